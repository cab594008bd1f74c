import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.algorithms.grids import INT4
from stages.algorithms.rounding import fake_round, round_rows, search_scales

onnxruntime.set_default_logger_severity(3)


@given(st.integers(2, 8), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_rows_any_width_lie_within_half_a_step_and_use_the_whole_range(bits, seed):
    w_OI = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    q_OI, scale_O = round_rows(w_OI, bits)
    top = 2 ** (bits - 1) - 1
    assert q_OI.dtype == torch.int8
    assert (q_OI.abs().amax(1) == top).all()
    assert ((q_OI * scale_O[:, None] - w_OI).abs() <= scale_O[:, None] * 0.5001).all()


def test_rows_on_an_integer_grid_are_exact():
    q_OI = torch.randint(-126, 127, (4, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    q_OI[:, 3] = 127
    scale_O = torch.tensor([0.5, 0.25, 2.0, 0.125])
    found, scale = round_rows(q_OI * scale_O[:, None])
    assert torch.equal(found, q_OI)
    assert torch.equal(scale, scale_O)


def test_rows_of_zeros_keep_a_positive_scale():
    q_OI, scale_O = round_rows(torch.zeros(2, 4))
    assert not q_OI.any()
    assert (scale_O > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_not_finite_are_refused(bad):
    w_OI = torch.ones(2, 64)
    w_OI[1, 5] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        round_rows(w_OI)


@pytest.mark.parametrize("bits", [1, 9])
def test_width_out_of_range_is_refused(bits):
    with pytest.raises(ValueError, match="2 to 8"):
        round_rows(torch.ones(1, 2), bits)


def test_block_scales_are_close_to_the_best_of_a_fine_brute_force():
    errors = torch.tensor([errors_of_a_block(seed) for seed in range(8)])
    mine, best, plain = errors.unbind(1)
    assert (mine <= plain * (1 + 1e-5)).all()
    assert (mine <= 1.25 * best).all()
    assert mine.sum() < 0.8 * plain.sum()


def errors_of_a_block(seed):
    made = torch.Generator().manual_seed(seed)
    w_B = torch.randn(16, generator=made)
    w_B[seed] *= 2
    importance_B = torch.rand(16, generator=made) ** 3 + 0.01
    scale = search_scales(w_B[None, None], INT4, importance_B[None])[0, 0]
    mine = weighted_error(w_B, scale, importance_B)
    fine = torch.linspace(0.02, 1.2, 4000) * w_B.abs().max() / 7
    best = min(weighted_error(w_B, one, importance_B) for one in fine)
    return mine, best, weighted_error(w_B, w_B.abs().max() / 7, importance_B)


def weighted_error(w_B, scale, importance_B):
    q_B = torch.clamp(torch.round(w_B / scale), -8, 7)
    return float(((q_B * scale - w_B).square() * importance_B).sum())


def test_block_whose_largest_weight_is_negative_uses_the_value_minus_eight():
    w_OGB = torch.tensor([[[-8.0, 7.0, 1.0, 2.0]]])
    scale_OG = search_scales(w_OGB, INT4)
    q_OGB = INT4.nearest(w_OGB / scale_OG[..., None])
    assert torch.equal(q_OGB * scale_OG[..., None], w_OGB)
    assert q_OGB.min() == -8


def test_importance_decides_which_weights_are_met():
    w_OGB = torch.tensor([[[30.0, 1.0, 1.3, 0.7]]])
    small = []
    for importance in (None, torch.tensor([[1e-6, 1.0, 1.0, 1.0]])):
        ratios = tuple(i / 100 for i in range(100, 4, -1))
        scale_OG1 = search_scales(w_OGB, INT4, importance, ratios=ratios)[..., None]
        small.append(float((INT4.nearest(w_OGB / scale_OG1) * scale_OG1 - w_OGB)[..., 1:].abs().sum()))
    assert small[1] < small[0] / 2


def test_scales_of_zeros_are_positive_and_only_storable_ones_are_given():
    scale_OG = search_scales(torch.zeros(2, 3, 4), INT4, storable=lambda scale: scale.half().float())
    assert (scale_OG == 1).all()
    found = search_scales(torch.randn(8, 2, 16), INT4, storable=lambda scale: scale.half().float())
    assert torch.equal(found, found.half().float())


def test_fake_round_equals_onnxruntime_quantize_dequantize():
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    scale = 0.05
    constants = [
        onnx.numpy_helper.from_array(np.array(scale, np.float32), "s"),
        onnx.numpy_helper.from_array(np.array(0, np.int8), "z"),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, [None])], [value("y", 1, [None])], initializer=constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.cat([torch.randn(1000) * 5, torch.arange(-10, 10) * 0.5 * scale])  # saturates, and lands on halves
    expected = session.run(None, {"x": x.numpy()})[0]
    np.testing.assert_array_equal(fake_round(x, torch.tensor(scale)).numpy(), expected)


def test_every_int4_value_survives_all_pairs():
    from stages.models.layers.quantized_linear import pack_int4, unpack_int4

    q_OI = torch.tensor(list(itertools.product(range(-8, 8), repeat=2)), dtype=torch.int8)
    packed = pack_int4(q_OI)
    assert packed.shape == (256, 1)
    assert packed.dtype == torch.uint8
    assert packed[0 * 16 + 9, 0] == ((1 & 15) << 4 | (-8 & 15))  # the first value lies in the low nibble
    assert torch.equal(unpack_int4(packed), q_OI)
