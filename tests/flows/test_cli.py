"""The command line: exit codes, one-line errors, JSON that follows its schema, nothing heavy imported for help."""

import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import jsonschema
import pytest

from flows.cli import main
from flows.commands.schema import FOLDER
from flows.recipe.read import load_recipe
from flows.results import GateResult, ModelResult, PlanLine, RunResult, StepResult
from flows.running.run_records import open_run
from stages.runtime.contract import DoesNotFit, FileEntry, Interrupted, Kind, Manifest, Provenance, StageError, Work
from stages.runtime.fingerprint import digest_file, fingerprint
from tests.flows.definitions import plain_stages  # noqa: F401
from tests.flows.recipe.test_read import GOOD


def result(passed: bool = True, run: str = "r1") -> RunResult:
    made = dict(fingerprint="ab" * 32, uri="file:///s", cached=False, seconds=2.5, peak_rss_bytes=10**9)
    return RunResult(
        run=run,
        passed=passed,
        verdict="passed" if passed else "gate failed",
        seconds=75.2,
        report="/s/report.html",
        store="file:///s",
        steps=[
            StepResult(name="dense", stage="fetch", kind=Kind.CHECKPOINT, metrics={"size_bytes": 538e6}, **made),
            StepResult(
                name="cpu",
                stage="compile",
                kind=Kind.ENGINE,
                metrics={"size_bytes": 9e7},
                why="params.x: [1] -> 2",
                **made,
            ),
            StepResult(
                name="validate-cpu-text", stage="validate", kind=Kind.REPORT, metrics={"perplexity": 21.7},
                measures="cpu", corpus="text", **made
            ),
        ],
        gates=[
            GateResult(
                measure="perplexity", artifact="cpu", target="onnxruntime:cpu", corpus="text", measured=1.3, low=1.2,
                high=1.41, bound="at_most", limit=1.25, passed=passed, against="dense",
            )
        ],
        model=ModelResult(name="m", version="3", alias="champion", targets=["onnxruntime:cpu"]) if passed else None,
        executed=["cpu on onnxruntime:cpu"],
        compiled=["gpu for tensorrt_rtx:sm_89+sm_120"],
        outputs={"engine cpu": "/s/cpu"},
    )  # fmt: skip


@pytest.fixture
def recipe(tmp_path, plain_stages):  # noqa: F811
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return str(path)


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Each test its own store, and the environment as it was afterwards."""
    monkeypatch.setenv("ENGINERY_STORE", str(tmp_path / "store"))
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def optimized(monkeypatch):
    """Stand-ins for the flow: what `optimize` returns or raises, and what it was called with."""
    seen = types.SimpleNamespace(answer=result(), recipe=None, settings=None)

    def optimize(asked, settings, terminal):
        seen.recipe, seen.settings = asked.recipe, settings
        terminal.started("dense")
        terminal.for_step("dense").advanced(1, 2)
        terminal.finished("dense", 1.0, cached=False, why="")
        if isinstance(seen.answer, BaseException):
            raise seen.answer
        return seen.answer

    def plan(recipe, settings, terminal=None):
        hit = PlanLine(name="dense", stage="fetch", hit=True, why="", fingerprint="ab" * 32, needs="nothing: sealed")
        return [hit, hit.model_copy(update={"name": "int8", "hit": False, "why": "params.scheme: a -> b"})]

    monkeypatch.setitem(sys.modules, "flows.pipeline.drive", types.SimpleNamespace(optimize=optimize))
    monkeypatch.setitem(sys.modules, "flows.pipeline.look_ahead", types.SimpleNamespace(plan=plan))
    return seen


def sealed(store, step: str, files: dict[str, bytes], kind=Kind.CHECKPOINT, metrics=None, **inputs: str) -> str:
    work = Work(stage="share", code="0" * 64, params={"made": step}, inputs=inputs, requires={})
    folder = store.scratch / "made" / step
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    entries = {n: FileEntry(sha256=digest_file(folder / n), size=(folder / n).stat().st_size) for n in files}
    made = Provenance(
        step=step, host="h", device="d", created=f"2026-01-0{len(step) % 9 + 1}", seconds=1.0, peak_rss_bytes=1
    )
    store.publish(folder, Manifest(work=work, kind=kind, files=entries, metrics=metrics or {}, provenance=made))
    return fingerprint(work)


@pytest.fixture
def opened(tmp_path):
    from stages.adapters.connect import connect

    return connect(str(tmp_path / "store"))


def valid(text: str, schema: str) -> dict:
    data = json.loads(text)
    jsonschema.validate(data, json.loads((FOLDER / f"{schema}.json").read_text()))
    return data


def test_help_is_there_at_once_without_heavy_imports():
    code = (
        "import sys\nfrom flows.cli import main\nmain(['--help'])\n"
        "heavy = ['torch', 'mlflow', 'prefect', 'transformers', 'numpy', 'yaml', 'pydantic']\n"
        "found = [name for name in heavy if name in sys.modules]\nmain(['run', '--help'])\nmain(['stages', 'prune'])\n"
        "print(found + [name for name in heavy[:-2] if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "rollback" in done.stdout and "130 interrupted" in done.stdout


def test_help_takes_at_most_0_4_seconds_of_a_processor():
    def took() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "flows", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time is what the command costs; the wall clock also counts whatever else the machine does.
    assert min(took() for _ in range(3)) <= 0.4


def test_help_says_each_command_in_one_whole_line(capsys):
    assert main(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.replace("[ARGS]...", "")


def test_no_arguments_show_help_and_version_is_said(capsys):
    assert main([]) == 0
    assert "Usage" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


@pytest.mark.parametrize("words", [["run"], ["rnu"], ["run", "a", "--jobs", "many"], ["ls", "--no-such"]])
def test_wrong_usage_is_one_line_and_exit_1(words, capsys):
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("error: ") and not said.out


def test_run_that_passes_exits_0_and_says_where_everything_lies(recipe, optimized, capsys):
    assert main(["run", recipe, "--set", "steps.int8.params.scheme=int4_weight_only", "--jobs", "2"]) == 0
    said = capsys.readouterr()
    for text in (
        "/s/report.html",
        "engine cpu: /s/cpu",
        "m version 3 as champion",
        "compiled, not judged: gpu",
        "21.7",
    ):
        assert text in said.out
    assert "params.x: [1] -> 2" in said.out
    assert "dense: 50%" in said.err and "dense: done in 1.0 s" in said.err
    assert optimized.recipe.step("int8").params == {"scheme": "int4_weight_only"}
    assert optimized.settings.jobs == 2


def test_run_hands_over_what_was_asked(recipe, optimized, tmp_path):
    words = ["--from", "int8", "--force", "cpu", "--force", "gpu", "--output", str(tmp_path / "out"), "--threads", "3"]
    assert main(["run", recipe, *words, "--store", str(tmp_path / "other")]) == 0
    asked = optimized.settings
    assert (asked.from_step, asked.force, asked.threads) == ("int8", {"cpu", "gpu"}, 3)
    assert (asked.store, asked.output) == (str(tmp_path / "other"), tmp_path / "out")
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/other/state/mlflow.db"


def test_run_json_is_one_object_that_follows_its_schema(recipe, optimized, capsys):
    assert main(["run", recipe, "--json"]) == 0
    data = valid(capsys.readouterr().out, "run")
    assert {"passed", "seconds", "report", "store", "steps", "gates", "model"} <= data.keys()
    stands = {"name": "m", "version": "3", "alias": "champion", "targets": ["onnxruntime:cpu"], "undone": ""}
    assert data["model"] == stands


def test_run_whose_gate_fails_exits_2_and_says_gate_measured_limit(recipe, optimized, capsys):
    optimized.answer = result(passed=False)
    assert main(["run", recipe]) == 2
    assert "gate failed: perplexity of cpu on text: measured 1.3, limit at most 1.25: failed" in capsys.readouterr().out
    assert main(["run", recipe, "--json"]) == 2
    said = capsys.readouterr()
    assert valid(said.out, "run")["model"] is None and "gate failed: perplexity" in said.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StageError("it broke", measured=3, limit=2, remedy="Mend it."), 1, "error: it broke; measured 3; limit 2. Me"),
        (DoesNotFit("memory ran out"), 3, "error: memory ran out"),
        (Interrupted("ended"), 130, "interrupted: ended"),
        (KeyboardInterrupt(), 130, "interrupted: what is sealed stays"),
    ],
)  # fmt: skip
def test_run_that_breaks_has_its_exit_code_and_one_line(recipe, optimized, capsys, error, code, said):
    optimized.answer = error
    assert main(["run", recipe]) == code
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(said) and not any("Traceback" in line for line in err)


def test_run_with_debug_shows_where(recipe, optimized, capsys):
    optimized.answer = StageError("it broke")
    assert main(["--debug", "run", recipe]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--force", "int9"], ["--from", "int9"], ["--jobs", "0"], ["--set", "a.b=1"]])
def test_run_with_a_wrong_option_starts_nothing(recipe, optimized, capsys, words):
    assert main(["run", recipe, *words]) == 1
    assert capsys.readouterr().err.startswith("error: ") and optimized.recipe is None


def test_recipe_with_mistakes_is_one_line_each_and_nothing_is_written(recipe, capsys, tmp_path):
    Path(recipe).write_text(GOOD.replace("keep: 0.9", "keep: 9").replace("name: small", "nmae: small"))
    assert main(["run", recipe]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2] for line in lines] == ["2", "7"] and all(x.startswith("error: ") for x in lines)
    assert not (tmp_path / "store").exists()


def test_store_that_may_not_be_written_to_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["sweep", "--store", str(tmp_path / "file" / "store")]) == 1
    said = capsys.readouterr().err
    assert "cannot be written to" in said and "--store" in said and said.count("\n") == 1


def test_plan_shows_hits_misses_and_reasons(recipe, optimized, capsys):
    assert main(["plan", recipe]) == 0
    said = capsys.readouterr().out
    assert "params.scheme: a -> b" in said and "1 of 2 steps would be made" in said
    assert main(["plan", recipe, "--json"]) == 0
    assert [line["hit"] for line in valid(capsys.readouterr().out, "plan")["steps"]] == [True, False]


def test_recipes_are_listed_with_what_they_are_about(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["minilm-l6-v2", "smollm2-135m", "tiny"]
    assert all(len(line) > 30 for line in lines)


def test_runs_explain_and_logs_read_the_records(recipe, opened, capsys):
    loaded = load_recipe(recipe)
    done = open_run(opened.scratch, loaded, ["enginery", "run", recipe])
    done.log({"event": "note", "step": "int8", "text": "12 layers"})
    done.finish(result(run=done.name))
    broken = open_run(opened.scratch, loaded, ["enginery", "run", recipe])
    broken.failed(StageError("disk full"))
    assert main(["runs", "--json"]) == 0
    lines = {line["run"]: line for line in valid(capsys.readouterr().out, "runs")["runs"]}
    assert (lines[done.name]["state"], lines[done.name]["model"]) == ("passed", "m 3")
    assert (lines[broken.name]["state"], lines[broken.name]["error"]) == ("error", "disk full")
    assert main(["runs"]) == 0
    assert done.name in capsys.readouterr().out
    assert main(["explain", done.name]) == 0
    said = capsys.readouterr().out
    assert "because params.x: [1] -> 2" in said and f"enginery run {recipe}" in said and "perplexity 21.7" in said
    assert main(["explain", broken.name]) == 0
    assert "error: disk full" in capsys.readouterr().out
    assert main(["logs", done.name, "--follow"]) == 0
    assert "int8 note 12 layers" in capsys.readouterr().out
    assert main(["logs", "nothing"]) == 1
    assert "no run begins with 'nothing'" in capsys.readouterr().err


def test_cancel_ends_the_process_of_a_run_and_no_other(recipe, opened, capsys):
    record = open_run(opened.scratch, load_recipe(recipe), ["x"])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        import psutil

        facts = json.loads((record.folder / "pid").read_text()) | {"pid": child.pid}
        (record.folder / "pid").write_text(json.dumps(facts | {"started": 1.0}))
        assert main(["cancel", record.name]) == 1
        assert "has ended" in capsys.readouterr().err and child.poll() is None
        (record.folder / "pid").write_text(json.dumps(facts | {"started": psutil.Process(child.pid).create_time()}))
        assert main(["runs"]) == 0 and "running" in capsys.readouterr().out
        assert main(["cancel", record.name]) == 0
        assert child.wait(10) == -15
        assert main(["runs"]) == 0 and "ended" in capsys.readouterr().out
    finally:
        child.kill()
    (record.folder / "pid").write_text(json.dumps(facts | {"host": "elsewhere"}))
    assert main(["cancel", record.name]) == 1
    assert "elsewhere" in capsys.readouterr().err


WAIT = "print('ready', flush=True); time.sleep(60)"
WAITS = {
    "in a command": WAIT,
    "where Python makes another error of it": (
        "type('C', (), {'d': type('D', (), {'__set_name__': lambda *_: wait_()})()})"
    ),
}


@pytest.mark.parametrize("where", WAITS)
def test_sigterm_ends_a_command_with_130(tmp_path, where):
    code = (
        "import os, signal, sys, flows.commands.inspect as looking, time\n"
        "import flows.cli as cli\nfrom flows.__main__ import command\n"
        f"def wait_():\n    {WAIT}\n"
        f"@cli.app.command()\ndef wait():\n    {WAITS[where]}\n"
        "sys.argv[1:] = ['wait']; command()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.terminate()
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130 and err.startswith("interrupted") and "Traceback" not in err


def test_ls_lists_the_newest_last_and_verify_hashes(opened, capsys):
    first = sealed(opened, "a", {"x.bin": b"12345"})
    second = sealed(opened, "bb", {"x.bin": b"123456"})
    assert main(["ls", "--json"]) == 0
    listed = valid(capsys.readouterr().out, "ls")["artifacts"]
    assert [(one["fingerprint"], one["size_bytes"]) for one in listed] == [(first, 5), (second, 6)]
    assert main(["ls"]) == 0
    assert first[:12] in capsys.readouterr().out
    assert main(["verify", "bb"]) == 0
    assert "every byte matches" in capsys.readouterr().out
    assert main(["verify", first[:8], "--json"]) == 0
    assert valid(capsys.readouterr().out, "verify")["fingerprint"] == first
    blob = next(p for p in opened.objects.root.glob("blobs/*/*") if p.stat().st_size == 5)
    blob.chmod(0o644)
    blob.write_bytes(b"54321")
    assert main(["verify", "a"]) == 1
    assert "does not match its digest" in capsys.readouterr().err


def test_compare_puts_artifacts_and_their_reports_side_by_side(opened, capsys, recipe):
    a = sealed(opened, "one", {"m": b"1"}, metrics={"size_bytes": 10.0, "parameters": 0.0})
    sealed(opened, "other", {"m": b"22"}, metrics={"size_bytes": 5.0, "parameters": 4.0})
    sealed(opened, "report", {"r": b"r"}, Kind.REPORT, {"perplexity": 20.0}, model=a, text="c" * 64)
    assert main(["compare", "one", "other"]) == 0
    said = capsys.readouterr().out
    assert "0.500" in said and "perplexity on cccccccc" in said and "params.made: one -> other" in said
    assert main(["compare", "one", "other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measures"]["size_bytes"] == {"a": 10.0, "b": 5.0}
    record = open_run(opened.scratch, load_recipe(recipe), ["x"])
    record.finish(result(run=record.name))
    assert main(["compare", record.name, "last", "--all"]) == 0
    assert "validate-cpu-text perplexity" in capsys.readouterr().out
    assert main(["compare", "one", "zzz"]) == 1


def test_compare_of_two_runs_shows_what_differs_and_counts_what_does_not(opened, capsys, recipe):
    first = open_run(opened.scratch, load_recipe(recipe), ["x"])
    first.finish(result(run=first.name))
    other = open_run(opened.scratch, load_recipe(recipe, ["steps.int8.params.scheme=int4_weight_only"]), ["x"])
    other.finish(result(passed=False, run=other.name).model_copy(update={"seconds": 80.0}))
    broken = open_run(opened.scratch, load_recipe(recipe), ["x"])
    broken.failed(StageError("disk full"))
    assert main(["compare", first.name, other.name]) == 0
    said = capsys.readouterr().out
    for text in ("steps.int8.params.scheme", "int8_w8a8", "int4_weight_only", "gate failed", "failed: 1.3, limit 1.25"):
        assert text in said, text
    assert "steps.dense.stage" not in said and "dense size_bytes" not in said and "rows are not shown: --all" in said
    hidden = int(said.partition(" equal rows")[0].split()[-1])
    assert main(["compare", first.name, other.name, "--all"]) == 0
    everything = capsys.readouterr().out
    assert everything.count("│\n") == said.count("│\n") + hidden and "not shown" not in everything
    assert main(["compare", first.name, other.name, "--json"]) == 0
    data = valid(capsys.readouterr().out, "compare")
    assert data["params"]["steps.int8.params.scheme"] == {"a": "int8_w8a8", "b": "int4_weight_only"}
    assert data["measures"]["seconds"] == {"a": 75.2, "b": 80.0} and data["measures"]["cpu size_bytes"]["a"] == 9e7
    assert main(["compare", first.name, broken.name]) == 0
    assert "error" in capsys.readouterr().out


def test_inspect_prints_what_the_bytes_say(opened, capsys):
    import numpy as np
    from safetensors.numpy import save

    weights = {"a.weight": np.zeros((4, 8), np.float32), "b.weight": np.ones((64, 64), np.int8)}
    held = save(weights | {"c.weight": weights["b.weight"]})
    files = {"model.safetensors": held, "structure.json": b'{"tied": [["a", "b"]]}'}
    sealed(opened, "shared", files, metrics={"size_bytes": 3.0}, model="d" * 64)
    assert main(["inspect", "shared"]) == 0
    said = capsys.readouterr().out
    for text in ("float32", "int8", "100.00%", "shared by 2: a, b", "stored 2 times", "4.1 kB", "reads model: dddd"):
        assert text in said
    assert main(["inspect", "shared", "--json"]) == 0
    seen = valid(capsys.readouterr().out, "inspect")
    assert seen["parameters"] == 32 + 2 * 4096 and seen["duplicate_bytes"] == 4096


def test_sweep_takes_an_artifact_away(opened, capsys):
    identity = sealed(opened, "a", {"x": b"1"})
    assert main(["sweep", "--artifact", "a"]) == 0
    assert "took away" in capsys.readouterr().out and opened.manifest(identity) is None
    assert main(["sweep"]) == 0
    assert "removed 0 in all, 0 B" in capsys.readouterr().out
    blob = next((opened.objects.root / "blobs").rglob("*"))
    for path in (opened.objects.root / "blobs").rglob("*"):
        os.utime(path, (1, 1))
    assert main(["sweep", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "blobs: 1, 1 B" in said and "would remove 1 in all, 1 B" in said and blob.exists()
    assert main(["sweep", "--runs-older-than", "soon"]) == 1
    assert main(["sweep"]) == 0 and "removed 1 in all" in capsys.readouterr().out


def test_promote_rollback_and_reconcile_say_where_the_alias_stands(capsys, monkeypatch):
    from flows.registry import journal, projection
    from flows.tracking import connect

    calls = []
    moved = projection.Release(version="2", logged_model="", new=False, moved=True, note="")
    stays = projection.Release(version="1", logged_model="", new=False, moved=False, note="it stood there")
    monkeypatch.setattr(connect, "open_tracking", lambda scratch: None)
    monkeypatch.setattr(projection, "promote", lambda *asked: calls.append(asked[1:]) or moved)
    monkeypatch.setattr(projection, "rollback", lambda *asked: calls.append(asked[1:]) or stays)
    monkeypatch.setattr(journal, "models", lambda objects: ["m", "n"])
    drift = projection.Drift("m", "champion", "2", "1")
    monkeypatch.setattr(projection, "reconcile", lambda found, model: [drift] if model == "m" else [])
    assert main(["promote", "m", "2", "--alias", "next", "--why", "faster"]) == 0
    assert "m@next now stands on version 2" in capsys.readouterr().out
    assert main(["rollback", "m"]) == 0
    assert "m@champion stands as before on version 1: it stood there" in capsys.readouterr().out
    assert calls == [("m", "2", "next", "faster"), ("m", "champion", "")]
    assert main(["reconcile"]) == 0
    assert "m@champion: was on 1, is on 2 again" in capsys.readouterr().out
    assert main(["reconcile", "n"]) == 0
    assert "every alias stands" in capsys.readouterr().out


def test_output_into_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -c 'import sys; from flows.cli import main; sys.exit(main([\"--help\"]))' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
