"""Models that continue no text, broken in one way each, judged by the gates that `init` writes for a text alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli import main
from flows.recipe.read import load_recipe
from stages.models.checkpoint.loading import load_model
from stages.runtime.progress import Silent
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests import taught
from tests.conftest import cached_models
from tests.flows.judging.test_broken_models import corpus, judged
from tests.stages.validate.words import WORDS, model

WINDOWS, TOKENS = 12, 48
LOUD = 20.0

Edit = Callable[[Any], None]


def always(label: int, made: Any) -> None:
    """One class of all, whatever is read."""
    made.classifier.weight.zero_()
    made.classifier.bias.zero_()
    made.classifier.bias[label] = LOUD


def scaled(by: float, path: str, made: Any) -> None:
    module = made.get_submodule(path) if path else last_norm(made)
    module.weight.mul_(by)
    module.bias.mul_(by)


def last_norm(made: Any) -> Any:
    return made.encoder.layer[-1].output.LayerNorm


def one_vector(made: Any) -> None:
    """The mean of what it says of some texts, for all of them."""
    ids = torch.randint(5, 20, (32, TOKENS), generator=torch.Generator().manual_seed(0))
    last = last_norm(made)
    mean = made(input_ids=ids).last_hidden_state.mean((0, 1))
    last.weight.zero_()
    last.bias.copy_(mean)


def confused(made: Any) -> None:
    """Says `hund` for `katt`, and `katt` for `hund`."""
    made.lm_head.weight[[27, 28]] = made.lm_head.weight[[28, 27]]


KINDS: dict[str, tuple[str, Edit, set[str]]] = {
    "a classifier that knows one class": ("bert_classes", partial(always, 1), {"kl_divergence", "relative_error"}),
    "a classifier ten times as sure": ("bert_classes", partial(scaled, 10.0, "classifier"), {"relative_error"}),
    "a tagger to which nothing is a name": ("tagger", partial(always, 0), {"kl_divergence"}),
    "a reader that is not sure": ("reader", partial(scaled, 0.05, "qa_outputs"), {"kl_divergence"}),
    "a translator that takes two words for each other": ("translator", confused, {"kl_divergence"}),
    "an encoder with one vector": ("embedder", one_vector, {"contrast"}),
    "an encoder of long vectors": ("embedder", partial(scaled, 7.0, ""), {"relative_error"}),
}


def embedder(folder: Path) -> Path:
    """An encoder whose vectors of all texts are near to each other, as those of many are."""
    made = shutil.copytree(model("bert_bare", folder), folder / "embedder")
    opened = load_model(made)
    with torch.no_grad():
        last_norm(opened).bias.copy_(torch.randn(opened.config.hidden_size).mul(2))
    opened.save_pretrained(made)
    (made / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return made


def dense_of(name: str, folder: Path) -> Path:
    if name == "embedder":
        return embedder(folder)
    return taught.taught(name, cached_models()) if name in ("tagger", "reader", "translator") else model(name, folder)


def texts_of(name: str) -> list[str]:
    if name == "tagger":  # few names, as in most prose
        return [("今天下雨了。他说天气很好。" * 5) + one for one, _ in taught.apart(taught.tagged)[2][:40]]
    if name == "translator":
        said = [asked for asked, _ in taught.apart(taught.sentence)[2]]
        return [" ".join(said[row : row + 8]) for row in range(0, len(said), 8)]
    if name == "reader":
        return [context for _, context, _ in taught.apart(taught.question)[2]]
    return [" ".join(WORDS[(3 * row + place * (1 + row % 5)) % len(WORDS)] for place in range(60)) for row in range(60)]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_model_fails_a_default_gate_and_dense_itself_none(kind, tmp_path):
    name, edit, gates = KINDS[kind]
    dense = dense_of(name, tmp_path)
    (tmp_path / "a.txt").write_text("words")
    assert main(["init", str(dense), str(tmp_path / "a.txt"), "-o", str(tmp_path / "mine.yaml")]) == 0
    recipe = load_recipe(tmp_path / "mine.yaml")
    passages = [{"id": str(number), "text": one} for number, one in enumerate(texts_of(name))]
    texts = {one: corpus(tmp_path / one, passages) for one in recipe.judge.corpora}

    def measured(folder: Path) -> dict[str, dict[str, Any]]:
        found = {}
        for one, text in texts.items():
            output = tmp_path / f"report-{one}-{folder.name}"
            output.mkdir()
            params = ValidateParams(windows=WINDOWS, window_tokens=TOKENS)
            VALIDATE.run(params, {"model": folder, "text": text, "baseline": dense}, output, Silent())
            found[one] = json.loads((output / "report.json").read_text())
        return found

    own = measured(dense)
    assert judged(recipe, own, own) == set()
    broken = shutil.copytree(dense, tmp_path / "broken")
    opened = load_model(dense)
    with torch.no_grad():
        edit(opened)
    opened.save_pretrained(broken)
    found = measured(broken)
    assert gates <= judged(recipe, own, found), {one: report["measures"] for one, report in found.items()}
