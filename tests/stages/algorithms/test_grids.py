import ml_dtypes
import numpy as np
import pytest
import torch

from stages.algorithms.correction import inverse_root
from stages.algorithms.grids import (
    FP4_E2M1,
    FP8_E4M3,
    INT4,
    decode_e2m1,
    e8m0,
    encode_e2m1,
    power_of_two,
)
from stages.models.layers.quantized_linear import QuantizedLinear
from stages.quantize.stored_forms import rounded


def halves(values):
    """Numbers on, beside and exactly between the values of a grid, and beyond its ends."""
    exact = np.array(sorted(values))
    between = (exact[1:] + exact[:-1]) / 2
    near = np.concatenate([between * (1 + 1e-6), between * (1 - 1e-6)])
    return torch.tensor(np.concatenate([exact, between, near, exact * 1.5, [0.0, -0.0]]), dtype=torch.float32)


@pytest.mark.parametrize(("grid", "dtype"), [(FP4_E2M1, ml_dtypes.float4_e2m1fn), (FP8_E4M3, ml_dtypes.float8_e4m3fn)])
def test_nearest_float_equals_ml_dtypes_with_halves_to_even(grid, dtype):
    codes = np.arange(16 if grid is FP4_E2M1 else 256, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32) if grid is FP8_E4M3 else codes.astype(np.uint8).astype(np.float32)
    if grid is FP4_E2M1:
        values = decode_e2m1(torch.arange(16)).numpy()
        assert {float(v) for v in values} == {
            float(np.float32(dtype(v))) for v in values
        }  # each is a value of the format
    x = halves({float(v) for v in values if np.isfinite(v)})
    clipped = np.clip(x.numpy(), -grid.top, grid.top)
    np.testing.assert_array_equal(grid.nearest(x).numpy(), clipped.astype(dtype).astype(np.float32))


def test_e2m1_codes_are_those_of_ml_dtypes():
    values = decode_e2m1(torch.arange(16))
    expected = values.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(encode_e2m1(values).numpy(), expected)
    np.testing.assert_array_equal(encode_e2m1(values).numpy(), np.arange(16))


def test_e8m0_codes_are_those_of_ml_dtypes():
    scale = torch.exp2(torch.arange(-126, 128).float())
    expected = scale.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    np.testing.assert_array_equal(e8m0(scale).numpy(), expected)
    assert torch.equal(power_of_two(e8m0(scale)), scale)


def test_int4_nearest_saturates_and_rounds_halves_to_even():
    x = torch.tensor([-9.0, -8.4, -0.5, 0.5, 1.5, 2.5, 7.4, 9.0])
    assert INT4.nearest(x).tolist() == [-8, -8, 0, 0, 2, 2, 7, 7]


def stored(form, tensors, shape):
    made = QuantizedLinear(shape[1], shape[0], form=form)
    for name, tensor in tensors.items():
        assert getattr(made, name).shape == tensor.shape
        assert getattr(made, name).dtype == tensor.dtype
        setattr(made, name, tensor)
    return made


def test_mxfp4_bytes_follow_the_definition():
    made = torch.Generator().manual_seed(0)
    w_OI = torch.randn(8, 64, generator=made) * torch.logspace(-6, 3, 8)[:, None]
    w_OI[0, :32] = 0
    tensors = rounded(w_OI, "mxfp4", 32, None, search=False)
    for row in range(8):
        for block in range(2):
            w_B = w_OI[row, 32 * block : 32 * block + 32].numpy()
            if not w_B.any():
                continue
            exponent = int(np.floor(np.log2(np.abs(w_B).max()))) - 2
            assert int(tensors["weight_scale"][row, block]) == exponent + 127
            expected = np.clip(w_B / np.float32(2.0) ** exponent, -6, 6).astype(ml_dtypes.float4_e2m1fn)
            codes = tensors["weight"][row, 16 * block : 16 * block + 16].numpy()
            unpacked = np.stack([codes & 15, codes >> 4], axis=1).ravel()
            np.testing.assert_array_equal(unpacked, expected.view(np.uint8))
    layer = stored("mxfp4", tensors, (8, 64))
    assert torch.isfinite(layer.dequantized()).all()


def test_nvfp4_bytes_follow_the_definition():
    made = torch.Generator().manual_seed(0)
    w_OI = torch.randn(8, 64, generator=made) * torch.logspace(-2, 1, 8)[:, None]
    tensors = rounded(w_OI, "nvfp4", 16, None, search=False)
    whole = np.float32(w_OI.abs().max() / (6 * 448))
    assert float(tensors["weight_scale_2"]) == pytest.approx(float(whole), rel=1e-6)
    dequantized = stored("nvfp4", tensors, (8, 64)).dequantized()
    for row in range(8):
        for block in range(4):
            w_B = w_OI[row, 16 * block : 16 * block + 16].numpy()
            scale = np.float32(np.abs(w_B).max() / np.float32(6) / whole).astype(ml_dtypes.float8_e4m3fn)
            assert tensors["weight_scale"].view(torch.uint8)[row, block] == scale.view(np.uint8)
            step = np.float32(scale) * whole
            expected = np.clip(w_B / step, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * step
            np.testing.assert_allclose(dequantized[row, 16 * block : 16 * block + 16], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "block"), [("int4", 16), ("nvfp4", 16), ("mxfp4", 32), ("int8", None), ("fp8_e4m3", None)]
)
def test_searched_scales_and_columns_lose_less_than_the_definition_in_each_form(form, block):
    made = torch.Generator().manual_seed(1)
    x_NI = torch.randn(400, 64, generator=made) @ torch.randn(64, 64, generator=made)
    w_OI, moment_II = torch.randn(32, 64, generator=made), x_NI.T @ x_NI / 400
    errors = []
    for moment, search in ((None, False), (None, True), (moment_II, True)):
        layer = QuantizedLinear(64, 32, form=form, block=block)
        for name, tensor in rounded(
            w_OI, form, block, None if moment is None else inverse_root(moment), search=search
        ).items():
            setattr(layer, name, tensor)
        away = layer.dequantized() - w_OI
        errors.append(float(((away @ moment_II) * away).sum() if moment is not None else away.square().sum()))
        if moment is not None:
            layer_off = QuantizedLinear(64, 32, form=form, block=block)
            for name, tensor in rounded(w_OI, form, block, None, search=True).items():
                setattr(layer_off, name, tensor)
            off = layer_off.dequantized() - w_OI
            assert errors[-1] < 0.7 * float(((off @ moment_II) * off).sum())
    assert errors[1] <= errors[0]


def test_rounding_of_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="48 inputs"):
        rounded(torch.ones(1, 48), "int4", 32, None)
    with pytest.raises(ValueError, match="not finite"):
        rounded(torch.full((1, 32), torch.nan), "int4", 32, None)
