"""GGUF files become the checkpoint that they were made of."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.adapters.gguf import Reader, dequantize
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.adapters.ggufs import write_gguf


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_fp32_file_gives_back_every_tensor_config_and_token(tiny: Path, tmp_path: Path, output: Path) -> None:
    write_gguf(tiny, tmp_path / "a.gguf")
    dequantize(tmp_path / "a.gguf", output, Silent())
    original, made = load_file(tiny / "model.safetensors"), load_file(output / "model.safetensors")
    assert made.keys() == original.keys(), "the tied embedding stands once"
    assert all(torch.equal(made[name], original[name]) for name in original)
    # The library's own writer is the judge of the file's form.
    save_file(made, tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    text = "The import statement, in 2 parts:\n\tfrom x import y"
    ids = AutoTokenizer.from_pretrained(tiny)(text).input_ids
    assert AutoTokenizer.from_pretrained(output)(text).input_ids == ids
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(at)(torch.tensor([ids])).logits for at in (tiny, output)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


def test_eight_bit_file_is_within_half_a_step_of_its_source(tiny: Path, tmp_path: Path, output: Path) -> None:
    write_gguf(tiny, tmp_path / "a.gguf", kind="Q8_0")
    dequantize(tmp_path / "a.gguf", output, Silent())
    original, made = load_file(tiny / "model.safetensors"), load_file(output / "model.safetensors")
    changed = 0
    for name, tensor in original.items():
        if tensor.dim() == 1:
            assert torch.equal(made[name], tensor)
            continue
        blocks = tensor.view(-1, 32)
        # Half a step, and the rounding of the step itself to 11 bits times up to 127 steps.
        bound = blocks.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-11)
        assert ((made[name].view(-1, 32) - blocks).abs() <= bound + 1e-9).all()
        changed += int((made[name] != tensor).sum())
    assert changed > 0


def test_arrays_read_at_once_are_what_the_library_reads(tiny: Path, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "a.gguf")
    ours, theirs = Reader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    assert ours.fields.keys() == theirs.fields.keys()
    kinds = set()
    for name, one in theirs.fields.items():
        assert ours.fields[name].contents() == one.contents(), name
        assert ours.fields[name].types == one.types
        kinds.add(tuple(one.types))
    array = gguf.GGUFValueType.ARRAY
    assert {(array, gguf.GGUFValueType.STRING), (array, gguf.GGUFValueType.INT32)} <= kinds
    assert [one.data_offset for one in ours.tensors] == [one.data_offset for one in theirs.tensors]


def test_files_do_not_tell_where_they_came_from(tiny: Path, tmp_path: Path, output: Path) -> None:
    write_gguf(tiny, tmp_path / "a.gguf")
    dequantize(tmp_path / "a.gguf", output, Silent())
    for path in output.glob("*.json"):
        assert str(tmp_path) not in path.read_text()
    assert "local_files_only" not in json.loads((output / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("size", [10, 5_000, 100_000])
def test_file_that_was_cut_short_is_refused(tiny: Path, tmp_path: Path, output: Path, size: int) -> None:
    write_gguf(tiny, tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:size])
    with pytest.raises(StageError, match="cut short or no GGUF"):
        dequantize(tmp_path / "b.gguf", output, Silent())


def test_architecture_that_is_not_known_is_refused(tiny: Path, tmp_path: Path, output: Path) -> None:
    write_gguf(tiny, tmp_path / "a.gguf", architecture="mystery")
    with pytest.raises(StageError, match="architecture that is not understood"):
        dequantize(tmp_path / "a.gguf", output, Silent())


def test_tensor_that_is_missing_is_named(tiny: Path, tmp_path: Path, output: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    write_gguf(tiny, tmp_path / "a.gguf", leave_out=name)
    with pytest.raises(StageError, match=name):
        dequantize(tmp_path / "a.gguf", output, Silent())
