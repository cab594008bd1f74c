"""The journal decides, MLflow follows; nothing registers twice, nothing is lost by a kill."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.recipe.model import Register
from flows.registry import package, projection
from flows.registry.going_back import rolled_back
from flows.registry.journal import Candidate, Executable, append, head, history, last, models
from flows.registry.projection import Drift, Registry, drift, promote, reconcile, rollback, versions
from stages.adapters.sources import local_path
from stages.runtime.contract import StageError
from stages.runtime.stores import LocalObjects
from tests.flows.recorded import tracking_in

MODEL, ALIAS = "smollm2", "champion"
PASSED = "run 20261122-011008-2e97 passed its gates"


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(LocalObjects(tmp_path / "store"), tracking_in(tmp_path / "mlflow"))


@pytest.fixture
def engine(tmp_path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "engine.json").write_text('{"target": "onnxruntime:cpu"}')
    (folder / "model.onnx").write_bytes(b"weights")
    return folder


def candidate(registry, letter, *, passed=True, judged=True, run=None, model=MODEL):
    run = run or registry.client.create_run(registry.tracking.experiment_id).info.run_id
    return Candidate(
        model=model,
        serves="cpu",
        executables={
            "cpu": Executable(fingerprint=letter * 64, target="onnxruntime:cpu", judged=judged),
            "gpu": Executable(fingerprint=f"{letter}9" * 32, target="tensorrt_rtx:sm_89", judged=False),
        },
        verdict={"passed": passed, "gates": []},
        run=run,
    )


def release(registry, candidate, engine, alias, why=""):
    """A promotion to its end, as a run does it: version, journal, and MLflow's alias after them."""
    against = last(history(registry.objects, candidate.model, alias))
    made = projection.release(registry, candidate, engine, alias, against=against, why=why)
    reconcile(registry, candidate.model)
    return made


def served(registry):
    return registry.client.get_model_version_by_alias(MODEL, ALIAS).version


def logged(registry):
    return registry.client.search_logged_models([registry.tracking.experiment_id])


def test_release_registers_promotes_and_says_what_was_not_judged(registry, engine):
    asked = candidate(registry, "a")
    made = release(registry, asked, engine, ALIAS, why="first")
    assert (made.version, made.new, made.moved, made.note) == ("1", True, True, "")
    version = registry.client.get_model_version_by_alias(MODEL, ALIAS)
    targets = {"onnxruntime:cpu": "judged", "tensorrt_rtx:sm_89": "compiled, not judged"}
    assert json.loads(version.tags["enginery.targets"]) == targets
    assert version.tags["enginery.fingerprint"] == "a" * 64 and version.tags["enginery.target"] == "onnxruntime:cpu"
    assert version.run_id == asked.run and "tensorrt_rtx:sm_89: compiled, not judged" in version.description
    (entry,) = history(registry.objects, MODEL)
    assert entry == head(registry.objects, MODEL, ALIAS)
    assert (entry.number, entry.action, entry.previous, entry.why) == (1, "promote", None, "first")
    assert entry.candidate == asked and "@" in entry.who and entry.when
    outputs = registry.client.get_run(asked.run).outputs.model_outputs
    assert [one.model_id for one in outputs] == [made.logged_model] == [one.model_id for one in logged(registry)]
    assert models(registry.objects) == [MODEL] and drift(registry, MODEL) == []


def test_release_describes_the_model_where_nobody_has(registry, engine):
    release(registry, candidate(registry, "a"), engine, ALIAS)
    assert f"enginery rollback {MODEL}" in registry.client.get_registered_model(MODEL).description
    registry.client.update_registered_model(MODEL, "A person wrote this.")
    release(registry, candidate(registry, "b"), engine, ALIAS)
    assert registry.client.get_registered_model(MODEL).description == "A person wrote this."
    registry.client.create_registered_model("old")
    release(registry, candidate(registry, "c", model="old"), engine, ALIAS)
    assert "model card" in registry.client.get_registered_model("old").description


def test_registry_apart_from_the_runs_has_versions_and_aliases(tmp_path, engine, monkeypatch):
    from mlflow import MlflowClient

    tracking_in(tmp_path / "there")
    there = f"sqlite:///{tmp_path}/there/mlflow.db"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", there)
    apart = Registry(LocalObjects(tmp_path / "store"), tracking_in(tmp_path / "runs"))
    made = release(apart, candidate(apart, "a"), engine, ALIAS)
    assert made.moved and drift(apart, MODEL) == []
    assert MlflowClient(there).get_model_version_by_alias(MODEL, ALIAS).version in (1, "1")
    assert MlflowClient(registry_uri=apart.tracking.uri).search_registered_models() == []


def test_release_of_the_same_engines_registers_nothing_new(registry, engine):
    release(registry, candidate(registry, "a"), engine, ALIAS)
    again = candidate(registry, "a").model_copy(update={"verdict": {"passed": True, "gates": ["changed"]}})
    made = release(registry, again, engine, ALIAS)
    assert (made.version, made.new, made.moved) == ("1", False, False) and "already" in made.note
    assert len(history(registry.objects, MODEL)) == len(versions(registry, MODEL)) == len(logged(registry)) == 1
    assert release(registry, candidate(registry, "b"), engine, ALIAS).version == "2"  # no number was burned


@pytest.mark.parametrize("lost", ["", "MLmodel", "artifacts/engine/model.onnx"])
def test_release_puts_files_that_mlflow_has_lost_there_again(registry, engine, lost):
    first = release(registry, candidate(registry, "a"), engine, ALIAS)
    files = local_path(registry.client.get_logged_model(first.logged_model).artifact_location)
    was = {path.relative_to(files) for path in files.rglob("*") if path.is_file()}
    shutil.rmtree(files) if not lost else (files / lost).unlink()
    again = release(registry, candidate(registry, "a"), engine, ALIAS)
    assert (again.version, again.new, again.moved) == ("1", False, False)
    assert "has them again" in again.note and "already" in again.note
    assert {path.relative_to(files) for path in files.rglob("*") if path.is_file()} == was
    assert "has them again" not in release(registry, candidate(registry, "a"), engine, ALIAS).note
    shutil.rmtree(files)
    other = release(registry, candidate(registry, "a", model="other"), engine, ALIAS)
    assert other.new and other.logged_model == first.logged_model
    assert {path.relative_to(files) for path in files.rglob("*") if path.is_file()} == was


def test_release_under_another_name_shares_the_logged_model(registry, engine):
    one = release(registry, candidate(registry, "a"), engine, ALIAS)
    two = release(registry, candidate(registry, "a", model="other"), engine, ALIAS)
    assert two.new and two.logged_model == one.logged_model and len(logged(registry)) == 1


@pytest.mark.parametrize(("change", "text"), [({"passed": False}, "hold its gates"), ({"judged": False}, "not judged")])
def test_release_of_what_did_not_pass_leaves_alias_and_registry_alone(registry, engine, change, text):
    release(registry, candidate(registry, "a"), engine, ALIAS)
    with pytest.raises(StageError, match=text):
        release(registry, candidate(registry, "b", **change), engine, ALIAS)
    assert len(versions(registry, MODEL)) == len(history(registry.objects, MODEL)) == 1 and served(registry) == 1
    assert len(logged(registry)) == 1


def test_rollback_goes_back_step_by_step_and_refuses_at_the_first(registry, engine):
    for letter in "abc":
        release(registry, candidate(registry, letter), engine, ALIAS)
    assert int(served(registry)) == 3
    back = rollback(registry, MODEL, ALIAS, why="slow")
    assert (back.version, back.moved) == ("2", True) and int(served(registry)) == 2
    assert rollback(registry, MODEL, ALIAS).version == "1" and int(served(registry)) == 1
    with pytest.raises(StageError, match="no version to go back to"):
        rollback(registry, MODEL, ALIAS)
    entries = history(registry.objects, MODEL)
    assert [(e.number, e.action, e.version.number, e.previous) for e in entries] == [
        (1, "promote", "1", None),
        (2, "promote", "2", "1"),
        (3, "promote", "3", "2"),
        (4, "rollback", "2", "3"),
        (5, "rollback", "1", "2"),
    ]


def test_rerun_after_a_rollback_does_not_undo_it_but_a_person_can(registry, engine):
    for letter in "abc":
        release(registry, candidate(registry, letter), engine, ALIAS)
    rollback(registry, MODEL, ALIAS, why="slow")
    rollback(registry, MODEL, ALIAS)
    for letter in "bc":
        made = release(registry, candidate(registry, letter), engine, ALIAS)
        assert not made.moved and "was rolled back by" in made.note and int(served(registry)) == 1
    assert "slow" in made.note
    assert promote(registry, MODEL, "3", ALIAS, why="fixed").moved and int(served(registry)) == 3
    assert rollback(registry, MODEL, ALIAS).version == "1"
    assert release(registry, candidate(registry, "d"), engine, ALIAS).moved and int(served(registry)) == 4


def test_rolled_back_version_stays_so_after_a_later_promotion_until_a_person_promotes_it(registry, engine):
    for letter in "ab":
        release(registry, candidate(registry, letter), engine, ALIAS, why=PASSED)
    rollback(registry, MODEL, ALIAS, why="slow")
    release(registry, candidate(registry, "c"), engine, ALIAS, why=PASSED)
    made = release(registry, candidate(registry, "b"), engine, ALIAS, why=PASSED)  # a cached rerun
    assert not made.moved and "rolled back by" in made.note and "slow" in made.note and int(served(registry)) == 3
    assert promote(registry, MODEL, "2", ALIAS).moved
    release(registry, candidate(registry, "d"), engine, ALIAS, why=PASSED)
    assert release(registry, candidate(registry, "b"), engine, ALIAS, why=PASSED).moved and int(served(registry)) == 2


def test_rerun_of_an_engine_that_a_person_left_does_not_overrule_them(registry, engine):
    for letter in "abac":
        release(registry, candidate(registry, letter), engine, ALIAS, why=PASSED)  # what runs promote marks nothing
    assert int(served(registry)) == 3 and rolled_back(history(registry.objects, MODEL, ALIAS)) == {}
    assert promote(registry, MODEL, "1", ALIAS, why="the third answers badly").moved
    for _ in range(2):
        made = release(registry, candidate(registry, "c"), engine, ALIAS, why=PASSED)
        assert (made.version, made.moved, made.stands) == ("3", False, False) and int(served(registry)) == 1
        assert "version 3 was left for version 1 by " in made.note and "the third answers badly" in made.note
        assert f"`enginery promote {MODEL} 3` puts it back" in made.note and "rolled back" not in made.note
    assert promote(registry, MODEL, "2", ALIAS, why="forward is away, too").moved
    assert not release(registry, candidate(registry, "a"), engine, ALIAS, why=PASSED).moved
    assert release(registry, candidate(registry, "d"), engine, ALIAS, why=PASSED).moved  # a new engine may follow
    assert release(registry, candidate(registry, "b"), engine, ALIAS, why=PASSED).moved  # which a run left, no person
    assert promote(registry, MODEL, "3", ALIAS).moved
    release(registry, candidate(registry, "d"), engine, ALIAS, why=PASSED)
    assert release(registry, candidate(registry, "c"), engine, ALIAS, why=PASSED).moved and int(served(registry)) == 3


def test_rollback_of_a_persons_promotion_takes_back_that_they_left_an_engine(registry, engine):
    for letter in "ab":
        release(registry, candidate(registry, letter), engine, ALIAS, why=PASSED)
    promote(registry, MODEL, "1", ALIAS)
    assert rollback(registry, MODEL, ALIAS).version == "2"
    undone = rolled_back(history(registry.objects, MODEL, ALIAS))
    assert undone.keys() == {"a" * 64} and undone["a" * 64].action == "rollback"
    release(registry, candidate(registry, "c"), engine, ALIAS, why=PASSED)
    assert release(registry, candidate(registry, "b"), engine, ALIAS, why=PASSED).moved
    assert not release(registry, candidate(registry, "a"), engine, ALIAS, why=PASSED).moved


def test_second_rollback_passes_over_what_the_first_one_rolled_back(registry, engine):
    for letter in "cabab":
        release(registry, candidate(registry, letter), engine, ALIAS, why=PASSED)
    assert rollback(registry, MODEL, ALIAS).note == "" and int(served(registry)) == 2  # 3, and a stands, which is 2
    back = rollback(registry, MODEL, ALIAS)
    assert (back.version, back.moved) == ("1", True) and int(served(registry)) == 1
    assert back.note == "passed over what was rolled back before: version 3"
    with pytest.raises(StageError, match="no version to go back to; measured 1 promoted"):
        rollback(registry, MODEL, ALIAS)
    release(registry, candidate(registry, "d"), engine, ALIAS, why=PASSED)
    assert rollback(registry, MODEL, ALIAS).version == "1"  # the journal is read again as it was written


def test_rollback_where_all_that_stood_was_rolled_back_is_refused(registry, engine):
    for letter in "abab":
        release(registry, candidate(registry, letter), engine, ALIAS, why=PASSED)
    assert rollback(registry, MODEL, ALIAS).version == "1"
    with pytest.raises(StageError, match="before it stood version 2, which was rolled back; limit one") as refused:
        rollback(registry, MODEL, ALIAS)
    assert f"`enginery promote {MODEL} VERSION`" in str(refused.value) and int(served(registry)) == 1
    assert len(history(registry.objects, MODEL)) == 5


def test_another_plan_beside_a_served_engine_is_no_leaving_of_it(registry, engine):
    asked = candidate(registry, "a")
    beside = asked.model_copy(update={"executables": {"cpu": asked.executables["cpu"]}})
    for one in (asked, beside):
        release(registry, one, engine, ALIAS, why=PASSED)
    assert promote(registry, MODEL, "1", ALIAS).moved
    assert rolled_back(history(registry.objects, MODEL, ALIAS)) == {}
    assert release(registry, beside, engine, ALIAS, why=PASSED).moved and int(served(registry)) == 2


def test_rolled_back_engine_stays_so_beside_another_plan(registry, engine):
    release(registry, candidate(registry, "a"), engine, ALIAS, why=PASSED)
    asked = candidate(registry, "b")
    release(registry, asked, engine, ALIAS, why=PASSED)
    rollback(registry, MODEL, ALIAS, why="slow")
    plan = next(iter(candidate(registry, "c").executables.values()))
    beside = asked.model_copy(update={"executables": {**asked.executables, "plan": plan}})
    assert beside.identity != asked.identity
    made = release(registry, beside, engine, ALIAS, why=PASSED)
    assert not made.moved and "slow" in made.note and int(served(registry)) == 1
    assert promote(registry, MODEL, made.version, ALIAS).moved


def test_rolled_back_engines_are_known_under_another_number_of_a_rebuilt_registry(registry, engine, tmp_path):
    for letter in "ab":
        release(registry, candidate(registry, letter), engine, ALIAS, why=PASSED)
    rollback(registry, MODEL, ALIAS)
    rebuilt = Registry(registry.objects, tracking_in(tmp_path / "new"))
    assert release(rebuilt, candidate(rebuilt, "c"), engine, ALIAS, why=PASSED).version == "1"
    made = release(rebuilt, candidate(rebuilt, "b"), engine, ALIAS, why=PASSED)
    assert (made.version, made.moved) == ("2", False) and int(served(rebuilt)) == 1
    # Version 2 of the registry that is lost was rolled back; this version 2 is c under a number that b once had.
    again = Registry(registry.objects, tracking_in(tmp_path / "newer"))
    release(again, candidate(again, "a"), engine, ALIAS, why=PASSED)
    assert release(again, candidate(again, "d"), engine, ALIAS, why=PASSED).version == "2" and int(served(again)) == 2


def test_entries_of_runs_from_before_they_said_so_are_no_decisions_of_a_person(registry, engine):
    for letter in "ab":
        release(registry, candidate(registry, letter), engine, ALIAS, why=PASSED)
    rollback(registry, MODEL, ALIAS)
    release(registry, candidate(registry, "c"), engine, ALIAS, why=PASSED)
    promote(registry, MODEL, "2", ALIAS, why=PASSED.replace("passed", "has passed"))
    assert [one.against for one in history(registry.objects, MODEL)] == [0, 1, None, 3, None]
    for entry in history(registry.objects, MODEL):
        key, data = f"promotions/{MODEL}/{entry.number:08d}.json", entry.model_dump(mode="json")
        del data["against"]
        registry.objects.put(key, json.dumps(data).encode(), replace=True)
    entries = history(registry.objects, MODEL)
    assert [one.by_person for one in entries] == [False, False, True, False, True]
    assert rolled_back(entries[:-1]).keys() == {entries[1].candidate.served}
    assert rolled_back(entries).keys() == {entries[3].candidate.served}  # a person promoted 2, and left 3 for it


def test_other_engine_that_is_served_makes_another_version_of_the_same_engines(registry, engine):
    asked = candidate(registry, "a")
    both = {**asked.executables, "other": Executable(fingerprint="e" * 64, target="onnxruntime:cpu", judged=True)}
    first, reordered = (asked.model_copy(update={"executables": both, "serves": one}) for one in ("cpu", "other"))
    assert first.identity != reordered.identity
    renamed = {"engine": both["cpu"], "gpu": both["gpu"], "more": both["other"]}
    assert first.model_copy(update={"executables": renamed, "serves": "engine"}).identity == first.identity
    release(registry, first, engine, ALIAS)
    made = release(registry, reordered, engine, ALIAS)
    assert (made.version, made.moved) == ("2", True) and int(served(registry)) == 2
    assert head(registry.objects, MODEL, ALIAS).candidate.serves == "other"
    version = registry.client.get_model_version_by_alias(MODEL, ALIAS)
    assert version.tags["enginery.fingerprint"] == "e" * 64
    assert not release(registry, reordered, engine, ALIAS).moved


def test_promote_an_unknown_version_names_those_there_are(registry, engine):
    release(registry, candidate(registry, "a"), engine, ALIAS)
    registry.client.create_model_version(MODEL, "file:///by/hand")
    with pytest.raises(StageError, match=r"version 2 of smollm2; measured registered: 1\."):
        promote(registry, MODEL, "2", ALIAS)
    with pytest.raises(StageError, match="no version"):
        promote(registry, "nothing", "1", ALIAS)


def test_alias_moved_by_hand_is_reported_and_put_back(registry, engine):
    for letter in "ab":
        release(registry, candidate(registry, letter), engine, ALIAS)
    registry.client.set_registered_model_alias(MODEL, ALIAS, "1")
    registry.client.set_registered_model_alias(MODEL, "someones", "1")
    assert drift(registry, MODEL) == [Drift(MODEL, ALIAS, "2", "1")]
    assert reconcile(registry, MODEL) == [Drift(MODEL, ALIAS, "2", "1")]
    assert drift(registry, MODEL) == [] and int(served(registry)) == 2
    registry.client.delete_registered_model_alias(MODEL, ALIAS)
    assert drift(registry, MODEL) == [Drift(MODEL, ALIAS, "2", None)] and reconcile(registry, MODEL)
    assert registry.client.get_registered_model(MODEL).aliases == {ALIAS: 2, "someones": 1}


def written_before(registry, alias, number=9):
    """The entry of an alias that MLflow refuses, as the journal once took it."""
    entry = history(registry.objects, MODEL)[-1].model_copy(update={"alias": alias, "number": number})
    registry.objects.put(f"promotions/{MODEL}/{number:08d}.json", entry.model_dump_json().encode())


@pytest.mark.parametrize("alias", ["latest", "v1"])
def test_alias_that_mlflow_refuses_enters_no_journal_and_blocks_no_other(registry, engine, alias):
    release(registry, candidate(registry, "a"), engine, ALIAS)
    with pytest.raises(StageError, match=f"reserves the alias '{alias}'"):
        promote(registry, MODEL, "1", alias)
    with pytest.raises(StageError, match=f"reserves the alias '{alias}'"):
        rollback(registry, MODEL, alias)
    assert len(history(registry.objects, MODEL)) == 1 and projection.refused(registry.objects, MODEL) == []
    written_before(registry, alias)
    registry.client.delete_registered_model_alias(MODEL, ALIAS)
    assert drift(registry, MODEL) == reconcile(registry, MODEL) == [Drift(MODEL, ALIAS, "1", None)]
    assert int(served(registry)) == 1
    (said,) = projection.refused(registry.objects, MODEL)
    assert f"{MODEL}@{alias}: left alone on version 1" in said and f"`enginery promote {MODEL} 1`" in said
    assert promote(registry, MODEL, "1", "challenger").moved
    release(registry, candidate(registry, "b"), engine, ALIAS)
    assert rollback(registry, MODEL, ALIAS).version == "1" and int(served(registry)) == 1


@pytest.mark.parametrize("alias", ["latest", "LATEST", "v2", "V2", "a b"])
def test_alias_that_mlflow_refuses_is_refused_on_every_way_into_the_journal(registry, engine, alias):
    def stood(_):
        raise AssertionError("the journal was read")

    asked = candidate(registry, "a")
    ways = {
        "a run": lambda: projection.release(registry, asked, engine, alias, against=0),
        "promote": lambda: promote(registry, MODEL, "1", alias),
        "rollback": lambda: rollback(registry, MODEL, alias),
        "journal": lambda: append(registry.objects, MODEL, alias, "promote", stood, "by hand"),
    }
    for way, go in ways.items():
        if way == "promote":
            release(registry, candidate(registry, "b"), engine, ALIAS)
        with pytest.raises(StageError, match=r"MLflow (reserves|takes no) "):
            go()
        if way == "a run":  # nothing is registered for an alias that cannot come about
            assert versions(registry, MODEL) == [] and logged(registry) == []
    with pytest.raises(ValidationError, match=r"MLflow (reserves|takes no) "):
        Register(model=MODEL, alias=alias)
    assert {one.alias for one in history(registry.objects, MODEL)} == {ALIAS}


def test_aliases_of_one_model_stand_apart(registry, engine):
    release(registry, candidate(registry, "a"), engine, ALIAS)
    release(registry, candidate(registry, "b"), engine, "challenger")
    assert int(served(registry)) == 1 and head(registry.objects, MODEL, "challenger").version.number == "2"
    assert [e.number for e in history(registry.objects, MODEL)] == [1, 2]
    with pytest.raises(StageError, match="no version to go back to"):
        rollback(registry, MODEL, "challenger")


def test_registry_that_lost_its_versions_is_rebuilt_by_the_next_run(registry, engine, tmp_path):
    for letter in "ab":
        release(registry, candidate(registry, letter), engine, ALIAS)
    rebuilt = Registry(registry.objects, tracking_in(tmp_path / "new"))
    with pytest.raises(StageError, match="lost version 2"):
        reconcile(rebuilt, MODEL)
    with pytest.raises(StageError, match="lost version 1"):
        rollback(rebuilt, MODEL, ALIAS)
    made = release(rebuilt, candidate(rebuilt, "b"), engine, ALIAS)
    assert (made.version, made.new, made.moved) == ("1", True, True) and int(served(rebuilt)) == 1
    assert not release(rebuilt, candidate(rebuilt, "b"), engine, ALIAS).moved
    with pytest.raises(StageError, match="lost version 1"):  # the one before, not the same engines under an old number
        rollback(rebuilt, MODEL, ALIAS)
    release(rebuilt, candidate(rebuilt, "c"), engine, ALIAS)
    assert rollback(rebuilt, MODEL, ALIAS).version == "1"


def test_concurrent_promoters_each_get_a_number_of_their_own(registry, engine):
    for letter in "abcd":
        release(registry, candidate(registry, letter), engine, ALIAS)
    known = versions(registry, MODEL)
    begin, mine = threading.Barrier(8), []

    def one(i):
        begin.wait()
        for n in range(5):
            chosen = known[(i + n) % 4]
            mine.append(append(registry.objects, MODEL, ALIAS, "promote", lambda _, c=chosen: c, "race"))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = history(registry.objects, MODEL)
    assert [e.number for e in entries] == list(range(1, 45))
    assert sorted(e.number for e in mine) == list(range(5, 45))
    assert all(b.previous == a.version.number for a, b in itertools.pairwise(entries))
    reconcile(registry, MODEL)
    assert str(served(registry)) == entries[-1].version.number


def test_journal_entry_of_a_user_without_a_name_says_its_number(registry, engine, monkeypatch):
    def nameless():
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    release(registry, candidate(registry, "a"), engine, ALIAS)
    assert head(registry.objects, MODEL, ALIAS).who.startswith(f"uid {os.getuid()}@")


def test_journal_beside_strange_files_reads_its_entries_only(registry, engine):
    release(registry, candidate(registry, "a"), engine, ALIAS)
    registry.objects.put(f"promotions/{MODEL}/.put-left-over", b"half")
    assert len(history(registry.objects, MODEL)) == 1 and history(registry.objects, MODEL, "nobody") == []
    assert head(registry.objects, "nothing", ALIAS) is None and models(registry.objects) == [MODEL]


CASES = ("half a logged model", "before the version", "before the journal", "before the alias")

KILLED = """
import os, signal, sys
from pathlib import Path
from flows.registry import projection
from flows.tracking.connect import Tracking
from mlflow import MlflowClient, pyfunc
from mlflow.store.model_registry import sqlalchemy_store as _
from mlflow.store.tracking import sqlalchemy_store as _
from stages.runtime.stores import LocalObjects
from tests.flows.recorded import tracking_in
from tests.flows.registry.test_projection import CASES, candidate
from tests.flows.registry.test_projection import release as released

def release(where, root, run):
    die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    if where == "half a logged model":
        MlflowClient.log_model_artifacts = die
    if where == "before the version":
        MlflowClient.create_model_version = die
    if where == "before the journal":
        projection.append = die
    if where == "before the alias":
        MlflowClient.set_registered_model_alias = die
    made = projection.Registry(LocalObjects(root / "store"), tracking_in(root / "mlflow"))
    released(made, candidate(made, "a", run=run), root / "engine", "champion")

pyfunc.save_model  # imported once, before the forks
for where, run in zip(CASES, sys.argv[2:]):
    if (pid := os.fork()) == 0:
        release(where, Path(sys.argv[1], where), run)
        os._exit(7)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, where
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder for each case in which a release was killed, with the MLflow run it belonged to."""
    root, runs = tmp_path_factory.mktemp("killed"), {}
    for where in CASES:
        (root / where / "engine").mkdir(parents=True)
        (root / where / "engine" / "model.onnx").write_bytes(b"weights")
        tracking = tracking_in(root / where / "mlflow")
        runs[where] = tracking.client.create_run(tracking.experiment_id).info.run_id
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(root), *runs.values()],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    return root, runs


@pytest.mark.fault
@pytest.mark.parametrize("where", CASES)
def test_release_killed_between_its_steps_comes_to_one_version(killed, where):
    root, runs = killed
    registry = Registry(LocalObjects(root / where / "store"), tracking_in(root / where / "mlflow"))
    made = release(registry, candidate(registry, "a", run=runs[where]), root / where / "engine", ALIAS)
    assert made.version == "1" and made.new == (where in ("half a logged model", "before the version"))
    assert made.moved == (where != "before the alias")
    assert len(versions(registry, MODEL)) == len(history(registry.objects, MODEL)) == len(logged(registry)) == 1
    assert int(served(registry)) == 1 and drift(registry, MODEL) == []
    (carrier,) = logged(registry)
    assert str(carrier.status) == "READY" and carrier.model_id == made.logged_model


def test_release_by_two_at_once_keeps_the_lowest_version(registry, engine, monkeypatch):
    asked = candidate(registry, "a")
    from mlflow import MlflowClient

    create = MlflowClient.create_model_version

    def overtaken(self, name, *args, **kwargs):  # another process registers the same engines first
        create(self, name, *args, **kwargs)
        return create(self, name, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", overtaken)
    made = release(registry, asked, engine, ALIAS)
    assert (made.version, made.new) == ("1", False) and [one.number for one in versions(registry, MODEL)] == ["1"]


def test_package_of_other_code_is_another_logged_model(registry, engine, tmp_path, monkeypatch):
    run = candidate(registry, "a").run
    one = package.logged_model(registry.tracking, engine, MODEL, "a" * 64, run)
    other = tmp_path / "served.py"
    other.write_text(package.SERVED.read_text() + "\n# changed\n")
    monkeypatch.setattr(package, "SERVED", other)
    two = package.logged_model(registry.tracking, engine, MODEL, "a" * 64, run)
    assert one.model_id != two.model_id
    assert package.logged_model(registry.tracking, engine, MODEL, "a" * 64, run).model_id == two.model_id
