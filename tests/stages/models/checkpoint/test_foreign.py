"""What other tools quantized becomes the floats that their formats define: packed by hand here, number by number."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from stages.models.checkpoint import foreign
from stages.models.checkpoint.files import read, weight_files
from stages.models.checkpoint.loading import load_model, outlined
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import family

RANDOM = np.random.default_rng(0)


def floats(config, tensors):
    """The float tensors, with their outlines held against them."""
    tool = foreign.method(config, "config.json")
    found = {}
    for name, outline, make in foreign.floats(config, tool, tensors):
        found[name] = make(tensors)
        assert (found[name].shape, found[name].dtype) == (outline.shape, outline.dtype)
    return found


def word(fields, bits):
    """Fields of some bits as one signed 32-bit word, the first lowest."""
    value = sum(int(field) << (bits * place) for place, field in enumerate(fields))
    return value - 2**32 if value >= 2**31 else value


def gptq(q_IO, zero_GO, scale_GO, group_I, bits, less):
    a_word = 32 // bits
    inputs, outputs = q_IO.shape
    packed = [[word(q_IO[i : i + a_word, o], bits) for o in range(outputs)] for i in range(0, inputs, a_word)]
    zeros = [[word((row[o : o + a_word] - less) % 2**bits, bits) for o in range(0, outputs, a_word)] for row in zero_GO]
    return {
        "m.qweight": torch.tensor(packed, dtype=torch.int32), "m.qzeros": torch.tensor(zeros, dtype=torch.int32),
        "m.scales": torch.tensor(scale_GO, dtype=torch.float16), "m.g_idx": torch.tensor(group_I, dtype=torch.int32),
        "m.bias": torch.ones(outputs),
    }  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_is_scale_times_value_less_zero(bits, version):
    inputs, outputs, groups = 32, 16, 4
    q_IO = RANDOM.integers(0, 2**bits, (inputs, outputs))
    zero_GO = RANDOM.integers(0, 2**bits, (groups, outputs))
    zero_GO[0, :2] = 0, 2**bits - 1
    scale_GO = RANDOM.uniform(0.5, 2, (groups, outputs)).astype(np.float16)
    group_I = RANDOM.permutation(np.arange(inputs) % groups)  # activation order
    tensors = gptq(q_IO, zero_GO, scale_GO, group_I, bits, less=1 if version == "gptq" else 0)
    config = {"quantization_config": {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}}
    found = floats(config | {"dtype": "float16"}, tensors)
    wanted = [[(q_IO[i, o] - zero_GO[group_I[i], o]) * float(scale_GO[group_I[i], o]) for i in range(inputs)]
              for o in range(outputs)]  # fmt: skip
    assert torch.equal(found["m.weight"], torch.tensor(wanted, dtype=torch.float32).half())
    assert torch.equal(found["m.bias"], torch.ones(outputs)) and found.keys() == {"m.weight", "m.bias"}


def test_awq_is_scale_times_value_less_zero():
    inputs, outputs, groups = 12, 16, 3
    q_IO, zero_GO = (RANDOM.integers(0, 16, (rows, outputs)) for rows in (inputs, groups))
    scale_GO = RANDOM.uniform(0.5, 2, (groups, outputs)).astype(np.float16)

    def packed(rows):  # a word holds columns 0 2 4 6 1 3 5 7
        words = [
            [word([row[o + c] for c in (0, 2, 4, 6, 1, 3, 5, 7)], 4) for o in range(0, outputs, 8)] for row in rows
        ]
        return torch.tensor(words, dtype=torch.int32)

    tensors = {"m.qweight": packed(q_IO), "m.qzeros": packed(zero_GO), "m.scales": torch.tensor(scale_GO)}
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}, "torch_dtype": "float16"}
    wanted = [[(q_IO[i, o] - zero_GO[i // 4, o]) * float(scale_GO[i // 4, o]) for i in range(inputs)]
              for o in range(outputs)]  # fmt: skip
    assert torch.equal(floats(config, tensors)["m.weight"], torch.tensor(wanted, dtype=torch.float32).half())


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.rand(24) + 1, torch.rand(24, 1) + 1, torch.rand(2, 4) + 1])
def test_fp8_is_value_times_scale_of_tensor_row_or_block(scale):
    torch.manual_seed(0)
    q_OI = torch.randn(24, 32).to(torch.float8_e4m3fn)
    block = {"weight_block_size": [12, 8]} if scale.shape == (2, 4) else {}
    config = {"quantization_config": {"quant_method": "fp8", **block}}
    found = floats(config, {"m.weight": q_OI, "m.weight_scale_inv": scale, "m.input_scale": torch.ones(1)})
    grid = scale[:, None] if scale.dim() == 1 else scale
    theirs = Fp8Dequantize(None)._dequantize_one(q_OI, grid, torch.bfloat16)
    assert found.keys() == {"m.weight"} and torch.equal(found["m.weight"], theirs)


def test_fp8_blocks_that_do_not_divide_are_cut_at_the_edge():
    q_OI, scale = torch.ones(5, 6).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    wanted = [[1, 1, 1, 1, 2, 2]] * 4 + [[4, 4, 4, 4, 8, 8]]
    found = floats(config, {"m.weight": q_OI, "m.weight_scale_inv": scale})
    assert torch.equal(found["m.weight"], torch.tensor(wanted).bfloat16())


def test_bitsandbytes_of_four_bits_is_table_times_peak_of_its_block():
    table = np.linspace(-1, 1, 16).astype(np.float32)
    code, peak = RANDOM.integers(0, 16, 128), RANDOM.integers(0, 256, 8)
    outer, inner, offset = np.array([2.0, 3.0], np.float32), np.linspace(0, 1, 256).astype(np.float32), 0.25
    state = {"quant_type": "nf4", "blocksize": 16, "dtype": "bfloat16", "shape": [8, 16], "nested_blocksize": 4,
             "nested_offset": offset}  # fmt: skip
    byte = [int(code[2 * i]) << 4 | int(code[2 * i + 1]) for i in range(64)]
    tensors = {
        "m.weight": torch.tensor(byte, dtype=torch.uint8)[:, None], "m.weight.quant_map": torch.tensor(table),
        "m.weight.absmax": torch.tensor(peak, dtype=torch.uint8), "m.weight.nested_absmax": torch.tensor(outer),
        "m.weight.nested_quant_map": torch.tensor(inner),
        "m.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    wanted = [table[code[i]] * (inner[peak[i // 16]] * outer[i // 64] + np.float32(offset)) for i in range(128)]
    found = floats({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, tensors)
    assert found.keys() == {"m.weight"}
    assert torch.equal(found["m.weight"], torch.tensor(np.array(wanted, np.float32)).reshape(8, 16).bfloat16())


def test_bitsandbytes_of_eight_bits_is_value_times_a_127th_of_the_rows_peak():
    q_OI, peak_O = torch.tensor([[127, -127], [64, 0]], dtype=torch.int8), torch.tensor([2.0, 127.0])
    found = floats({"quantization_config": {"load_in_8bit": True}}, {"m.weight": q_OI, "m.SCB": peak_O})
    assert torch.equal(found["m.weight"], torch.tensor([[2.0, -2.0], [64.0, 0.0]]).bfloat16())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, "quantized by gptq; measured bits 3"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv"),
        ({"quant_method": "aqlm"}, "quantized by aqlm"),
        ({"quant_method": "modelopt"}, "quantized by modelopt.*Give the checkpoint it was made from"),
    ],
)
def test_format_that_is_not_understood_is_refused_by_name(said, message):
    with pytest.raises(StageError, match=f"mine/config.json is of a checkpoint that is {message}|{message}"):
        foreign.method({"quantization_config": said}, "mine/config.json")


def test_values_without_a_scale_or_with_a_wrong_one_are_refused():
    config, q_OI = {"quantization_config": {"quant_method": "fp8"}}, torch.ones(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(StageError, match=r"m\.weight is quantized, and the file has no scale for it"):
        floats(config, {"m.weight": q_OI})
    with pytest.raises(StageError, match=r"m.weight do not fit.*weight \(4, 4\), weight_scale_inv \(2, 2, 2\)"):
        floats(config, {"m.weight": q_OI, "m.weight_scale_inv": torch.ones(2, 2, 2)})


def test_checkpoint_is_written_as_floats_that_load(tmp_path):
    folder, out = family("llama", tmp_path), tmp_path / "out"
    out.mkdir()
    config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "dtype": "bfloat16",
    }  # fmt: skip
    tensors, wanted = {}, {}
    for name, one in read(folder).items():
        if "_proj" in name:
            q_OI, scale = (one / one.abs().max() * 448).to(torch.float8_e4m3fn), one.abs().max().reshape(1, 1) / 448
            tensors |= {name: q_OI, f"{name}_scale_inv": scale}
            wanted[name] = (q_OI.float() * scale).bfloat16().float()
        else:
            tensors[name] = wanted[name] = one.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert outlined(folder, weight_files(folder))[1] == []
    foreign.write(config, "fp8", read(folder), out / "model.safetensors", Silent())
    (out / "config.json").write_text(json.dumps(foreign.plain(config)))
    found = dict(load_model(out).named_parameters())
    assert all(torch.equal(found[name], one) for name, one in wanted.items())
