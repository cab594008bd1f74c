"""Each verb that writes over each family: what it wrote is opened and asked before anything is sealed."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.attention import attentions
from stages.models.checkpoint.loading import load_model, outlined, save_model
from stages.models.checkpoint.subject import Subject
from stages.models.text.windows import Windows
from stages.prune import zeros
from stages.prune.admission import admitted
from stages.prune.depth import drop_blocks
from stages.prune.params import PruneParams
from stages.prune.stage import _structure
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.share import ShareParams, share
from tests.stages.models.families import FAMILIES, VOCABULARY, WIDER, answers, family, library

IDS = torch.arange(40).view(2, 20) * 7 % 90


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", sorted((FAMILIES | WIDER).keys() - {"mamba"}))
def test_family_pruned_by_magnitude_is_written_as_it_answers(name, root, tmp_path):
    folder = family(name, root)
    model = load_model(folder)
    how = zeros.How("magnitude", "2:4", 0.5, list(zeros.linears(model)))
    zeros.sparsified(model, IDS, how, tmp_path / "state", Silent())
    written = save_model(model, tmp_path, like=folder)
    found = zeros.proven(model, written, how)
    assert found.zeros == found.weights // 2
    torch.testing.assert_close(answers(load_model(tmp_path)), answers(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES | WIDER)
def test_family_with_equal_maps_is_tied_and_answers_the_same(name, root, tmp_path):
    folder, given = family(name, root), tmp_path / "given"
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key, one in tensors.items() if one.dim() == 2 and ".1." in key]:
        if (other := key.replace(".1.", ".0.", 1)) in tensors:
            tensors[key] = tensors[other].clone()
    given.mkdir()
    save_file(tensors, given / "model.safetensors", {"format": "pt"})
    (given / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = load_model(given)
    if name == "albert":  # its blocks are one
        with pytest.raises(StageError, match="no two tensors"):
            share(ShareParams(method="tie"), {"model": given}, tmp_path / "out", Silent())
        return
    (tmp_path / "out").mkdir()
    found = share(ShareParams(method="tie"), {"model": given}, tmp_path / "out", Silent())
    assert found["parameters"] < found["parameters_before"]
    torch.testing.assert_close(answers(load_model(tmp_path / "out")), answers(model), rtol=1e-4, atol=1e-5)


def outline(folder):
    return {"model": Subject(folder, outlined(folder, [folder / "model.safetensors"])[0], "")}


@pytest.mark.parametrize(
    "name", ["opt", "gpt2", "falcon", "phi3", "bloom", "bert_masked", "roberta", "distilbert", "electra", "deberta"]
)
def test_family_loses_a_block_and_answers_as_what_is_left(name, root, tmp_path):
    folder = family(name, root)
    params = PruneParams(method="blocks", keep=0.7, windows=2, window_tokens=20)
    admitted(params, outline(folder))
    tmp_path.joinpath("out").mkdir()
    found = _structure(params, load_model(folder), Windows(IDS, ()), folder, tmp_path / "out", Silent())
    assert (found["layers"], found["hidden_size"]) == (2, 32)
    assert len(anatomy.blocks(load_model(tmp_path / "out"))) == 2
    torch.testing.assert_close(
        answers(library(name, tmp_path / "out")), answers(load_model(tmp_path / "out")), rtol=1e-4, atol=1e-5
    )


def drawn(root, kind, config, settings):
    """A checkpoint that stands in no table of families."""
    torch.manual_seed(7)
    model = getattr(transformers, kind)(getattr(transformers, config)(vocab_size=VOCABULARY, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(root / "drawn")
    return root / "drawn"


_NEO = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
        "window_size": 4, "attention_types": [[["global", "local"], 2]]}  # fmt: skip


@pytest.mark.parametrize("gone", [[0], [1], [0, 3]])
def test_gpt_neo_without_blocks_is_what_transformers_opens_and_keeps_its_kinds_of_attention(gone, tmp_path):
    folder = drawn(tmp_path, "GPTNeoForCausalLM", "GPTNeoConfig", _NEO)
    model = load_model(folder)
    kinds = [one for place, one in enumerate(model.config.attention_layers) if place not in gone]
    drop_blocks(model, gone)
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "out", like=folder)
    theirs = transformers.GPTNeoForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert theirs.config.attention_layers == kinds
    assert [block.attn.attention_type for block in theirs.transformer.h] == kinds
    torch.testing.assert_close(answers(theirs), answers(load_model(tmp_path / "out")), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers(theirs), answers(model), rtol=1e-4, atol=1e-5)


def test_gpt_neo_loses_blocks_by_the_stage(tmp_path):
    folder = drawn(tmp_path, "GPTNeoForCausalLM", "GPTNeoConfig", _NEO)
    params = PruneParams(method="blocks", keep=0.8, windows=2, window_tokens=20)
    admitted(params, outline(folder))
    (tmp_path / "out").mkdir()
    found = _structure(params, load_model(folder), Windows(IDS, ()), folder, tmp_path / "out", Silent())
    assert found["layers"] == 3


def test_blocks_that_divide_their_attention_by_their_number_are_refused_at_admission(tmp_path):
    settings = FAMILIES["gpt2"][2] | {"scale_attn_by_inverse_layer_idx": True}
    folder = drawn(tmp_path, "GPT2LMHeadModel", "GPT2Config", settings)
    with pytest.raises(StageError, match=r"divide their attention by their number.*method: magnitude"):
        admitted(PruneParams(method="blocks", keep=0.7), outline(folder))


_ONE_KEY = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", FAMILIES["llama"][2] | {"num_key_value_heads": 1}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", FAMILIES["llama"][2] | {"num_key_value_heads": 1, "pad_token_id": 0}),
    "bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", FAMILIES["gpt2"][2] | {"multi_query": True}),
}


@pytest.mark.parametrize("name", _ONE_KEY)
def test_heads_of_queries_that_read_one_key_go_and_what_is_written_answers(name, tmp_path):
    folder = drawn(tmp_path, *_ONE_KEY[name])
    params = PruneParams(method="heads", keep=0.9, windows=2, window_tokens=20)
    admitted(params, outline(folder))
    (tmp_path / "out").mkdir()
    found = _structure(params, load_model(folder), Windows(IDS, ()), folder, tmp_path / "out", Silent())
    assert found["block_parameters"] <= 0.9 * found["block_parameters_before"]
    written = load_model(tmp_path / "out")
    assert answers(written).isfinite().all()
    found = [(one.heads, one.kv_heads) for block in anatomy.blocks(written) for one in attentions(block).values()]
    assert found == [(2, 1)] * 3


@pytest.mark.parametrize(("name", "why"), [("albert", "run several times"), ("bart", "an encoder and a decoder")])
def test_family_whose_blocks_cannot_go_is_refused_at_admission_as_by_the_work(name, why, root, tmp_path):
    folder, params = family(name, root), PruneParams(method="blocks", keep=0.7, windows=2, window_tokens=20)
    with pytest.raises(StageError, match=why):
        admitted(params, outline(folder))
    with pytest.raises(StageError, match=why):
        _structure(params, load_model(folder), Windows(IDS, ()), folder, tmp_path, Silent())


_DECODERS = {"d_model": 32, "decoder_layers": 3, "encoder_layers": 2, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
             "decoder_attention_heads": 4, "encoder_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("name", ["Bart", "Pegasus"])
def test_decoder_of_two_stacks_that_stands_alone_loses_a_block_and_what_is_written_answers(name, tmp_path):
    folder = drawn(tmp_path, f"{name}ForCausalLM", f"{name}Config", _DECODERS)
    params = PruneParams(method="blocks", keep=0.7, windows=2, window_tokens=20)
    admitted(params, outline(folder))
    for method in ("channels", "heads"):  # their numbers are proven on a copy of one block
        admitted(PruneParams(method=method, keep=0.8, multiple=1), outline(folder))
    (tmp_path / "out").mkdir()
    found = _structure(params, load_model(folder), Windows(IDS, ()), folder, tmp_path / "out", Silent())
    assert found["layers"] == 2
    theirs = getattr(transformers, f"{name}ForCausalLM").from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(answers(theirs), answers(load_model(tmp_path / "out")), rtol=1e-4, atol=1e-5)


_SEVERAL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "hidden_size_per_layer_input": 4, "laurel_rank": 4, "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
    "activation_sparsity_pattern": [0.0, 0.0], "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("method", ["wanda", "blocks", "auto"])
def test_blocks_that_read_several_streams_are_refused_at_admission(method, tmp_path):
    folder = drawn(tmp_path, "Gemma3nForCausalLM", "Gemma3nTextConfig", _SEVERAL)
    pattern = {"pattern": "2:4"} if method == "wanda" else {}
    with pytest.raises(StageError, match=r"model\.layers\.0 reads its tokens in another order.*\[4, 1, 8, 32\]"):
        admitted(PruneParams(method=method, **pattern), outline(folder))
