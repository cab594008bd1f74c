import pytest
import torch
from transformers import AutoTokenizer

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.low_rank import products
from stages.models.low_rank.kinds import TOGETHER
from stages.prune.automatic import automatic
from stages.prune.channels_heads import narrow
from stages.prune.target import Asked
from stages.prune.units import CHANNELS
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import answers, family
from tests.stages.prune.test_channels_heads import lost


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("automatic")


@pytest.mark.parametrize("keep", [0.95, 0.85])
def test_auto_loses_no_more_than_channels_or_ranks_alone(keep, tiny, reference, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = torch.tensor(tokenizer(reference)["input_ids"][: 40 * 64]).view(40, 64)
    dense = load_model(tiny)
    total, made = anatomy.block_parameters(dense), {name: load_model(tiny) for name in ("auto", "channels", "ranks")}
    limit, notes = int(keep * total), Notes()
    automatic(made["auto"], ids[:24], Asked(limit, 8, "loss", tmp_path / "auto"), notes)
    narrow(made["channels"], ids[:24], CHANNELS, Asked(limit, 8, "loss", tmp_path / "c", uneven=True), Silent())
    products.compressed(made["ranks"], ids[:24], products.Asked(keep, TOGETHER), tmp_path / "r", Silent())
    assert all(anatomy.block_parameters(one) <= limit for one in made.values())
    found = {name: lost(one, dense, ids[24:]) for name, one in made.items()}
    # Prices are of second order: what was least by them may be a little more than the least.
    assert found["auto"] <= 1.15 * min(found.values()) < max(found.values()), found
    assert "nats a token" in notes.notes[-1]
    (tmp_path / "out").mkdir()
    written = save_model(made["auto"], tmp_path / "out", like=tiny, progress=Silent())
    assert torch.allclose(written(input_ids=ids[:2]).logits, made["auto"](input_ids=ids[:2]).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert_masked", "t5", "falcon", "phi3", "bloom", "gemma2", "albert", "bart"])
def test_auto_takes_from_every_family_and_what_is_written_answers_as_in_memory(name, root, tmp_path):
    folder = family(name, root)
    model = load_model(folder)
    ids = torch.randint(5, 60, (6, 24), generator=torch.Generator().manual_seed(2))
    asked = Asked(int(0.9 * anatomy.block_parameters(model)), 2, "loss", tmp_path)
    assert automatic(model, ids, asked, Silent())
    assert anatomy.block_parameters(model) <= asked.limit
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "out", like=folder, progress=Silent())
    read = load_model(tmp_path / "out")
    assert anatomy.block_parameters(read) == anatomy.block_parameters(model)
    assert torch.allclose(answers(read), answers(model), atol=1e-5)


def test_auto_that_cannot_take_so_much_names_the_best(tiny, tmp_path):
    model = load_model(tiny)
    ids = torch.randint(0, 768, (4, 32), generator=torch.Generator().manual_seed(1))
    asked = Asked(int(0.02 * anatomy.block_parameters(model)), 8, "loss", tmp_path)
    with pytest.raises(StageError, match=r"channels, heads and ranks cannot remove so much; measured keep 0\.\d+ at"):
        automatic(model, ids, asked, Silent())
