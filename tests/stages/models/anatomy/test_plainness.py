import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BartConfig, BartForSequenceClassification

from stages.models.anatomy.plainness import ask, factor, plain, token_tables, uncalled
from stages.models.checkpoint.loading import load_model
from tests.stages.models.families import FAMILIES, WIDER, answers, family


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 5.5


class Added(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 0.01


class Rowwise(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * (1 + (ids == 0).float()[..., None])


class Offset(nn.Embedding):
    def forward(self, ids):
        return super().forward((ids + 2).clamp_max(self.num_embeddings - 1))


class Masked(nn.Embedding):
    def forward(self, mask, past):
        return super().forward(mask + past)


TABLES = {
    "plain": (nn.Embedding, 1.0),
    "scaled": (Scaled, 5.5),
    "added": (Added, None),
    "of one row": (Rowwise, None),
    "of other rows": (Offset, None),
    "asks for more": (Masked, None),
}


@pytest.mark.parametrize("case", TABLES)
def test_factor_is_what_every_row_is_multiplied_by_or_none(case):
    torch.manual_seed(0)
    made, wanted = TABLES[case]
    found = factor(made(300, 16))
    assert found == wanted if wanted in (None, 1.0) else found == pytest.approx(wanted, rel=1e-6)


def test_table_that_bounds_its_rows_is_not_plain():
    torch.manual_seed(0)
    assert factor(nn.Embedding(50, 16, max_norm=1.0)) is None


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-10, 10)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Normed(nn.Linear):
    def forward(self, x):
        return functional.linear(x, functional.normalize(self.weight), self.bias)


class Same(nn.Linear):
    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight.t())


@pytest.mark.parametrize(
    ("made", "wanted"), [(nn.Linear, True), (Same, True), (Clipped, False), (Twice, False), (Normed, False)]
)
def test_map_is_plain_by_what_it_gives(made, wanted):
    torch.manual_seed(0)
    assert plain(made(24, 8)) == wanted


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", FAMILIES | WIDER)
def test_maps_that_a_family_reads_without_a_call_change_its_answer_and_no_call_tells(name, root):
    model = load_model(family(name, root))
    assert all(torch.isfinite(one).all() for one in ask(model).values())
    silent = uncalled(model)
    assert {path.rpartition(".")[2] for path in silent} == ({"dt_proj"} if name == "mamba" else set())
    before = answers(model)
    for path in silent:
        with torch.no_grad():
            model.get_submodule(path).weight.mul_(2)
    assert torch.equal(before, answers(model)) == (not silent)


@pytest.mark.parametrize("name", ["bart", "mbart", "t5", "marian"])
def test_tables_of_tokens_are_those_that_the_stacks_read(name, root):
    model = load_model(family(name, root))
    read = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda *_, path=path: read.add(path))
    ask(model)
    assert {path for path in read if "position" not in path and "relative" not in path} <= token_tables(model).keys()


@pytest.mark.parametrize("end", [3, 4, 5, 7])
def test_probe_ends_a_text_once_whatever_the_token_is_that_ends_it(end):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 31}
    config = BartConfig(**sizes, **heads, eos_token_id=end, bos_token_id=0, pad_token_id=1, decoder_start_token_id=2)
    answers = ask(BartForSequenceClassification(config).eval())  # it refuses rows of which one ends more often
    assert answers["logits"].shape == (2, config.num_labels)
