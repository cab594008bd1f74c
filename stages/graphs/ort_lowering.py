"""ONNX Runtime's integer kernels in place of Q/DQ pairs: the same numbers, computed on the integers.

Left to itself, ONNX Runtime dequantizes a whole embedding table at each call, and multiplies in float where several
products read the same rounded activations. These rewritings mend that:

- A product of INT8 activations and INT8 weights becomes `MatMulIntegerToFloat`, whose INT32 sums are exact. The
  activations become unsigned with the zero at 128, the same grid: signed ones have no fast kernel (31 against 412
  GOP/s on one core with AVX512-VNNI; fp32 102).
- A table of which rows are taken is read raw: the rows that the tokens name are dequantized and no others.
- A product of float activations and INT8 weights is one of integers, too: each row of the activations, over its
  largest value, is written in three digits of eight bits, which stand side by side as rows, so that the weights are
  read once, a byte each. What is left is 2^-24 of the row's largest value, as in fp32; of 2^-16, which two digits
  leave, models with massive activations make a hundredth of what is usual beside them. `MatMulNBits` at the accuracy
  level that multiplies in float takes ten times as long, and its faster level rounds the activations.
  `round_activations` leaves one digit or two, where an engine may: INT8 or INT16 with a scale for each row.
- A Relu before rounding to FP8 is a maximum, since ONNX Runtime leaves the Relu out.
- A product of float activations and INT4 weights keeps them in half a byte each, see `ort_few_bits`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from stages.graphs.ort_few_bits import PRODUCT, few_bits_product
from stages.graphs.ort_nodes import VENDOR, constant, placed, sweep

INTEGER_PRODUCT, RAW_ROWS, SPLIT_PRODUCT = "MatMulIntegerToFloat", "raw_rows", "split_products"
FEW_BITS_PRODUCT = PRODUCT
FP8 = frozenset({ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2})
DIGITS, STEP, FINER = 3, 1 / 127, 1 / 254
"""Of a row over its largest value: the step of the first digit; each other's, over that of the one before, of which it
says at most half."""


def lower(model: ir.Model) -> dict[str, int]:
    """Rewrite the graph in place. Returns how many integer products and raw readings of a table it holds now."""
    graph = model.graph
    counts: Counter[str] = Counter()
    digits: dict[ir.Value, Digits] = {}
    for node in list(graph):
        kind, made = RAW_ROWS, _raw_rows(graph, node) if node.op_type == "Gather" else None
        if made is None:
            kind, made = INTEGER_PRODUCT, _integer_product(graph, node)
        if made is None:
            kind, made = SPLIT_PRODUCT, _split_product(graph, node, digits)
        if made is None:
            kind, made = FEW_BITS_PRODUCT, few_bits_product(graph, node)
        if made is None:
            continue
        old, new = node.outputs[0], made.outputs[0]
        new.shape, new.type, name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        new.name = name
        counts[kind] += 1
    _keep_relus(graph)
    if counts.total() > counts[RAW_ROWS]:
        model.opset_imports[VENDOR] = 1
    if counts:
        sweep(graph)
    return dict(counts)


def _keep_relus(graph: ir.Graph) -> None:
    """Write a Relu before rounding to FP8 as a maximum: ONNX Runtime 1.31 leaves the Relu out, as if no value there
    were negative.
    """
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
            continue
        zero, relu = node.inputs[2], _producer(node.inputs[0])
        if zero is None or zero.dtype not in FP8 or relu is None or relu.op_type != "Relu":
            continue
        made = placed(graph, relu, "Max", [relu.inputs[0], _number(graph, "no_less", 0.0)])
        old, new = relu.outputs[0], made.outputs[0]
        new.shape, new.type, name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(relu, safe=True)
        new.name = name


def _integer_product(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """q(x) @ q(w) * (scale of x * scale of w), placed before a MatMul of dequantized values; None: it is none."""
    if node.op_type != "MatMul":
        return None
    weight, activation = _dequantizer(node.inputs[1]), _dequantizer(node.inputs[0])
    if weight is None or activation is None or not _per_column(weight):
        return None
    rounding = _producer(activation.inputs[0])
    if rounding is None or rounding.op_type != "QuantizeLinear":
        return None
    scale, zero = rounding.inputs[1], unsigned_zero(graph)
    unsigned = _unsigned(graph, rounding, zero)
    inputs = [unsigned, weight.inputs[0], scale, weight.inputs[1], zero]
    return placed(graph, node, INTEGER_PRODUCT, inputs, domain=VENDOR)


@dataclass(frozen=True)
class Digits:
    """Activations in digits of eight bits.

    Attributes:
        largest: of each row, [..., 1].
        all: of each value over it, [DIGITS, ..., I] in UINT8 with the zero at 128.
    """

    largest: ir.Value
    all: ir.Value


def _split_product(graph: ir.Graph, node: ir.Node, known: dict[ir.Value, Digits]) -> ir.Node | None:
    """sum(digit @ q(w)) * scales, placed before a MatMul of float and dequantized values; None: it is none."""
    x = node.inputs[0]
    found = _columns(graph, node) if node.op_type == "MatMul" and x is not None else None
    if found is None or x is None or x.shape is None:
        return None
    if x not in known:
        known[x] = _digits(graph, node, x)
    step, zero = _number(graph, "digit_0", STEP), unsigned_zero(graph)
    inputs: list[ir.Value | None] = [known[x].all, found[0], step, found[1], zero]
    product = placed(graph, node, INTEGER_PRODUCT, inputs, domain=VENDOR).outputs[0]
    told = placed(graph, node, "Mul", [product, _worth(graph, DIGITS, len(x.shape))]).outputs[0]
    first = constant(graph, "first_axis", np.array([0], dtype=np.int64))
    whole = placed(graph, node, "ReduceSum", [told, first], keepdims=0).outputs[0]
    return placed(graph, node, "Mul", [whole, known[x].largest])


def round_activations(model: ir.Model, digits: Callable[[str], int]) -> int:
    """Let products of digits keep the first of them alone, which is INT8 with a scale for each row, or two.

    A head that is the table of tokens keeps all: it says logits, of few rows, and its time goes into its weights.

    Args:
        model: lowered.
        digits: how many, by the name of the weights; DIGITS leave the product as it is.

    Returns:
        How many products have fewer now.
    """
    graph, rounded = model.graph, 0
    for node in split_products(model):
        (told, _), *_ = node.outputs[0].uses()
        (whole, _), *_ = told.outputs[0].uses()
        every, left = _known(node.inputs[0]).producer(), digits(str(_known(node.inputs[1]).name))
        assert every is not None
        if left == DIGITS:
            continue
        rounded += 1
        if left > 1:
            node.replace_input_with(0, placed(graph, node, "Concat", list(every.inputs[:left]), axis=0).outputs[0])
            told.replace_input_with(1, _worth(graph, left, len(_known(told.inputs[1]).shape or ()) - 1))
            continue
        unsqueezed = _producer(every.inputs[0])
        assert unsqueezed is not None
        product = placed(graph, node, INTEGER_PRODUCT, [unsqueezed.inputs[0], *node.inputs[1:]], domain=VENDOR)
        made, old = product.outputs[0], whole.outputs[0]
        made.shape, made.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, made)
    if rounded:
        sweep(graph)
    return rounded


def split_products(model: ir.Model) -> list[ir.Node]:
    """Products of digits whose weights are no table of tokens."""
    found = []
    for node in model.graph:
        if node.op_type == INTEGER_PRODUCT and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            digits = _producer(node.inputs[0])
            found += [node] if digits is not None and digits.op_type == "Concat" else []
    return found


def _worth(graph: ir.Graph, digits: int, axes: int) -> ir.Value:
    """What each digit is worth, [digits, 1, ...] with `axes` ones."""
    worth = np.array([FINER**place for place in range(digits)], np.float32).reshape(-1, *[1] * axes)
    return constant(graph, f"worth_{axes}" if digits == DIGITS else f"worth_{axes}_of_{digits}", worth)


def _columns(graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """INT8 weights [I, O] of a product and the scales of their columns."""
    weight = _dequantizer(node.inputs[1])
    if weight is not None and _per_column(weight):
        return _known(weight.inputs[0]), _known(weight.inputs[1])
    # A table of tokens that is the head as well: the runtime turns it when it loads.
    turned = _producer(node.inputs[1])
    table = _dequantizer(turned.inputs[0]) if turned is not None and turned.op_type == "Transpose" else None
    if table is None or not _int8(table) or table.attributes.get_int("axis", 1) != 0:
        return None
    perm = ir.AttrInt64s("perm", [1, 0])
    made = ir.Node("", "Transpose", [table.inputs[0]], [perm], num_outputs=1)
    graph.insert_before(node, made)
    return made.outputs[0], _known(table.inputs[1])


def _digits(graph: ir.Graph, before: ir.Node, x: ir.Value) -> Digits:
    def then(kind: str, *inputs: ir.Value) -> ir.Value:
        return placed(graph, before, kind, list(inputs)).outputs[0]

    zero, axis = unsigned_zero(graph), constant(graph, "last_axis", np.array([-1], dtype=np.int64))
    tiny = _number(graph, "tiny", float(np.finfo(np.float32).tiny))  # a row of zeros is divided by it
    largest = then("Max", then("ReduceMax", then("Abs", x), axis), tiny)
    left, digits = then("Div", x, largest), list[ir.Value | None]()
    first = constant(graph, "first_axis", np.array([0], dtype=np.int64))
    for place in range(DIGITS):
        step = _number(graph, f"digit_{place}", STEP * FINER**place)
        digit = then("QuantizeLinear", left, step, zero)
        digits.append(then("Unsqueeze", digit, first))
        if place < DIGITS - 1:
            left = then("Sub", left, then("DequantizeLinear", digit, step, zero))
    return Digits(largest, placed(graph, before, "Concat", digits, axis=0).outputs[0])


def _number(graph: ir.Graph, name: str, value: float) -> ir.Value:
    return constant(graph, name, np.array(value, dtype=np.float32))


def unsigned_zero(graph: ir.Graph) -> ir.Value:
    """The zero of numbers that are written unsigned."""
    return constant(graph, "unsigned_zero", np.array(128, dtype=np.uint8))


def _raw_rows(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """scale[ids] * q[ids], placed before a Gather of rows from a dequantized table; None: it is none."""
    table = _dequantizer(node.inputs[0])
    if table is None or node.attributes.get_int("axis", 0) != 0 or table.attributes.get_int("axis", 1) != 0:
        return None
    if "block_size" in table.attributes:
        return None
    ids = node.inputs[1]
    raw = placed(graph, node, "Gather", [table.inputs[0], ids], axis=0).outputs[0]
    values = placed(graph, node, "Cast", [raw], to=int(ir.DataType.FLOAT)).outputs[0]
    scale = placed(graph, node, "Gather", [table.inputs[1], ids], axis=0).outputs[0]
    last = constant(graph, "last_axis", np.array([-1], dtype=np.int64))
    scale = placed(graph, node, "Unsqueeze", [scale, last]).outputs[0]
    return placed(graph, node, "Mul", [values, scale])


def _unsigned(graph: ir.Graph, rounding: ir.Node, zero: ir.Value) -> ir.Value:
    """The rounded activations on the same grid in UINT8, made once for all products that read them."""
    for user, _ in list(_known(rounding.inputs[0]).uses()):
        if user.op_type == "QuantizeLinear" and user.inputs[1] is rounding.inputs[1] and zero in user.inputs:
            return user.outputs[0]
    return placed(graph, rounding, "QuantizeLinear", [*rounding.inputs[:2], zero]).outputs[0]


def _per_column(weight: ir.Node) -> bool:
    """Constant INT8 [I, O] with a scale for each of the O columns."""
    return _int8(weight) and weight.attributes.get_int("axis", 1) == 1


def _int8(weight: ir.Node) -> bool:
    q, scale = weight.inputs[0], weight.inputs[1]
    if q is None or scale is None or q.const_value is None or "block_size" in weight.attributes:
        return False
    return q.const_value.dtype == ir.DataType.INT8 and len(_known(scale).shape or ()) == 1


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = _producer(value)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _known(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
