"""A table or a map that does more than its weight says keeps doing it, in every family."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.models.anatomy.plainness import factor, token_tables
from stages.models.checkpoint.loading import load_model
from stages.models.layers.quantized_linear import QuantizedEmbedding, quantized_modules
from stages.quantize.params import QuantizeParams
from stages.quantize.stage import quantize
from stages.runtime.progress import Silent
from tests.stages.models.families import FAMILIES, WIDER, answers, family

SCALED = {"gemma", "gemma2", "gemma3", "xglm", "biogpt", "mbart"}


class Told(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", FAMILIES | WIDER)
def test_family_in_eight_bits_answers_as_the_dense_one_with_rounded_weights(name, root, tmp_path):
    told, folder = Told(), family(name, root)
    quantize(QuantizeParams(scheme="int8_weight_only"), {"model": folder}, tmp_path / "out", told)
    dense, ours = load_model(folder), load_model(tmp_path / "out")
    exact = answers(dense)
    factors = {path: factor(table) for path, table in token_tables(dense).items()}
    assert (name in SCALED) == any(one != 1 for one in factors.values()), factors
    few = quantized_modules(ours)
    tables = {path: one.factor for path, one in few.items() if isinstance(one, QuantizedEmbedding)}
    assert tables == pytest.approx({path: factors[path] for path in tables}) and tables
    with torch.no_grad():
        for path, one in few.items():  # what each map and table stands for, in the model's own modules
            values = (
                one.weight.float() * one.weight_scale[:, None]
                if isinstance(one, QuantizedEmbedding)
                else one.dequantized()
            )
            dense.get_submodule(path).weight.copy_(values)
    assert torch.allclose(answers(ours), answers(dense), rtol=1e-4, atol=1e-4 * exact.abs().max())
    assert 0 < (answers(ours) - exact).norm() < 0.05 * exact.norm()
    assert any("not called as maps" in note for note in told.notes) == (name == "mamba")


def test_rows_too_short_to_gain_are_rounded_all_the_same_and_that_is_said(tmp_path):
    config = LlamaConfig(
        hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=2, vocab_size=17
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "given")
    told = Told()
    found = quantize(QuantizeParams(scheme="int8_weight_only"), {"model": tmp_path / "given"}, tmp_path / "out", told)
    assert found["size_bytes"] > found["size_bytes_before"] and found["integer_matrices"] == 9
    assert any("did not shrink" in note for note in told.notes)
