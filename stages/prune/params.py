"""What a recipe may say of prune. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.runtime.contract import Params

WEIGHTS = ("magnitude", "wanda", "sparsegpt", "gradient")


class PruneParams(Params):
    """What goes.

    Attributes:
        method: `auto` spends one budget over channels, heads and ranks of maps of all blocks, where each costs least on
            the text; `channels` narrows every block's feed-forward part to one width, `heads` takes key-value groups of
            attention heads out of every block, `width` takes dimensions out of the residual stream that passes
            through all of them, `blocks` takes whole blocks out; `magnitude`, `wanda`, `gradient` and `sparsegpt` put
            zeros into the blocks' maps, the last one mending the other weights. Of a text of several sources, channels,
            heads and blocks are judged by the source that they cost most.
        keep: largest share of the blocks' parameters that stays; of zeros: of the maps' weights that are not zero.
        pattern: zeros: so many of so many neighbours stay in every row, whatever `keep` says; without one each map has
            as many zeros as the measured loss allows.
        by: blocks: chosen by the measured loss without them, or by how little they change what passes through; an
            encoder's always by the latter.
        widths: channels, heads: the same share of every block's, so that the configuration can say it; or of each block
            as many as cost least, measured on the text: `structure.json` says so, which plain transformers does not
            read.
        multiple: channels, width: what is left is a multiple of this; a recipe that says nothing of it has multiples of
            the blocks in which a later `quantize` rounds.
        layers: zeros: paths of the maps that get them, with `*` for anything; every map of the blocks by default.
        skip: zeros: paths of maps that get none; `keep` is the share of the others.
        windows: calibration windows.
        window_tokens: their length.
    """

    method: Literal["auto", "channels", "heads", "width", "blocks", "magnitude", "wanda", "gradient", "sparsegpt"] = (
        "channels"
    )
    keep: float = Field(default=0.95, gt=0, lt=1)
    pattern: Literal["2:4", "4:8"] | None = None
    by: Literal["loss", "influence"] = "loss"
    widths: Literal["even", "uneven"] = "even"
    multiple: int = Field(default=8, ge=1)
    layers: tuple[str, ...] = Field(default=("*",), min_length=1)
    skip: tuple[str, ...] = ()
    windows: int = Field(default=32, ge=1)
    window_tokens: int = Field(default=512, ge=8)

    @model_validator(mode="after")
    def _pattern_of_zeros(self) -> PruneParams:
        if self.pattern and self.method not in WEIGHTS:
            raise ValueError(f"{self.method} leaves no pattern of zeros; `pattern` goes with {', '.join(WEIGHTS)}")
        if self.widths == "uneven" and self.method not in ("channels", "heads"):
            raise ValueError(f"{self.method} has no widths that could be uneven; they go with channels, heads")
        if (self.skip or self.layers != ("*",)) and self.method not in WEIGHTS:
            raise ValueError(
                f"{self.method} takes from all blocks alike; `layers` and `skip` go with {', '.join(WEIGHTS)}"
            )
        return self
