"""Maps as thin products in every family: what was asked is gone, and what is written answers as it did."""

import pytest
import torch

from stages.factorize import FactorizeParams
from stages.factorize import admit as factorize_admitted
from stages.models.anatomy.blocks import block_parameters, blocks
from stages.models.checkpoint.loading import load_model, outlined, save_model
from stages.models.checkpoint.subject import Subject
from stages.models.layers.low_rank_linear import SharedLinear
from stages.models.low_rank.planning import dense
from stages.models.low_rank.products import Asked, compressed
from stages.models.low_rank.projections import named
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.share import ShareParams
from stages.share import admit as share_admitted
from tests.stages.models.families import FAMILIES, WIDER, answers, family

PLAIN = {"q", "k", "v", "o", "up", "down"}
ROLES = {
    "phi3": {"qkv", "o", "gate_up", "down"},
    "gpt2": {"qkv", "o", "up", "down"},
    "neox": {"qkv", "o", "up", "down"},
    "mamba": {"o"},
    "albert": PLAIN,
    "bart": PLAIN | {f"cross_{role}" for role in "qkvo"},
}
IDS = 3 + torch.arange(24).view(2, 12) * 7 % 90


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", FAMILIES | WIDER)
def test_family_in_thin_products_is_written_as_it_answers(name, root, tmp_path):
    model = load_model(family(name, root))
    before, names = block_parameters(model), dense(model)
    kinds = ShareParams().projections if len(name) % 2 and name != "mamba" else None
    done = compressed(model, IDS.clone(), Asked(0.93, kinds, 2 if kinds else 1), tmp_path / "state", Silent())
    thin = {row["layer"] for row in done.rows}
    assert thin == {path for path in names if isinstance(model.get_submodule(path), SharedLinear)}
    written = save_model(model, tmp_path / "out", like=family(name, root))
    assert block_parameters(written) <= 0.93 * before
    torch.testing.assert_close(answers(load_model(tmp_path / "out")), answers(model), rtol=1e-4, atol=1e-5)


def known(name, root):
    folder = family(name, root)
    return {"model": Subject(folder, outlined(folder, [folder / "model.safetensors"])[0], "generate"), "text": None}


@pytest.mark.parametrize("name", ["phi3", "gpt2", "bart", "albert", "mamba", "mixtral", "neox"])
def test_admission_says_what_the_work_would(name, root, tmp_path):
    model, admitted = load_model(family(name, root)), known(name, root)
    if name == "mixtral":
        for ask in (lambda: dense(model), lambda: factorize_admitted(FactorizeParams(), admitted)):
            with pytest.raises(StageError, match="holds experts"):
                ask()
        return
    assert factorize_admitted(FactorizeParams(layers=(dense(model)[0],)), admitted).loose
    assert share_admitted(ShareParams(), admitted).loose
    assert {role for block in blocks(model) for role in named(block)} == ROLES[name]
    share_admitted(ShareParams(projections=tuple(ROLES[name])), admitted)
    with pytest.raises(StageError, match=r"no map for 'gate' in any block.*measured .*o"):
        share_admitted(ShareParams(projections=("o", "gate+up")), admitted)
    if name == "albert":
        with pytest.raises(StageError, match="no neighbouring blocks"):
            share_admitted(ShareParams(method="recursive"), admitted)
    else:
        assert share_admitted(ShareParams(method="recursive"), admitted).loose
