"""Proof that an engine for the processor, with or without integer kernels, computes what it was made from.

End to end, the two need not agree when activations are rounded: their sums differ in the last digit, and a value that
lies between two steps may fall to either. So the float part is compared end to end without rounding, and each integer
product for itself, on the activations that it was given.

Shapes: N windows, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from stages.adapters.onnxruntime import open_session
from stages.adapters.onnxruntime_slots import open_stacks
from stages.graphs import components, onnx_graph, ort_lowering, stepping
from stages.graphs.parity import parity, require_parity
from stages.runtime.contract import StageError

PRODUCT_LIMIT = 1e-4
"""Largest difference of a product's values over the largest of them; fp32 sums of scaled integers reach 1e-6."""


def require_same_numbers(
    source: Path,
    output: Path,
    ids_NT: NDArray[np.int64],
    build: Callable[[Path, Path], None],
    answers: Sequence[Callable[[Path], NDArray[np.float32]]],
    *,
    predicts: bool = True,
    said_NT: NDArray[np.int64] | None = None,
) -> float:
    """Compare engine and graph end to end, without the rounding of activations.

    Args:
        source: the graph.
        output: folder of the engine that was built from it.
        ids_NT: what both read.
        build: builds an engine of a graph into a folder, as the one in `output` was built.
        answers: what the engine in a folder answers to `ids_NT`, in each of the ways that it can be asked.
        predicts: whether the answer is the next token of each; else only its numbers are compared.
        said_NT: what a decoder behind an encoder reads beside `ids_NT`.

    Returns:
        The largest logit difference, in standard deviations.

    Raises:
        StageError: they differ, or the engine's own logits are not finite.
    """
    with tempfile.TemporaryDirectory(dir=output, prefix=".twin-") as folder:
        twin, models = Path(folder) / source.name, components.load(source)
        rounded = sum(onnx_graph.drop_rounding(model) for model in models)
        components.save(models, twin)
        del models
        if said_NT is None:
            reference_NTV = stepping.outputs(open_session(twin, literal=True), ids_NT)["logits"]
        else:
            stacks = open_stacks(twin, literal=True)
            reference_NTV = stacks.begin(ids_NT, np.ones_like(ids_NT), said_NT.shape[1]).read(said_NT)
        if rounded:
            output = Path(folder) / "engine"
            output.mkdir()
            build(twin, output)
        found = [parity(ids_NT if predicts else None, reference_NTV, answer(output)) for answer in answers]
    for one in found:
        require_parity(one, "the engine and the graph")
    return max(one.logit_difference for one in found)


def require_exact_products(engine: Path, ids_NT: NDArray[np.int64], said_NT: NDArray[np.int64] | None = None) -> float:
    """Compute every integer product again in float64 from the activations that the engine saw.

    Args:
        engine: its graph; an encoder's may stand beside it.
        ids_NT: what it reads.
        said_NT: what a decoder behind an encoder reads beside that.

    Returns:
        The largest difference over the largest value of its product; 0 without integer products.

    Raises:
        StageError: a product differs.
    """
    models = components.load(engine)
    products = [
        [node for node in model.graph if node.op_type == ort_lowering.INTEGER_PRODUCT and _rounds(node)]
        for model in models
    ]
    if not any(products):
        return 0.0
    with tempfile.TemporaryDirectory(dir=engine.parent, prefix=".products-") as folder:
        exposed = Path(folder) / engine.name
        components.save([_exposed(*pair) for pair in zip(models, products, strict=True)], exposed)
        if said_NT is None:
            outputs = [stepping.outputs(open_session(exposed), ids_NT)]
        else:
            outputs = open_stacks(exposed).outputs(ids_NT, said_NT)
    return max(_worst(*pair) for pair in zip(products, outputs, strict=True))


def _worst(products: list[ir.Node], seen: Mapping[str, NDArray[np.float32]]) -> float:
    worst = 0.0
    for node in products:
        x, scale = _activation(node)
        expected = _product(seen[str(x.name)], scale, _weights(node.inputs[1]), _array(node.inputs[3]))
        difference = float(np.abs(seen[str(node.outputs[0].name)] - expected).max() / np.abs(expected).max())
        if not difference <= PRODUCT_LIMIT:
            raise StageError(
                f"the engine's product with {node.inputs[1].name if node.inputs[1] else node.name} is not exact",
                measured=f"{difference:.3g} of its largest value",
                limit=PRODUCT_LIMIT,
                remedy="Report it with this processor's name.",
            )
        worst = max(worst, difference)
    return worst


def _exposed(model: ir.Model, products: list[ir.Node]) -> ir.Model:
    """The graph with what goes into each product, and what comes out, as further outputs."""
    wanted = [_activation(node)[0] for node in products] + [node.outputs[0] for node in products]
    for value in dict.fromkeys(wanted):
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        if value not in model.graph.outputs:
            model.graph.outputs.append(value)
    return model


def _activation(node: ir.Node) -> tuple[ir.Value, NDArray[np.float32]]:
    """What is rounded before a product, and the step."""
    assert node.inputs[0] is not None
    rounding = node.inputs[0].producer()
    assert rounding is not None and rounding.inputs[0] is not None
    return rounding.inputs[0], _array(rounding.inputs[1])


def _rounds(node: ir.Node) -> bool:
    """Whether a product's activations are rounded as the graph says; those that are split are compared end to end."""
    made = None if node.inputs[0] is None else node.inputs[0].producer()
    return made is not None and made.op_type == "QuantizeLinear"


def _array(value: ir.Value | None) -> NDArray[np.float32]:
    assert value is not None and value.const_value is not None
    found: NDArray[np.float32] = value.const_value.numpy()
    return found


def _weights(value: ir.Value | None) -> NDArray[np.float32]:
    """Of eight bits, signed or not."""
    found = _array(value)
    return found if found.dtype == np.int8 else found.astype(np.float32) - 128


def _product(
    x_NTI: NDArray[np.float32], scale: NDArray[np.float32], q_IO: NDArray[np.float32], scale_O: NDArray[np.float32]
) -> NDArray[np.float64]:
    q_NTI = np.clip(np.rint(x_NTI / scale), -128, 127).astype(np.float64)
    product: NDArray[np.float64] = q_NTI @ q_IO.astype(np.float64) * (float(scale) * scale_O.astype(np.float64))
    return product
