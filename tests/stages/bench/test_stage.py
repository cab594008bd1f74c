"""bench: figures with their device, a slower model measured slower, refusals that seal nothing. No time is asserted."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from stages.bench.bytes_read import copy_bytes_per_s
from stages.bench.stage import BENCH, BenchParams
from stages.bench.turns import contestant
from stages.measures.items import ItemSplits
from stages.measures.table import SPEEDS
from stages.runtime.contract import StageError
from stages.runtime.execute import device_name, execute, work_of
from tests.conftest import sealer
from tests.engines import Hears

SHORT = {"prompt_tokens": (16, 600), "new_tokens": 8, "batches": (2, 1), "repeats": 3}
DEEP = 24


@pytest.fixture(scope="module")
def made(shared_store, dense, topics, tmp_path_factory, tiny):
    """A tiny graph, measured beside a checkpoint of four times its blocks; both read 512 tokens."""
    seal, folder = sealer(shared_store), tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny, num_hidden_layers=DEEP, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    deep = seal("fetch", {"source": folder.as_uri()}).identity
    graph = seal("export", {}, model=dense).identity
    params = BenchParams.model_validate({**SHORT, "target": "onnxruntime:cpu"})
    inputs, heard = {"artifact": graph, "baseline": deep, "text": topics}, Hears()
    outcome = execute(BENCH, params, work_of(BENCH, params, inputs), shared_store, heard, step="bench")
    report = json.loads((shared_store.checkout(outcome.identity) / "report.json").read_text())
    return SimpleNamespace(
        report=report, outcome=outcome, graph=graph, deep=deep, params=params, inputs=inputs, heard=heard
    )


def test_bench_reports_every_measure_of_the_task_with_its_interval_device_and_runtime(made):
    report, said = made.report, made.report["speed"]
    assert report["executor"] == BENCH.executed_on(made.params) == dict(made.outcome.manifest.work.executor)
    assert report["executor"]["device"] == device_name()
    assert report["artifact_target"] == said["artifact"]["target"] == "onnxruntime:cpu"
    assert said["baseline"]["target"] == "torch:cpu"
    wanted = {name for name, one in SPEEDS.items() if "generate" in one.tasks}
    for role in ("artifact", "baseline"):
        measures, intervals = said[role]["measures"], said[role]["intervals"]
        assert set(measures) == wanted
        assert set(intervals) == {name for name in wanted if not SPEEDS[name].once}
        assert all(low <= measures[name] <= high for name, (low, high) in intervals.items())
        assert measures["token_latency_p50_ms"] <= measures["token_latency_p95_ms"] <= measures["token_latency_p99_ms"]
    assert set(said["ratios"]) == wanted
    assert all(low <= point <= high for point, low, high in said["ratios"].values())
    assert made.outcome.manifest.metrics == {
        **said["artifact"]["measures"],
        **{f"{name}_ratio": three[0] for name, three in said["ratios"].items()},
    }


def test_bench_takes_lengths_at_the_smallest_batch_and_batches_at_the_shortest_length(made):
    cells = [(one["batch"], one["prompt_tokens"], one["new_tokens"]) for one in made.report["cells"]]
    # 600 tokens are more than both read, eight of which are written.
    assert cells == [(1, 16, 8), (1, 504, 8), (2, 16, 8)]
    assert [made.report["speed"][key] for key in ("batch", "prompt_tokens", "new_tokens")] == [1, 504, 8]
    assert made.heard.notes == ["prompts of 16 and 504 tokens and 8 new ones: a model reads 512"]
    assert made.heard.fractions == sorted(made.heard.fractions) and made.heard.fractions[-1] == 1


def test_bench_of_four_times_the_blocks_is_slower_in_every_round(made):
    ratios = made.report["speed"]["ratios"]
    assert ratios["decode_tokens_per_s"][1] > 2
    assert ratios["time_to_first_token_ms"][2] < 0.5
    assert ratios["peak_rss_bytes"][0] < 1  # of a process without torch


def test_bench_counts_weights_without_tables_that_are_only_looked_up_and_the_cache(made, shared_store):
    folder = shared_store.checkout(made.deep)
    looked_up = 768 * 64 * 4
    # Keys and values of two heads of 16 in each block, as they stand halfway through the seven tokens behind the first.
    cache = DEEP * 2 * 2 * 16 * 4 * (504 + 7 / 2)
    stored = (folder / "model.safetensors").stat().st_size
    assert made.report["speed"]["baseline"]["bytes_per_token"] == round(stored - looked_up + cache)
    graph = (shared_store.checkout(made.graph) / "model.onnx").stat().st_size
    # Its one table is the head's, too.
    assert made.report["speed"]["artifact"]["bytes_per_token"] == round(graph + cache / DEEP * 6)


def test_bench_of_the_same_work_is_found_and_of_another_device_is_other_work(made, shared_store, monkeypatch):
    again = sealer(shared_store)("bench", {**SHORT, "target": "onnxruntime:cpu"}, **made.inputs)
    assert again.cached and again.identity == made.outcome.identity
    monkeypatch.setattr("stages.adapters.targets.device_name", lambda: "another processor x2")
    there = work_of(BENCH, made.params, made.inputs)
    assert {**there.executor, "device": device_name()} == dict(made.outcome.manifest.work.executor)
    assert shared_store.manifest(there.stage) is None
    with pytest.raises(StageError, match="planned for another device than the one it runs on"):
        execute(BENCH, made.params, made.outcome.manifest.work, shared_store, Hears(), force=True)


def test_bench_on_another_target_than_the_artifacts_is_refused_and_seals_nothing(made, shared_store):
    sealed = len(list(shared_store.manifests()))
    with pytest.raises(StageError, match="another target") as caught:
        sealer(shared_store)("bench", {**SHORT, "target": "torch:cpu"}, artifact=made.graph, text=made.inputs["text"])
    assert (caught.value.measured, caught.value.limit) == ("onnxruntime:cpu", "torch:cpu")
    assert "target` to onnxruntime:cpu" in caught.value.remedy
    assert len(list(shared_store.manifests())) == sealed


def test_bench_whose_process_is_killed_says_so(made, shared_store):
    with contestant("artifact", shared_store.checkout(made.graph), "cpu") as one:
        assert len(one.asked([[5, 6, 7]], 4)["steps_s"]) == 3
        os.kill(one._process.pid, signal.SIGKILL)
        with pytest.raises(StageError, match="the process of the artifact ended before it had answered") as caught:
            one.asked([[5, 6, 7]], 4)
    assert "-9" in str(caught.value.measured)


@pytest.fixture
def encoder(tiny, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=768, max_position_embeddings=64, **shape)).save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bert" / name).write_bytes((tiny / name).read_bytes())
    return tmp_path / "bert"


def test_bench_of_an_encoder_counts_items(encoder, shared_store, topics, tmp_path):
    params = BenchParams(prompt_tokens=(16, 64), batches=(1, 3), repeats=2)
    out = tmp_path / "out"
    out.mkdir()
    metrics = BENCH.run(params, {"artifact": encoder, "text": shared_store.checkout(topics)}, out, Hears())
    report = json.loads((out / "report.json").read_text())
    assert set(metrics) == {name for name, one in SPEEDS.items() if "embed" in one.tasks}
    assert [(one["batch"], one["prompt_tokens"]) for one in report["cells"]] == [(1, 16), (1, 64), (3, 16)]
    assert "ratios" not in report["speed"] and "baseline" not in report["speed"]


def test_bench_beside_what_answers_otherwise_or_by_other_tokens_is_refused(encoder, tiny, tmp_path):
    inputs = {"artifact": tiny, "baseline": encoder, "text": tmp_path}
    with pytest.raises(StageError, match="answers something else") as caught:
        BENCH.run(BenchParams(), inputs, tmp_path, Hears())
    assert caught.value.measured == "its task is embed"
    tokenizer = json.loads((encoder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (encoder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StageError, match="another vocabulary") as caught:
        BENCH.run(BenchParams(), inputs, tmp_path, Hears())
    assert caught.value.measured == "the same number of other tokens"


def test_bench_of_a_folder_that_is_no_model_is_refused_by_its_role(tmp_path):
    with (
        pytest.raises(StageError, match=r"the baseline: .* holds no engine, graph or checkpoint"),
        contestant("baseline", tmp_path, "cpu"),
    ):
        raise AssertionError


def test_bench_of_items_or_of_a_split_that_is_not_there_is_refused_before_any_work():
    with pytest.raises(StageError, match="prompts are taken from text"):
        BENCH.admit(BenchParams(), {"artifact": None, "text": ItemSplits({"test"})})
    with pytest.raises(StageError, match="no split 'test'"):
        BENCH.admit(BenchParams(), {"artifact": None, "text": frozenset({"train"})})


def test_copies_are_counted_as_read_and_written():
    assert 1e8 < copy_bytes_per_s(2, 2**24) < 1e13
