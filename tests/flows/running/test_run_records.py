"""Records and settings: what is remembered of a run, and where libraries keep their files."""

import json
import os
import subprocess
import sys
import threading

import pytest

from flows.recipe.read import load_recipe
from flows.running.run_records import find_run, open_run, records
from flows.settings import enter, settle
from stages.runtime.contract import Interrupted, StageError
from tests.flows.definitions import plain_stages  # noqa: F401
from tests.flows.recipe.test_read import GOOD
from tests.flows.test_cli import result


@pytest.fixture
def recipe(tmp_path, plain_stages):  # noqa: F811
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return load_recipe(path)


def test_record_of_a_running_run_has_its_process_and_recipe(recipe, tmp_path):
    record = open_run(tmp_path, recipe, ["enginery", "run", "x"])
    assert record.pid == os.getpid() and record.line().state == "running"
    assert record.facts["command"] == ["enginery", "run", "x"]
    copy = tmp_path / "copy.yaml"
    copy.write_text(record.recipe())
    assert load_recipe(copy) == recipe


def test_record_ends_in_each_state(recipe, tmp_path):
    ended = [open_run(tmp_path, recipe, []) for _ in range(5)]
    ended[0].finish(result(run=ended[0].name))
    ended[1].finish(result(passed=False, run=ended[1].name))
    ended[2].failed(StageError("broke"))
    ended[3].failed(KeyboardInterrupt())
    ended[4].failed(Interrupted("stopped"))
    states = ["passed", "gate failed", "error", "interrupted", "interrupted"]
    assert [record.line().state for record in ended] == states
    assert ended[0].result == result(run=ended[0].name) and ended[2].result is None
    assert ended[3].line().error == "interrupted" and all(record.pid is None for record in ended)


OLD_TEXT = {
    "at_most": "m of cpu: measured 1, limit at most 2: passed",
    "at_least": "m of cpu: measured 1, limit at least 0",
}


@pytest.mark.parametrize("bound", OLD_TEXT)
def test_record_from_before_bound_and_verdict_reads_with_both(recipe, tmp_path, bound):
    record = open_run(tmp_path, recipe, [])
    record.finish(result(run=record.name))
    kept = json.loads((record.folder / "result.json").read_text())
    del kept["verdict"], kept["gates"][0]["bound"]
    kept["gates"][0]["text"] = OLD_TEXT[bound]
    (record.folder / "result.json").write_text(json.dumps(kept))
    assert record.result.gates[0].bound == bound and record.line().state == "passed"
    (record.folder / "result.json").write_text(json.dumps(kept | {"gates": []}))
    assert record.line().state == "not judged"
    kept["gates"][0]["passed"] = False
    (record.folder / "result.json").write_text(json.dumps(kept | {"passed": False}))
    assert record.line().state == "gate failed"


def test_record_of_a_killed_process_is_ended_even_if_its_number_is_taken(recipe, tmp_path):
    code = (
        "import sys; from pathlib import Path; from flows.recipe.model import Recipe\n"
        "from flows.running.run_records import open_run\n"
        "recipe = Recipe.model_validate_json(sys.stdin.read())\n"
        "open_run(Path(sys.argv[1]), recipe, ['x']); import os; os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], input=recipe.model_dump_json(), text=True, check=False)
    (record,) = records(tmp_path)
    assert record.pid is None and record.line().state == "ended"
    with pytest.raises(StageError, match="has ended"):
        record.cancel()


def test_log_of_many_threads_keeps_whole_lines_and_skips_a_torn_one(recipe, tmp_path):
    record = open_run(tmp_path, recipe, [])
    threads = [
        threading.Thread(target=lambda i=i: [record.log({"event": "note", "n": (i, k)}) for k in range(50)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with (record.folder / "log.jsonl").open("a") as log:
        log.write('{"event": "no')
    events = list(record.events())
    assert len(events) == 200 and {tuple(e["n"]) for e in events} == {(i, k) for i in range(4) for k in range(50)}


def test_event_whose_text_holds_other_ends_of_lines_is_one_event(recipe, tmp_path):
    record = open_run(tmp_path, recipe, [])
    texts = [f"before{end}after" for end in "\u2028\u2029\x85\x0b\x0c\x1c\r\n"]
    for text in texts:
        record.log({"event": "note", "text": text})
    assert [event["text"] for event in record.events()] == texts


def test_find_run_takes_a_beginning_or_the_last(recipe, tmp_path):
    made = sorted([open_run(tmp_path, recipe, []) for _ in range(3)], key=lambda record: record.name)
    assert find_run(tmp_path, made[1].name) == made[1] and find_run(tmp_path, "last") == made[2]
    with pytest.raises(StageError, match="more than one run"):
        find_run(tmp_path, "2")
    with pytest.raises(StageError, match="no run"):
        find_run(tmp_path / "empty", "last")


def test_settings_come_from_what_is_asked_the_environment_and_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("ENGINERY_STORE", str(tmp_path / "a"))
    assert settle().store == str(tmp_path / "a") and settle(store="s3://b/c").store == "s3://b/c"
    monkeypatch.delenv("ENGINERY_STORE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settle().store == str(tmp_path / ".enginery" / "store")
    cores = len(os.sched_getaffinity(0))
    assert (settle().jobs, settle().threads) == (1, cores) and settle(jobs=cores).threads == 1
    with pytest.raises(StageError, match="--threads is a count"):
        settle(threads=0)


def test_enter_keeps_libraries_out_of_home_and_leaves_what_the_user_set(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", "/mine")
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    before = dict(os.environ)
    try:
        scratch = enter(settle(store=str(tmp_path / "store")))
        assert scratch == tmp_path / "store" / "state"
        assert os.environ["HF_HOME"] == "/mine" and os.environ["PREFECT_HOME"] == str(scratch / "prefect")
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{scratch}/mlflow.db"
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
