"""fetch: the same content is the same checkpoint from wherever it comes, and what is unsound is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

from stages.adapters.connect import pins
from stages.fetch import FETCH, FetchParams, pin
from stages.models.checkpoint.layout import INDEX, WEIGHTS
from stages.models.checkpoint.loading import load_config
from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError
from stages.runtime.execute import Outcome, execute, work_of
from stages.runtime.progress import Silent
from stages.serving.eager import eager
from tests.conftest import Seal
from tests.stages.adapters.ggufs import write_gguf
from tests.stages.adapters.wheels import make_wheel, only_wheels_of
from tests.stages.models.families import VOCABULARY, family
from tests.tiny import reference_text, tiny_tokenizer


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, to damage."""
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    return folder


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path) -> None:
    """Split model.safetensors into two shards with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    halves = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def test_checkpoint_arrives_with_every_byte_and_is_counted(shared_store: Store, dense: str, tiny: Path) -> None:
    view = shared_store.checkout(dense)
    for name in (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (view / name).read_bytes() == (tiny / name).read_bytes()
    manifest = shared_store.manifest(dense)
    assert manifest is not None
    tensors = load_file(tiny / WEIGHTS)
    assert manifest.metrics == {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "size_bytes": (tiny / WEIGHTS).stat().st_size,
        "tensors": len(tensors),
    }


def test_same_content_from_two_schemes_and_places_is_one_checkpoint(
    seal: Seal, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"pack/model/{path.name}": path.read_bytes() for path in copy.iterdir()}
    make_wheel(tmp_path / "wheels", "pack", "1", files | {"pack/model/train.py": b"raise SystemExit"})
    only_wheels_of(tmp_path / "wheels", monkeypatch)
    first = seal("fetch", {"source": copy.as_uri()})
    packed = seal("fetch", {"source": "pypi://pack==1/pack/model"})
    (copy / "README.md").write_text("does not count")
    (copy / WEIGHTS).rename(copy / "weights.safetensors")
    renamed = seal("fetch", {"source": str(copy)})
    alone = seal("fetch", {"source": str(copy / "weights.safetensors")})
    assert {first.identity, packed.identity, renamed.identity, alone.identity} == {first.identity}
    assert [o.cached for o in (first, packed, renamed, alone)] == [False, True, True, True]


def test_changed_weight_is_another_checkpoint(seal: Seal, copy: Path) -> None:
    before = seal("fetch", {"source": str(copy)}).identity
    tensors = load_file(copy / WEIGHTS)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    assert seal("fetch", {"source": str(copy)}).identity != before


def test_package_is_known_without_pip_and_downloaded_again_when_its_bytes_are_gone(
    store: Store, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "pack", "1", {f"pack/{path.name}": path.read_bytes() for path in copy.iterdir()})
    only_wheels_of(wheels, monkeypatch)
    asked = FetchParams(source="pypi://pack==1/pack")
    first = pin(asked, pins(store), Silent())
    shutil.rmtree(pins(store).downloads)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert pin(asked, pins(store), Silent()) == first
    with pytest.raises(StageError, match="no wheel"):
        execute(FETCH, first, work_of(FETCH, first, {}), store, Silent())
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    outcome = execute(FETCH, first, work_of(FETCH, first, {}), store, Silent())
    assert not outcome.cached and (store.checkout(outcome.identity) / WEIGHTS).is_file()


def test_shards_are_kept_as_they_are(seal: Seal, store: Store, copy: Path, tiny: Path) -> None:
    shard(copy)
    outcome = seal("fetch", {"source": str(copy)})
    view = store.checkout(outcome.identity)
    joined = {name: tensor for path in view.glob("*.safetensors") for name, tensor in load_file(path).items()}
    whole = load_file(tiny / WEIGHTS)
    assert joined.keys() == whole.keys() and all(torch.equal(joined[name], whole[name]) for name in whole)
    assert outcome.manifest.metrics["tensors"] == len(whole)


def test_gguf_becomes_fp32_safetensors_with_a_tokenizer(seal: Seal, store: Store, tiny: Path, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "a.gguf")
    (tmp_path / "inner").mkdir()
    shutil.copy(tmp_path / "a.gguf", tmp_path / "inner" / "b.gguf")
    one = seal("fetch", {"source": str(tmp_path / "a.gguf")})
    assert seal("fetch", {"source": str(tmp_path / "inner")}).identity == one.identity
    view = store.checkout(one.identity)
    original, made = load_file(tiny / WEIGHTS), load_file(view / WEIGHTS)
    assert made.keys() == original.keys() and all(torch.equal(made[name], original[name]) for name in original)
    assert "quantization_config" not in json.loads((view / "config.json").read_text())
    assert (view / "tokenizer.json").is_file()


def test_forced_run_of_a_gguf_reproduces_every_byte(store: Store, tiny: Path, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "a.gguf", kind="Q8_0")
    outcomes = []
    for name in ("a.gguf", "other name.gguf"):
        path = tmp_path / name
        if not path.exists():
            (tmp_path / "a.gguf").rename(path)
        params = pin(FetchParams(source=str(path)), pins(store), Silent())
        outcomes.append(execute(FETCH, params, work_of(FETCH, params, {}), store, Silent(), force=True))
    assert outcomes[0].identity == outcomes[1].identity and not outcomes[1].changed


def nan(folder: Path, value: float = float("nan"), dtype: torch.dtype = torch.float32) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = value
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def untied(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def only_adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def shard_then(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def both(folder: Path) -> None:
        shard(folder)
        change(folder)

    return both


def place_wrongly(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-1-of-2.safetensors"
    index["weight_map"]["model.embed_tokens.weight"] = "model-2-of-2.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def damage_header(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8:12] = b"????"
    (folder / WEIGHTS).write_bytes(data)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def empty_weights(folder: Path) -> None:
    save_file({"nothing": torch.zeros(0)}, folder / WEIGHTS, metadata={"format": "pt"})


def two_files(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "b.safetensors")
    (folder / WEIGHTS).rename(folder / "a.safetensors")


UNSOUND: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no checkpoint"),
    "pickle": (only_pickle, r"pytorch_model\.bin is a pickle.*Convert it to safetensors"),
    "adapter": (only_adapter, "mine is an adapter for org/base, and no checkpoint; measured LORA.*hf://org/base"),
    "cut": (lambda f: truncate(f / WEIGHTS, 90_000), "is cut short.*measured 90000 bytes; limit 1385400 bytes"),
    "cut in the header": (lambda f: truncate(f / WEIGHTS, 100), "is cut short or no safetensors"),
    "empty file": (lambda f: truncate(f / WEIGHTS, 0), "is cut short or no safetensors"),
    "header": (damage_header, "the header of .* is damaged"),
    "NaN": (nan, r"tensor model\.layers\.3\.mlp\.up_proj\.weight holds.*measured 1 NaN or infinite"),
    "infinity": (lambda f: nan(f, float("inf"), torch.bfloat16), r"tensor model\.layers\.3\.mlp"),
    "NaN in fp8": (
        lambda f: nan(f, float("nan"), torch.float8_e4m3fn),
        r"tensor model\.layers\.3\.mlp",
    ),
    "remote code": (
        lambda f: change_json(f / "config.json", auto_map={"AutoModel": "x.Y"}, model_type="mystery"),
        r"'mystery' of .*mine/config\.json is not understood: .*auto_map.*never run",
    ),
    "model type": (lambda f: change_json(f / "config.json", model_type="mystery"), "'mystery' of .* is not understood"),
    "architecture": (lambda f: change_json(f / "config.json", architectures=["MysteryLM"]), "'MysteryLM'"),
    "no architecture": (lambda f: change_json(f / "config.json", architectures=None), "names the architecture ''"),
    "quantized": (lambda f: change_json(f / "config.json", quantization_config={"quant_method": "gptq"}), "gptq"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "value of another type": (
        lambda f: change_json(f / "config.json", vocab_size="768"),
        r"no model of .*mine/config\.json; measured .*'vocab_size' expected int, got str.*Correct that field",
    ),
    "unknown rope": (
        lambda f: change_json(f / "config.json", rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        r"no model of this configuration of 'llama'; measured rope_parameters: 'spiral'",
    ),
    "unknown activation": (lambda f: change_json(f / "config.json", hidden_act="soft"), "measured hidden_act: 'soft'"),
    "no such type": (lambda f: change_json(f / "config.json", dtype="float17"), "no attribute 'float17'"),
    "tokenizer cut": (lambda f: truncate(f / "tokenizer.json", 900), "mine has no tokenizer that can be read"),
    "tokenizer of its own": (
        lambda f: change_json(
            f / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}
        ),
        r"no tokenizer that can be read.*tokenizer_config\.json that names no code \(auto_map\)",
    ),
    "settings no JSON": (lambda f: (f / "generation_config.json").write_text("{"), r"generation_config\.json .*JSON"),
    "end no number": (
        lambda f: change_json(f / "generation_config.json", eos_token_id="<end>"),
        "ends a sequence is no number; measured eos_token_id: '<end>'",
    ),
    "ties that differ": (untied, r"tied by the configuration but differ in the file.*false in .*mine/config\.json"),
    "no tokenizer": (no_tokenizer, "has no tokenizer.*save_pretrained"),
    "no parameters": (empty_weights, "mine lacks tensors of LlamaForCausalLM; measured 56 missing"),
    "two files": (two_files, "more than one checkpoint"),
    "GGUF beside": (lambda f: (f / "a.gguf").write_bytes(b"GGUF"), "more than one checkpoint"),
    "whole and index": (lambda f: (f / INDEX).write_text("{}"), "more than one checkpoint"),
    "shard missing": (
        shard_then(lambda f: (f / "model-2-of-2.safetensors").unlink()),
        "names model-2-of-2",
    ),
    "index empty": (shard_then(lambda f: (f / INDEX).write_text('{"weight_map": {}}')), "has no weight_map"),
    "index wrong": (shard_then(place_wrongly), "places tensor .* which does not hold it"),
    "tensor twice": (
        shard_then(lambda f: shutil.copy(f / "model-1-of-2.safetensors", f / "model-2-of-2.safetensors")),
        "stands in model-1-of-2.safetensors and model-2-of-2.safetensors",
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_checkpoint_is_refused_and_nothing_is_sealed(seal: Seal, store: Store, copy: Path, case: str) -> None:
    damage, message = UNSOUND[case]
    damage(copy)
    with pytest.raises(StageError, match=message) as caught:
        seal("fetch", {"source": str(copy)})
    assert "\n" not in str(caught.value)
    assert list(store.manifests()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "there is no file or folder"),
        ("a.bin", "a pickle"),
        ("a.txt", "no checkpoint"),
        ("a.gguf", "GGUF"),
    ],
)
def test_file_that_is_no_checkpoint_is_refused(seal: Seal, tmp_path: Path, name: str, message: str) -> None:
    if name != "absent":
        (tmp_path / name).write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 40)
    with pytest.raises(StageError, match=message):
        seal("fetch", {"source": str(tmp_path / name)})


@pytest.mark.filterwarnings("ignore")
def test_how_somebody_ran_or_stored_a_model_plays_no_part(seal: Seal, store: Store, copy: Path, tiny: Path) -> None:
    change_json(
        copy / "config.json", _attn_implementation="flash_attention_2", attn_implementation="flash_attention_3",
        return_dict=False, output_hidden_states=True, quantization_config=None, architectures="LlamaForCausalLM",
    )  # fmt: skip
    ids_NT = np.arange(24).reshape(2, 12) % 768
    opened = eager(store.checkout(seal("fetch", {"source": str(copy)}).identity))
    expected = eager(tiny)
    np.testing.assert_array_equal(*(one.forward(ids_NT, np.ones_like(ids_NT)) for one in (opened, expected)))
    told, wanted = (one.steps().begin(ids_NT, np.ones_like(ids_NT)) for one in (opened, expected) if one.steps)
    np.testing.assert_array_equal(told, wanted)


def test_number_without_end_in_a_configuration_is_read_as_transformers_writes_it(
    seal: Seal, store: Store, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1, state_size=4
    )
    model = Mamba2ForCausalLM(config)
    model.save_pretrained(tmp_path / "mamba")
    assert json.loads((tmp_path / "mamba" / "config.json").read_text())["time_step_limit"][1] == {
        "__float__": "Infinity"
    }
    tiny_tokenizer(reference_text()[:20_000]).save_pretrained(tmp_path / "mamba")
    arrived = store.checkout(seal("fetch", {"source": str(tmp_path / "mamba")}).identity)
    assert list(load_config(arrived).time_step_limit) == list(config.time_step_limit)


def test_files_that_changed_after_they_were_pinned_are_refused(store: Store, copy: Path) -> None:
    params = pin(FetchParams(source=str(copy)), pins(store), Silent())
    tensors = load_file(copy / WEIGHTS)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(StageError, match="not what it was"):
        execute(FETCH, params, work_of(FETCH, params, {}), store, Silent())
    assert list(store.manifests()) == []


def test_gguf_that_changed_is_another_checkpoint_and_not_the_pinned_one(
    store: Store, copy: Path, tmp_path: Path
) -> None:
    write_gguf(copy, tmp_path / "a.gguf")
    before = pin(FetchParams(source=str(tmp_path / "a.gguf")), pins(store), Silent())
    tensors = load_file(copy / WEIGHTS)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    write_gguf(copy, tmp_path / "a.gguf")
    after = pin(FetchParams(source=str(tmp_path / "a.gguf")), pins(store), Silent())
    assert work_of(FETCH, after, {}) != work_of(FETCH, before, {})
    with pytest.raises(StageError, match="not what it was"):
        execute(FETCH, before, work_of(FETCH, before, {}), store, Silent())
    assert list(store.manifests()) == []


def test_digest_that_a_recipe_demands_is_held_against_the_source(store: Store, copy: Path) -> None:
    with pytest.raises(StageError, match=r"not what it was.*limit 000000000000"):
        pin(FetchParams(source=str(copy), digest="0" * 64), pins(store), Silent())


def test_files_of_the_user_stay_as_they_were(seal: Seal, copy: Path) -> None:
    (copy / WEIGHTS).chmod(0o640)
    outcome: Outcome = seal("fetch", {"source": str(copy)})
    assert not outcome.cached
    found = (copy / WEIGHTS).stat()
    assert found.st_mode & 0o777 == 0o640 and found.st_nlink == 1


def test_progress_reaches_its_total(store: Store, copy: Path) -> None:
    class Heard(Silent):
        shown: list[float] = []  # noqa: RUF012

        def advanced(self, done: float, total: float) -> None:
            self.shown.append(done / total)

    params = pin(FetchParams(source=str(copy)), pins(store), Silent())
    execute(FETCH, params, work_of(FETCH, params, {}), store, Heard())
    assert np.all(np.diff(Heard.shown) >= 0) and Heard.shown[-1] == 1


class Noted(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def fetched(folder: Path, store: Store) -> tuple[Path, Outcome, list[str]]:
    """The sealed checkpoint of a folder, and what fetch said of it."""
    heard = Noted()
    params = pin(FetchParams(source=str(folder)), pins(store), heard)
    outcome = execute(FETCH, params, work_of(FETCH, params, {}), store, heard)
    return store.checkout(outcome.identity), outcome, heard.said


def test_what_the_architecture_does_not_read_is_said_and_does_not_count(store: Store, copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "score.weight": torch.ones(2, 64)}
    save_file(tensors | more, copy / WEIGHTS, metadata={"format": "pt"})
    _, outcome, said = fetched(copy, store)
    assert any("2 tensors" in text and all(name in text for name in more) for text in said)
    assert outcome.manifest.metrics["parameters"] == sum(tensor.numel() for tensor in tensors.values())


def test_code_beside_a_type_that_transformers_has_is_neither_run_nor_copied_and_said(store: Store, copy: Path) -> None:
    (copy / "modeling_own.py").write_text("raise SystemExit('code of others ran')")
    change_json(copy / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Llama"})
    view, _, said = fetched(copy, store)
    assert not list(view.glob("*.py")) and any("auto_map" in text and "the code never" in text for text in said)


def test_eight_bit_floats_of_another_tool_become_sixteen_bits_and_it_is_said(store: Store, copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    scale, wide = tensors[name].abs().max() / 448, tensors[name]
    tensors |= {name: (wide / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    foreign = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    change_json(copy / "config.json", quantization_config=foreign, dtype="float16")
    view, outcome, said = fetched(copy, store)
    assert any("quantized by fp8" in text and "float16" in text for text in said)
    config = json.loads((view / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float16"
    made = load_file(view / WEIGHTS)
    assert torch.equal(made[name], (tensors[name].float() * scale).half())
    assert torch.equal(made["model.norm.weight"], tensors["model.norm.weight"])
    assert outcome.manifest.metrics["parameters"] == sum(tensor.numel() for tensor in made.values())
    assert (view / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()


def test_checkpoint_in_the_layout_of_compressed_tensors_comes_back_and_is_not_quantized_again(
    seal: Seal, store: Store, tiny: Path, tmp_path: Path
) -> None:
    packed = {"scheme": "int8_weight_only", "embedding": "keep", "layout": "compressed-tensors"}
    first = seal("quantize", packed, model=seal("fetch", {"source": str(tiny)}).identity)
    shutil.copytree(store.checkout(first.identity), tmp_path / "back")
    again = seal("fetch", {"source": str(tmp_path / "back")})
    view = store.checkout(again.identity)
    assert (view / WEIGHTS).read_bytes() == (store.checkout(first.identity) / WEIGHTS).read_bytes()
    assert "quantization_config" in json.loads((view / "config.json").read_text())
    with pytest.raises(StageError, match=r"quantized already.*or give the float checkpoint"):
        seal("quantize", {"scheme": "int8_weight_only"}, model=again.identity)


def test_adapter_is_merged_into_its_base_and_both_are_pinned(
    seal: Seal, store: Store, copy: Path, tiny: Path, tmp_path: Path
) -> None:
    only_adapter(copy)
    path = "model.layers.0.self_attn.q_proj"
    a_rI, b_Or = torch.randn(2, 64), torch.randn(64, 2)
    lora = {f"base_model.model.{path}.lora_A.weight": a_rI, f"base_model.model.{path}.lora_B.weight": b_Or}
    save_file(lora, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    change_json(copy / "adapter_config.json", r=2, lora_alpha=3)
    asked = {"source": str(copy), "base": str(tiny)}
    view = store.checkout(seal("fetch", asked).identity)
    before, after = load_file(tiny / WEIGHTS), load_file(view / WEIGHTS)
    assert torch.allclose(after[f"{path}.weight"], before[f"{path}.weight"] + 1.5 * b_Or @ a_rI, atol=1e-5)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 1
    assert (view / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert seal("fetch", asked).cached
    with pytest.raises(StageError, match=r"not what it was.*limit 000000000000"):
        seal("fetch", asked | {"base_digest": "0" * 64})
    with pytest.raises(StageError, match="is no adapter, and a `base` is given for it"):
        seal("fetch", {"source": str(tiny), "base": str(tiny)})
    write_gguf(tiny, tmp_path / "base.gguf")
    params = FetchParams(source=str(copy), base=str(tmp_path / "base.gguf"))
    with pytest.raises(StageError, match="an adapter is merged into a folder, and ") as work:
        FETCH.run(params, {}, tmp_path / "out", Silent())
    with pytest.raises(StageError) as ahead:
        FETCH.admit(params, {})
    assert str(ahead.value) == str(work.value)


def test_modules_of_sentence_transformers_arrive_in_folders_of_their_own(seal: Seal, store: Store, copy: Path) -> None:
    (copy / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text("{}")
    first = seal("fetch", {"source": str(copy)}).identity
    second = seal("quantize", {"scheme": "int8_weight_only"}, model=first).identity
    for view in map(store.checkout, (first, second)):
        assert (view / "modules.json").is_file() and (view / "1_Pooling" / "config.json").read_text() == "{}"


def sentence_pieces(count: int) -> bytes:
    """A sentencepiece model of the reference text."""
    pieces, made = pytest.importorskip("sentencepiece"), io.BytesIO()
    sentences = iter(reference_text()[:5_000].split("\n\n"))
    pieces.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=made, vocab_size=count, hard_vocab_limit=False, minloglevel=2
    )
    return made.getvalue()


@pytest.mark.filterwarnings("ignore")  # transformers recommends a library
def test_translator_arrives_with_both_of_its_sentence_pieces(seal: Seal, store: Store, tmp_path: Path) -> None:
    folder = family("marian", tmp_path)
    spoken = {"<unk>": 0, "</s>": 1, "<pad>": 2}
    tokenizer = {
        "source.spm": sentence_pieces(60), "target.spm": sentence_pieces(61), "vocab.json": json.dumps(spoken).encode(),
        "tokenizer_config.json": b'{"source_lang": "a", "target_lang": "b"}',
    }  # fmt: skip
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    first = seal("fetch", {"source": folder.as_uri()})
    view = store.checkout(first.identity)
    assert {name: (view / name).read_bytes() for name in tokenizer} == tokenizer
    (folder / "target.spm").write_bytes(sentence_pieces(62))
    assert seal("fetch", {"source": folder.as_uri()}).identity != first.identity
    (folder / "target.spm").unlink()
    with pytest.raises(StageError, match="has no tokenizer"):
        seal("fetch", {"source": folder.as_uri()})
