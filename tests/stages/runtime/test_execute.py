import errno
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import replace

import pytest

from stages.runtime import execute as module
from stages.runtime.artifacts import Store
from stages.runtime.contract import PARTIAL, DoesNotFit, Image, Kind, StageError, Work
from stages.runtime.execute import check_kinds, execute, work_of
from stages.runtime.fingerprint import canonical, fingerprint, required
from stages.runtime.peak_memory import peak_rss_bytes
from stages.runtime.progress import Silent
from stages.runtime.stores import LocalObjects
from tests.stages.runtime.trial import TRIAL, TrialParams


class Notes(Silent):
    def __init__(self):
        self.heard = []

    def note(self, text):
        self.heard.append(text)


def run(store, *, stage=TRIAL, inputs=None, progress=None, force=False, step="trial", **params):
    made = TrialParams(**params)
    return execute(stage, made, work_of(stage, made, inputs or {}), store, progress or Silent(), step=step, force=force)


def drafts(store):
    return [p for p in (store.scratch / "drafts").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_first_run_seals_what_the_stage_wrote_with_its_provenance(store):
    outcome = run(store, text="ab", number=2)
    manifest = outcome.manifest
    assert (outcome.cached, outcome.changed) == (False, True)
    assert outcome.identity == fingerprint(manifest.work)
    assert (store.checkout(outcome.identity) / "text.txt").read_text() == "abab"
    assert set(manifest.files) == {"text.txt", "deep/zeros"}
    assert manifest.kind is Kind.CORPUS
    assert manifest.metrics == {"letters": 4.0}
    assert manifest.provenance.step == "trial"
    assert 0 <= manifest.provenance.seconds < 60
    assert manifest.provenance.peak_rss_bytes > 10_000_000
    assert drafts(store) == []


def test_same_work_again_is_a_hit_that_runs_nothing_and_changes_nothing(store, tmp_path):
    log = tmp_path / "log"
    first = run(store, log=str(log))
    second = run(store, log=str(log), step="another")
    assert (second.cached, second.changed) == (True, False)
    assert second.manifest == first.manifest
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize("change", [{"text": "other"}, {"number": 4}])
def test_other_params_are_other_work(store, change):
    assert run(store).identity != run(store, **change).identity


def test_inputs_and_their_roles_are_part_of_the_work(store):
    a, b = run(store, text="a").identity, run(store, text="b").identity
    every = [{}, {"text": a}, {"text": b}, {"more.0": a, "more.1": b}, {"more.0": b, "more.1": a}]
    assert len({run(store, inputs=inputs).identity for inputs in every}) == len(every)


def test_forced_run_makes_it_again_and_says_whether_the_bytes_changed(store, tmp_path):
    log = tmp_path / "log"
    first = run(store, log=str(log))
    again = run(store, log=str(log), force=True, step="forced")
    assert (again.cached, again.changed, again.identity) == (False, False, first.identity)
    assert len(log.read_text().splitlines()) == 2
    assert store.manifest(first.identity).provenance.step == "forced"

    def other(params, inputs, output, progress):
        (output / "text.txt").write_text("something else")
        return {}

    assert run(store, stage=replace(TRIAL, run=other), force=True).changed
    assert (store.checkout(first.identity) / "text.txt").read_text() == "something else"


def test_failed_stage_seals_nothing_and_leaves_no_file(store):
    with pytest.raises(StageError, match="the trial failed"):
        run(store, say="error")
    assert list(store.manifests()) == []
    assert [path.name for path in drafts(store)] == ["work.json"]
    assert not run(store).cached


def test_stage_that_writes_nothing_is_refused(store):
    with pytest.raises(StageError, match="without writing a file"):
        run(store, stage=replace(TRIAL, run=lambda *_: {}))
    assert list(store.manifests()) == []


def test_run_after_a_failure_resumes_from_its_partial_state(store):
    with pytest.raises(StageError, match="interrupted by itself"):
        run(store, say="state")
    notes = Notes()
    outcome = run(store, progress=notes)
    assert notes.heard == ["starts at 7"]
    assert not any(PARTIAL in name for name in outcome.manifest.files)
    assert drafts(store) == []


@pytest.mark.parametrize("change", [{"force": True}, {"number": 5}])
def test_forced_run_and_other_work_start_at_nothing(store, change):
    with pytest.raises(StageError, match="interrupted by itself"):
        run(store, say="state")
    notes = Notes()
    run(store, progress=notes, **change)
    assert notes.heard == ["starts at 0"]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("params", {"text": "x"}, "params.kilobytes"),
        ("code", "d" * 64, "code"),
        ("executor", {"device": "x"}, "executor"),
    ],
)
def test_partial_state_of_other_work_is_refused_naming_the_field(store, field, value, named):
    work = work_of(TRIAL, TrialParams(), {})
    partial = store.scratch / "drafts" / fingerprint(work) / PARTIAL
    partial.mkdir(parents=True)
    other = work.model_copy(update={field: value})
    (partial / "work.json").write_bytes(canonical(other.model_dump(mode="json")))
    (partial / "count").write_text("9")
    with pytest.raises(StageError, match="belongs to other work") as caught:
        run(store)
    assert caught.value.measured.startswith(named)
    assert str(partial) in str(caught.value)
    assert (partial / "count").read_text() == "9"
    assert list(store.manifests()) == []


def test_kill_while_the_partial_state_was_claimed_does_no_harm(store):
    partial = store.scratch / "drafts" / fingerprint(work_of(TRIAL, TrialParams(), {})) / PARTIAL
    partial.mkdir(parents=True)
    (partial / ".work.json").write_bytes(b'{"stage":')
    assert not run(store).cached


def test_inputs_that_do_not_fit_are_refused_before_anything_runs(store, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(StageError, match="'text' of trial is not sealed"):
        run(store, inputs={"text": "0" * 64}, log=str(log))
    wrong = run(store, stage=replace(TRIAL, output=Kind.REPORT)).identity
    with pytest.raises(StageError, match="cannot take this as 'text'"):
        run(store, inputs={"text": wrong}, log=str(log))
    assert not log.exists()


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ({"texts": Kind.CORPUS}, "has no input 'texts'"),
        ({"text.0": Kind.CORPUS}, "has no input 'text.0'"),
        ({"more": Kind.CORPUS}, "has no input 'more'"),
        ({"more.0": Kind.CORPUS, "more.1": Kind.ONNX}, "cannot take this as 'more.1'; measured onnx; limit corpus or"),
    ],
)
def test_roles_and_kinds_that_a_stage_does_not_take_are_refused(kinds, text):
    with pytest.raises(StageError, match=text):
        check_kinds(TRIAL, kinds)


def test_roles_that_a_stage_takes_are_accepted_and_a_missing_one_is_named():
    check_kinds(TRIAL, {})
    check_kinds(TRIAL, {"text": Kind.CORPUS, "more.0": Kind.REPORT})
    needed = {role: replace(taken, optional=False) for role, taken in TRIAL.inputs.items()}
    with pytest.raises(StageError, match="needs an input 'more'"):
        check_kinds(replace(TRIAL, inputs=needed), {"text": Kind.CORPUS})


def test_code_or_libraries_other_than_planned_are_refused(store):
    work = work_of(TRIAL, TrialParams(), {})
    with pytest.raises(StageError, match="not the code that was planned"):
        execute(TRIAL, TrialParams(), work.model_copy(update={"code": "d" * 64}), store, Silent())
    with pytest.raises(StageError, match="requires numpy"):
        execute(TRIAL, TrialParams(), work.model_copy(update={"requires": {"numpy": "0.1"}}), store, Silent())
    assert list(store.manifests()) == []


def test_work_names_libraries_of_the_image_and_the_executor():
    on = replace(TRIAL, image=Image.TENSORRT, executed_on=lambda params: {"device": params.text})
    work = work_of(on, TrialParams(text="gpu"), {"text": "b", "more.0": "a"})
    assert work.requires == required(Image.TENSORRT)
    assert work.executor == {"device": "gpu"}
    assert work_of(TRIAL, TrialParams(), {}).executor == {}
    assert work == Work.model_validate_json(work.model_dump_json())


def test_module_that_params_choose_is_part_of_the_code_planned_and_checked(store):
    chosen = {"a": "stages.measures.size", "b": "stages.measures.interval"}
    on = replace(TRIAL, uses=lambda params: (chosen[params.text],))
    works = [work_of(on, TrialParams(text=text), {}) for text in chosen]
    assert len({work.code for work in [*works, work_of(TRIAL, TrialParams(), {})]}) == 3
    with pytest.raises(StageError, match="not the code that was planned"):
        execute(on, TrialParams(text="a"), works[0].model_copy(update={"code": works[1].code}), store, Silent())
    assert execute(on, TrialParams(text="a"), works[0], store, Silent()).manifest.work.code == works[0].code


def test_disk_full_while_the_stage_writes_does_not_fit_and_seals_nothing(store, small_disk):
    full = Store(store.objects, small_disk / "scratch")
    with pytest.raises(DoesNotFit, match=f"the disk of {small_disk}/scratch is full.*enginery sweep"):
        run(full, kilobytes=3000)
    assert list(full.manifests()) == []
    assert shutil.disk_usage(small_disk).free > 900_000
    assert not run(full, kilobytes=100).cached


def test_disk_full_while_sealing_does_not_fit_and_seals_nothing(store, small_disk):
    full = Store(LocalObjects(small_disk / "store"), store.scratch)
    with pytest.raises(DoesNotFit, match=f"the disk of {small_disk}/store is full"):
        run(full, kilobytes=3000)
    assert list(full.manifests()) == []
    assert [path for path in (small_disk / "store").rglob("*") if path.name.startswith(".put")] == []
    assert not run(full, kilobytes=100).cached


def test_disk_full_before_the_stage_starts_leaves_nothing_that_later_runs_stumble_over(store, small_disk):
    full = Store(store.objects, small_disk / "scratch")
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space") as caught, ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(DoesNotFit, match="is full"):
        run(full)
    ballast.unlink()
    assert not run(full).cached


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_memory_that_ran_out_does_not_fit(store, error):
    def greedy(*_):
        raise error

    with pytest.raises(DoesNotFit, match="memory ran out; measured peak"):
        run(store, stage=replace(TRIAL, run=greedy))


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), PermissionError(13, "not yours"), KeyError("k")])
def test_other_errors_pass_as_they_are(store, error):
    def broken(*_):
        raise error

    with pytest.raises(type(error)) as caught:
        run(store, stage=replace(TRIAL, run=broken))
    assert caught.value is error


def test_peak_memory_is_the_stages_own(store):
    before = bytearray(os.urandom(1)) * 300_000_000
    del before

    def allocating(params, inputs, output, progress):
        held = bytearray(b"x") * (params.number * 1_000_000)
        (output / "text.txt").write_text(str(len(held)))
        return {}

    stage = replace(TRIAL, run=allocating)
    small = run(store, stage=stage, number=1).manifest.provenance.peak_rss_bytes
    large = run(store, stage=stage, number=200).manifest.provenance.peak_rss_bytes
    assert large - small > 150_000_000
    assert peak_rss_bytes() >= large


def test_commit_comes_from_the_environment_or_git_or_is_empty(monkeypatch, tmp_path):
    monkeypatch.setenv("ENGINERY_COMMIT", "abc")
    assert module.commit.__wrapped__() == "abc"
    monkeypatch.delenv("ENGINERY_COMMIT")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.commit.__wrapped__() == ""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert module.commit.__wrapped__() == head


def test_device_name_names_a_processor_and_its_cores():
    name, _, cores = module.device_name.__wrapped__().rpartition(" x")
    assert name
    assert int(cores) == os.cpu_count()


def test_two_stores_never_share_drafts_of_the_same_work(store, tmp_path):
    other = Store(LocalObjects(tmp_path / "other"), tmp_path / "elsewhere")
    assert run(store).identity == run(other).identity
    counts = Counter(len(list(one.manifests())) for one in (store, other))
    assert counts == {1: 2}
