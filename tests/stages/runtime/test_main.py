import json
import os
import signal
import subprocess
import sys
import time

import pytest

from stages import stage
from stages.__main__ import described, main, rebuilt
from stages.adapters.connect import connect, pins
from stages.runtime.contract import PARTIAL, DoesNotFit, Interrupted, StageError, Unavailable
from stages.runtime.execute import work_of
from stages.runtime.fingerprint import fingerprint
from stages.runtime.progress import Silent
from tests.stages.runtime.trial import ROOT, TRIAL, start


def ordered(folder, *, force=False, stage=TRIAL, inputs=None, **params):
    made = stage.params(**params)
    work = work_of(stage, made, inputs or {})
    order = folder / f"order-{fingerprint(work)[:8]}-{force}-{params.get('say', '')}.json"
    order.write_text(
        json.dumps(
            {"work": work.model_dump(mode="json"), "params": made.model_dump(mode="json"), "step": "s", "force": force}
        )
    )
    return order, fingerprint(work)


def ended(child, timeout=60):
    """Wait without closing the child's input; returns exit code and events."""
    out, err = child.stdout.read(), child.stderr.read()
    code = child.wait(timeout)
    child.stdin.close(), child.stdout.close(), child.stderr.close()
    return code, [json.loads(line) for line in out.splitlines()], err


def wait_for_state(folder, identity):
    counter = folder / "scratch" / "drafts" / identity / PARTIAL / "count"
    for _ in range(1000):
        if counter.is_file() and counter.read_text():
            return counter
        time.sleep(0.02)
    raise AssertionError("the child never wrote its state")


def store_of(folder):
    return connect(str(folder / "store"), folder / "scratch")


def test_child_tells_its_progress_and_last_that_it_sealed(tmp_path):
    order, identity = ordered(tmp_path, say="noise")
    code, events, err = ended(start(tmp_path, order))
    assert code == 0
    assert [event["event"] for event in events] == ["note", "metric", "sealed"]
    assert events[-1] == {"event": "sealed", "identity": identity, "cached": False, "changed": True}
    assert "noise on stdout" in err
    assert "more noise" in err
    assert store_of(tmp_path).manifest(identity).provenance.step == "s"
    assert ended(start(tmp_path, order))[1] == [
        {"event": "sealed", "identity": identity, "cached": True, "changed": False}
    ]
    forced, _ = ordered(tmp_path, force=True)
    assert ended(start(tmp_path, forced))[1][-1]["cached"] is False


def test_child_where_transformers_cannot_be_imported_checks_its_order_first(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "transformers.py").write_text("raise RuntimeError('torch is too old')")
    quantize = stage("quantize")
    made = quantize.params(scheme="int8_weight_only")
    work = work_of(quantize, made, {})
    order = tmp_path / "order.json"
    order.write_text(json.dumps({"work": work.model_dump(mode="json"), "params": made.model_dump(mode="json")}))
    path = os.pathsep.join([str(broken), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "stages", "quantize", "--orphan", "--work", order, "--store", tmp_path / "store"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    (event,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert event["event"] == "error"
    assert event["what"] == "quantize needs an input 'model'"


def test_child_whose_stage_fails_ends_in_an_error_event_and_code_1(tmp_path):
    order, identity = ordered(tmp_path, say="error")
    code, events, err = ended(start(tmp_path, order))
    assert code == 1
    assert events[-1] == {
        "event": "error", "kind": "StageError", "what": "the trial failed", "measured": "1", "limit": "2",
        "remedy": "Try another.",
    }  # fmt: skip
    assert "Traceback" not in err
    assert store_of(tmp_path).manifest(identity) is None


def test_child_told_to_end_exits_130_keeps_its_state_and_the_next_run_goes_on(tmp_path):
    order, identity = ordered(tmp_path, gate=str(tmp_path / "gate"))
    child = start(tmp_path, order)
    wait_for_state(tmp_path, identity)
    child.send_signal(signal.SIGTERM)
    code, events, _ = ended(child)
    assert code == 130
    assert events[-1]["event"] == "error"
    assert events[-1]["kind"] == "Interrupted"
    assert store_of(tmp_path).manifest(identity) is None
    counted = int(wait_for_state(tmp_path, identity).read_text())
    (tmp_path / "gate").touch()
    code, events, _ = ended(start(tmp_path, order))
    assert code == 0
    assert events[0] == {"event": "note", "text": f"starts at {counted}"}


def test_child_killed_outright_leaves_no_artifact_and_the_next_run_succeeds(tmp_path):
    order, identity = ordered(tmp_path, gate=str(tmp_path / "gate"), kilobytes=50)
    child = start(tmp_path, order)
    counter = wait_for_state(tmp_path, identity)
    child.kill()
    assert ended(child)[0] == -signal.SIGKILL
    assert (counter.parents[1] / "text.txt").exists()
    assert list(store_of(tmp_path).manifests()) == []
    (tmp_path / "gate").touch()
    code, events, _ = ended(start(tmp_path, order))
    assert code == 0
    assert int(events[0]["text"].split()[-1]) >= 1
    store_of(tmp_path).verify(identity)


def test_child_ends_when_its_parent_is_gone_unless_it_may_be_an_orphan(tmp_path):
    order, identity = ordered(tmp_path, gate=str(tmp_path / "gate"))
    child = start(tmp_path, order)
    wait_for_state(tmp_path, identity)
    child.stdin.close()
    assert child.wait(20) == -signal.SIGKILL
    child.stdout.close(), child.stderr.close()
    assert list(store_of(tmp_path).manifests()) == []

    counter = wait_for_state(tmp_path, identity)
    counted = int(counter.read_text())
    orphan = start(tmp_path, order, orphan=True)
    orphan.stdin.close()
    while int(counter.read_text() or 0) < counted + 3:
        time.sleep(0.02)
    (tmp_path / "gate").touch()
    assert ended(orphan)[0] == 0


def test_of_two_children_with_the_same_work_one_makes_it_and_both_get_it(tmp_path):
    order, identity = ordered(tmp_path, gate=str(tmp_path / "gate"), log=str(tmp_path / "log"))
    first = start(tmp_path, order)
    wait_for_state(tmp_path, identity)
    second = start(tmp_path, order)
    time.sleep(1)
    assert second.poll() is None
    (tmp_path / "gate").touch()
    (code, events, _), (other_code, other_events, _) = ended(first), ended(second)
    assert (code, other_code) == (0, 0)
    assert [events[-1]["cached"], other_events[-1]["cached"]] == [False, True]
    assert {events[-1]["identity"], other_events[-1]["identity"]} == {identity}
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_real_stage_runs_as_python_m_stages(tmp_path):
    from stages import stage

    corpus = stage("corpus")
    params = corpus.params.model_validate({"source": "pydoc://topics", "splits": {"validate": 0.5, "test": 0.5}})
    store = connect(str(tmp_path / "store"))
    params = corpus.pin(params, pins(store), Silent())
    order, identity = ordered(tmp_path, stage=corpus, **params.model_dump())
    done = subprocess.run(
        [sys.executable, "-m", "stages", "corpus", "--work", str(order), "--store", store.uri, "--orphan"],
        cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["identity"] == identity
    assert set(store.verify(identity).files) == {"corpus.json", "test.jsonl", "validate.jsonl"}


def called(capfd, *arguments):
    """Call main in this process: it takes descriptor 1 for itself, so give it back afterwards."""
    kept, handler = os.dup(1), signal.getsignal(signal.SIGTERM)
    try:
        code = main([*arguments, "--orphan"])
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        signal.signal(signal.SIGTERM, handler)
    return code, [json.loads(line) for line in capfd.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StageError("w", measured=1), 1),
        (DoesNotFit("w", limit="l"), 3),
        (Interrupted("w"), 130),
        (Unavailable("w", remedy="r"), 1),
        (KeyboardInterrupt(), 130),
        (None, 0),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_each_kind_of_error_has_its_exit_code_and_event(tmp_path, capfd, monkeypatch, error, code):
    def failing(params, inputs, output, progress):
        if error is not None:
            raise error
        (output / "a").write_text("a")
        return {}

    from dataclasses import replace

    import stages
    from tests.stages.runtime import trial

    monkeypatch.setitem(stages.STAGES, "trial", "tests.stages.runtime.trial:TRIAL")
    monkeypatch.setattr(trial, "TRIAL", replace(TRIAL, run=failing))
    order, _ = ordered(tmp_path)
    found, events = called(capfd, "trial", "--work", str(order), "--store", str(tmp_path / "store"))
    assert found == code
    assert events[-1]["event"] == ("error" if code else "sealed")
    if isinstance(error, StageError):
        assert events[-1]["kind"] == type(error).__name__


@pytest.mark.filterwarnings("ignore")
def test_unknown_stage_and_unknown_store_are_errors_and_no_tracebacks(tmp_path, capfd):
    order, _ = ordered(tmp_path)
    code, events = called(capfd, "fly", "--work", str(order), "--store", str(tmp_path / "store"))
    assert (code, events[-1]["what"]) == (1, "there is no stage 'fly'")
    code, events = called(capfd, "corpus", "--work", str(order), "--store", "gopher://there")
    assert code == 1
    assert events[-1]["what"].startswith("the order for corpus is not one that this version understands")


@pytest.mark.parametrize("kind", [StageError, DoesNotFit, Interrupted, Unavailable])
def test_error_described_and_rebuilt_is_of_the_same_kind_and_parts(kind):
    error = kind("what", measured=3, limit=None, remedy="remedy")
    again = rebuilt(json.loads(json.dumps(described(error))))
    assert type(again) is kind
    assert (again.what, again.measured, again.limit, again.remedy) == ("what", "3", None, "remedy")
    assert type(rebuilt({"kind": "Unheard", "what": "w"})) is StageError
