"""Models of each task that overflow on one word: nothing is made of what they answer to an item that has it."""

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from stages.measures.items import Item
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import StageError
from tests.stages.validate.test_questions import asked
from tests.stages.validate.words import model

OVERFLOWS = 3e38
ITEMS = {
    "bert_classes": {"task": "classify", "answers": ("0",)},
    "bert_tokens": {"task": "tag", "labels": ("0", "0", "0")},
    "bert_answers": {"task": "question", "context": "the big dog was in rome", "answers": ("dog",)},
    "bert_choices": {"task": "choices", "choices": (" a cat", " the mat")},
    "t5": {"task": "translate", "answers": ("the cat sat",)},
    "llama": {"task": "answers", "answers": ("cat",)},
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", ITEMS)
def test_answer_that_is_not_finite_is_refused(name, beside, tmp_path):
    dense = model(name, tmp_path)
    made = load_model(dense)
    with torch.no_grad():
        made.get_input_embeddings().weight[AutoTokenizer.from_pretrained(dense).convert_tokens_to_ids("rome")] = (
            OVERFLOWS
        )
    broken = shutil.copytree(dense, tmp_path / "broken")
    made.save_pretrained(broken)
    item = Item(id="overflows", ability="x", prompt="who was rome", **ITEMS[name])
    if AutoConfig.from_pretrained(dense).is_encoder_decoder and not beside:
        assert asked(tmp_path, broken, [item])["measures"]["chrf"] < 20  # it writes what it can
        return
    with pytest.raises(StageError, match="logits that are no distribution"):
        asked(tmp_path, broken, [item], **({"baseline": dense} if beside else {}))
