"""The end of a run: a run that fails has promoted nothing, and one that has promoted does not fail."""

# ruff: noqa: F811 - fixtures that other modules define are imported and then named as arguments

import itertools
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from flows.cli import main
from flows.pipeline import optimize
from flows.pipeline.drive import optimize as optimized
from flows.pipeline.finish import _candidate, finish
from flows.pipeline.steps import end, run_steps
from flows.pipeline.verdict import judged
from flows.recipe.expand import expanded
from flows.recipe.model import Register
from flows.recipe.read import load_recipe
from flows.registry.journal import Executable
from flows.results import GateResult
from flows.running.session import run_step
from stages.runtime.contract import StageError, Unavailable
from tests.flows.pipeline.tiny_run import RECIPE, place, sealed  # noqa: F401

FULL = OSError(28, "No space left on device")
REFUSED = MlflowException("not like this", error_code=3)  # INVALID_PARAMETER_VALUE
AWAY = MlflowException("the database is gone", error_code=1)  # INTERNAL_ERROR


def in_journal(_objects, key, _data):
    return key.startswith("promotions/")


def is_result(path, _text):
    return path.name == "result.json"


def of_verdict(_client, _run, tags=(), **_):
    return any(tag.key == "enginery.verdict" for tag in tags)


def of_version(_client, _run, tags=(), **_):
    return any(tag.key == "enginery.version" for tag in tags)


def of_engine(_source, target):
    return "/cpu/" in str(target)


def of_report(_source, target):
    return Path(target).name == ".report.html.part"


@dataclass(frozen=True, kw_only=True)
class Break:
    """A function that breaks: from its call number `at` on, or at that call `once`; after its work if `done`.

    Only calls of which `on` is true count.
    """

    where: str
    error: BaseException
    at: int = 1
    once: bool = False
    done: bool = False
    on: Any = lambda *_, **__: True

    @contextmanager
    def now(self):
        whole, calls = resolve_name(self.where), itertools.count(1)

        def breaking(*args, **kwargs):
            call = next(calls) if self.on(*args, **kwargs) else 0
            breaks = call == self.at if self.once else call >= self.at
            if breaks and self.done:
                whole(*args, **kwargs)
            if breaks:
                raise self.error
            return whole(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.where, breaking)
            patch.setattr("flows.pipeline.finish.AWAY_S", 0)
            yield


SUMMARY, ENDED = "mlflow.MlflowClient.log_batch", "mlflow.MlflowClient.set_terminated"
ARTIFACT = "flows.tracking.runs.RecipeRun.artifact"
PUT, ALIAS = "stages.runtime.stores.LocalObjects.put", "mlflow.MlflowClient.set_registered_model_alias"
PAGE = "flows.reporting.report._template"

BEFORE = {
    "copies": Break(where="shutil.copyfile", error=FULL, on=of_engine),
    "report": Break(where=PAGE, error=FULL),
    "report's copy": Break(where="shutil.copyfile", error=FULL, on=of_report),
    "MLflow's figures": Break(where=SUMMARY, error=REFUSED, on=of_verdict),
    "MLflow that stays away": Break(where=SUMMARY, error=AWAY, on=of_verdict),
    "MLflow's copy of the report": Break(where=ARTIFACT, error=FULL),
    "logged model": Break(where="flows.registry.projection.logged_model", error=FULL),
    "version": Break(where="mlflow.MlflowClient.create_model_version", error=REFUSED),
    "journal": Break(where=PUT, error=Unavailable("the store is gone"), on=in_journal),
}


def in_main_thread(*_args, **_kwargs):
    """Python raises an interrupt nowhere else; what writes to MLflow meanwhile ends runs of steps."""
    return threading.current_thread() is threading.main_thread()


AFTER = {
    "alias": Break(where=ALIAS, error=REFUSED),
    "alias while MLflow stays away": Break(where=ALIAS, error=AWAY),
    "event": Break(where="flows.registry.projection.tell", error=RuntimeError("no such event")),
    "report with the version": Break(where=PAGE, error=FULL, at=2),
    "its copy": Break(where="shutil.copyfile", error=FULL, at=2, on=of_report),
    "MLflow's tag": Break(where=SUMMARY, error=REFUSED, on=of_version),
    "MLflow's report": Break(where=ARTIFACT, error=FULL, at=2),
    "record": Break(where="flows.running.run_records._write", error=FULL, once=True, on=is_result),
    "record's last line": Break(where="flows.running.run_records.Record._ended", error=FULL),
    "closing of MLflow's run": Break(where=ENDED, error=REFUSED, on=in_main_thread),
}


def page_of(result):
    return Path(result.report).read_text(encoding="utf-8")


def made(session):
    for name in session.planned:
        run_step(session, name)
    return session


@pytest.mark.parametrize("part", BEFORE)
def test_part_that_breaks_before_the_promotion_fails_the_run_and_promotes_nothing(place, part):
    broken, place.output = BEFORE[part], place.folder / "out"
    with broken.now(), pytest.raises((OSError, StageError)) as raised:
        place.run()
    assert broken.error in (raised.value, raised.value.__cause__)
    assert place.promoted == [] and place.alias == ""
    assert place.state == "error" and str(broken.error) in place.record.line().error and not place.output.exists()
    assert place.followed(place.record.name).info.status == "FAILED"


def test_run_broken_at_one_part_after_the_other_comes_to_one_version(place):
    place.output = place.folder / "out"
    for part in ("report's copy", "MLflow's copy of the report", "version", "journal"):
        with BEFORE[part].now(), pytest.raises((OSError, StageError)):
            place.run()
    result = place.run()
    assert result.passed and place.state == "passed" and place.loose == []
    assert place.promoted == place.versions == ["1"] and place.alias == "1"
    assert (place.output / "cpu" / "model.onnx").read_bytes() == b"weights"
    assert (place.output / "report.html").read_text() == page_of(result)


@pytest.mark.parametrize("part", AFTER)
def test_part_that_breaks_after_the_promotion_is_told_and_the_run_has_passed(place, part):
    broken, place.output = AFTER[part], place.folder / "out"
    with broken.now():
        result = place.run()
    assert result.passed and result.model.version == "1"
    assert place.promoted == ["1"] and place.alias == ("" if part.startswith("alias") else "1")
    assert place.state == "passed" and place.record.line().model == f"{place.model} 1"
    (told,) = {(one["what"], one["error"], one["remedy"]) for one in place.loose}
    assert str(broken.error) in told[1] and (place.output / "cpu" / "model.onnx").is_file()
    assert all(any(text in line for line in place.terminal.lines) for text in told)

    again = place.run()
    assert again.passed and again.model == result.model and place.state == "passed" and place.loose == []
    assert place.promoted == place.versions == ["1"] and place.alias == "1"
    assert "version 1" in page_of(again)
    assert place.followed(again.run).data.tags["enginery.version"] == f"{place.model} 1"


def test_promotion_comes_after_report_and_mlflow_which_then_name_the_version(place, monkeypatch):
    seen, whole = SimpleNamespace(), resolve_name(PUT)

    def put(objects, key, data):
        if key.startswith("promotions/"):
            seen.page = (place.record.folder / "report.html").read_text()
            seen.tags = place.followed(place.record.name).data.tags
            seen.result = place.record.result
        return whole(objects, key, data)

    monkeypatch.setattr(PUT, put)
    result = place.run()
    assert "To be registered as" in seen.page and "version 1" not in seen.page and seen.result is None
    assert seen.tags["enginery.verdict"] == "passed" and "enginery.version" not in seen.tags
    assert "version 1" in page_of(result) and "To be registered as" not in page_of(result)
    followed = place.followed(result.run)
    assert followed.data.tags["enginery.version"] == f"{place.model} 1" and followed.info.status == "FINISHED"
    assert Path(place.client.download_artifacts(followed.info.run_id, "report.html")).read_text() == page_of(result)
    assert place.record.result == result and result.model.version == "1"


def test_terminal_and_log_that_are_gone_fail_no_promoted_run(place):
    place.run()
    place.terminal.gone = True
    with AFTER["MLflow's tag"].now():
        assert place.run().passed
    assert {one["what"] for one in place.loose} == {"the version in MLflow's run", "the word on the version"}
    assert any("stands on version 1 already" in one["remedy"] for one in place.loose)
    log = Break(
        where="flows.running.run_records.Record.log", error=FULL, on=lambda _, said: said["event"] == "loose end"
    )
    with AFTER["MLflow's tag"].now(), log.now():
        assert place.run().passed
    assert place.state == "passed" and place.loose == []


def test_full_disk_after_the_promotion_leaves_a_passed_run(place):
    disk = [Break(where=f"flows.running.run_records.{name}", error=FULL, on=is_result) for name in ("_write",)]
    disk += [AFTER["report with the version"], AFTER["MLflow's report"], AFTER["closing of MLflow's run"]]
    with disk[0].now(), disk[1].now(), disk[2].now(), disk[3].now():
        assert place.run().passed
    assert place.promoted == ["1"] and not (place.record.folder / "failure.json").exists()
    assert len({one["what"] for one in place.loose}) == 4


INTERRUPTED = {
    "before the alias": Break(where=ALIAS, error=KeyboardInterrupt()),
    "behind the journal's entry": Break(where=PUT, error=KeyboardInterrupt(), on=in_journal, done=True),
    "while the record is written": Break(
        where="flows.running.run_records._write", error=KeyboardInterrupt(), once=True, on=is_result
    ),
    "while MLflow's run is closed": Break(where=ENDED, error=KeyboardInterrupt(), on=in_main_thread),
}


@pytest.mark.parametrize("where", INTERRUPTED)
def test_interrupt_after_the_promotion_leaves_a_record_that_says_passed(place, where):
    with INTERRUPTED[where].now(), pytest.raises(KeyboardInterrupt):
        place.run()
    assert place.promoted == ["1"]
    line = place.record.line()
    assert (line.state, line.model, line.error) == ("passed", f"{place.model} 1", "")
    ends = {"FINISHED"} if where != "while MLflow's run is closed" else {"FINISHED", "RUNNING"}
    assert place.followed(place.record.name).info.status in ends
    assert place.run().passed and place.promoted == place.versions == ["1"] and place.alias == "1"


def test_interrupt_before_the_promotion_leaves_a_record_that_says_interrupted(place):
    with Break(where=SUMMARY, error=KeyboardInterrupt(), on=of_verdict).now(), pytest.raises(KeyboardInterrupt):
        place.run()
    assert place.state == "interrupted" and place.promoted == [] and place.alias == ""


def test_journal_whose_answer_is_lost_has_promoted(place):
    with Break(where=PUT, error=FULL, on=in_journal, done=True).now():
        result = place.run()
    assert result.passed and result.model.version == "1" and place.state == "passed"
    assert place.promoted == ["1"] and place.alias == "1"
    assert any("No space left" in line for line in place.terminal.lines)


def test_end_done_twice_registers_and_promotes_once(place):
    with place.session() as session:
        judgement = judged(made(session))
        one, two = finish(session, judgement), finish(session, judgement)
    assert one.model == two.model and place.promoted == place.versions == ["1"] and place.alias == "1"
    assert place.record.result == two and place.state == "passed"


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr("flows.pipeline.steps.AWAY_S", 20)
    monkeypatch.setattr(optimize, "show", lambda session, result: None)


def test_end_is_tried_again_while_mlflow_is_away_and_for_no_other_error(place, hurried):
    with place.session() as session, Break(where=SUMMARY, error=AWAY, once=True, on=of_verdict).now():
        assert end(made(session)).passed
    assert place.promoted == place.versions == ["1"] and sum("tried again" in one for one in place.terminal.lines) == 1
    with (
        pytest.raises(OSError),
        place.session() as session,
        Break(where=SUMMARY, error=FULL, once=True, on=of_verdict).now(),
    ):
        end(made(session))
    assert place.state == "error"


def test_end_tried_again_does_not_judge_the_model_against_itself(place, hurried):
    place.gates = ("measure: size_bytes, artifact: cpu, against: champion, at_most: 0.5",)
    lost = Break(where=PUT, error=Unavailable("no answer"), on=in_journal, done=True, once=True)
    unread = Break(where="flows.pipeline.finish.head", error=Unavailable("no answer"), once=True)
    with place.session() as session, lost.now(), unread.now():
        assert end(made(session)).passed
    assert place.promoted == ["1"] and place.alias == "1" and place.state == "passed"


def test_champion_is_judged_against_though_its_corpus_was_made_by_another_step(place):
    assert place.run().passed
    place.gates = ("measure: perplexity, artifact: cpu, against: champion, at_most: 1.5",)
    # As by newer code or other params: the step's fingerprint is another, the corpus' digest is not.
    before = place.run().steps
    place.seal("steps.text.params.splits.test=0.5")
    again = place.run("steps.text.params.splits.test=0.5")
    one, other = (next(step for step in steps if step.name == "text") for steps in (before, again.steps))
    assert one.fingerprint != other.fingerprint
    (gate,) = [one for one in again.gates if one.against == "champion"]
    assert gate.measured == 1.0 and gate.passed and "no champion" not in gate.text


def test_prefect_that_breaks_after_the_end_fails_no_run(place, monkeypatch):
    def page(session, result):
        raise RuntimeError("no such page")

    def flow(recipe, return_state):
        session = optimize._ASKED.get().session
        run_steps(session)
        end(session, lambda result: page(session, result))
        raise RuntimeError("the flow run has no state")

    monkeypatch.setattr(optimize, "optimize_recipe", flow)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr("flows.registry.announce.has_server", lambda: False)
    result = place.run()
    assert result.passed and place.promoted == ["1"] and place.state == "passed"
    assert [one["error"] for one in place.loose] == [
        "RuntimeError: no such page",
        "RuntimeError: the flow run has no state",
    ]


def test_gate_that_fails_is_reported_and_recorded_and_promotes_nothing(place):
    place.gates = ("measure: perplexity, against: dense, at_most: 0.5",)
    with AFTER["closing of MLflow's run"].now():
        result = place.run()
    assert not result.passed and result.model is None and place.state == "gate failed"
    assert place.promoted == place.versions == [] and "Nothing was registered" in page_of(result)
    assert place.followed(result.run).data.tags["enginery.verdict"] == "gate failed"


GATE = "  - {measure: perplexity, against: dense, at_most: 1.25}\n"


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        ("", "register: only what holds a gate is promoted; allowed: together with `gates`"),
        ("gates: []\n", "register: only what holds a gate is promoted"),
        (
            "gates:\n  - {measure: size_bytes, artifact: cpu, against: champion, at_most: 1.5}\n",
            "gates: where no champion is yet, none of the gates holds anything; allowed: one more, without `champion`",
        ),
    ],
)
def test_recipe_that_registers_what_no_gate_holds_is_refused_and_promotes_nothing(
    place, monkeypatch, capsys, gates, said
):
    monkeypatch.setattr("tests.flows.pipeline.tiny_run.RECIPE", RECIPE.replace(f"gates:\n{GATE}", gates))
    assert main(["run", str(place.recipe), "--store", str(place.root / "store")]) == 1
    assert said in capsys.readouterr().err and place.promoted == place.versions == []


def test_what_no_gate_was_applied_to_is_not_promoted_whoever_checked_the_recipe(place):
    asked = load_recipe(place.recipe).model_copy(update={"gates": []})
    result = optimized(expanded(asked), place.settings, place.terminal)
    assert (result.verdict, result.passed, result.model) == ("not judged", True, None)
    assert place.promoted == place.versions == [] and "Not judged" in page_of(result)


def test_run_without_gates_that_registers_nothing_is_not_judged_as_every_page_says(place, monkeypatch, capsys):
    bare = RECIPE.replace(f"gates:\n{GATE}", "").replace("register: {model: MODEL}\n", "")
    monkeypatch.setattr("tests.flows.pipeline.tiny_run.RECIPE", bare)
    words = ["run", str(place.recipe), "--store", str(place.root / "store")]
    assert main(words) == 0
    result, said = place.record.result, capsys.readouterr().out
    assert (result.verdict, result.passed, place.state) == ("not judged", True, "not judged")
    assert "not judged (the recipe has no gates)" in said and "registered" not in said and "passed" not in said
    assert "Not judged" in page_of(result) and "Nothing was registered" in page_of(result)
    assert place.followed(result.run).data.tags["enginery.verdict"] == "not judged"
    assert main(["explain", result.run, *words[2:]]) == 0
    assert ": not judged, started" in capsys.readouterr().out


def test_gate_against_a_champion_wants_an_alias_that_says_which(place, monkeypatch, capsys):
    alone = RECIPE.replace("register: {model: MODEL}\n", "").replace("against: dense", "against: champion")
    monkeypatch.setattr("tests.flows.pipeline.tiny_run.RECIPE", alone)
    assert main(["plan", str(place.recipe), "--store", str(place.root / "store")]) == 1
    assert "gates.0.against: no alias says which model is served; allowed: together with `register`" in (
        capsys.readouterr().err
    )


def test_gate_on_a_size_holds_where_nothing_is_measured(place, monkeypatch):
    head = RECIPE.partition("judge:")[0]
    for limit, verdict in ((7, "passed"), (6, "gate failed")):
        gates = f"gates: [{{measure: size_bytes, artifact: cpu, at_most: {limit}}}]\n"
        monkeypatch.setattr("tests.flows.pipeline.tiny_run.RECIPE", head + gates)
        assert place.run().verdict == verdict


def test_command_exits_0_and_names_the_remedy_where_the_alias_broke_and_1_where_a_part_before_it(place, capsys):
    words = ["run", str(place.recipe), "--store", str(place.root / "store")]
    with BEFORE["MLflow's figures"].now():
        assert main(words) == 1
    assert "not like this" in capsys.readouterr().err and place.promoted == []
    with AFTER["alias"].now():
        assert main(words) == 0
    said = capsys.readouterr()
    assert f"registered: {place.model} version 1" in said.out and "MLflow's alias did not come about" in said.err
    assert f"enginery reconcile {place.model}" in said.err
    assert main(["reconcile", place.model, "--store", str(place.root / "store")]) == 0 and place.alias == "1"


def test_engine_of_which_no_gate_applied_is_no_candidate_though_another_artifacts_holds():
    said: list[str] = []
    session = SimpleNamespace(
        recipe=SimpleNamespace(register_as=Register(model="m")),
        loose=SimpleNamespace(heard=said.append),
        mlflow=SimpleNamespace(id="r"),
    )
    told = {
        "measure": "accuracy",
        "target": "",
        "corpus": "",
        "limit": 1.0,
        "bound": "at_least",
        "passed": True,
        "text": "",
    }
    of_none, of_other, of_it = (
        GateResult(artifact=name, measured=measured, **told)
        for name, measured in (("cpu", None), ("graph", 2.0), ("cpu", 2.0))
    )
    engines = {"cpu": Executable(fingerprint="a" * 64, target="onnxruntime:cpu", judged=True)}
    judgement = SimpleNamespace(outcome="passed", serves="cpu", engines=engines, gates=[of_none, of_other])
    assert _candidate(session, judgement) is None
    assert said == ["nothing is registered: no gate that applied speaks of cpu, which would be served"]
    judgement.gates.append(of_it)
    assert _candidate(session, judgement).serves == "cpu" and len(said) == 1
