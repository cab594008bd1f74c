import pytest
import torch

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model
from stages.quantize.movable_scales import fold, sites
from tests.stages.models.grouped import grouped


@pytest.fixture(params=["dense", "grouped"])
def model(request, tiny, tmp_path):
    return load_model(tiny if request.param == "dense" else grouped(tiny, tmp_path / "grouped"))


def random_factors(site):
    count = int(site.index_I.max()) + 1
    return torch.empty(count).uniform_(0.1, 10.0)


def test_folding_every_site_leaves_the_function_as_it_was(model):
    torch.manual_seed(0)
    ids = torch.randint(0, 768, (2, 32))
    with torch.no_grad():
        before = model(ids).logits
        weights = [reader.weight.clone() for site in sites(model) for reader in site.readers.values()]
        for site in sites(model):
            fold(site, random_factors(site))
        after = model(ids).logits
        changed = [reader.weight for site in sites(model) for reader in site.readers.values()]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)
    assert all(not torch.equal(a, b) for a, b in zip(weights, changed, strict=True))


def test_sites_cover_every_weight_of_the_blocks_once(model):
    read = [id(reader.weight) for site in sites(model) for reader in site.readers.values()]
    linears = {
        id(module.weight)
        for block in anatomy.blocks(model)
        for module in block.module.modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(read) == len(set(read))
    assert set(read) == linears


def test_sites_of_grouped_query_attention_share_a_factor_among_query_heads(tiny):
    model = load_model(tiny)
    (site,) = [site for site in sites(model) if site.name.endswith("layers.0.self_attn.o_proj")]
    # 4 query heads of 16 channels on 2 value heads: heads 0 and 1 read value head 0, heads 2 and 3 value head 1.
    expected = [16 * (head // 2) + channel for head in range(4) for channel in range(16)]
    assert site.index_I.tolist() == expected


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_cannot_be_divided_by_are_refused(tiny, bad):
    site = sites(load_model(tiny))[0]
    factors = torch.ones(64)
    factors[3] = bad
    with pytest.raises(ValueError, match="positive and finite"):
        fold(site, factors)
