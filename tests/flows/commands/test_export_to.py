"""`enginery export-to`: what is handed over is opened by the tool that it is for, and says the same."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import json
import shutil

import gguf
import numpy as np
import onnxruntime
import onnxruntime_genai as genai
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from flows.cli import main
from flows.registry.journal import Candidate, Executable
from flows.registry.projection import Registry, reconcile, release
from stages.adapters.gguf import dequantize
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers import quantized_linear, rounded_cache
from stages.models.layers.quantization_spec import annotate
from stages.models.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear
from stages.runtime.progress import Silent
from stages.runtime.stores import LocalObjects
from stages.serving.engine import open_engine
from tests.conftest import sealer
from tests.engines import mixed, mixed_graph, one_block, rounded, token_windows
from tests.flows.recorded import tracking_in
from tests.flows.registry.test_served import chain
from tests.stages.models import families
from tests.stages.models.families import FAMILIES

PROMPTS = ["The for statement is used to", "A class", "If the expression is found to be true, then the suite"]


@pytest.fixture
def handed(capsys, tmp_path):
    """handed(MODEL, format, ...) -> the folder and what was printed."""

    def run(model, form, *more):
        capsys.readouterr()
        folder = tmp_path / f"to-{form}"
        assert main(["export-to", str(model), str(folder), "--format", form, *map(str, more)]) == 0
        told = capsys.readouterr()
        assert not told.err
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        return folder, told.out

    return run


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["export-to", *map(str, words)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and "defect" not in told.err, told.err
    return told.err


def by_transformers(folder, ids, **how):
    with torch.no_grad():
        model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        return model.eval()(torch.from_numpy(ids)).logits.float().numpy()


def by_gguf(folder, ids):
    """What such a file answers as `fetch` brings it, and by transformers' own loader, which wants accelerate."""
    read = folder.parent / "read"
    shutil.rmtree(read, ignore_errors=True)
    read.mkdir()
    dequantize(folder / "model.gguf", read, Silent())
    found = by_transformers(read, ids)
    assert np.allclose(by_transformers(folder, ids, gguf_file="model.gguf"), found, rtol=0, atol=1e-4)
    return found


def test_checkpoint_for_transformers_has_the_same_bytes_and_the_chat_template(knowing, handed):
    folder, _ = handed(knowing, "hf")
    for path in folder.iterdir():
        assert path.read_bytes() == (knowing / path.name).read_bytes()
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    told = [AutoTokenizer.from_pretrained(at).apply_chat_template(talk, tokenize=False) for at in (folder, knowing)]
    assert told[0] == told[1]
    assert (folder / "generation_config.json").is_file() and (folder / "model.safetensors").is_file()


def test_engine_of_every_kind_of_map_becomes_what_transformers_opens(shared_store, mixed_graph, handed):
    made = sealer(shared_store)("compile", {"backend": "onnxruntime", "maximum_tokens": 64}, graph=mixed_graph.name)
    folder, said = handed(made.identity[:12], "hf", "--store", shared_store.uri)
    assert "note: quantized weights are written as floats" in said and "note: activations are rounded no more" in said
    assert not (folder / "quantization.json").exists() and not (folder / "structure.json").exists()
    ids = token_windows(2, 17)
    wanted = open_engine(shared_store.checkout(made.identity)).logits(ids)
    found = by_transformers(folder, ids)
    # The engine rounds the activations of one block, a plain model none.
    assert 0 < np.abs(found - wanted).mean() < 0.02 * wanted.std()


def cut(tiny, folder):
    """A checkpoint with a block of fewer channels and one head group less, as surgery leaves them."""
    model = load_model(tiny)
    mlp, attention = model.model.layers[2].mlp, model.model.layers[4].self_attn

    def keep(linear, rows, columns):
        made = torch.nn.Linear(columns, rows, bias=False)
        made.weight = torch.nn.Parameter(linear.weight.data[:rows, :columns].clone())
        return made

    mlp.gate_proj, mlp.up_proj = keep(mlp.gate_proj, 100, 64), keep(mlp.up_proj, 100, 64)
    mlp.down_proj = keep(mlp.down_proj, 64, 100)
    attention.q_proj, attention.o_proj = keep(attention.q_proj, 32, 64), keep(attention.o_proj, 64, 32)
    attention.k_proj, attention.v_proj = keep(attention.k_proj, 16, 64), keep(attention.v_proj, 16, 64)
    save_model(model, folder, like=tiny)
    return folder


def test_blocks_of_unequal_size_are_filled_up_and_answer_the_same(tiny, tmp_path, handed):
    source = cut(tiny, tmp_path / "cut")
    assert (source / "structure.json").is_file()
    ids = token_windows(2, 40)
    wanted = open_engine(source).logits(ids)
    folder, said = handed(source, "hf")
    assert "filled up with zeros" in said and not (folder / "structure.json").exists()
    assert np.abs(by_transformers(folder, ids) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(by_transformers(tiny, ids) - wanted).max() > 0.1
    folder, _ = handed(source, "gguf", "--dtype", "f32")
    found = by_gguf(folder, ids)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_rounded_table_and_cache_become_floats_and_it_is_said(tiny, tmp_path, handed):
    model, plain = load_model(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    table, head = QuantizedEmbedding(768, 64), QuantizedLinear(64, 768)
    table.weight, table.weight_scale = rounded(model.model.embed_tokens.weight.data)
    head.weight, head.weight_scale = table.weight, table.weight_scale
    quantized_linear.replace(model, "model.embed_tokens", table)
    quantized_linear.replace(model, "lm_head", head)
    rounded_cache.put(model, "int8", {f"model.layers.{block}.self_attn": (0.05, 0.05) for block in range(6)})
    annotate(model, rounded_cache.described(model), {})
    save_model(model, tmp_path / "rounded", like=tiny)
    folder, said = handed(tmp_path / "rounded", "hf")
    assert "note: keys and values are rounded no more in 6 layers" in said and "table of INT8 rows" in said
    ids = token_windows(2, 40)
    with torch.no_grad():
        plain.model.embed_tokens.weight.copy_(table.weight * table.weight_scale[:, None])
        wanted = plain.eval()(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(by_transformers(folder, ids) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(open_engine(tmp_path / "rounded").logits(ids) - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_rounded_classifier_that_generates_nothing_is_opened_and_answers_the_same(tmp_path, handed):
    source = families.family("bert_classes", tmp_path)
    model = load_model(source)
    table = QuantizedEmbedding(*model.get_input_embeddings().weight.shape)
    table.weight, table.weight_scale = rounded(model.get_input_embeddings().weight.data)
    quantized_linear.replace(model, "bert.embeddings.word_embeddings", table)
    annotate(model, {}, {})
    save_model(model, tmp_path / "rounded", like=source)
    folder, said = handed(tmp_path / "rounded", "hf")
    assert "table of INT8 rows" in said
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        found = AutoModelForSequenceClassification.from_pretrained(folder).eval()(ids).logits
        assert torch.allclose(found, model(ids).logits, rtol=0, atol=1e-5)


def test_quantized_maps_stay_quantized_where_transformers_has_the_layout(shared_store, tiny, tmp_path, handed):
    seal = sealer(shared_store)
    dense = seal("fetch", {"source": one_block(tiny, tmp_path / "one").as_uri()}).identity
    made = seal("quantize", {"scheme": "int8_weight_only", "embedding": "keep"}, model=dense)
    source = shared_store.checkout(made.identity)
    folder, said = handed(source, "hf")
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
    assert "note: the quantized maps are stored as compressed-tensors" in said
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    ids = token_windows(2, 17)
    wanted = open_engine(source).logits(ids)
    found = by_transformers(folder, ids)
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


def looped(folder, ids, new):
    """Greedy tokens by a plain loop over a graph's cache."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    past = {
        one.name: np.zeros((1, one.shape[1], len(ids) + new, one.shape[3]), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("past_key_values")
    }
    outputs = [one.name for one in session.get_outputs()]
    said, fed, length = [], ids, 0
    for _ in range(new):
        feeds = {
            "input_ids": np.array([fed]),
            "past_lengths": np.array([length]),
            "logits_at": np.array([[len(fed) - 1]]),
        }
        logits, *present = session.run(outputs, feeds | past)
        length, past = length + len(fed), dict(zip(past, present, strict=True))
        fed = [int(logits[0, 0].argmax())]
        said += fed
    return said


def test_graph_of_an_engine_is_run_by_a_plain_loop_of_onnxruntime(shared_store, mixed_graph, handed):
    made = sealer(shared_store)("compile", {"backend": "onnxruntime", "maximum_tokens": 64}, graph=mixed_graph.name)
    folder, _ = handed(made.identity[:12], "onnx", "--store", shared_store.uri)
    assert (folder / "model.onnx").read_bytes() == (mixed_graph / "model.onnx").read_bytes()
    tokenizer, opened = AutoTokenizer.from_pretrained(folder), open_engine(mixed_graph)
    for prompt in PROMPTS:
        text = tokenizer.decode(looped(folder, tokenizer(prompt).input_ids, 8), skip_special_tokens=True)
        assert text == opened.generate([prompt], max_new_tokens=8)[0]


def by_genai(folder, prompts, new):
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    rows = [[int(one) for one in tokenizer.encode(prompt)] for prompt in prompts]
    longest = max(map(len, rows))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=longest + new, batch_size=len(rows))
    generator = genai.Generator(model, params)
    pad = json.loads((folder / "genai_config.json").read_text())["model"]["pad_token_id"]
    generator.append_tokens(np.array([row + [pad] * (longest - len(row)) for row in rows], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    ends = AutoTokenizer.from_pretrained(folder)
    return [
        ends.decode([int(one) for one in generator.get_sequence(row)][longest:], skip_special_tokens=True)
        for row in range(len(rows))
    ]


@pytest.mark.parametrize("made", ["engine", "graph"])
def test_engine_and_graph_are_opened_by_onnxruntime_genai_and_say_the_same(shared_store, mixed_graph, handed, made):
    engine = sealer(shared_store)("compile", {"backend": "onnxruntime", "maximum_tokens": 64}, graph=mixed_graph.name)
    source = shared_store.checkout(engine.identity) if made == "engine" else mixed_graph
    folder, _ = handed(source, "genai", "--store", shared_store.uri)
    wanted = open_engine(source).generate(PROMPTS, max_new_tokens=10)
    for prompt, one in zip(PROMPTS, wanted, strict=True):
        assert by_genai(folder, [prompt], 10) == [one]
    assert by_genai(folder, PROMPTS, 10) == wanted


@pytest.mark.parametrize(("dtype", "slack"), [("f32", 1e-4), ("f16", 5e-3), ("q8_0", 0.1)])
def test_gguf_file_is_opened_by_transformers_and_says_the_same(knowing, handed, dtype, slack):
    folder, _ = handed(knowing, "gguf", "--dtype", dtype)
    ids = np.random.default_rng(3).integers(4, 640, (2, 40))
    wanted, found = by_transformers(knowing, ids), by_gguf(folder, ids)
    missed = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert (0 if dtype == "f32" else 1e-5) <= missed < slack
    kinds = {one.tensor_type.name for one in gguf.GGUFReader(folder / "model.gguf").tensors if len(one.shape) > 1}
    assert kinds == {dtype.upper()}
    theirs, ours = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf"), AutoTokenizer.from_pretrained(knowing)
    for text in ("What is the capital of France?", "<user>  don't, 12", "巴黎\n\ttabs"):
        assert theirs(text).input_ids == ours(text).input_ids
    assert theirs.chat_template == ours.chat_template and theirs.eos_token_id == ours.eos_token_id


def renamed(tiny, folder, family):
    """A random model of a family with the tiny Llama's vocabulary and tokenizer."""
    name, config, how = FAMILIES[family]
    torch.manual_seed(2)
    # transformers reads no other size of a Qwen3's heads from such a file.
    how = how | {"vocab_size": 768, "eos_token_id": 0, "head_dim": 128 if family == "qwen3" else how["head_dim"]}
    model = getattr(transformers, name)(getattr(transformers, config)(**how))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    for one in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / one, folder / one)
    return folder


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_llama_types_become_gguf_files_of_their_own_names(tiny, tmp_path, handed, family):
    source = renamed(tiny, tmp_path / family, family)
    folder, _ = handed(source, "gguf", "--dtype", "f32")
    ids = token_windows(2, 20)
    wanted, found = by_transformers(source, ids), by_gguf(folder, ids)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_what_gguf_does_not_hold_is_refused_by_name_before_any_weight_is_read(tiny, tmp_path, capsys):
    for name, changes, text in (
        ("gpt2", {"model_type": "gpt2"}, "its type is not written; measured gpt2; limit llama, qwen2, qwen3"),
        ("biased", {"attention_bias": True}, "its maps have a bias; measured attention_bias"),
        (
            "scaled",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "its positions are scaled; measured yarn",
        ),
        ("gelu", {"hidden_act": "gelu"}, "its activation is not written; measured gelu"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(tiny / "tokenizer.json", folder / "tokenizer.json")
        config = json.loads((tiny / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))  # and no weights
        assert text in refused(capsys, folder, tmp_path / "to", "--format", "gguf")
    pieces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer = json.loads((tiny / "tokenizer.json").read_text()) | {"pre_tokenizer": pieces}
    (folder / "config.json").write_text((tiny / "config.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer is not written; measured BPE behind Metaspace" in refused(
        capsys, folder, tmp_path / "to", "--format", "gguf"
    )
    assert not (tmp_path / "to").exists()


def copied(tiny, folder, **files):
    """The tiny Llama, with other values in these files of it."""
    shutil.copytree(tiny, folder)
    for name, changes in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))
    return folder


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (
            {"tokenizer": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}},
            "it puts a space before each text; measured add_prefix_space: true; limit false",
        ),
        (
            {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "unk_token": "<end>"}},
            "it puts a space before each text",
        ),
        ({"tokenizer": {"normalizer": {"type": "Lowercase"}}}, "it changes texts before it splits them; measured Low"),
    ],
)
def test_tokenizer_that_changes_texts_becomes_no_gguf_file(tiny, tmp_path, capsys, files, text):
    source = copied(tiny, tmp_path / "source", **files)
    assert text in refused(capsys, source, tmp_path / "to", "--format", "gguf")


def test_composed_texts_of_a_gguf_file_are_told_of(tiny, tmp_path, handed):
    source = copied(tiny, tmp_path / "source", tokenizer={"normalizer": {"type": "NFC"}})
    assert "note: readers of GGUF split texts as they come" in handed(source, "gguf")[1]


def test_gguf_file_has_the_tokens_that_transformers_reads(tiny, tmp_path, handed):
    """Its class splits otherwise than tokenizer.json says."""
    source = copied(tiny, tmp_path / "source", tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    theirs, folder = AutoTokenizer.from_pretrained(source), handed(source, "gguf")[0]
    ours = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    texts = ("Return the 12345th, don't", "one\n\n two")
    assert any(AutoTokenizer.from_pretrained(tiny)(text).input_ids != theirs(text).input_ids for text in texts)
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids


def test_ends_of_a_gguf_file_are_the_checkpoints_and_its_chats_own_is_the_first(tiny, tmp_path, handed):
    source = copied(tiny, tmp_path / "source", generation_config={"eos_token_id": [5, 0, 7, 9]})
    folder, said = handed(source, "gguf")
    assert "9 end none any more" in said and "5" not in said.partition("three tokens")[2].partition("\n")[0]
    assert AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").eos_token_id == 0
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    held = [int(fields[f"tokenizer.ggml.{one}_token_id"].parts[-1][0]) for one in ("eos", "eot", "eom")]
    assert held == [0, 5, 7]
    (tmp_path / "read").mkdir()
    dequantize(folder / "model.gguf", tmp_path / "read", Silent())
    assert open_engine(tmp_path / "read").ends == {0, 5, 7}


def test_folder_is_written_whole_or_not_at_all(tiny, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    assert "taken is there already; limit no folder, or an empty one" in refused(capsys, tiny, taken, "--format", "hf")
    assert [path.name for path in taken.iterdir()] == ["mine"]
    broken = shutil.copytree(tiny, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.5.mlp.up_proj.weight"] *= 1e6
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    text = refused(capsys, broken, tmp_path / "to", "--format", "gguf")
    assert "does not fit into f16; measured" in text and "Take --dtype f32." in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "taken"]
    (tmp_path / "to").mkdir()
    assert main(["export-to", str(tiny), str(tmp_path / "to"), "--format", "hf"]) == 0
    assert (tmp_path / "to" / "config.json").stat().st_mode & 0o044


def test_what_cannot_be_handed_over_is_one_line(tiny, shared_store, mixed_graph, tmp_path, capsys):
    to = tmp_path / "to"
    assert "a checkpoint becomes no graph by --format onnx" in refused(capsys, tiny, to, "--format", "onnx")
    assert "--dtype is for gguf, not for hf" in refused(capsys, tiny, to, "--format", "hf", "--dtype", "f16")
    assert "a graph without a cache" in refused(capsys, chain(tmp_path / "chain"), to, "--format", "genai")
    copied = shutil.copytree(mixed_graph, tmp_path / "copied")
    (copied / "tokenizer_config.json").write_text("{}")
    told = refused(capsys, copied, to, "--format", "hf", "--store", shared_store.uri)
    assert "what copied was made from is not there; measured no artifact of these bytes in" in told
    assert "--format" in refused(capsys, tiny, to, "--format", "pickle")
    assert not to.exists()


@pytest.mark.fault
def test_registered_engine_leads_to_its_checkpoint(shared_store, mixed, mixed_graph, tmp_path, handed, monkeypatch):
    made = sealer(shared_store)("compile", {"backend": "onnxruntime", "maximum_tokens": 64}, graph=mixed_graph.name)
    registry = Registry(LocalObjects(tmp_path / "journal"), tracking_in(tmp_path / "mlflow"))
    run = registry.client.create_run(registry.tracking.experiment_id).info.run_id
    candidate = Candidate(
        model="mixed",
        serves="cpu",
        executables={"cpu": Executable(fingerprint=made.identity, target="onnxruntime:cpu", judged=True)},
        verdict={"passed": True},
        run=run,
    )
    release(registry, candidate, shared_store.checkout(made.identity), "champion", against=0)
    reconcile(registry, "mixed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking.uri)
    folder, _ = handed("models:/mixed@champion", "hf", "--store", shared_store.uri)
    ids = token_windows(1, 9)
    wanted = open_engine(mixed).logits(ids)
    assert np.abs(by_transformers(folder, ids) - wanted).mean() < 0.02 * wanted.std()
