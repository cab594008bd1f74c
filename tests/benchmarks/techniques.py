"""What `make bench` runs, by the name that `ONLY=` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

BUDGET = "2.83 min at 400/s"
"""Of one `recover`: about 170 seconds of two cores. A run tells its own rate: see `--budget`."""
CONTROLS = ("fold_norms", "fine_tune", "uniform_svd")
"""Stages that stand in `tests.benchmarks.controls`: what ours are compared with, not part of the product."""


@dataclass(frozen=True)
class Technique:
    """One row of the table.

    Attributes:
        name: what the row is called.
        stage: of the product, or one of CONTROLS.
        params: the stage's.
        inputs: role -> dense, text, other, or the name of another technique whose checkpoint it reads.
        about: what a reader must know of the row.
        scored: False where the checkpoint is only another row's input.
        as_long_as: the technique whose seconds become this one's param `seconds`.
    """

    name: str
    stage: str
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=lambda: {"model": "dense", "text": "text"})
    about: str = ""
    scored: bool = True
    as_long_as: str = ""


def quantized(name: str, scheme: str, about: str = "", *, model: str = "dense", **params: Any) -> Technique:
    """A row of `quantize`. Table and head stay as they are, as peers leave them."""
    asked = {"scheme": scheme, "embedding": "keep", **params}
    return Technique(name, "quantize", asked, {"model": model, "text": "text"}, about)


def recovered(name: str, model: str, about: str, **params: Any) -> Technique:
    """A row of `recover` of another row's checkpoint."""
    inputs = {"model": model, "teacher": "dense", "text": "text", "other": "other"}
    return Technique(
        name, "recover", {"tokens": BUDGET, "learning_rate": 3e-4, "written_windows": 64, **params}, inputs, about
    )


TECHNIQUES = (
    quantized("int8", "int8_weight_only"),
    quantized("w8a8", "int8_w8a8", "static, symmetric, SmoothQuant searched"),
    quantized("fp8", "fp8_e4m3", "static"),
    quantized("int4", "int4_weight_only", "symmetric, block 64", block=64),
    Technique("folded-norms", "fold_norms", inputs={"model": "dense"}, scored=False),
    quantized("int4-folded", "int4_weight_only", "of the copy with folded norms", model="folded-norms", block=64),
    quantized("nvfp4", "nvfp4"),
    quantized("mxfp4", "mxfp4"),
    quantized("auto5", "auto", "INT4 and INT8 mixed at 5.0 bits", bits=5.0, block=64),
    quantized("int4-rotated", "int4_weight_only", "heads rotated first", block=64, rotation="heads"),
    quantized("w8a8-unrotated", "int8_w8a8", "heads as they are", rotation="off"),
    quantized("kv-int8", "bf16", "keys and values in INT8", kv_cache="int8"),
    quantized("kv-fp8", "bf16", "keys and values in FP8", kv_cache="fp8_e4m3"),
    Technique("2:4-sparsegpt", "prune", {"method": "sparsegpt", "pattern": "2:4"}),
    Technique("2:4-wanda", "prune", {"method": "wanda", "pattern": "2:4"}),
    Technique("2:4-magnitude", "prune", {"method": "magnitude", "pattern": "2:4"}),
    Technique("channels", "prune", {"method": "channels", "keep": 0.85}, about="a fifth of the feed-forward channels"),
    Technique("heads", "prune", {"method": "heads", "keep": 0.95}),
    Technique("width", "prune", {"method": "width", "keep": 0.9}, about="a tenth of the residual stream"),
    Technique("blocks", "prune", {"method": "blocks", "keep": 0.8}, about="a fifth of the blocks, rounded up"),
    Technique("factorize", "factorize", {"keep": 0.8}),
    Technique("factorize-sparse", "factorize", {"keep": 0.8, "sparse": 0.5}, about="half of it in single weights"),
    Technique("basis", "share", {"method": "basis", "keep": 0.8}),
    Technique("recursive", "share", {"method": "recursive", "keep": 0.8}),
    Technique("svd-uniform", "uniform_svd", {"keep": 0.8}, about="control: whitened SVD, one rank a shape"),
    recovered("recover", "blocks", "after `blocks`; half teacher, half text", kl_weight=0.5),
    recovered("recover-2:4", "2:4-sparsegpt", "after `2:4-sparsegpt`; zeros stay", update="sparse"),
    Technique("tuned-dense", "fine_tune", about="control: plain fine-tuning of the dense model", as_long_as="recover"),
    Technique(
        "soup", "fuse", {"method": "soup"}, {"models.0": "blocks", "models.1": "recover"}, "of `blocks` and `recover`"
    ),
    Technique(
        "slerp", "fuse", {"method": "slerp"}, {"models.0": "blocks", "models.1": "recover"}, "of `blocks` and `recover`"
    ),
)

KEEP, KEEP_BLOCKS = 0.95, 0.97
"""Of the blocks' parameters, where abilities are counted: five of a hundred go, or one block of up to 33."""


def _cut(name: str, stage: str, about: str = "5 % of the blocks", **params: Any) -> tuple[Technique, ...]:
    return (Technique(name, stage, {"keep": KEEP, **params}, about=about),)


_UNEVEN = {"widths": "uneven", "about": "5 % of the blocks, of each as many as cost least"}
CUTS: Mapping[str, tuple[Technique, ...]] = {
    "channels": _cut("channels", "prune", method="channels")
    + _cut("channels-uneven", "prune", method="channels", **_UNEVEN),
    "heads": _cut("heads", "prune", method="heads") + _cut("heads-uneven", "prune", method="heads", **_UNEVEN),
    "width": _cut("width", "prune", method="width")
    + _cut("auto", "prune", "5 % of the blocks: channels, heads and ranks", method="auto"),
    "blocks": _cut("blocks", "prune", "one block", method="blocks", keep=KEEP_BLOCKS),
    "factorize": _cut("factorize", "factorize"),
    "factorize-sparse": _cut("factorize-sparse", "factorize", "5 %, half of it in single weights", sparse=0.5),
    "basis": _cut("basis", "share", method="basis"),
    "recursive": _cut("recursive", "share", method="recursive"),
    "svd-uniform": _cut("svd-uniform", "uniform_svd", "control: whitened SVD, one rank a shape, 5 %; stored dense"),
}
"""In place of the techniques of this name, which take so much that no ability is left to compare."""
GENTLE = tuple(row for one in TECHNIQUES if not one.as_long_as for row in CUTS.get(one.name, (one,)))
"""The techniques whose abilities are counted."""


def chosen(only: Iterable[str], among: Iterable[Technique]) -> tuple[Technique, ...]:
    """The techniques that `only` names and those whose checkpoints they read, in the table's order; all for none.

    Raises:
        KeyError: no technique is called so.
    """
    table = {one.name: one for one in among}
    wanted: set[str] = set()
    waiting = list(only) or list(table)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            needed = (*table[name].inputs.values(), table[name].as_long_as)
            waiting += [source for source in needed if source in table]
    return tuple(one for name, one in table.items() if name in wanted)
