import base64
import hashlib
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, LlamaForCausalLM

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.files import stored_parameters
from stages.models.checkpoint.loading import load_config, load_model, load_tokenizer, save_model
from stages.models.layers import low_rank_linear
from stages.runtime.contract import StageError
from tests.stages.models.checkpoint.test_files import resident
from tests.stages.models.families import family
from tests.tiny import reference_text

IDS = torch.arange(48).view(2, 24) * 7 % 768


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_load_model_gives_the_logits_of_the_library(tiny):
    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ours = load_model(tiny)
    assert not ours.training
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def test_load_model_tied_head_is_one_tensor(tiny):
    model = load_model(tiny)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert stored_parameters(tiny) == sum(p.numel() for p in model.parameters())


def test_load_model_in_half_precision_converts_parameters_only(tiny):
    model = load_model(tiny, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_load_model_training_never_reaches_the_file(copy):
    before = hashlib.sha256((copy / "model.safetensors").read_bytes()).digest()
    model = load_model(copy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert hashlib.sha256((copy / "model.safetensors").read_bytes()).digest() == before
    assert model.model.norm.weight.requires_grad


def test_save_model_reload_gives_equal_logits_and_equal_bytes(tiny, tmp_path):
    model = load_model(tiny)
    save_model(model, tmp_path / "a", like=tiny)
    again = load_model(tmp_path / "a")
    save_model(again, tmp_path / "b", like=tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(files)
    assert "structure.json" not in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert torch.equal(logits(library), logits(model))
    assert str(tmp_path) not in (tmp_path / "a" / "config.json").read_text()


def test_save_model_shared_basis_is_stored_once_and_shared_after_reload(tiny, tmp_path):
    model = load_model(tiny)
    paths = [f"model.layers.{i}.self_attn.{r}_proj" for i in (2, 3) for r in "qk"]
    low_rank_linear.install(model, {"shared": [{"modules": paths, "rank": 24}]})
    with torch.no_grad():
        for path in paths:
            model.get_submodule(path).coefficient.weight.normal_()
        model.get_submodule(paths[0]).basis.weight.normal_()
    save_model(model, tmp_path / "a", like=tiny)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert [name for name in stored if name.endswith("basis.weight")] == [f"{paths[0]}.basis.weight"]
    again = load_model(tmp_path / "a")
    assert len({id(again.get_submodule(path).basis) for path in paths}) == 1
    assert torch.equal(logits(again), logits(model))
    assert low_rank_linear.describe(again) == low_rank_linear.describe(model)
    assert (
        anatomy.block_parameters(again)
        == anatomy.block_parameters(model)
        == sum(tensor.numel() for name, tensor in stored.items() if ".layers." in name)
    )


def test_save_model_tied_matrices_are_stored_once_and_tied_after_reload(tiny, tmp_path):
    model = load_model(tiny)
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"]
    low_rank_linear.tie(model, names)
    save_model(model, tmp_path / "a", like=tiny)
    again = load_model(tmp_path / "a")
    assert again.get_parameter(names[0]) is again.get_parameter(names[1])
    assert stored_parameters(tmp_path / "a") == stored_parameters(tiny) - 64 * 192
    assert torch.equal(logits(again), logits(model))


def test_load_model_untied_head_with_biases_survives_a_reload(tiny, tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=768, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.layers[1].mlp.up_proj.bias.data.normal_()
    save_model(model, tmp_path / "a", like=tiny)
    again = load_model(tmp_path / "a")
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_load_model_shards_are_read_by_their_index(tiny, tmp_path):
    model = load_model(tiny)
    model.save_pretrained(tmp_path / "s", max_shard_size="300KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load_model(tmp_path / "s")), logits(model))
    next((tmp_path / "s").glob("model-00002*")).unlink()
    with pytest.raises(StageError, match="lacks model-00002"):
        load_model(tmp_path / "s")


def test_load_model_index_that_leaves_the_folder_is_refused(copy):
    (copy / "model.safetensors").rename(copy.parent / "out.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../out.safetensors"}}))
    with pytest.raises(StageError, match="outside the checkpoint"):
        load_model(copy)


def test_load_model_old_derived_table_is_ignored(copy, tiny):
    edit_tensors(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(logits(load_model(copy)), logits(load_model(tiny)))


def test_load_model_tied_copies_are_accepted_only_when_equal(copy, tiny):
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(load_model(copy)), logits(load_model(tiny)))
    edit_tensors(copy, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(StageError, match="tied by the configuration but differ"):
        load_model(copy)


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), "1 missing"),
        (
            lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)}),
            "1 left over: model.layers.0.extra.weight",
        ),
        (lambda t: t.update({NORM: torch.ones(3)}), "misshapen"),
        (lambda t: t[NORM].__setitem__(5, torch.nan), f"{NORM} holds a NaN"),
        (lambda t: t[NORM].__setitem__(5, -torch.inf), f"{NORM} holds a NaN or an infinity"),
    ],
)
def test_load_model_wrong_tensors_are_refused_by_name(copy, change, message):
    edit_tensors(copy, change)
    with pytest.raises(StageError, match=message):
        load_model(copy)


def test_load_model_truncated_file_is_refused(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(StageError, match="damaged or cut short"):
        load_model(copy)


def test_load_model_pickle_is_refused_unread(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(StageError, match=r"no model\.safetensors"):
        load_model(copy)
    (copy / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(StageError, match="is a pickle, which can run code"):
        load_model(copy)


def test_load_model_code_beside_the_weights_is_never_run(copy, tiny):
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(copy, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    assert torch.equal(logits(load_model(copy)), logits(load_model(tiny)))
    edit_config(copy, model_type="evil")
    with pytest.raises(StageError, match=r"architecture 'evil' of .* is not understood: .*never run"):
        load_model(copy)


def test_load_config_refusals_name_the_reason(copy, tmp_path):
    with pytest.raises(StageError, match=r"has no config\.json"):
        load_config(tmp_path)
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(StageError, match="names the architecture '', which is not understood for 'bert'; limit BertLM"):
        load_config(tmp_path / "bert")
    edit_config(tmp_path / "bert", architectures=["LlamaForCausalLM"])
    with pytest.raises(StageError, match="names the architecture 'LlamaForCausalLM', which is not understood for"):
        load_config(tmp_path / "bert")
    edit_config(copy, quantization_config={"quant_method": "gptq"})
    with pytest.raises(StageError, match="is quantized by gptq"):
        load_config(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(StageError, match="is not JSON"):
        load_config(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(StageError, match="no JSON object"):
        load_config(copy)


def test_load_tokenizer_absent_is_refused(tiny, copy):
    assert load_tokenizer(tiny)("the").input_ids == load_tokenizer(copy)("the").input_ids
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(StageError, match="no tokenizer that can be read"):
        load_tokenizer(copy)


@pytest.mark.parametrize("damage", ['{"model": {"type": "BPE"}}', '{"model": 3}', "[]", "{", ""])
def test_tokenizer_that_is_damaged_is_refused_by_its_folder(tiny, tmp_path, damage):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "tokenizer.json").write_text(damage)
    with pytest.raises(StageError, match=r"copy has no tokenizer that can be read; measured \S"):
        load_tokenizer(copy)


def test_structure_that_does_not_fit_is_refused(tiny, copy):
    group = {"modules": ["model.layers.9.mlp.up_proj"], "rank": 2}
    for spec, message in (
        ({"shared": [group]}, "which the model does not have"),
        ({"shared": [group | {"modules": ["model.layers.0.mlp"]}]}, "no linear map"),
        ({"tied": [["model.norm.weight", "model.norm.nothing"]]}, "ties a tensor that the model does not have"),
        ({"residual": ["model.layers.0.mlp"]}, "no linear map"),
        ({"sizes": {"model.layers.9.mlp": {"in_features": 2}}}, "sizes model.layers.9.mlp, which the model does not"),
        ({"sizes": {"model.layers.0.mlp.up_proj": {"width": 2}}}, "gives .*up_proj a width that it cannot have"),
        (
            {"sizes": {"model.layers.0.mlp.up_proj": {"out_features": -2}}},
            "a out_features that it cannot have; measured -2",
        ),
        ({"sizes": {"model.layers.0.self_attn": {"forward": 2}}}, "gives .*self_attn a forward that it cannot have"),
    ):
        (copy / "structure.json").write_text(json.dumps(spec))
        with pytest.raises(StageError, match=message):
            load_model(copy)


ENTRY = {"kind": "linear", "shape": [64, 64], "format": "int8", "bits": 8, "block": None, "input": "float"}


@pytest.mark.parametrize(
    ("file", "spec"),
    [
        ("quantization", {"scheme": "int8_w8a8"}),
        ("quantization", {"layers": ["model.layers.0.self_attn.q_proj"]}),
        ("quantization", {"layers": {"model.layers.9.self_attn.q_proj": ENTRY}}),
        ("quantization", {"layers": {"model.layers.0.self_attn": ENTRY | {"shape": "wide"}}}),
        ("quantization", {"layers": {"model.layers.0.self_attn.q_proj": ENTRY | {"format": "int9"}}}),
        ("quantization", {"layers": {"model.layers.0.self_attn.q_proj": ENTRY | {"shape": [-64, 64]}}}),
        ("quantization", {"layers": {"model.layers.0.self_attn.q_proj": ENTRY | {"tied_to": "nobody"}}}),
        *(
            (
                "quantization",
                {"layers": {"model.layers.0.self_attn.q_proj": {k: v for k, v in ENTRY.items() if k != one}}},
            )
            for one in ("kind", "shape", "format", "block", "input")
        ),
        ("structure", {"shared": [{"modules": ["model.layers.0.mlp.up_proj"]}]}),
        ("structure", {"shared": 3}),
        ("structure", {"tied": {"model.norm.weight": 1}}),
        ("structure", {"sizes": ["model.layers.0.mlp"]}),
    ],
)
def test_description_that_cannot_be_followed_is_refused_by_its_files_name(copy, file, spec):
    (copy / f"{file}.json").write_text(json.dumps(spec))
    with pytest.raises(StageError, match=f"{file}|ties a tensor"):
        load_model(copy)


def test_memory_that_runs_out_is_not_called_a_damaged_description(copy, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    (copy / "quantization.json").write_text(json.dumps({"layers": {}}))
    monkeypatch.setattr("stages.models.layers.quantization_spec.install", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_model(copy)


def test_shared_linear_is_coefficient_after_basis():
    basis, coefficient = nn.Linear(6, 3, bias=False), nn.Linear(3, 5)
    one = low_rank_linear.SharedLinear(basis, coefficient)
    x = torch.randn(2, 6)
    dense = x @ (coefficient.weight @ basis.weight).T + coefficient.bias
    assert torch.allclose(one(x), dense, atol=1e-6)
    assert (one.in_features, one.out_features) == (6, 5)


def test_residual_linear_is_the_sum_and_survives_a_reload_with_its_tie(tiny, tmp_path):
    model = load_model(tiny)
    paths = [f"model.layers.{i}.mlp.up_proj" for i in (1, 3)]
    names = [f"{path}.dense.weight" for path in paths]
    low = [{"modules": [f"{path}.low"], "rank": 4} for path in paths]
    spec = {"residual": paths, "shared": low, "tied": [names]}
    low_rank_linear.install(model, spec)
    for parameter in model.model.layers.parameters():
        parameter.data.normal_()
    one, x = model.get_submodule(paths[1]), torch.randn(3, 64)
    dense = one.dense.weight + one.low.coefficient.weight @ one.low.basis.weight
    assert torch.allclose(one(x), x @ dense.T, atol=1e-3)
    assert (one.in_features, one.out_features) == (64, 192)
    assert low_rank_linear.describe(model) == spec
    save_model(model, tmp_path / "a", like=tiny)
    again = load_model(tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert again.get_parameter(names[0]) is again.get_parameter(names[1])
    assert low_rank_linear.describe(again) == spec
    assert anatomy.maps(anatomy.blocks(again)[1])["mlp.up_proj"] is again.get_submodule(paths[0])
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert [name for name in stored if "dense" in name] == names[:1]


def test_load_model_heads_of_another_number_a_block_survive_a_reload(tiny, tmp_path):
    """Half the key-value groups of one block go, as head pruning leaves it."""
    model = load_model(tiny)
    attention = model.model.layers[2].self_attn
    for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        linear = getattr(attention, name)
        linear.weight, linear.out_features = nn.Parameter(linear.weight.detach()[:rows].clone()), rows
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach()[:, :32].clone())
    attention.o_proj.in_features = 32
    save_model(model, tmp_path / "a", like=tiny)
    again = load_model(tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    sizes = json.loads((tmp_path / "a" / "structure.json").read_text())["sizes"]
    assert sizes["model.layers.2.self_attn.k_proj"] == {"out_features": 16}


def test_load_model_checkpoint_of_the_bare_model_gets_its_prefix(tmp_path):
    folder = family("gpt2", tmp_path)
    before = load_model(folder).transformer.state_dict()
    edit_tensors(folder, lambda t: [t.update({name.removeprefix("transformer."): t.pop(name)}) for name in list(t)])
    edit_tensors(folder, lambda t: t.update({"h.0.attn.bias": torch.ones(1, 1, 4, 4)}))
    after = load_model(folder).transformer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_load_model_old_names_of_norms_and_derived_tables_are_understood(tmp_path):
    folder = family("bert_masked", tmp_path)
    before = load_model(folder).state_dict()
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        edit_tensors(
            folder, lambda t, n=new, o=name: [t.update({k.replace(n, o): t.pop(k)}) for k in list(t) if n in k]
        )
    edit_tensors(folder, lambda t: t.update({"bert.embeddings.position_ids": torch.arange(4)[None]}))
    after = load_model(folder).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_load_model_head_of_another_task_is_refused_with_a_way_out(tmp_path):
    folder = family("bert_masked", tmp_path)
    edit_config(folder, architectures=["BertForSequenceClassification"])
    with pytest.raises(
        StageError, match=r"4 missing: bert\.pooler.*Set .* to \[\"BertLMHeadModel\"\] or \[\"BertForMaskedLM\"\]"
    ):
        load_model(folder)
    edit_config(folder, architectures=["BertForMaskedLM"])
    assert type(load_model(folder)).__name__ == "BertForMaskedLM"


def test_load_model_leaves_weights_in_the_file_until_they_are_read(tiny, tmp_path):
    """What was checked is given back: the pages of a checkpoint just loaded are not this process's memory."""
    folder = shutil.copytree(tiny, tmp_path / "big")
    edit_config(folder, vocab_size=1 << 16)
    edit_tensors(folder, lambda t: t.update({"model.embed_tokens.weight": torch.randn(1 << 16, 64)}))
    before = resident()
    model = load_model(folder)
    assert resident() - before < 6 << 20
    model.model.embed_tokens.weight.sum()
    assert resident() - before > 14 << 20
    save_model(model, tmp_path / "again", like=folder)
    assert resident() - before < 6 << 20


def sentence_pieces(folder, kind):
    """A sentencepiece model of the reference text, and its own reader."""
    pieces = pytest.importorskip("sentencepiece")
    made = folder / f"{kind}.trained"
    sentences = iter(reference_text()[:50_000].split("\n\n"))
    pieces.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=(writer := io.BytesIO()), vocab_size=450, model_type=kind,
        byte_fallback=kind == "bpe", minloglevel=2, pad_id=3,
    )  # fmt: skip
    made.write_bytes(writer.getvalue())
    return made, pieces.SentencePieceProcessor(model_file=str(made))


@pytest.mark.parametrize(
    ("kind", "file", "made"), [("bpe", "tokenizer.model", "Llama"), ("unigram", "spiece.model", "T5")]
)
def test_tokenizer_of_sentence_pieces_alone_reads_as_its_own_library(kind, file, made, tmp_path):
    model, theirs = sentence_pieces(tmp_path, kind)
    model.rename(tmp_path / file)
    settings = {"tokenizer_class": f"{made}Tokenizer", "extra_ids": 0}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": made.lower()}))
    tokenizer, text = load_tokenizer(tmp_path), "The value of an expression, x, is 12."
    assert tokenizer(text, add_special_tokens=False).input_ids == theirs.encode(text)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_tokenizer_of_tiktoken_alone_is_read(tmp_path):
    pytest.importorskip("tiktoken")
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t"]
    lines = [f"{base64.b64encode(one).decode()} {rank}" for rank, one in enumerate(ranks)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_tokenizer(tmp_path)("then é", add_special_tokens=False).input_ids == [257, 110, 32, 195, 169]


def test_tokenizer_whose_reader_is_not_installed_is_refused_with_its_name(copy, monkeypatch):
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    monkeypatch.setattr("stages.models.checkpoint.loading.find_spec", lambda name: None)
    with pytest.raises(StageError, match=f"{copy} needs .*, without sentencepiece and tiktoken.*Run: pip"):
        load_tokenizer(copy)
