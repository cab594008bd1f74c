"""Pairs of texts put to encoders, held against transformers' vectors and scipy's correlation of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer, BertTokenizerFast

from stages.measures.items import Item
from stages.models.checkpoint.pooling import pooling
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests.stages.models.families import family
from tests.stages.validate.test_questions import asked, folder_of

TEXTS = ("a b c", "f e", "d d a", "e f c b a", "a a b", "f", "c d e f", "b", "e e f d", "a c")
QUERIES = ("a b", "f e d", "d a d", "e f c b", "b a a", "f f", "c d e", "b b", "e e f", "c a")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("bare"))


def encoder(root, draw=0):
    """A tiny BERT that knows six letters."""
    made = family("bert_bare", root, draw)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    BertTokenizerFast({word: number for number, word in enumerate(words)}).save_pretrained(made)
    return made


def vectors(folder, texts, pool=lambda hidden: hidden.mean(0)):
    model, tokenizer = (
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        found = [
            pool(model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=64)).last_hidden_state[0])
            for text in texts
        ]
    return torch.nn.functional.normalize(torch.stack(found).double(), dim=-1).numpy()


def similar(texts=TEXTS, others=QUERIES):
    pairs = enumerate(zip(texts, others, strict=True))
    return [
        Item(id=f"s{n}", ability="odd" if n % 2 else "even", task="similarity", prompt=a, other=b, score=n * 7 % 5)
        for n, (a, b) in pairs
    ]


def sought(queries=QUERIES, documents=TEXTS):
    return [
        Item(id=f"r{n}", ability="x", task="retrieval", prompt=query, other=document)
        for n, (query, document) in enumerate(zip(queries, documents, strict=True))
    ]


def test_correlation_is_scipys_of_transformers_cosines(folder, tmp_path):
    items = similar()
    report = asked(tmp_path, folder, items, baseline=folder)
    cosines = (vectors(folder, TEXTS) * vectors(folder, QUERIES)).sum(-1)
    assert [one["similarity"] for one in report["documents"]] == pytest.approx(cosines.tolist(), abs=1e-5)
    gold = [item.score for item in items]
    assert report["measures"]["spearman"] == pytest.approx(spearmanr(gold, cosines).statistic)
    assert report["slices"]["odd"]["spearman"] == pytest.approx(spearmanr(gold[1::2], cosines[1::2]).statistic)
    assert report["measures"]["cosine"] == pytest.approx(1)
    assert "accuracy" not in report["measures"] and report["task"] == "embed"
    assert not any("vectors" in one for one in report["documents"])


def test_document_is_found_where_it_is_the_nearest_of_the_set(folder, tmp_path):
    documents = [*TEXTS[:-1], TEXTS[0]]  # two queries seek the same one
    report = asked(tmp_path, folder, sought(documents=documents))
    candidates = list(dict.fromkeys(documents))
    cosines = vectors(folder, QUERIES) @ vectors(folder, candidates).T
    ranks = []
    for row, document, one in zip(cosines, documents, report["documents"], strict=True):
        ranks.append(1 + int((row > row[candidates.index(document)]).sum()))
        assert one["rank"] == ranks[-1] and one["right"] == (ranks[-1] == 1)
        assert one["chance"] == 1 / 9 and one["expected"].endswith(f": {document}")
        assert one["answer"].endswith(f": {candidates[int(row.argmax())]}")
    assert 0 < sum(rank == 1 for rank in ranks) < 10, "some are found and some are not"
    for most in (1, 5):
        assert report["measures"][f"recall_at_{most}"] == np.mean([rank <= most for rank in ranks])
    assert report["measures"]["accuracy"] == report["measures"]["recall_at_1"]


def test_model_to_which_all_texts_are_one_finds_none(folder, tmp_path):
    same = tmp_path / "same"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.weight.zero_()
    model.save_pretrained(same)
    AutoTokenizer.from_pretrained(folder).save_pretrained(same)
    report = asked(tmp_path, same, sought())
    assert report["measures"]["recall_at_5"] == 0 and {one["rank"] for one in report["documents"]} == {10}
    assert "spearman" not in asked(tmp_path, same, similar())["measures"]


def test_other_model_is_at_a_distance_from_its_baseline(folder, tmp_path):
    other = encoder(tmp_path, draw=1)
    report = asked(tmp_path, other, similar(), baseline=folder)
    both = [(vectors(other, texts) * vectors(folder, texts)).sum(-1) for texts in (TEXTS, QUERIES)]
    tokens = [one["tokens"] for one in report["documents"]]
    wanted = np.average(np.mean(both, axis=0), weights=tokens)
    assert report["measures"]["cosine"] == pytest.approx(wanted, abs=1e-5) and wanted < 0.9


POOLS = {
    "cls_token": lambda hidden: hidden[0],
    "mean_tokens": lambda hidden: hidden.mean(0),
    "max_tokens": lambda hidden: hidden.max(0).values,
    "lasttoken": lambda hidden: hidden[-1],
    "mean_sqrt_len_tokens": lambda hidden: hidden.mean(0),
}


def sentence_model(folder, to, kind, types=("Transformer", "Pooling", "Normalize"), most=64):
    shutil.copytree(folder, to)
    places = ("", "1_Pooling", "2_Last")
    modules = [
        {"idx": n, "path": path, "type": f"sentence_transformers.models.{name}"}
        for n, (path, name) in enumerate(zip(places, types, strict=True))
    ]
    (to / "modules.json").write_text(json.dumps(modules))
    (to / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": most}))
    (to / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{one}": one == kind for one in POOLS}
    (to / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return to


@pytest.mark.parametrize("kind", POOLS)
def test_vector_is_pooled_as_the_modules_beside_the_checkpoint_say(folder, tmp_path, kind):
    own = sentence_model(folder, tmp_path / "own", kind)
    report = asked(tmp_path, own, similar())
    cosines = (vectors(folder, TEXTS, POOLS[kind]) * vectors(folder, QUERIES, POOLS[kind])).sum(-1)
    assert [one["similarity"] for one in report["documents"]] == pytest.approx(cosines.tolist(), abs=1e-5)


def test_graph_without_modules_is_pooled_as_its_baseline_is(folder, tmp_path):
    own = sentence_model(folder, tmp_path / "own", "cls_token")
    bare = asked(tmp_path, folder, similar(), baseline=own)
    for one, other in zip(bare["documents"], asked(tmp_path, own, similar(), baseline=own)["documents"], strict=True):
        assert one == {key: pytest.approx(value) if isinstance(value, float) else value for key, value in other.items()}
    assert bare["documents"] != asked(tmp_path, folder, similar(), baseline=folder)["documents"]


def test_text_is_read_up_to_the_length_that_stands_beside_the_checkpoint(folder, tmp_path):
    own = sentence_model(folder, tmp_path / "own", "mean_tokens", most=4)
    (one,) = asked(tmp_path, own, similar(["a b c d e f"], ["f"]))["documents"]
    assert one["tokens"] == 4


def test_module_or_pooling_that_is_not_applied_is_refused(folder, tmp_path):
    dense = sentence_model(folder, tmp_path / "dense", "cls_token", ("Transformer", "Pooling", "Dense"))
    with pytest.raises(StageError, match="a module that is not applied here"):
        asked(tmp_path, dense, similar())
    (dense / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    assert pooling(dense).kinds == ("cls",)
    (dense / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(StageError, match="a pooling that is not known"):
        pooling(dense)


def test_set_in_which_nothing_can_be_missed_or_compared_is_refused(folder, tmp_path):
    with pytest.raises(StageError, match="all queries have one document"):
        asked(tmp_path, folder, sought(documents=["a"] * 10))
    with pytest.raises(StageError, match="no measure is of both"):
        asked(tmp_path, folder, [*sought(), *similar()])


def test_parts_come_to_the_same_bytes_and_others_parts_are_made_anew(folder, tmp_path):
    from stages.runtime.parts import FOLDER, keep

    items = [one.model_copy(update={"id": f"{one.id}.{again}"}) for again in range(4) for one in sought()]
    inputs = {"model": folder, "baseline": folder, "text": folder_of(items, tmp_path / "items")}
    params, whole, parted = ValidateParams(variants=("space",)), tmp_path / "whole", tmp_path / "parted"
    whole.mkdir()
    VALIDATE.run(params, inputs, whole, Silent())
    assert VALIDATE.divided.count(params, inputs) == 4
    first, third = (VALIDATE.divided.part(params, inputs, range(at, at + 1), Silent()) for at in (0, 2))
    keep(parted / FOLDER, range(0, 1), first)
    keep(parted / FOLDER, range(1, 2), third)  # not of these items
    VALIDATE.run(params, inputs, parted, Silent())
    assert (parted / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    assert json.loads((whole / "report.json").read_bytes())["measures"]["robustness"] >= 0


def test_engine_is_asked_as_its_checkpoint_is(folder, seal, tmp_path):
    """From files to the figures: an encoder of sentences, its graph and its engine, on pairs of a .csv."""
    own = sentence_model(folder, tmp_path / "own", "cls_token")
    lines = [f"{a},{b},{n * 7 % 5}" for n, (a, b) in enumerate(zip(TEXTS, QUERIES, strict=True))]
    (tmp_path / "pairs.csv").write_text("\n".join(["left,right,stars", *lines]))
    columns = {"prompt": "left", "other": "right", "score": "stars", "right": ""}
    params = {"source": str(tmp_path / "pairs.csv"), "columns": columns, "task": "similarity"}
    pairs, dense = seal("items", params), seal("fetch", {"source": own.as_uri()})
    engine = seal("compile", {"backend": "onnxruntime"}, graph=seal("export", {}, model=dense.identity).identity)
    judged = [
        seal("validate", {"target": target}, model=one.identity, text=pairs.identity, baseline=dense.identity)
        for one, target in ((dense, "torch:cpu"), (engine, "onnxruntime:cpu"))
    ]
    eager, compiled = (one.manifest.metrics for one in judged)
    cosines = (vectors(folder, TEXTS, POOLS["cls_token"]) * vectors(folder, QUERIES, POOLS["cls_token"])).sum(-1)
    wanted = spearmanr([n * 7 % 5 for n in range(10)], cosines).statistic
    assert eager["spearman"] == pytest.approx(wanted) == compiled["spearman"]
    assert eager["cosine"] == pytest.approx(1) and compiled["cosine"] == pytest.approx(1, abs=1e-5)
