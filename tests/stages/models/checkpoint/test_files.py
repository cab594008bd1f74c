from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.models.checkpoint import files
from stages.models.memory import pages
from stages.runtime.contract import StageError

MIB = 1 << 20


def resident():
    """Bytes of mapped files in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


@pytest.fixture
def big(tmp_path):
    """A checkpoint of three tensors of 8 MiB."""
    torch.manual_seed(0)
    made = {name: torch.randn(2 * MIB) for name in "abc"}
    save_file(made, tmp_path / "model.safetensors", {"format": "pt"})
    return made, files.read(tmp_path)


def test_write_gives_the_bytes_of_the_formats_own_writer(tmp_path):
    torch.manual_seed(0)
    floats = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
    integers = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32]
    made = {f"z{i}.{dtype}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate(floats)}
    made |= {f"a{i}": torch.arange(7).to(dtype) for i, dtype in enumerate(integers)}
    made |= {
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "ü": torch.randn(2),
        "exponent": torch.ones(3).to(torch.float8_e8m0fnu),
    }
    save_file(made, tmp_path / "theirs", {"format": "pt"})
    files.write(tmp_path / "ours", made)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_write_of_strided_views_stores_them_row_by_row(tmp_path):
    x = torch.randn(6, 4)
    files.write(tmp_path / "a", {"t": x.t(), "part": x[1:4, 2:]})
    again = load_file(tmp_path / "a")
    assert torch.equal(again["t"], x.t())
    assert torch.equal(again["part"], x[1:4, 2:])


def test_write_of_a_type_that_the_format_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(StageError, match=r"odd cannot be stored; measured torch\.complex128"):
        files.write(tmp_path / "a", {"odd": torch.zeros(2, dtype=torch.complex128)})
    assert not (tmp_path / "a").exists()


def test_headers_alone_tell_shapes_and_types(tmp_path):
    files.write(tmp_path / "model.safetensors", {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
    assert files.shapes(tmp_path) == {"a": (2, 3), "b": (4,)}
    assert files.dtypes(tmp_path) == {"a": "F32", "b": "BF16"}
    assert files.stored_parameters(tmp_path) == 10
    files.write(
        tmp_path / "model.safetensors",
        {"a": torch.zeros(3), "mask": torch.zeros(5, dtype=torch.uint8), "at": torch.zeros(3, dtype=torch.int16)},
    )
    assert files.stored_parameters(tmp_path) == 3 + 2 + 2


def test_forget_gives_the_memory_back_and_the_values_stay(big):
    made, stored = big
    for tensor in stored.values():
        tensor.sum()
    before = resident()
    assert pages.forget(stored["a"]) > 4 * MIB
    assert before - resident() > 4 * MIB
    assert torch.equal(stored["a"], made["a"])
    module = nn.Module()
    module.one, module.two = nn.Parameter(stored["b"]), nn.Parameter(stored["c"].view(-1, 2).t())
    module.same = module.one
    stored["a"].sum()
    before = resident()
    assert 10 * MIB < pages.release(module) <= 17 * MIB
    assert before - resident() > 10 * MIB


def test_pieces_are_all_of_a_tensor_and_no_more_than_one_of_them_stays(big, monkeypatch):
    made, stored = big
    monkeypatch.setattr(pages, "_PIECE", MIB // 4)
    before, most, seen = resident(), 0, []
    for part in pages.pieces(stored["a"].view(-1, 4)):
        seen.append(part.clone())
        most = max(most, resident() - before)
    assert len(seen) == 8
    assert most < 4 * MIB
    assert torch.equal(torch.cat(seen).flatten(), made["a"])
    for odd in (torch.tensor(3.0), torch.empty(0, 5), torch.empty(5, 0), made["a"].view(-1, 4).t()):
        parts = list(pages.pieces(odd))
        assert torch.equal(torch.cat(parts) if odd.dim() else parts[0], odd)


def test_own_tensor_is_written_to_outside_the_files_pages_and_stays_tied(big):
    made, stored = big
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    one.weight = other.weight = nn.Parameter(stored["a"].view(-1, 2), requires_grad=False)
    one.weight.sum()
    before = resident()
    pages.own(one.weight)
    assert before - resident() > 4 * MIB
    one.weight.mul_(2)
    assert resident() < before - 4 * MIB
    assert other.weight is one.weight
    assert torch.equal(other.weight, 2 * made["a"].view(-1, 2))
    assert torch.equal(stored["a"], made["a"])
    assert pages.forget(one.weight) == 0


@pytest.mark.parametrize("write", ["in_place", "data", "numpy", "detached"])
def test_forget_never_loses_what_was_written(big, write):
    made, stored = big
    tensor = stored["b"]
    tensor.sum()
    places = [0, 5, 70_001, 1_500_000, 2 * MIB - 1]
    for place in places:
        if write == "in_place":
            tensor[place] = 7
        elif write == "data":
            tensor.data[place] = 7
        elif write == "numpy":
            tensor.numpy()[place] = np.float32(7)
        else:
            tensor.detach().view(2, -1)[place // MIB, place % MIB] = 7
    expected = made["b"].clone()
    expected[places] = 7
    assert pages.forget(tensor) > 2 * MIB
    assert torch.equal(tensor, expected)
    assert pages.forget(tensor) > 0
    assert torch.equal(tensor, expected)
    assert torch.equal(stored["a"], made["a"])
    assert torch.equal(stored["c"], made["c"])


def test_forget_of_memory_that_no_file_holds_does_nothing(monkeypatch, tmp_path, big):
    own = torch.randn(1 << 18)
    before = own.clone()
    assert pages.forget(own) == 0
    assert torch.equal(own, before)
    assert pages.forget(torch.empty(0)) == 0
    assert pages.forget(torch.empty(5, device="meta")) == 0
    monkeypatch.setattr(pages, "_PAGEMAP", tmp_path / "absent")
    big[1]["a"].sum()
    assert pages.forget(big[1]["a"]) == 0
