"""The folder of --output: one run's, whole, or what stood there before."""

# ruff: noqa: F811 - fixtures that other modules define are imported and then named as arguments

import json
import os
import shutil
from pathlib import Path

import pytest

from flows.cli import main
from flows.pipeline.output_folder import RESULT, check_output, check_room, copied, copies_into
from flows.recipe.model import Recipe
from flows.results import RunResult
from stages.adapters.connect import connect
from stages.runtime.contract import DoesNotFit, StageError
from tests.flows.pipeline.tiny_run import RECIPE, place, sealed  # noqa: F401
from tests.flows.test_cli import result

FETCH = {"stage": "fetch", "params": {"source": "x://y"}}
TEXT = {"stage": "corpus", "params": {"source": "x://y", "splits": {"test": 1.0}}}


def recipe_of(*steps, **more) -> Recipe:
    made = [{"inputs": inputs, "name": name, **stage} for name, stage, inputs in steps]
    return Recipe.model_validate({"recipe": 1, "name": "a", "steps": made, **more})


SMALL = (("dense", FETCH, {}), ("int8", {"stage": "quantize", "params": {"scheme": "int8_w8a8"}}, {"model": "dense"}))
WHOLE = (*SMALL, ("text", TEXT, {}), ("graph", {"stage": "export"}, {"model": "int8"}))
JUDGE = {"artifacts": ["int8", "graph"], "baseline": "dense", "corpora": ["text"]}


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (recipe_of(*SMALL), ["int8"]),
        (recipe_of(*SMALL, ("int4", FETCH, {})), ["int8", "int4"]),
        (recipe_of(*WHOLE), ["text", "graph"]),
        (recipe_of(*WHOLE, judge=JUDGE), ["int8", "graph"]),
        (recipe_of(*WHOLE, judge=JUDGE | {"artifacts": ["int8"]}), ["int8", "graph"]),
        (recipe_of(*SMALL, ("seen", {"stage": "validate"}, {"model": "int8"})), ["int8", "seen"]),
        (recipe_of(("dense", FETCH, {})), ["dense"]),
    ],
)
def test_copied_is_what_is_judged_and_what_no_step_reads(recipe, names):
    assert copied(recipe) == names


def filled(folder: Path, run: str, *names: str) -> None:
    """What a run of that name leaves: in each artifact a file of its own that says whose it is."""
    outputs = {name: str(folder / name) for name in (RESULT, "report.html", *names)}
    with copies_into(folder) as copies:
        source = folder.parent / f"made-{run}"
        shutil.rmtree(source, ignore_errors=True)
        (source / "deep").mkdir(parents=True)
        for path in (source / "deep" / run, source / "same"):
            path.write_text(run)
        for name in names:
            copies.add(source, name)
        copies.add(source / "same", "report.html")
        copies.conclude(result(run=run).model_copy(update={"outputs": outputs}))
        copies.place()


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RESULT)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def of_run(run: str, *names: str) -> dict[str, str]:
    artifacts = {f"{name}/{file}": run for name in names for file in (f"deep/{run}", "same")}
    return {"report.html": run, **artifacts}


def test_earlier_run_is_replaced_whole_and_what_others_left_stays(tmp_path):
    folder = tmp_path / "out"
    filled(folder, "one", "cpu", "gpu")
    assert content(folder) == of_run("one", "cpu", "gpu")
    (folder / "mine.txt").write_text("mine")
    filled(folder, "two", "cpu", "int8")
    assert content(folder) == {**of_run("two", "cpu", "int8"), "mine.txt": "mine"}
    assert RunResult.model_validate_json((folder / RESULT).read_bytes()).run == "two"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def killed_at(rename: int, folder: Path, *names: str) -> bool:
    """Whether a process that fills the folder came to that rename, at which it was killed."""
    if not (child := os.fork()):
        whole, calls = Path.rename, iter(range(1000))

        def dying(path, target):
            if next(calls) == rename:
                os._exit(9)
            return whole(path, target)

        Path.rename = dying
        try:
            filled(folder, "two", *names)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("before", [(), ("cpu", "gpu")])
def test_kill_at_any_moment_leaves_the_old_or_the_new_and_a_result_only_where_it_is_whole(tmp_path, before):
    folder, store = tmp_path / "out", connect(str(tmp_path / "store"))
    whole = [of_run("one", *before) if before else {}, of_run("two", "cpu", "int8")]
    for rename in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if before:
            filled(folder, "one", *before)
        killed = killed_at(rename, folder, "cpu", "int8")
        shown = {name: text for name, text in content(folder).items() if not name.startswith(".enginery-")}
        assert shown in whole or not (folder / RESULT).exists()
        check_output(folder, recipe_of(*SMALL), store)
        assert content(folder) == (whole[0] if killed else whole[1]), rename
        filled(folder, "three", "cpu")
        assert content(folder) == of_run("three", "cpu")
        if not killed:
            break
    assert rename == (8 if before else 4)


@pytest.mark.parametrize("rename", range(8))
def test_break_between_renames_leaves_what_stood_before(tmp_path, monkeypatch, rename):
    folder = tmp_path / "out"
    filled(folder, "one", "cpu", "gpu")
    whole, calls = Path.rename, iter(range(1000))

    def breaking(path, target):
        if next(calls) == rename:
            raise KeyboardInterrupt
        return whole(path, target)

    monkeypatch.setattr(Path, "rename", breaking)
    with pytest.raises(KeyboardInterrupt):
        filled(folder, "two", "cpu", "int8")
    assert content(folder) == of_run("one", "cpu", "gpu") and (folder / RESULT).is_file()


def test_output_that_cannot_be_is_refused_at_once(tmp_path, monkeypatch, place, capsys):
    store = place.root / "store"
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs" / "cpu").mkdir(parents=True)
    (tmp_path / "inside").symlink_to(store)
    ran = []
    monkeypatch.setattr("flows.pipeline.drive.optimize", lambda *_: ran.append(1))
    for folder, said in {
        tmp_path / "file": "is no folder",
        tmp_path / "file" / "out": "is no folder",
        tmp_path / "theirs": "holds what no run has left there; measured cpu",
        tmp_path / "inside" / "out": "lies in the store",
        store: "lies in the store",
        store / "state" / "out": "lies in the store",
        Path("/proc/out"): "cannot be written to",
        tmp_path / ("n" * 300): "cannot be written to; measured File name too long",
    }.items():
        assert main(["run", str(place.recipe), "--store", str(store), "--output", str(folder)]) == 1, folder
        assert said in capsys.readouterr().err
    assert ran == [] and not (tmp_path / "out").exists()
    assert list((tmp_path / "theirs").iterdir()) == [tmp_path / "theirs" / "cpu"]


def test_full_disk_is_said_at_once_and_exits_3(tmp_path, place, monkeypatch, capsys):
    words = ["run", str(place.recipe), "--store", str(place.root / "store"), "--output", str(tmp_path / "out")]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("flows.pipeline.output_folder.shutil.disk_usage", lambda _: usage._replace(free=3))
    assert main(words) == 3
    assert "has no room for cpu" in capsys.readouterr().err and place.promoted == []
    assert not any(event["event"] == "sealed" for event in place.record.events()) and not (tmp_path / "out").exists()
    with pytest.raises(DoesNotFit, match="no room for cpu"):
        check_room(tmp_path / "none" / "out", {"cpu": 10**9})


def test_run_copies_report_recipe_result_and_each_artifact(place, monkeypatch, capsys):
    both = RECIPE.replace("artifacts: [cpu]", "artifacts: [graph, cpu]")
    monkeypatch.setattr("tests.flows.pipeline.tiny_run.RECIPE", both)
    place.seal()
    out = place.folder / "deep" / "out"
    words = ["run", str(place.recipe), "--store", str(place.root / "store"), "--output", str(out)]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["cpu", "graph", "recipe.yaml", "report.html", "result.json"]
    assert json.loads((out / "result.json").read_text()) == json.loads(said)
    assert json.loads(said)["outputs"] == {path.name: str(path) for path in out.iterdir()}
    assert json.loads(said)["model"]["version"] == "1"
    assert (out / "recipe.yaml").read_text() == place.record.recipe()
    assert "version 1" in (out / "report.html").read_text() and str(out / "graph") in (out / "report.html").read_text()
    assert {path.name for path in (out / "cpu").iterdir()} == {"model.onnx", "engine.json"}
    (out / "cpu" / "model.onnx").write_bytes(b"changed")
    assert main(words) == 0 and (out / "cpu" / "model.onnx").read_bytes() == b"weights"
    assert f"graph: {out / 'graph'}" in capsys.readouterr().out


def test_run_that_fails_leaves_the_output_as_it_was_and_a_failed_gate_replaces_it(place, monkeypatch):
    place.output = place.folder / "out"
    place.run()
    before = {path: path.stat().st_mtime_ns for path in place.output.rglob("*")}

    def breaking(*_, **__):
        raise StageError("broke")

    with monkeypatch.context() as patch:
        patch.setattr("flows.tracking.runs.RecipeRun.summary", breaking)
        with pytest.raises(StageError):
            place.run()
    assert {path: path.stat().st_mtime_ns for path in place.output.rglob("*")} == before
    place.gates = ("measure: perplexity, against: dense, at_most: 0.5",)
    failed = place.run()
    assert RunResult.model_validate_json((place.output / RESULT).read_bytes()) == failed
    assert failed.verdict == "gate failed" and "Failed" in (place.output / "report.html").read_text()
    assert (place.output / "cpu" / "model.onnx").read_bytes() == b"weights"


def test_outputs_without_the_option_name_every_judged_artifact(place, monkeypatch):
    both = RECIPE.replace("artifacts: [cpu]", "artifacts: [dense, cpu]")
    monkeypatch.setattr("tests.flows.pipeline.tiny_run.RECIPE", both)
    place.seal()
    outputs = place.run().outputs
    assert list(outputs) == ["report.html", "dense", "cpu"] and all(Path(one).exists() for one in outputs.values())
