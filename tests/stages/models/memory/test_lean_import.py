import subprocess
import sys

from stages.models.memory.lean_import import UNUSED

ASKED = f"""
import sys
from stages.models.memory.lean_import import import_transformers
import_transformers()
import stages.models.checkpoint.loading, stages.models.blockwise.compress, transformers.generation
print([name for name in (*{UNUSED}, "torch._dynamo", "torch.distributed.tensor", "sympy") if name in sys.modules])
import scipy.special, sklearn, torch
print(scipy.special.expit(0.0))
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item(), torch.distributed.is_available())
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
given = torch.arange(8)[None]
traced = torch.export.export(model, (given,), {{"use_cache": False}}, strict=False).module()
print(torch.equal(traced(given, use_cache=False).logits, model(given, use_cache=False).logits))
stub = [name for name, module in list(sys.modules.items()) for value in list(vars(module).values())
        if type(value).__name__ == "_Unmarking"]
print(stub)
"""


def test_transformers_is_imported_without_what_no_stage_uses_which_can_still_be_imported():
    told = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["[]", "0.5", "2.0 True", "True", "[]"]
