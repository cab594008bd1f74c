"""Quantized layers: weights of few bits and their scales, computed the way an engine computes them.

In torch `forward` is fake quantization in float: what an engine gives that multiplies the dequantized values. Under
`torch.export` it writes QuantizeLinear and DequantizeLinear nodes instead; call `for_export` on the model first.

Shapes: O outputs, I inputs, B block length along I, V vocabulary, H hidden, ... any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx import ops

from stages.algorithms.grids import decode_e2m1, nearest_e4m3, power_of_two
from stages.algorithms.products import SHORT
from stages.algorithms.rounding import fake_round
from stages.models.anatomy import blocks as anatomy

_SHOWN = "shown_as_float"
"""Of a module: its maps whose weights look like float ones to it."""
ROWS = 1 << 14
"""Rows made float at once: a head has one for each token of the vocabulary."""
_ALL = slice(None)


def pack_int4(q_OI: Tensor) -> Tensor:
    """Two signed 4-bit values a byte along I, the first in the low nibble: int8 [O, I] -> uint8 [O, I/2]."""
    low, high = q_OI[:, 0::2] & 0x0F, q_OI[:, 1::2] & 0x0F
    return (low | (high << 4)).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: uint8 [O, I/2] -> int8 [O, I] in -8..7."""
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Form:
    """How a linear map's weights are stored.

    Attributes:
        name: as in `quantization.json`.
        bits: of a weight; two of four bits lie in a byte, the first in the low half.
        dtype: of the stored weights.
        scale: type of the scales.
        block: inputs that share a scale where the format fixes it.
        two_level: block scales are themselves multiples of one scale of the whole map.
    """

    name: str
    bits: int
    dtype: torch.dtype
    scale: torch.dtype
    block: int | None = None
    two_level: bool = False


FORMS = {
    form.name: form
    for form in (
        Form("int8", 8, torch.int8, torch.float32),
        Form("int4", 4, torch.uint8, torch.float16),
        Form("fp8_e4m3", 8, torch.float8_e4m3fn, torch.float32),
        Form("nvfp4", 4, torch.uint8, torch.float8_e4m3fn, block=16, two_level=True),
        Form("mxfp4", 4, torch.uint8, torch.uint8, block=32),
    )
}


class QuantizedLinear(nn.Module):
    """A linear layer on weights of few bits.

    Attributes:
        form: the weights' format.
        block: inputs that share a scale; None for one scale an output row.
        input_form: `int8` or `fp8_e4m3`: the input is rounded with `input_scale`; None: the input stays as it is.
        weight: [O, I], or uint8 [O, I/2] with two 4-bit codes a byte.
        weight_scale: [O] or [O, I/B]; for mxfp4 the exponents of powers of two with a bias of 127.
        weight_scale_2: nvfp4: scalar by which `weight_scale` is multiplied.
        input_scale: scalar.
        transposed: laid out by `for_export` as [I, O] and [I/B, O].
        held: the dequantized weight, while many calls follow each other; None: it is computed at each call.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None
    held: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        form: str = "int8",
        block: int | None = None,
        input_form: str | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.form, self.block, self.input_form = FORMS[form], block or FORMS[form].block, input_form
        self.transposed, self.held = False, None
        stored = (outputs, inputs * self.form.bits // 8)
        scales = (outputs, inputs // self.block) if self.block else (outputs,)
        self.register_buffer("weight", torch.zeros(stored, dtype=self.form.dtype))
        self.register_buffer("weight_scale", torch.ones(scales).to(self.form.scale))
        self.register_buffer("weight_scale_2", torch.ones(()) if self.form.two_level else None)
        self.register_buffer("input_scale", torch.ones(()) if input_form else None)
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)

    def hold(self) -> None:
        """Keep the dequantized weight, in a short float, until `put`: many calls in that type will follow."""
        self.held = self.dequantized().to(SHORT)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors by name; the dequantized weight is held no longer."""
        self.held = None
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    @property
    def bits(self) -> int:
        """Of a stored weight."""
        return self.form.bits

    def values(self, rows: slice = _ALL) -> Tensor:
        """The weights at scale 1, float32 [O, I], or some rows of them."""
        code_OI = self.weight[rows]
        if self.form.name == "int4":
            return unpack_int4(code_OI).float()
        if self.form.bits == 4:
            return decode_e2m1(torch.stack((code_OI & 0x0F, code_OI >> 4), dim=-1).flatten(-2))
        return code_OI.float()

    def scales(self, rows: slice = _ALL) -> Tensor:
        """What the values are multiplied by, float32 [O] or [O, I/B]."""
        scale = self.weight_scale[rows]
        if self.form.name == "mxfp4":
            return power_of_two(scale)
        return scale.float() if self.weight_scale_2 is None else scale.float() * self.weight_scale_2

    def dequantized(self, rows: slice = _ALL) -> Tensor:
        """w_OI as float."""
        if self.block is None:
            return self.values(rows) * self.scales(rows)[:, None]
        return (self.values(rows).unflatten(1, (-1, self.block)) * self.scales(rows)[:, :, None]).flatten(1)

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the map reads it."""
        if self.input_scale is None:
            return x
        if self.input_form == "int8":
            return fake_round(x, self.input_scale)
        return nearest_e4m3(x.float() / self.input_scale) * self.input_scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        self.__dict__.pop("weight", None)  # see `_look_float`
        if torch.compiler.is_exporting():
            return self._exported(x)
        if self.held is not None:
            return functional.linear(self.rounded(x).to(self.held.dtype), self.held, self.bias)
        x, starts = self.rounded(x).float(), range(0, self.out_features, ROWS)
        parts = [self._some(x, slice(at, at + ROWS)) for at in starts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _some(self, x: Tensor, rows: slice) -> Tensor:
        return functional.linear(x, self.dequantized(rows), None if self.bias is None else self.bias[rows])

    def _exported(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = round_trip(x, self.input_scale, torch.int8 if self.input_form == "int8" else torch.float8_e4m3fn)
        if not self.transposed:
            # The table that it shares with the embedding lies as rows: one initializer, transposed after the scales.
            return functional.linear(x, _dequantize_node(self.weight, self.weight_scale, {"axis": 0}), self.bias)
        attributes = {"axis": 1} if self.block is None else {"axis": 0, "block_size": self.block}
        scale = self.weight_scale
        if self.weight_scale_2 is not None:
            scale = _dequantize_node(scale, self.weight_scale_2, {})
        y = torch.matmul(x, _dequantize_node(self.weight, scale, attributes))
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """A table of INT8 rows with a scale each; the head may share its tensors.

    Attributes:
        factor: what every row is multiplied by, where the table that it stands for does so.
        weight: int8 [V, H].
        weight_scale: float [V].
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, rows: int, hidden: int, factor: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.factor = rows, hidden, factor
        self.register_buffer("weight", torch.zeros((rows, hidden), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(rows))

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., H]."""
        if torch.compiler.is_exporting():
            # Engines refuse a Gather of raw INT8: the rows are taken from the dequantized table.
            rows = functional.embedding(ids, _dequantize_node(self.weight, self.weight_scale, {"axis": 0}))
        else:
            rows = functional.embedding(ids, self.weight) * self.weight_scale[ids].unsqueeze(-1)
        return rows if self.factor == 1 else rows * self.factor


def round_trip(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Under `torch.export`: activations through QuantizeLinear and DequantizeLinear with one scale."""
    zero = torch.zeros((), dtype=dtype)
    q = ops.symbolic("QuantizeLinear", (x, scale, zero), {}, dtype=dtype, shape=x.shape)
    return _dequantize_node(q, scale, {})


def _dequantize_node(q: Tensor, scale: Tensor, attributes: dict[str, Any]) -> Tensor:
    return ops.symbolic("DequantizeLinear", (q, scale), attributes, dtype=scale.dtype, shape=q.shape)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    """Every quantized module once, by its first name."""
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the module called `name` stands."""
    for parent, attribute in anatomy.replace(model, model.get_submodule(name), new):
        _look_float(parent, attribute)


def _look_float(parent: nn.Module, attribute: str) -> None:
    """Show a module that asks its map's weight for a type a float one, until the map itself runs.

    T5's feed-forward turns what it hands to its last map into the type of that map's weight. Of codes in bytes that
    would leave nothing of it.
    """
    code = getattr(type(parent).forward, "__code__", None)
    looks = code is not None and {attribute, "weight", "dtype"} <= set(code.co_names)
    if not looks or attribute in parent.__dict__.setdefault(_SHOWN, set()):
        return
    parent.__dict__[_SHOWN].add(attribute)

    def show(*_: Any) -> None:
        child = getattr(parent, attribute)
        if isinstance(child, QuantizedLinear):
            child.__dict__["weight"] = torch.empty(0)

    parent.register_forward_pre_hook(show)
    parent.register_forward_hook(lambda *_: getattr(parent, attribute).__dict__.pop("weight", None), always_call=True)


def for_export(model: nn.Module) -> None:
    """Lay weights out as [I, O] in place, the order in which MatMul takes them without a Transpose.

    Four-bit weights are unpacked to a byte each (INT4 to int8, codes of floats to uint8), since torch has no tensor of
    them; `onnx_graph.pack_weights` packs them in the exported graph. What the embedding shares stays rows.
    """
    modules = quantized_modules(model)
    tables = {id(module.weight) for module in modules.values() if isinstance(module, QuantizedEmbedding)}
    # Maps that are tied stay so; the old tensors are held since a freed one's id may come again.
    laid: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
    for module in modules.values():
        if isinstance(module, QuantizedEmbedding) or id(module.weight) in tables or module.transposed:
            continue
        key = id(module.weight)
        if key not in laid:
            laid[key] = module.weight, _laid_out(module)
        module.put(laid[key][1])
        module.transposed = True


def _laid_out(module: QuantizedLinear) -> dict[str, Tensor]:
    q_OI, scale = module.weight, module.weight_scale
    if module.form.name == "int4":
        q_OI = unpack_int4(q_OI)
    elif module.form.bits == 4:
        q_OI = torch.stack((q_OI & 0x0F, q_OI >> 4), dim=-1).flatten(-2)
    if module.block is None:
        return {"weight": q_OI.t().contiguous()}
    scale = scale if module.form.two_level else module.scales()
    return {"weight": q_OI.t().contiguous(), "weight_scale": scale.t().contiguous()}
