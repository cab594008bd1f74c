"""Encoders of sentences: the graph gives a text's vector, held against numpy on transformers' vectors of its tokens."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel

from stages.export.stage import EXPORT, ExportParams
from stages.models.checkpoint.loading import load_config, load_model, outlined, save_model
from stages.models.checkpoint.subject import Subject
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.serving.engine import open_engine
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests.stages.models.families import family
from tests.stages.validate.test_embedding import TEXTS, encoder, sentence_model


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("bare"))


def modules(folder, to, pooling, *, normalized=True, most=64):
    """The layout of sentence-transformers with a pooling of any settings."""
    sentence_model(folder, to, "", most=most)
    if not normalized:
        (to / "modules.json").write_text(json.dumps(json.loads((to / "modules.json").read_text())[:2]))
    (to / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return to


def hidden(folder, text):
    model, tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()


def of_numpy(rows, kinds, normalized):
    """As sentence-transformers defines it: kinds joined in its own order, whatever the configuration's."""
    own = {
        "cls_token": rows[0],
        "max_tokens": rows.max(0),
        "mean_tokens": rows.sum(0) / len(rows),
        "mean_sqrt_len_tokens": rows.sum(0) / np.sqrt(len(rows)),
        "lasttoken": rows[-1],
    }
    vector = np.concatenate([value for name, value in own.items() if name in kinds])
    return vector / np.sqrt((vector**2).sum()) if normalized else vector


def batch(folder, texts, side):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    found = tokenizer(list(texts), padding=True, return_tensors="np")
    return found["input_ids"], found["attention_mask"]


@pytest.mark.parametrize(
    ("kinds", "normalized"),
    [(["mean_tokens"], True), (["lasttoken", "mean_sqrt_len_tokens", "mean_tokens", "max_tokens", "cls_token"], False)],
)
def test_graph_and_torch_give_the_vectors_of_sentence_transformers(bare, tmp_path, kinds, normalized):
    own = modules(
        bare, tmp_path / "own", {f"pooling_mode_{kind}": True for kind in kinds}, normalized=normalized, most=16
    )
    graph = tmp_path / "graph"
    graph.mkdir()
    EXPORT.run(ExportParams(), {"model": own}, graph, Silent())
    wanted = np.stack([of_numpy(hidden(bare, text), kinds, normalized) for text in TEXTS])
    for folder, side in ((graph, "right"), (graph, "left"), (own, "right")):
        opened = open_engine(folder)
        assert (opened.task, opened.maximum_tokens) == ("embed", 16)
        np.testing.assert_allclose(opened.forward(*batch(bare, TEXTS, side)), wanted, rtol=1e-4, atol=1e-5)
    described = json.loads((graph / "graph.json").read_text())
    assert described["pooling"]["normalize"] == normalized and len(described["pooling"]["kinds"]) == len(kinds)
    assert (graph / "1_Pooling" / "config.json").read_bytes() == (own / "1_Pooling" / "config.json").read_bytes()


def test_text_windows_are_judged_by_the_vector_of_each_and_of_its_first_half(bare, seal, tmp_path):
    own = modules(bare, tmp_path / "own", {"pooling_mode_mean_tokens": True}, most=16)
    splits = {"calibrate": 0.5, "test": 0.5}
    text = seal("corpus", {"source": "pydoc://topics", "splits": splits})
    dense = seal("fetch", {"source": own.as_uri()})
    engine = seal("compile", {"backend": "onnxruntime"}, graph=seal("export", {}, model=dense.identity).identity)
    params = {"target": "onnxruntime:cpu", "windows": 5}
    report = seal("validate", params, model=engine.identity, text=text.identity, baseline=dense.identity)
    assert report.manifest.metrics["cosine"] == pytest.approx(1, abs=1e-5)
    assert report.manifest.metrics["contrast"] == pytest.approx(1, abs=1e-4)
    assert report.manifest.metrics["tokens"] == 10, "two vectors a window"


@pytest.mark.parametrize("name", ["bert_masked", "llama"])
def test_head_of_a_checkpoint_that_modules_follow_plays_no_part(name, tmp_path):
    folder = family(name, tmp_path)
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    model = load_model(folder)
    assert type(model) is type(AutoModel.from_config(load_config(folder)))
    ids = torch.arange(20).view(2, 10)
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).last_hidden_state, theirs(ids).last_hidden_state)
        save_model(model, tmp_path / "again", like=folder)
        again = load_model(tmp_path / "again")
        torch.testing.assert_close(again(ids).last_hidden_state, theirs(ids).last_hidden_state)
    assert not isinstance(model, BertModel) or model.pooler is None


def outline(folder):
    return {"model": Subject(folder, outlined(folder, [folder / "model.safetensors"])[0], "embed", 64)}


def test_modules_and_settings_that_are_not_applied_are_refused_before_any_work(bare, tmp_path):
    dense = sentence_model(bare, tmp_path / "dense", "cls_token", ("Transformer", "Pooling", "Dense"))
    early = sentence_model(bare, tmp_path / "early", "cls_token", ("Transformer", "Normalize", "Pooling"))
    lower, asked = (modules(bare, tmp_path / one, {"pooling_mode": "mean"}) for one in ("lower", "asked"))
    (lower / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    prompts = {"prompts": {"query": "query: ", "document": ""}}
    settings = asked / "config_sentence_transformers.json"
    settings.write_text(json.dumps(prompts | {"default_prompt_name": "query"}))
    for folder, why in ((dense, "Dense"), (early, "Normalize"), (lower, "do_lower_case"), (asked, "'query: '")):
        for admitted in (
            lambda known: EXPORT.admit(ExportParams(), known),
            lambda known: VALIDATE.admit(ValidateParams(), known),
        ):
            with pytest.raises(StageError, match=why):
                admitted(outline(folder))
    settings.write_text(json.dumps(prompts | {"default_prompt_name": "document"}))
    assert EXPORT.admit(ExportParams(), outline(asked)).built == 64
