"""What a recipe may say of quantize. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.runtime.contract import Params

Scheme = Literal[
    "int8_w8a8", "int8_weight_only", "fp8_e4m3", "int4_weight_only", "nvfp4", "mxfp4", "auto", "fp16", "bf16"
]
SIXTEEN_BITS = ("fp16", "bf16")


class QuantizeParams(Params):
    """How weights and activations are rounded.

    Attributes:
        scheme: INT8 or FP8 weights and activations, with static ranges; weights alone as INT8 rows, INT4 blocks, or
            four-bit floats in NVFP4 or MXFP4 blocks; or `auto`: INT4 blocks where they lose least, INT8 rows elsewhere;
            or every number of the checkpoint in 16 bits, which transformers and any engine load as they are.
        smoothing: int8_w8a8: strength of moving outliers from activations into weights, 0 to 1; None searches it for
            each layer.
        block: INT4: inputs that share a scale.
        bits: auto: most bits a weight of the blocks on average, scales counted.
        loss: auto: instead of `bits`, the largest predicted loss in nats a token, at the least size.
        embedding: INT8 rows for the token table and the head, or left as they are; fp16 and bf16 cast them, too.
        observer: int8_w8a8: how the range of inputs is chosen: `search` for the least error of the outputs, or
            `minmax`, `percentile`, `mse`, `entropy` of the inputs.
        keep: int8_w8a8, fp8_e4m3: largest share of the blocks' weights whose inputs stay float, where that saves most.
        layers: paths of the maps that are quantized, with `*` for anything; every map of the blocks by default.
        skip: paths of maps that stay float: `*.down_proj`.
        windows: calibration windows; None takes 8, or 32 where inputs are rounded: all set the ranges then, and a
            quarter of them fits the maps. More lose less and take longer.
        window_tokens: their length.
        kv_cache: keys and values in eight bits as they are cached, with static scales of each layer.
        search: `auto` fits each map to the dense model's outputs, by columns, and searches scales, ranges and
            smoothing; `off` rounds to nearest with the plain ranges of the format's definition.
        rotation: mixes the values between v and o by a Hadamard matrix (`heads`), the residual stream, too (`stream`; a
            tied table becomes two), or the heads of the blocks where rounding then loses less on the text (`auto`), so
            that no channel stands out. It folds into the weights: before rounding the model gives the same. None
            rotates heads where inputs are rounded, the search is on and no tied tensor is in the way.
        layout: how the checkpoint is laid out: our own way, or as vLLM and transformers load it, which holds no
            quantized table and no shared, factorized or unevenly pruned layers; vLLM wants q, k and v in one form, and
            gate and up, which `auto` does not promise.
    """

    scheme: Scheme = "int8_w8a8"
    smoothing: float | None = Field(default=None, ge=0, le=1)
    block: int = Field(default=64, ge=2)
    bits: float | None = Field(default=None, gt=0)
    loss: float | None = Field(default=None, ge=0)
    embedding: Literal["int8", "keep"] = "int8"
    keep: float = Field(default=0.07, ge=0, le=0.5)
    observer: Literal["search", "minmax", "percentile", "mse", "entropy"] = "search"
    layers: tuple[str, ...] = Field(default=("*",), min_length=1)
    skip: tuple[str, ...] = ()
    windows: int | None = Field(default=None, ge=1)
    window_tokens: int = Field(default=512, ge=8)
    kv_cache: Literal["keep", "int8", "fp8_e4m3"] = "keep"
    search: Literal["auto", "off"] = "auto"
    rotation: Literal["off", "heads", "stream", "auto"] | None = None
    layout: Literal["enginery", "compressed-tensors"] = "enginery"

    @model_validator(mode="after")
    def _one_limit(self) -> QuantizeParams:
        given = [name for name in ("bits", "loss") if getattr(self, name) is not None]
        if self.scheme == "auto" and len(given) != 1:
            raise ValueError("scheme auto needs one of `bits` and `loss`")
        if self.scheme != "auto" and given:
            raise ValueError(f"`{given[0]}` belongs to scheme auto")
        if self.layout == "compressed-tensors" and self.scheme in SIXTEEN_BITS:
            raise ValueError(f"layout compressed-tensors holds no {self.scheme}: engines load it as it is")
        if self.rotation not in (None, "off") and self.scheme in SIXTEEN_BITS:
            raise ValueError(f"`rotation` spreads what few bits lose; {self.scheme} has no use for it")
        if self.observer not in ("search", "minmax") and self.search == "off":
            raise ValueError(f"`search: off` takes the largest input; `observer: {self.observer}` goes with `auto`")
        if self.layout == "compressed-tensors" and self.embedding == "int8":
            raise ValueError("layout compressed-tensors holds no INT8 table: set `embedding: keep`")
        return self


def block_of(params: QuantizeParams) -> int | None:
    """How many inputs of a map share a scale, None where a row has one."""
    blocks = {"int4_weight_only": params.block, "auto": params.block, "nvfp4": 16, "mxfp4": 32}
    return blocks.get(params.scheme)
