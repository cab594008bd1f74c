"""Against which champion a run is judged: the one that stands, measured as the run measures, and no other."""

# ruff: noqa: F811 - fixtures that other modules define are imported and then named as arguments

import json
import math
import threading
from contextlib import nullcontext

import pytest

from flows.cli import main
from flows.pipeline.steps import VERDICTS, end
from flows.registry import projection
from flows.registry.journal import Overtaken, append, history, last
from flows.running.session import run_step
from stages.adapters.connect import connect
from stages.runtime.contract import Kind
from tests.flows.pipeline.tiny_run import place, sealed  # noqa: F401

BEATS = "measure: perplexity, artifact: cpu, against: champion, at_most: 0.99"
EQUALS = "measure: perplexity, artifact: cpu, against: champion, at_most: 1.001"
SMALLER = "measure: size_bytes, artifact: cpu, against: champion, at_most: 1.5"


def model(worse):
    return f"steps.dense.params.worse={worse}"


def store_of(place):
    return connect(str(place.root / "store"))


def step_of(result, name):
    return next(step for step in result.steps if step.name == name)


def against_champion(result):
    (gate,) = [one for one in result.gates if one.against == "champion"]
    return gate


@pytest.fixture
def together(monkeypatch):
    """Runs beside one store at once, as on two machines: a disk's lock lets one go on at a time."""
    monkeypatch.setattr("flows.running.session._alone", lambda scratch, terminal: nullcontext())
    monkeypatch.setattr("flows.prefect_api.retry.AWAY_S", 0)


def test_champion_is_measured_on_the_windows_and_the_baseline_of_the_run(place):
    first = place.run(model(0.5))
    place.gates = (BEATS,)
    again = place.run(model(0.3), "judge.windows=3")
    step = step_of(again, "validate-champion-text")
    assert (step.measures, step.corpus, step.cached) == ("champion", "text", False)
    work = store_of(place).manifest(step.fingerprint).work
    engine, dense, text = step_of(first, "cpu"), step_of(again, "dense"), step_of(again, "text")
    assert work.inputs == {"model": engine.fingerprint, "text": text.fingerprint, "baseline": dense.fingerprint}
    assert (work.params["windows"], work.params["split"]) == (3, "test")
    assert against_champion(again).measured == pytest.approx(math.exp(-0.2)) and place.promoted == ["1", "2"]
    rerun = place.run(model(0.3), "judge.windows=3")  # what stands now is its own engine
    assert step_of(rerun, "validate-champion-text").fingerprint == step_of(rerun, "validate-cpu-text").fingerprint
    assert step_of(rerun, "validate-champion-text").cached and not rerun.passed
    assert "validate-champion-text" in (place.record.folder / "report.html").read_text()


def test_champion_is_planned_like_any_other_measurement_and_not_where_no_gate_asks(place, capsys):
    place.run(model(0.5))
    words = ["--store", str(place.root / "store"), "--json", "--set", model(0.4)]
    assert main(["plan", str(place.recipe), *words]) == 0
    assert "champion" not in {line["name"] for line in json.loads(capsys.readouterr().out)["steps"]}
    place.gates = (EQUALS,)
    assert main(["plan", str(place.recipe), *words]) == 0
    (line,) = [one for one in json.loads(capsys.readouterr().out)["steps"] if "champion" in one["name"]]
    assert (line["name"], line["stage"], line["hit"]) == ("validate-champion-text", "validate", False)


def test_champion_of_other_windows_stands_beside_nothing(place):
    place.run(model(0.5))
    place.run(model(0.4), "judge.windows=3")
    with_other = place.followed(place.run(model(0.3), "judge.windows=4").run).data.metrics
    assert "perplexity.text" in with_other and "champion.perplexity.text" not in with_other
    with_same = place.followed(place.run(model(0.2), "judge.windows=4").run).data.metrics
    # The champion was made from another dense model: its report is against another baseline.
    assert "champion.perplexity.text" not in with_same and "champion.size_bytes" in with_same
    assert "champion.perplexity.text" in place.followed(place.run(model(0.2), "judge.windows=4").run).data.metrics


@pytest.mark.parametrize("gate", [EQUALS, SMALLER])
def test_champion_whose_engine_is_gone_is_an_error_and_not_no_champion(place, capsys, gate):
    first = place.run(model("0.123"))
    engine, store = step_of(first, "cpu").fingerprint, store_of(place)
    for identity, manifest in list(store.manifests()):
        if identity == engine or (manifest.kind is Kind.REPORT and manifest.work.inputs["model"] == engine):
            store.remove(identity)
    place.gates = (gate,)
    words = [str(place.recipe), "--store", str(place.root / "store"), "--set", model("0.01")]
    for command in ("plan", "run"):
        assert main([command, *words]) == 1
        said = capsys.readouterr().err
        assert f"the engine of {place.model}@champion, version 1, is not in" in said and engine[:12] in said
        assert f"`enginery promote {place.model} VERSION`" in said
    assert place.promoted == ["1"]
    place.gates = ()
    place.run(model("0.123"))  # the remedy: the recipe that made it
    place.gates = (gate,)
    assert place.run(model("0.01")).passed and place.promoted == ["1", "2"]


def test_champion_whose_report_is_gone_is_measured_again(place):
    place.run(model(0.5))
    place.gates, store = (BEATS,), store_of(place)
    found = step_of(place.run(model(0.4)), "validate-champion-text").fingerprint
    store.remove(found)
    # Back to the champion that was: a person decides.
    projection.rollback(registry_of(place), place.model, "champion")
    again = place.run(model(0.4))
    step = step_of(again, "validate-champion-text")
    assert (step.fingerprint, step.cached) == (found, False) and against_champion(again).measured < 0.99


def test_first_run_has_no_champion_and_says_so(place):
    place.gates = (EQUALS, SMALLER)
    result = place.run(model(0.4))
    said = [one.text for one in result.gates if one.against == "champion"]
    assert len(said) == 2 and all("not applicable: no champion" in one for one in said) and result.passed
    assert not [step for step in result.steps if "champion" in step.name]


def registry_of(place):
    from flows.tracking.connect import open_tracking

    return projection.Registry(store_of(place).objects, open_tracking(place.root))


def made(session):
    for name in session.planned:
        run_step(session, name)
    return session


def test_champion_that_changes_while_steps_run_is_measured_and_judged_against(place, together):
    place.gates = (BEATS,)
    with place.session(model(0.3)) as session:
        made(session)
        assert place.run(model(0.2)).passed  # another run's, and better
        result = end(session)
    assert step_of(result, "validate-champion-text").measures == "champion"
    assert not result.passed and against_champion(result).measured == pytest.approx(math.exp(0.1))
    assert place.promoted == ["1"] and place.versions == ["1"]


@pytest.mark.parametrize(("first", "second", "stands"), [(0.3, 0.2, ["1", "2", "3"]), (0.2, 0.3, ["1", "2"])])
def test_of_two_runs_that_beat_the_old_champion_the_worse_never_lands_on_the_better(
    place, together, monkeypatch, first, second, stands
):
    assert place.run(model(0.5)).passed
    place.gates = (BEATS,)
    judged, landed, whole = threading.Barrier(2), threading.Event(), projection.append
    results, ours = {}, threading.local()

    def appended(*args, **kwargs):
        if not getattr(ours, "met", False):  # both have their verdict against version 1 before either appends
            ours.met = True
            judged.wait(30)
        if ours.worse == second:
            landed.wait(30)
        entry = whole(*args, **kwargs)
        landed.set()
        return entry

    monkeypatch.setattr(projection, "append", appended)
    one_by_one, packed = threading.Lock(), projection.logged_model

    def logged(*args):  # CPython 3.11 does not always bear that two threads parse at once
        with one_by_one:
            return packed(*args)

    monkeypatch.setattr(projection, "logged_model", logged)

    def go(worse, session):
        ours.worse = worse
        results[worse] = end(session)

    with place.session(model(first)) as one, place.session(model(second)) as other:
        pairs = ((first, made(one)), (second, made(other)))
        threads = [threading.Thread(target=go, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    entries = history(store_of(place).objects, place.model)
    assert results[first].passed and len(entries) == len(stands)
    assert results[second].passed == (second < first)
    ratio = math.exp(second - first)
    assert against_champion(results[second]).measured == pytest.approx(ratio)  # against the first, not version 1
    better = store_of(place).checkout(entries[-1].candidate.executables["cpu"].fingerprint)
    assert (better / "model.onnx").read_bytes() == b"weights" + str(min(first, second)).encode()
    assert [entry.against for entry in entries] == [0, *(one.number for one in entries[:-1])]
    # A version that lost at the last moment is taken away again.
    assert len(place.versions) == len(stands)


def test_run_that_is_overtaken_again_and_again_gives_up_and_promotes_nothing(place, monkeypatch):
    tries = []

    def overtaken(*args, **kwargs):
        tries.append(args)
        raise Overtaken("the alias has moved", measured="promote to version 7 by someone")

    monkeypatch.setattr("flows.pipeline.finish.release", overtaken)
    with pytest.raises(Overtaken), place.session(model(0.3)) as session:
        end(made(session))
    assert len(tries) == VERDICTS and place.promoted == [] and place.state == "error"
    assert sum("it is judged against that" in line for line in place.terminal.lines) == VERDICTS - 1


def test_appends_that_hold_against_one_entry_come_to_one(place):
    place.run(model(0.5))
    objects = store_of(place).objects
    (entry,) = history(objects, place.model)
    begin, won, lost = threading.Barrier(8), [], []

    def one(i):
        begin.wait()
        chosen = entry.version.model_copy(update={"number": str(i)})
        try:
            won.append(append(objects, place.model, "champion", "promote", lambda _: chosen, "race", entry.number))
        except Overtaken as error:
            lost.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 7
    assert last(history(objects, place.model, "champion")) == won[0].number == 2 and won[0].against == 1
