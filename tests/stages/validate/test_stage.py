import importlib.metadata
import json
import math
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax, rel_entr, softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.judging.gates import judge
from stages.compile.stage import COMPILE, CompileParams
from stages.export.stage import EXPORT, ExportParams
from stages.fetch import FETCH, FetchParams
from stages.models.text.windows import windows
from stages.runtime import parts
from stages.runtime.artifacts import Store
from stages.runtime.contract import DoesNotFit, Kind, Manifest, Provenance, StageError, Work
from stages.runtime.dividing import execute_part
from stages.runtime.execute import device_name, execute, work_of
from stages.runtime.fingerprint import ROOT, entries, fingerprint
from stages.runtime.progress import Silent
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests.conftest import sealer
from tests.flows.judging.test_gates import Gate

SHORT = {"window_tokens": 64, "windows": 12}


def published(store, kind, fill):
    """Seal a folder that `fill` writes, as an artifact of made-up work named after the function."""
    work = Work(stage="trial", code="", params={"fill": fill.__qualname__}, inputs={}, requires={})
    with store.draft(fingerprint(work)) as draft:
        fill(draft)
        about = Provenance(host="h", device="d", created="", seconds=0, peak_rss_bytes=0)
        store.publish(draft, Manifest(work=work, kind=kind, files=entries(draft), metrics={}, provenance=about))
    return fingerprint(work)


def report_of(store, outcome):
    return json.loads((store.checkout(outcome.identity) / "report.json").read_text())


def counted_table(ids_NT):
    """Logits of a bigram model: log counts of which token follows which."""
    table_VV = np.full((768, 768), 0.05)
    for ids_T in ids_NT.numpy():
        np.add.at(table_VV, (ids_T[:-1], ids_T[1:]), 1.0)
    return np.log(table_VV).astype(np.float32)


def bigram_graph(table_VV):
    """ONNX of logits = table[input_ids]."""
    shape = ["batch", "sequence"]
    inputs = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, shape) for n in ("input_ids", "attention_mask")
    ]
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [*shape, 768])
    node = onnx.helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    graph = onnx.helper.make_graph(
        [node], "bigram", inputs, [logits], [onnx.numpy_helper.from_array(table_VV, "table")]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(scope="module")
def judged(shared_store):
    """Seal a report: judged(model, text, baseline=..., **params) -> Outcome."""

    def run(model, text, baseline=None, **params):
        inputs = {"model": model, "text": text} | ({"baseline": baseline} if baseline else {})
        return sealer(shared_store)("validate", SHORT | params, **inputs)

    return run


@pytest.fixture(scope="module")
def ids_NT(shared_store, dense, topics):
    """The windows that the tests score, by another tokenizer class than the stage's."""
    tokenizer = AutoTokenizer.from_pretrained(shared_store.checkout(dense))
    return windows(shared_store.checkout(topics), "test", tokenizer, 64, most=12)


@pytest.fixture(scope="module")
def dense_logits(shared_store, dense, ids_NT):
    model = AutoModelForCausalLM.from_pretrained(shared_store.checkout(dense), dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids_NT).logits[:, :-1].double().numpy()


@pytest.fixture(scope="module")
def table(shared_store, dense, topics):
    tokenizer = AutoTokenizer.from_pretrained(shared_store.checkout(dense))
    return counted_table(windows(shared_store.checkout(topics), "train", tokenizer, 64))


@pytest.fixture(scope="module")
def bigram(shared_store, tiny, table):
    """Fingerprint of an engine that answers by a table of bigrams."""

    def fill(folder):
        onnx.save(bigram_graph(table), folder / "model.onnx")
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(tiny / name, folder / name)
        about = {
            "target": "onnxruntime:cpu", "backend": "onnxruntime", "architectures": [], "executable": "model.onnx",
            "vocabulary": 768, "maximum_tokens": 96,
        }  # fmt: skip
        (folder / "engine.json").write_text(json.dumps(about))

    return published(shared_store, Kind.ENGINE, fill)


def changed_checkpoint(store, tiny, change):
    """Seal the tiny model after `change(tensors)`."""

    def fill(folder):
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        tensors = load_file(tiny / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    fill.__qualname__ = change.__qualname__
    return published(store, Kind.CHECKPOINT, fill)


def test_perplexity_of_a_checkpoint_equals_transformers_own_loss(shared_store, judged, dense, topics, ids_NT):
    outcome = judged(dense, topics)
    model = AutoModelForCausalLM.from_pretrained(shared_store.checkout(dense), dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(input_ids=ids_T[None], labels=ids_T[None]).loss) for ids_T in ids_NT]
    report = report_of(shared_store, outcome)
    assert [d["nll"] / d["tokens"] for d in report["documents"]] == pytest.approx(losses, rel=1e-5)
    assert outcome.manifest.metrics["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert outcome.manifest.metrics["perplexity"] < 100, "a trained model, where guessing gives 768"
    assert outcome.manifest.metrics["tokens"] == 12 * 63
    assert "kl_divergence" not in outcome.manifest.metrics


def test_report_has_its_documents_and_says_what_was_measured_where(shared_store, judged, dense, topics):
    outcome = judged(dense, topics)
    report = report_of(shared_store, outcome)
    corpus = json.loads((shared_store.checkout(topics) / "corpus.json").read_text())
    assert report["artifact_target"] == "torch:cpu"
    assert (report["split"], report["window_tokens"], report["corpus"]) == ("test", 64, corpus.get("digest", ""))
    assert len({d["id"] for d in report["documents"]}) == len(report["documents"]) == 12
    assert all(set(d) == {"id", "tokens", "nll"} and d["tokens"] == 63 for d in report["documents"])
    assert report["measures"] == {k: v for k, v in outcome.manifest.metrics.items() if k != "tokens"}
    checkpoint = shared_store.manifest(dense)
    assert report["measures"]["size_bytes"] == checkpoint.files["model.safetensors"].size
    assert outcome.manifest.kind is Kind.REPORT
    assert set(outcome.manifest.files) == {"report.json"}


def test_executor_is_part_of_the_work(judged, dense, topics):
    work = judged(dense, topics).manifest.work
    version = importlib.metadata.version("torch")
    assert work.executor == {"target": "torch:cpu", "device": device_name(), "runtime": f"torch {version}"}
    other = work_of(VALIDATE, ValidateParams(**SHORT, target="onnxruntime:cpu"), work.inputs)
    assert other.executor["runtime"] == f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    assert fingerprint(other) != fingerprint(work)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about a machine without a GPU")
def test_gpu_that_is_not_there_is_refused_ahead_of_the_work_and_by_it(shared_store, judged, dense, topics):
    work = judged(dense, topics).manifest.work
    on_gpu = ValidateParams(**SHORT, target="torch:cuda")
    planned = work_of(VALIDATE, on_gpu, work.inputs)
    assert planned.executor["target"] == "torch:cuda" and planned.executor["runtime"].startswith("torch ")
    assert planned.executor["device"] != work.executor["device"], "a report of the processor never stands for it"
    with pytest.raises(DoesNotFit, match="Set `target` to torch:cpu") as ahead:
        VALIDATE.admit(on_gpu, {})
    at_work = refused(shared_store, lambda: judged(dense, topics, target="torch:cuda"), "there is none here")
    assert str(at_work) == str(ahead.value)


def test_model_judged_against_itself_has_no_divergence(judged, dense, topics):
    metrics = judged(dense, topics, baseline=dense).manifest.metrics
    assert metrics["kl_divergence"] == 0.0
    assert metrics["top1_agreement"] == 1.0


def test_engine_is_scored_as_it_answers_and_paired_with_the_checkpoint(
    shared_store, judged, bigram, dense, topics, ids_NT, dense_logits, table
):
    outcome = judged(bigram, topics, baseline=dense, target="onnxruntime:cpu")
    report = report_of(shared_store, outcome)
    for ids_T, p_TV, document in zip(ids_NT.numpy(), dense_logits, report["documents"], strict=True):
        q_TV = table[ids_T[:-1]].astype(float)
        assert document["nll"] == pytest.approx(-log_softmax(q_TV, 1)[np.arange(63), ids_T[1:]].sum(), rel=1e-6)
        assert document["kl"] == pytest.approx(rel_entr(softmax(p_TV, 1), softmax(q_TV, 1)).sum(), rel=1e-4)
        assert document["agree"] == int((p_TV.argmax(1) == q_TV.argmax(1)).sum())
    assert report["artifact_target"] == "onnxruntime:cpu"
    assert report["measures"]["size_bytes"] == shared_store.manifest(bigram).files["model.onnx"].size
    dense_report = report_of(shared_store, judged(dense, topics))
    assert [d["id"] for d in dense_report["documents"]] == [d["id"] for d in report["documents"]]
    reports = {("cpu", "text"): report, ("dense", "text"): dense_report}
    verdict = judge([Gate(at_most=100.0), Gate(at_most=1.01)], reports, {}, {"cpu": "onnxruntime:cpu"})
    assert [result.passed for result in verdict.results] == [True, False]


def test_noise_in_the_weights_shows_in_every_measure(shared_store, judged, tiny, dense, topics):
    def noisy(tensors):
        generator = torch.Generator().manual_seed(0)
        for tensor in tensors.values():
            tensor += 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator) if tensor.ndim > 1 else 0

    metrics = judged(changed_checkpoint(shared_store, tiny, noisy), topics, baseline=dense).manifest.metrics
    assert metrics["perplexity"] > 1.05 * judged(dense, topics).manifest.metrics["perplexity"]
    assert metrics["kl_divergence"] > 0.02
    assert 0.1 < metrics["top1_agreement"] < 0.95


def test_same_report_again_is_a_hit_and_a_forced_one_has_the_same_bytes(shared_store, judged, dense, topics):
    first = judged(dense, topics, baseline=dense)
    assert judged(dense, topics, baseline=dense).cached
    params = ValidateParams(**SHORT)
    work = work_of(VALIDATE, params, {"model": dense, "text": topics, "baseline": dense})
    forced = execute(VALIDATE, params, work, shared_store, Silent(), force=True)
    assert forced.identity == first.identity
    assert not forced.changed


def test_fewer_windows_are_the_first_ones_and_another_split_has_other_documents(shared_store, judged, dense, topics):
    whole = report_of(shared_store, judged(dense, topics))["documents"]
    assert report_of(shared_store, judged(dense, topics, windows=2))["documents"] == whole[:2]
    other = report_of(shared_store, judged(dense, topics, windows=2, split="validate"))["documents"]
    assert all(d["id"].startswith("validate-") for d in other)
    assert other[0]["nll"] != whole[0]["nll"]


def test_progress_goes_up_to_its_total(shared_store, dense, topics, tmp_path):
    heard = []

    class Bar(Silent):
        def advanced(self, done, total):
            heard.append((done, total))

    inputs = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    VALIDATE.run(ValidateParams(window_tokens=64, windows=3), inputs, tmp_path, Bar())
    assert heard == [(1, 3), (2, 3), (3, 3)]


def refused(store, run, text):
    """Assert that `run` is refused with `text` and seals nothing; returns the error."""
    before = {identity for identity, _ in store.manifests()}
    with pytest.raises(StageError, match=text) as caught:
        run()
    assert {identity for identity, _ in store.manifests()} == before
    return caught.value


def test_artifact_of_another_target_is_refused_and_never_silently_executed(shared_store, judged, bigram, dense, topics):
    error = refused(shared_store, lambda: judged(bigram, topics), "another target")
    assert (error.measured, error.limit) == ("onnxruntime:cpu", "torch:cpu")
    refused(shared_store, lambda: judged(dense, topics, target="onnxruntime:cpu"), "another target")


def test_plan_for_a_gpu_is_refused_where_there_is_none(shared_store, judged, bigram, topics):
    def plan(folder):
        shutil.copytree(shared_store.checkout(bigram), folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        about = json.loads((folder / "engine.json").read_text())
        about |= {"target": "tensorrt_rtx:sm_89", "backend": "tensorrt_rtx", "executable": "model.plan"}
        (folder / "engine.json").write_text(json.dumps(about | {"architectures": ["sm_89"]}))
        (folder / "model.onnx").rename(folder / "model.plan")

    identity = published(shared_store, Kind.ENGINE, plan)
    refused(shared_store, lambda: judged(identity, topics, target="onnxruntime:cpu"), "tensorrt|driver|GPU|target")


def test_windows_longer_than_an_engine_was_built_for_are_refused(shared_store, judged, topics, bigram, tiny):
    error = refused(
        shared_store, lambda: judged(bigram, topics, window_tokens=97, windows=1), "longer than the engine can read"
    )
    assert error.limit == "96 tokens"
    dense = FETCH.admit(FetchParams(source=str(tiny)), {})
    graph = EXPORT.admit(ExportParams(), {"model": dense})
    engine = COMPILE.admit(CompileParams(backend="onnxruntime", maximum_tokens=96), {"graph": graph})
    with pytest.raises(StageError) as ahead:
        VALIDATE.admit(ValidateParams(window_tokens=97), {"model": engine})
    assert str(ahead.value) == str(error)
    works = int(re.search(r"`window_tokens` of `judge` to (\d+)", error.remedy)[1])
    VALIDATE.admit(ValidateParams(window_tokens=works), {"model": engine})
    assert (
        judged(bigram, topics, window_tokens=works, windows=1, target="onnxruntime:cpu").manifest.metrics["tokens"]
        == works - 1
    )
    longer = COMPILE.admit(CompileParams(backend="onnxruntime", maximum_tokens=97), {"graph": graph})
    VALIDATE.admit(ValidateParams(window_tokens=97), {"model": longer})
    whole = COMPILE.admit(CompileParams(backend="onnxruntime"), {"graph": graph})
    VALIDATE.admit(ValidateParams(window_tokens=9000), {"model": whole})  # cut to the 512 that the model reads
    VALIDATE.admit(ValidateParams(window_tokens=9000), {"model": dense})


def test_windows_are_no_longer_than_the_model_reads(shared_store, judged, topics, dense):
    def report(tokens):
        found = shared_store.checkout(judged(dense, topics, window_tokens=tokens, windows=1).identity) / "report.json"
        return json.loads(found.read_text())

    longest, cut = report(512), report(513)
    assert cut["window_tokens"] == 512
    assert cut["documents"] == longest["documents"]


def test_overflow_in_a_model_or_its_baseline_is_refused_naming_the_document(shared_store, judged, tiny, dense, topics):
    def spoiled(tensors):
        tensors["model.norm.weight"][:] = 3e38  # finite as it lies there, not when it is executed

    overflowing = changed_checkpoint(shared_store, tiny, spoiled)
    refused(shared_store, lambda: judged(overflowing, topics), "test-00000-")
    refused(
        shared_store,
        lambda: judged(dense, topics, baseline=overflowing),
        "its baseline gave logits on document test-00000-",
    )


def test_baseline_with_another_vocabulary_is_refused(shared_store, judged, tiny, dense, topics):
    def renamed(folder):
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        text = json.loads((folder / "tokenizer.json").read_text())
        tokens = text["model"]["vocab"]
        (first, a), (second, b) = [(token, tokens[token]) for token in ("a", "b")]
        tokens[first], tokens[second] = b, a
        (folder / "tokenizer.json").write_text(json.dumps(text))

    other = published(shared_store, Kind.CHECKPOINT, renamed)
    error = refused(shared_store, lambda: judged(dense, topics, baseline=other), "another vocabulary")
    both = [FETCH.admit(FetchParams(source=str(one)), {}) for one in (tiny, shared_store.checkout(other))]
    with pytest.raises(StageError) as ahead:
        VALIDATE.admit(ValidateParams(), dict(zip(("model", "baseline"), both, strict=True)))
    assert str(ahead.value) == str(error)


def test_split_too_short_for_one_window_is_refused(shared_store, judged, dense):
    def short(folder):
        (folder / "test.jsonl").write_text('{"id": "a", "text": "Too short."}\n')

    text = published(shared_store, Kind.CORPUS, short)
    refused(shared_store, lambda: judged(dense, text), "shorter than one window")
    refused(shared_store, lambda: judged(dense, text, split="validate"), "no split 'validate'")
    report = report_of(shared_store, judged(dense, text, window_tokens=2))
    assert report["corpus"] == ""


@pytest.mark.parametrize(
    "wrong", [{"split": "exam"}, {"window_tokens": 1}, {"windows": 0}, {"target": "tensorrt:sm_90x"}, {"device": "cpu"}]
)
def test_params_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        ValidateParams(**wrong)


MANY = {"window_tokens": 64, "windows": 40}


class Ear(Silent):
    def __init__(self):
        self.notes, self.done = [], []

    def note(self, text):
        self.notes.append(text)

    def advanced(self, done, total):
        self.done.append(done)


@pytest.fixture
def apart(shared_store, tmp_path):
    """The shared objects with a scratch folder of its own, so that no partial state is shared."""
    (tmp_path / "scratch").mkdir()
    return Store(shared_store.objects, tmp_path / "scratch")


@pytest.fixture(scope="module")
def many(dense, topics):
    """Params and work of 40 windows paired with a baseline."""
    params = ValidateParams(**MANY)
    return params, work_of(VALIDATE, params, {"model": dense, "text": topics, "baseline": dense})


@pytest.fixture(scope="module")
def undivided(shared_store, many, tmp_path_factory):
    """The report of a run that finds no part."""
    params, work = many
    output = tmp_path_factory.mktemp("undivided")
    inputs = {role: shared_store.checkout(identity) for role, identity in work.inputs.items()}
    VALIDATE.run(params, inputs, output, Silent())
    return (output / "report.json").read_bytes()


def gathered(store, many):
    """Make the report from what stands in the store; returns its bytes and what was heard."""
    ear = Ear()
    made = execute(VALIDATE, *many, store, ear, force=True)
    return (store.checkout(made.identity) / "report.json").read_bytes(), ear


def written(documents):
    """A part as the stage writes it: the documents of each window."""
    return json.dumps(documents if isinstance(documents, str) else [[one] for one in documents]).encode()


def test_part_that_was_written_whole_is_used(apart, many, undivided):
    parts.put(apart.objects, fingerprint(many[1]), range(8, 16), written(json.loads(undivided)["documents"][8:16]))
    report, ear = gathered(apart, many)
    assert report == undivided
    assert (ear.notes[0], ear.done) == ("8 of 40 documents are scored already", list(range(8, 41)))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_report_has_the_same_bytes_however_and_in_whatever_order_it_was_divided(apart, many, undivided, count):
    spans = parts.gaps(40, [], math.ceil(40 / count))
    assert len(spans) == count
    random.Random(count).shuffle(spans)
    threads = torch.get_num_threads()
    for index, span in enumerate(spans):
        torch.set_num_threads(1 + index % 2)
        execute_part(VALIDATE, *many, apart, span, Silent())
    torch.set_num_threads(threads)
    report, ear = gathered(apart, many)
    assert report == undivided
    assert ear.done == [40], "nothing was scored again"
    assert parts.standing(apart.objects, fingerprint(many[1])) == []


def test_report_computes_only_what_no_part_holds(apart, many, undivided):
    for span in (range(4, 20), range(10, 13), range(30, 40)):
        execute_part(VALIDATE, *many, apart, span, Silent())
    report, ear = gathered(apart, many)
    assert report == undivided
    assert ear.done == list(range(26, 41))


@pytest.mark.parametrize(
    "poison", ["other text", "short", "long", "shuffled", "baseline", "number", "fraction", "infinite", "text"]
)
def test_part_with_other_scores_than_its_name_says_is_not_used(apart, many, undivided, poison):
    span, documents = range(8, 16), json.loads(undivided)["documents"]
    chosen = [dict(one, nll=1.0) for one in documents[8:16]]
    spoiled = {
        "other text": [one | {"id": one["id"][:-1] + "x"} for one in chosen],
        "short": chosen[:-1],
        "long": [*chosen, documents[16]],
        "shuffled": chosen[::-1],
        "baseline": [{k: v for k, v in one.items() if k != "kl"} for one in chosen],
        "number": [one | {"nll": "1.0"} for one in chosen],
        "fraction": [one | {"agree": 3.5} for one in chosen],
        "infinite": [one | {"nll": math.inf} for one in chosen],
        "text": "scores",
    }[poison]
    parts.put(apart.objects, fingerprint(many[1]), span, written(spoiled))
    report, ear = gathered(apart, many)
    assert report == undivided
    assert ear.notes == ["the scores of documents 8 to 15 are not of this corpus: made anew"]
    assert ear.done == list(range(1, 41))


def test_part_whose_name_goes_beyond_the_last_window_is_not_used(apart, many, undivided):
    last = written(json.loads(undivided)["documents"][32:])
    parts.put(apart.objects, fingerprint(many[1]), range(32, 48), last)
    report, ear = gathered(apart, many)
    assert report == undivided
    assert (len(ear.notes), ear.done) == (1, list(range(1, 41)))


def test_part_behind_the_last_window_is_refused(apart, many):
    with pytest.raises(StageError, match="behind the last of the documents"):
        execute_part(VALIDATE, *many, apart, range(32, 41), Silent())
    assert parts.standing(apart.objects, fingerprint(many[1])) == []


@pytest.fixture
def child(apart, many, tmp_path):
    """Start `python -m stages validate` on the 40 windows; returns the process."""
    params, work = many
    order = tmp_path / "order.json"
    order.write_text(json.dumps({"work": work.model_dump(mode="json"), "params": params.model_dump(mode="json")}))
    command = [sys.executable, "-m", "stages", "validate", "--work", order, "--store", apart.uri]
    command += ["--scratch", apart.scratch, "--orphan"]

    def start(*wanted):
        return subprocess.Popen(
            [*command, *wanted], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        )

    return start


def told(process):
    out, err = process.communicate(timeout=60)
    return [json.loads(line) for line in out.splitlines()], err.decode()


@pytest.mark.fault
def test_child_killed_in_the_middle_goes_on_and_seals_the_same_bytes(apart, many, undivided, child):
    apart.remove(fingerprint(many[1]))
    process, done = child(), 0
    while done < 20:
        event = json.loads(process.stdout.readline())
        done = event.get("done", 0)
    process.kill()
    told(process)
    assert apart.manifest(fingerprint(many[1])) is None
    events, err = told(child())
    assert events[-1]["event"] == "sealed", err
    steps = [event["done"] for event in events if event["event"] == "advanced"]
    assert 16 <= steps[0] < 40
    assert steps == list(range(steps[0], 41)), "the first that is told stood already, each other was computed"
    assert (apart.checkout(fingerprint(many[1])) / "report.json").read_bytes() == undivided


@pytest.mark.fault
def test_child_asked_for_units_or_a_part_says_so_and_seals_nothing(apart, many, child):
    apart.remove(fingerprint(many[1]))
    assert told(child("--units"))[0] == [{"event": "units", "count": 40}]
    events, _ = told(child("--part", "36:40"))
    assert [event.get("done") for event in events] == [1, 2, 3, 4, None]
    assert events[-1] == {"event": "part", "start": 36, "stop": 40}
    assert parts.standing(apart.objects, fingerprint(many[1])) == [range(36, 40)]
    assert apart.manifest(fingerprint(many[1])) is None
    assert "invalid _span value" in told(child("--part", "4:4"))[1]
    parts.drop(apart.objects, fingerprint(many[1]))


def test_documents_of_a_mixed_corpus_name_their_slice_and_measures_stand_by_slice(
    shared_store, dense, topics, tmp_path
):
    seal = sealer(shared_store)
    code = "\n\n".join((ROOT / "stages" / "runtime" / f"{name}.py").read_text() for name in ("artifacts", "stores"))
    (tmp_path / "code.txt").write_text(code)
    sources = [{"source": "pydoc://topics", "share": 0.75}, {"source": str(tmp_path / "code.txt"), "share": 0.25}]
    mixed = seal("corpus", {"sources": sources, "splits": {"test": 0.5, "train": 0.5}}).identity
    report = report_of(shared_store, seal("validate", SHORT, model=dense, text=mixed))
    slices = [document["slice"] for document in report["documents"]]
    assert (slices.count("topics"), slices.count("code")) == (9, 3)
    for name, measures in report["slices"].items():
        own = [document for document in report["documents"] if document["slice"] == name]
        total = sum(document["tokens"] for document in own)
        key = next(key for key in own[0] if key not in ("id", "tokens", "slice"))
        assert measures["perplexity"] == pytest.approx(math.exp(sum(one[key] for one in own) / total))
    assert report["slices"]["code"]["perplexity"] > 2 * report["slices"]["topics"]["perplexity"]
    alone = report_of(shared_store, seal("validate", SHORT, model=dense, text=topics))
    assert "slices" not in alone and all("slice" not in document for document in alone["documents"])
