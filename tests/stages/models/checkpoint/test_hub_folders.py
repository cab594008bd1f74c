"""Folders as hubs and trainers lay them out are taken for what they are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from stages.models.checkpoint.hub_folders import located
from stages.models.checkpoint.layout import choose
from stages.models.checkpoint.loading import load_model, save_model
from stages.runtime.contract import StageError

REVISIONS = "a" * 40, "b" * 40


def cache(root, source, *, refs=True):
    """A repository as the hub's client keeps it: blobs by their digests, links to them in snapshots."""
    top = root / "models--org--name"
    (top / "blobs").mkdir(parents=True)
    for revision in REVISIONS:
        snapshot = top / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(source.iterdir())):
            blob = top / "blobs" / f"{number:040x}"
            shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    if refs:
        (top / "refs").mkdir()
        (top / "refs" / "main").write_text(REVISIONS[1])
    return top


def test_cache_of_the_hub_stands_for_the_snapshot_of_its_ref(tiny, tmp_path):
    top = cache(tmp_path, tiny)
    assert located(top) == top / "snapshots" / REVISIONS[1]
    assert choose(top).digest() == choose(tiny).digest()


def test_cache_that_names_no_snapshot_is_refused_unless_it_holds_one(tiny, tmp_path):
    top = cache(tmp_path, tiny, refs=False)
    with pytest.raises(StageError, match=f"does not say which.*Give one of them: .*{REVISIONS[0]}"):
        choose(top)
    shutil.rmtree(top / "snapshots" / REVISIONS[0])
    assert choose(top).digest() == choose(tiny).digest()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_link_that_leads_nowhere_is_refused_by_name(tiny, tmp_path, name):
    top = cache(tmp_path, tiny)
    link = top / "snapshots" / REVISIONS[1] / name
    link.resolve().unlink()
    with pytest.raises(StageError, match=rf"{REVISIONS[1]}/{name} is a link to a file that is not there.*cp -rL"):
        choose(top)


@pytest.fixture
def sentences(tiny, tmp_path):
    """A folder of sentence-transformers: the model itself, a pooling, a map with weights of its own."""
    folder = shutil.copytree(tiny, tmp_path / "sentences")
    modules = [{"idx": i, "path": path, "type": "x"} for i, path in enumerate(["", "1_Pooling", "2_Dense"])]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text("{}")
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"of": name}))
    save_file({"linear.weight": torch.ones(2, 64)}, folder / "2_Dense" / "model.safetensors")
    return folder


ADDED = {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json",
         "2_Dense/model.safetensors"}  # fmt: skip


def test_modules_of_sentence_transformers_travel_with_the_checkpoint(sentences, tmp_path):
    chosen = choose(sentences)
    assert chosen.files.keys() > ADDED and chosen.weights.keys() == {"model.safetensors"}
    before = chosen.digest()
    save_model(load_model(sentences), tmp_path / "out", like=sentences)
    assert all((tmp_path / "out" / name).read_bytes() == (sentences / name).read_bytes() for name in ADDED)
    (sentences / "1_Pooling" / "config.json").write_text("{}")
    assert choose(sentences).digest() != before


def test_modules_that_are_pickles_or_lie_outside_are_not_taken(sentences):
    (sentences / "modules.json").write_text(json.dumps([{"path": "../outside"}, {"path": "/etc"}, {"path": ".."}]))
    (sentences.parent / "config.json").write_text("{}")
    assert not any("/" in name for name in choose(sentences).files)
    (sentences / "modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    (sentences / "2_Dense" / "model.safetensors").rename(sentences / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(StageError, match=r"2_Dense/pytorch_model\.bin is a pickle"):
        choose(sentences)
    (sentences / "modules.json").write_text('{"path": 1}')
    with pytest.raises(StageError, match=r"modules\.json is not a list of modules"):
        choose(sentences)
