"""Channels and heads of a text of several sources: the source that is hurt most decides, however little it is."""

import json

import pytest
import torch

from stages.algorithms.channels import output_error, reconstructed
from stages.models.anatomy.blocks import block_parameters
from stages.models.checkpoint.loading import load_model, load_tokenizer
from stages.models.text.windows import sliced_windows
from stages.prune.channels_heads import narrow
from stages.prune.params import PruneParams
from stages.prune.stage import prune
from stages.prune.target import Asked
from stages.prune.units import CHANNELS
from stages.runtime.fingerprint import digest_file
from stages.runtime.progress import Silent
from tests.tiny import reference_text

HOW = {"method": "channels", "keep": 0.62, "windows": 64, "window_tokens": 64}
UNEVEN = {"widths": "uneven", "keep": 0.5}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Nine tenths of prose, and a tenth that reads it from behind in upper case."""
    folder = tmp_path_factory.mktemp("mix")
    parts = reference_text().split("\n\n")
    rows = [{"source": "prose", "text": one} for one in parts[:300]]
    rows += [{"source": "odd", "text": one[::-1].upper()} for one in parts[600:660]]
    lines = [json.dumps({"id": f"calibrate-{n}"} | row) + "\n" for n, row in enumerate(rows)]
    (folder / "calibrate.jsonl").write_text("".join(lines))
    (folder / "corpus.json").write_text(json.dumps({"sources": {"prose": {"share": 0.9}, "odd": {"share": 0.1}}}))
    return folder


def pruned(model, text, output, **how):
    prune(PruneParams(**HOW | how), {"model": model, "text": text}, output, Silent())
    return output


def sealed(folder):
    return {p.name: digest_file(p) for p in sorted(folder.iterdir()) if p.is_file()}


def windows(tiny, text):
    return sliced_windows(text, "calibrate", load_tokenizer(tiny), 64, most=64)


def narrowed(tiny, found, sources, partial):
    """Fewer channels, of one choice; the windows are the same."""
    model = load_model(tiny)
    limit = int(HOW["keep"] * block_parameters(model))
    narrow(model, found.ids_NT, CHANNELS, Asked(limit, 8, "loss", partial, sources=sources), Silent())
    return model


def damage(tiny, found, cut):
    """Block -> source -> error of what the feed-forward gives with the channels that stayed, fitted on all of the text.

    By the dense model's own inputs: which channels stayed is read off the rows of `up` that are there.
    """
    dense = load_model(tiny)
    reads: dict[int, torch.Tensor] = {}
    for n, layer in enumerate(dense.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args, n=n: reads.update({n: args[0]}))
    with torch.no_grad():
        dense(input_ids=found.ids_NT)
    damages = []
    for n, (old, new) in enumerate(zip(dense.model.layers, cut.model.layers, strict=True)):
        rows = {tuple(row.tolist()): j for j, row in enumerate(old.mlp.up_proj.weight)}
        kept = torch.tensor([rows[tuple(row.tolist())] for row in new.mlp.up_proj.weight])
        w, each = old.mlp.down_proj.weight.detach().double(), {}
        for source in ("prose", "odd", ""):
            own = reads[n][[not source or one == source for one in found.names]].flatten(0, 1).double()
            each[source] = own.T @ own / len(own)
        fitted = reconstructed(w, each[""], kept)
        damages.append({source: output_error(w, each[source], kept, fitted) for source in ("prose", "odd")})
    return damages


def test_a_tenth_of_the_text_is_hurt_less_where_it_has_a_name(tiny, text, tmp_path):
    found = windows(tiny, text)
    ours = damage(tiny, found, narrowed(tiny, found, found.sources, tmp_path / "named"))
    whole = damage(tiny, found, narrowed(tiny, found, (), tmp_path / "unnamed"))
    ratios = [a["odd"] / b["odd"] for a, b in zip(ours, whole, strict=True)]
    assert sum(ratios) / len(ratios) < 0.96
    hurt = [(a, b) for a, b in zip(ours, whole, strict=True) if b["odd"] > b["prose"]]
    assert len(hurt) >= 2  # blocks in which the tenth was hurt most
    assert all(max(a.values()) < max(b.values()) for a, b in hurt)


@pytest.mark.parametrize("how", [{}, UNEVEN, {"method": "heads", "keep": 0.9}, {"method": "auto", "keep": 0.6}])
def test_text_of_one_named_source_is_text_without_a_name_to_the_bit(tiny, tmp_path, how):
    plain, named = tmp_path / "plain", tmp_path / "named"
    for folder, more in ((plain, {}), (named, {"source": "prose"})):
        folder.mkdir()
        rows = [{"id": str(n), "text": one} | more for n, one in enumerate(reference_text().split("\n\n")[:200])]
        (folder / "calibrate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (named / "corpus.json").write_text(json.dumps({"sources": {"prose": {"share": 1.0}}}))
    few = how | {"windows": 12}
    outputs = [pruned(tiny, one, tmp_path / place, **few) for one, place in ((plain, "a"), (named, "b"))]
    assert sealed(outputs[0]) == sealed(outputs[1])


@pytest.mark.parametrize(
    "how", [UNEVEN, {"method": "heads", "keep": 0.9}, {"method": "auto", "keep": 0.6}, {"method": "heads"} | UNEVEN]
)
def test_every_way_takes_what_was_asked_from_a_mix(tiny, text, tmp_path, how):
    keep = max(how["keep"], 0.9) if how.get("method") == "heads" else how["keep"]
    output = pruned(tiny, text, tmp_path / "out", **how | {"keep": keep})
    before, after = (block_parameters(load_model(one)) for one in (tiny, output))
    assert 0.95 * keep * before < after <= keep * before
