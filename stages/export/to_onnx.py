"""A model as an ONNX graph: inputs input_ids and attention_mask, output logits.

Shapes: N sequences, T tokens, V vocabulary, H hidden, I inputs and O outputs of a linear map.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.export import cached, two_stacks
from stages.export.cached import LayerCache
from stages.export.called import OUTPUT, as_called, inputs_of, masks
from stages.export.experts import use_every
from stages.graphs import onnx_graph
from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.pooling import Pooling
from stages.models.layers import quantized_linear
from stages.models.layers.low_rank_linear import ResidualLinear, SharedLinear
from stages.models.layers.sparse_linear import SparseLinear
from stages.models.low_rank.planning import filled
from stages.runtime.contract import StageError

FUSED_ATTENTION = 23
"""The first opset with operators for attention, rotary embedding and RMS norm."""
FOUR_BIT_FLOATS = 23
"""The first opset that dequantizes E2M1."""


def densify(model: PreTrainedModel) -> None:
    """Make sparse maps dense in place, and one with the product beside them where that is float: no engine takes them.

    A graph then holds and multiplies what the dense model's would.
    """
    for path, one in list(model.named_modules()):
        if not (isinstance(one, ResidualLinear) and isinstance(one.dense, SparseLinear)):
            continue
        w_OI, low = one.dense.dense().detach(), one.low
        assert isinstance(low, SharedLinear)
        if isinstance(low.basis, nn.Linear) and isinstance(low.coefficient, nn.Linear):
            model.set_submodule(
                path, filled(w_OI + low.coefficient.weight.detach() @ low.basis.weight.detach(), one.dense.bias)
            )
        else:
            one.dense = filled(w_OI, one.dense.bias)


class Product(nn.Module):
    """A linear map whose weight lies as w_IO, the order that MatMul reads."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


def to_onnx(
    model: PreTrainedModel,
    opset: int,
    task: str,
    ids_1T: NDArray[np.int64],
    pool: Pooling | None = None,
    *,
    tells_segments: bool = False,
) -> ir.Model:
    """Export; the model's weights are laid out anew in place, so it is of no use afterwards.

    Args:
        model: from `load_model`, with its quantized modules.
        opset: version of the ONNX operators, at least 21.
        task: what the model is for.
        ids_1T: a window to ask the model by how it has to be called.
        pool: makes one vector of each text.
        tells_segments: the graph takes the segments of tokens, too.

    Raises:
        StageError: padding changes what the model answers, the opset has no four-bit floats, or the exporter refuses,
            with its own text.
    """
    _refuse_fp4(model, opset)
    fused, names = opset >= FUSED_ATTENTION, inputs_of(tells_segments=tells_segments)
    called = as_called(model, task, ids_1T, fused=fused, pool=pool, tells_segments=tells_segments)
    first_names = _first_names(model)
    lay_out(model)
    use_every(model)
    ids_NT = torch.arange(16).view(2, 8) % model.config.get_text_config().vocab_size
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    given, shapes = (ids_NT, *[torch.ones_like(ids_NT) for _ in names[1:]]), dict.fromkeys(names, axes)
    try:
        with masks():
            exported = _traced(called, given, (names, [OUTPUT]), shapes, opset)
    except torch.onnx.OnnxExporterError as error:
        raise StageError(
            f"the exporter could not turn {type(model).__name__} into ONNX",
            measured=_first_cause(error),
            remedy="Take `export` and what follows it out of the recipe, or report it with config.json.",
        ) from error
    clean(exported, first_names)
    return exported


def with_cache(model: PreTrainedModel, layers: Sequence[LayerCache]) -> ir.Model:
    """The same with keys and values as inputs and outputs, see `cached.Decoder`; opset 24.

    Args:
        model: as for `to_onnx`.
        layers: from `cached.layer_caches`.

    Raises:
        NotCached: the exporter refuses.
    """
    inputs, outputs, _ = cached.names(len(layers))
    arguments = cached.sample(layers, model.config.get_text_config().vocab_size)
    decoder, first_names = cached.Decoder(model, len(layers)).eval(), _first_names(model)
    lay_out(model)
    use_every(model)
    try:
        with cached.attending(model):
            exported = _traced(decoder, arguments, (inputs, outputs), cached.shapes(layers), FUSED_ATTENTION)
    except torch.onnx.OnnxExporterError as error:
        raise cached.NotCached(_first_cause(error)) from error
    _finish(exported, first_names)
    return exported


def with_two_stacks(model: PreTrainedModel, caches: tuple[list[LayerCache], list[LayerCache]]) -> dict[str, ir.Model]:
    """Export a model with an encoder and a decoder, laid out anew in place, to two graphs that share their weights.

    Args:
        model: from `load_model`.
        caches: from `two_stacks.layer_caches`.

    Raises:
        NotCached: the exporter refuses.
    """
    layers, first_names = len(caches[0]), _first_names(model)
    lay_out(model)
    use_every(model)
    names, arguments, shapes = two_stacks.names(layers), two_stacks.sample(*caches), two_stacks.shapes(layers)
    made: dict[str, ir.Model] = {}
    for name, module in (("encoder", two_stacks.Reading(model)), ("decoder", two_stacks.Saying(model))):
        try:
            with two_stacks.attending(model):
                made[name] = _traced(module.eval(), arguments[name], names[name][:2], shapes[name], FUSED_ATTENTION)
        except torch.onnx.OnnxExporterError as error:
            raise cached.NotCached(_first_cause(error)) from error
        _finish(made[name], first_names)
    return made


def _finish(exported: ir.Model, first_names: Mapping[str, str]) -> None:
    clean(exported, first_names)
    exported.opset_imports[""] = cached.OPSET
    for node in exported.graph:
        node.version = None


def _traced(
    module: nn.Module,
    arguments: tuple[Any, ...],
    names: tuple[Sequence[str], Sequence[str]],
    shapes: dict[str, Any],
    opset: int,
) -> ir.Model:
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=opset,
            input_names=names[0],
            output_names=names[1],
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    exported: Any = program.model
    onnx_graph.pack_weights(exported.graph)
    return exported


def _first_cause(error: BaseException) -> str:
    """Its first line: what stands above it is advice for those who export by hand."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def lay_out(model: PreTrainedModel) -> None:
    """Turn weights to [I, O] in place, so that they keep their names and no Transpose stands in the graph.

    A weight that another module reads as rows (tied embedding) stays as it is.
    """
    quantized_linear.for_export(model)
    places = dict(model.named_modules())
    uses = Counter(id(tensor) for module in places.values() for tensor in module._parameters.values())
    for name, module in places.items():
        if isinstance(module, nn.Linear) and uses[id(module.weight)] == 1:
            quantized_linear.replace(model, name, Product(module))


def clean(model: ir.Model, first_names: Mapping[str, str]) -> None:
    """Take out what says where and when a graph was made; weights get the names they have in the checkpoint."""
    model.producer_name, model.producer_version, model.doc_string = "enginery", "", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("model."):
            inner = name.removeprefix("model.")
            value.name = first_names.get(inner, inner)


def _first_names(model: PreTrainedModel) -> dict[str, str]:
    """Every name of every tensor -> the first name of the same tensor, under which checkpoints store it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in anatomy.named_tensors(model)}


def _refuse_fp4(model: PreTrainedModel, opset: int) -> None:
    floats = [
        name
        for name, module in quantized_linear.quantized_modules(model).items()
        if isinstance(module, quantized_linear.QuantizedLinear) and module.form.name in ("nvfp4", "mxfp4")
    ]
    if floats and opset < FOUR_BIT_FLOATS:
        raise no_four_bit_floats(opset, f"{len(floats)} maps like {floats[0]}")


def no_four_bit_floats(opset: int, measured: str) -> StageError:
    """The refusal of an opset that is too old for four-bit floats."""
    return StageError(
        f"opset {opset} has no four-bit floats",
        measured=measured,
        limit=f"opset {FOUR_BIT_FLOATS}",
        remedy=f"Set `opset: {FOUR_BIT_FLOATS}`.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it misses torchvision, which a language model does not need
    try:
        with warnings.catch_warnings():
            # All inputs share their axes on purpose.
            warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
            # torch's own tree of inputs, copied by torch.
            warnings.filterwarnings("ignore", message="`isinstance\\(treespec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
