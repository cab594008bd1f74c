"""A checkpoint counts once it is whole, and starts one run for its bytes, however often the watcher is killed."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import boto3
import pytest

from flows.cli import main
from flows.commands.options import seconds
from flows.prefect_api import events
from flows.recipe.model import Recipe
from flows.settings import settle
from flows.triggers import watch
from flows.triggers.arrival_records import ARRIVALS, arrived, begin, checkpoint, find, finished, forget, on_source
from flows.triggers.checkpoint_scan import Prefix, look
from stages.adapters.s3.client import parse
from stages.models.checkpoint import layout
from stages.runtime.contract import DoesNotFit, Interrupted, StageError, Unavailable
from tests.flows.prefect_server import deployed, eventually, prefect_api, runs_of
from tests.flows.prefect_server import events as events_of
from tests.stages.adapters.conftest import s3_endpoint, s3_root

KEY = "a" * 64


def recipe(name="arrive", *more) -> Recipe:
    fetch = {"name": "dense", "stage": "fetch", "params": {"source": "nowhere", "digest": "b" * 64}}
    return Recipe.model_validate({"recipe": 1, "name": name, "steps": [fetch, *more]})


def whole(folder: Path, weights=b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def announced(api, name):
    """The events of checkpoints that arrived for a recipe."""
    return [one for one in events_of(api, events.CHECKPOINT_CREATED) if one["resource"].get("enginery.recipe") == name]


@pytest.fixture
def prefix(tmp_path, store) -> Prefix:
    (tmp_path / "in").mkdir()
    return Prefix(str(tmp_path / "in"), "arrive", store, 0.0)


@pytest.fixture
def digests(prefix):
    """Look once; the digests of what stopped changing, by folder. What was said is in `digests.said`."""

    def one():
        found = look(prefix, one.said.append)
        return {source.rpartition("/")[2]: seen.digest for source, seen in found.items() if seen.digest}

    one.said = []
    return one


def test_checkpoint_counts_at_the_second_look_that_sees_no_change(prefix, digests):
    folder = whole(Path(prefix.uri) / "deep" / "a b")
    assert digests() == {}
    expected = {"a%20b": layout.choose(folder).digest()}
    assert digests() == expected and digests() == expected
    (folder / "model.safetensors").write_bytes(b"changed")
    assert digests() == {}
    assert digests() == {"a%20b": layout.choose(folder).digest()} != expected


def test_checkpoint_that_grows_between_looks_never_counts(prefix, digests):
    weights = whole(Path(prefix.uri) / "a") / "model.safetensors"
    for n in range(4):
        with weights.open("ab") as stream:
            stream.write(b"more")
        os.utime(weights, (1, 1))  # as a copy that keeps times does
        assert digests() == {}, n
    for n in range(4):
        weights.write_bytes(bytes([n]))
        os.utime(weights, (n, n))
        assert digests() == {}, n


def test_checkpoint_settles_for_as_long_as_asked(prefix, monkeypatch):
    whole(Path(prefix.uri) / "a")
    slow, now = Prefix(prefix.uri, prefix.recipe, prefix.store, 60.0), time.time()
    seen = []
    for later in (0, 30, 59, 61):
        monkeypatch.setattr("flows.triggers.checkpoint_scan.time.time", lambda later=later: now + later)
        seen.append([bool(one.digest) for one in look(slow, print).values()])
    assert seen == [[False], [False], [False], [True]]


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_checkpoint_that_lacks_a_file_waits_and_says_what_for(prefix, digests, missing):
    folder = whole(Path(prefix.uri) / "a")
    (folder / missing).rename(folder / "kept.safetensors")
    assert digests() == digests() == {} and len(digests.said) == 1
    assert ("its tokenizer" if missing == "tokenizer.json" else missing) in digests.said[0]
    (folder / "kept.safetensors").rename(folder / missing)
    assert digests() == {} and list(digests()) == ["a"]


def test_sharded_checkpoint_counts_with_its_index_and_every_shard(prefix, digests):
    folder = whole(Path(prefix.uri) / "a")
    names = [f"model-0000{n}-of-00007.safetensors" for n in range(1, 8)]
    (folder / "model.safetensors").rename(folder / names[0])
    assert digests() == digests() == {} and "model.safetensors.index.json" in digests.said[-1]
    (folder / layout.INDEX).write_text('{"weight_map": ')
    assert digests() == digests() == {} and "a whole index" in digests.said[-1]
    (folder / layout.INDEX).write_text(json.dumps({"weight_map": {f"t{n}": name for n, name in enumerate(names)}}))
    assert digests() == digests() == {} and f"{names[4]} and 2 more" in digests.said[-1]
    for name in names[1:]:
        assert digests() == {}
        (folder / name).write_bytes(name.encode())
    assert digests() == {} and digests() == {"a": layout.choose(folder).digest()}
    (folder / layout.INDEX).write_text('{"weight_map": {}}')
    assert digests() == {} and "weight_map" in digests.said[-1]


def test_gguf_counts_by_itself_and_other_files_not_at_all(prefix, digests):
    root = Path(prefix.uri)
    (root / "one.gguf").write_bytes(b"1")
    (root / "sub").mkdir()
    (root / "sub" / "two.gguf").write_bytes(b"2")
    (root / "sub" / "notes.txt").write_text("x")
    (root / "pickle").mkdir()
    (root / "pickle" / "config.json").write_text("{}")
    (root / "pickle" / "model.bin").write_bytes(b"x")
    (root / "other").mkdir()
    (root / "other" / "model.bin").write_bytes(b"x")
    assert digests() == {} and list(digests()) == ["one.gguf", "two.gguf"]
    (said,) = digests.said
    assert (
        "pickle is not whole yet: it lacks its tokenizer, model.safetensors" in said and "model.bin is a pickle" in said
    )


def test_checkpoint_that_is_a_link_counts_as_a_folder_does(prefix, digests, tmp_path):
    root = Path(prefix.uri)
    (root / "links").mkdir()
    (root / "links" / "one").symlink_to(whole(tmp_path / "elsewhere" / "run" / "checkpoint-1").parent)
    (root / "circle").symlink_to(root)
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    whole(root / "two", b"other")
    assert digests() == {}
    assert digests()["checkpoint-1"] == layout.choose(tmp_path / "elsewhere" / "run" / "checkpoint-1").digest()
    (seen,) = (source for source in look(prefix, print) if source.endswith("/checkpoint-1"))
    assert seen == (root / "links" / "one" / "checkpoint-1").as_uri()
    assert digests().keys() == {"checkpoint-1", "two"}


@pytest.mark.parametrize("left", [b"", b'{"file:///a": ', b"[]", b'{"file:///a": {"seen": 1}}'])
def test_what_was_seen_is_looked_at_afresh_where_its_record_is_damaged(prefix, digests, left):
    whole(Path(prefix.uri) / "a")
    assert digests() == {}
    prefix.store.objects.put(prefix.memory, left, replace=True)
    assert digests() == {} and list(digests()) == ["a"]


def test_same_bytes_at_two_places_have_one_digest(prefix, digests):
    for name in "abc":
        whole(Path(prefix.uri) / name, b"other" if name == "c" else b"same")
    digests()
    found = digests()
    assert found["a"] == found["b"] != found["c"]


def test_checkpoint_that_cannot_be_fetched_is_left_alone_until_it_changes(prefix, digests):
    folder = whole(Path(prefix.uri) / "a")
    (folder / "other.gguf").write_bytes(b"x")
    whole(Path(prefix.uri) / "b")
    assert digests() == {} and set(digests()) == {"b", "other.gguf"} == set(digests())
    assert len(digests.said) == 1 and "more than one checkpoint" in digests.said[0]
    (folder / "other.gguf").unlink()
    (folder / "config.json").write_text('{"a": 1}')
    assert set(digests()) == {"b"} and set(digests()) == {"a", "b"}


def test_source_that_cannot_be_reached_is_tried_at_the_next_look(prefix, digests, monkeypatch):
    whole(Path(prefix.uri) / "a")
    digests()

    def away(*_):
        raise Unavailable("no server answers")

    with monkeypatch.context() as patch:
        patch.setattr("flows.triggers.checkpoint_scan.pin", away)
        assert digests() == {} and "tried again" in digests.said[0]
    assert list(digests()) == ["a"]


def test_place_that_cannot_be_watched_is_refused(prefix, tmp_path):
    (tmp_path / "file").touch()
    for uri, text in [("http://x/y", "cannot be watched"), ("/no/where", "no file"), (tmp_path / "file", "no folder")]:
        with pytest.raises(StageError, match=text):
            look(Prefix(str(uri), "r", prefix.store, 0), print)


def test_prefix_in_s3_is_looked_at_as_a_folder_is(s3_root, store, tiny):
    said = []
    prefix = Prefix(f"{s3_root}/in", "arrive", store, 0.0)
    assert look(prefix, said.append) == {}
    upload(tiny, f"{s3_root}/in/a")
    upload(tiny, f"{s3_root}/in-other/a")
    look(prefix, said.append)
    (found,) = look(prefix, said.append).items()
    assert found[0] == f"{s3_root}/in/a" and found[1].digest == layout.choose(tiny).digest() and said == []
    with pytest.raises(StageError, match="does not exist"):
        look(Prefix("s3://no-such-bucket/in", "arrive", store, 0.0), said.append)


def test_prefix_in_s3_without_permission_is_refused(s3_root, store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StageError, match="is denied"):
        look(Prefix(s3_root, "arrive", store, 0.0), print)


def test_recipe_takes_a_source_in_its_one_fetch_step():
    taken = on_source(recipe(), "s3://b/x", KEY)
    assert taken.step("dense").params == {"source": "s3://b/x", "digest": KEY}
    assert on_source(recipe(), "s3://b/x").step("dense").params == {"source": "s3://b/x"}
    assert on_source(recipe(), "") == recipe()
    other = {"name": "teacher", "stage": "fetch", "params": {"source": "y"}}
    with pytest.raises(StageError, match="2 fetch steps: dense, teacher; limit 1"):
        on_source(recipe("two", other), "s3://b/x")


def test_arrival_is_taken_by_one_flow_run_which_keeps_it(store):
    arrived(store.objects, checkpoint("arrive", "s3://b/x", KEY, {"config.json": 2}))
    taken, holder = begin(store.objects, recipe(), f"s3://b/x#{KEY}", "first")
    assert holder == "" and taken.step("dense").params == {"source": "s3://b/x", "digest": KEY}
    assert begin(store.objects, recipe(), f"s3://b/x#{KEY}", "first")[1] == ""
    assert begin(store.objects, recipe(), f"s3://b/copy#{KEY}", "second")[1] == "first"
    assert begin(store.objects, recipe("other"), f"s3://b/x#{KEY}", "second")[1] == ""
    assert begin(store.objects, recipe(), "s3://b/x", "second") == (on_source(recipe(), "s3://b/x"), "")
    assert begin(store.objects, recipe(), f"#{KEY}", "first")[0] == recipe()


def test_arrival_that_is_forgotten_is_new_with_another_event(store):
    one = arrived(store.objects, checkpoint("arrive", "s3://b/x", KEY, {}))
    assert arrived(store.objects, checkpoint("arrive", "s3://b/copy", KEY, {})) == one
    watch.finish(store.objects, one)
    begin(store.objects, recipe(), f"s3://b/x#{KEY}", "first")
    other = arrived(store.objects, checkpoint("arrive", "s3://b/y", "ab" * 32, {}))
    assert finished(store.objects, "arrive") == {KEY}
    for prefix, text in [("a", "more than one"), ("c", "no arrival")]:
        with pytest.raises(StageError, match=text):
            forget(store.objects, "arrive", prefix)
    assert forget(store.objects, "arrive", "aaa") == KEY and finished(store.objects, "arrive") == set()
    assert find(store.objects, "arrive", KEY) is None and find(store.objects, "arrive", other.key) == other
    assert begin(store.objects, recipe(), f"s3://b/x#{KEY}", "second")[1] == ""
    again = arrived(store.objects, checkpoint("arrive", "s3://b/x", KEY, {}))
    assert again.id != one.id and again.announcement().id == again.id


def test_flow_run_of_an_arrival_that_another_has_ends_at_once(prefect_api, store, monkeypatch):
    from flows.triggers.on_checkpoint import optimize_checkpoint

    monkeypatch.setenv("ENGINERY_STORE", str(store.objects.root))
    begin(store.objects, recipe(), f"s3://b/x#{KEY}", "the first")
    state = optimize_checkpoint(recipe(), f"s3://b/x#{KEY}", return_state=True)
    assert state.is_completed() and "the first has this checkpoint" in state.message


@pytest.mark.parametrize("killed", ["before the event", "after the event", "before the record is closed", "later"])
def test_watcher_killed_at_any_point_announces_once(prefix, prefect_api, killed):
    name = f"arrive-{killed.replace(' ', '-')}"
    deployment = deployed(name)
    source = whole(Path(prefix.uri) / "a", killed.encode())
    mine = checkpoint(name, source.as_uri(), layout.choose(source).digest(), {"model.safetensors": 7})
    record = arrived(prefix.store.objects, mine)
    if killed == "after the event":
        events._send(record.announcement())
    elif killed != "before the event":
        events.deliver(record.announcement())
    if killed == "later":
        watch.finish(prefix.store.objects, record)
    said = []
    settings = settle(store=prefix.store.uri)
    for _ in range(2):
        watch.watch(prefix.uri, recipe(name), settings, every_s=1, settle_s=0, once=True, say=said.append)
    assert eventually(lambda: runs_of(prefect_api, deployment))
    (run,) = runs_of(prefect_api, deployment)
    assert run["parameters"] == {"recipe": name, "checkpoint": f"{source.as_uri()}#{mine.key}"}
    (one,) = [
        e for e in events_of(prefect_api, events.CHECKPOINT_CREATED) if e["resource"].get("enginery.recipe") == name
    ]
    assert one["payload"]["digest"] == mine.key and one["payload"]["bytes"] == 7
    assert one["resource"]["prefect.resource.id"] == f"enginery.checkpoint.{mine.key}"
    assert sum("announced" in line for line in said) == (killed != "later")


def test_watcher_goes_on_where_the_prefect_server_was_away(prefix, prefect_api, monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    whole(Path(prefix.uri) / "a", b"away")
    said, settings = [], settle(store=prefix.store.uri)
    look(prefix, said.append)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        watch.watch(prefix.uri, recipe(), settings, every_s=1, settle_s=0, once=True, say=said.append)
    assert "tried again" in said[-1] and finished(prefix.store.objects, "arrive") == set()
    watch.watch(prefix.uri, recipe(), settings, every_s=1, settle_s=0, once=True, say=said.append)
    assert "announced" in said[-1] and len(finished(prefix.store.objects, "arrive")) == 1


def test_scheduled_flow_announces_at_its_second_look(prefix, prefect_api, monkeypatch):
    monkeypatch.setenv("ENGINERY_STORE", str(prefix.store.objects.root))
    folder = whole(Path(prefix.uri) / "a", b"scheduled")
    shutil.copytree(folder, folder.with_name("copy"))
    digest = layout.choose(folder).digest()
    assert [watch.watch_once(prefix.uri, recipe("scheduled"), 0.0) for _ in range(3)] == [[], [digest], []]
    assert watch.watch_once(prefix.uri, "tiny", 0.0) == [] and watch.watch_once(prefix.uri, "tiny", 0.0) == [digest]
    assert find(prefix.store.objects, "tiny", digest).recipe == "tiny"


def test_watcher_without_a_server_runs_each_checkpoint_once(prefix, prefect_api, tiny, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL")  # in the settings it stays: that spares the test a temporary server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    said, root = [], Path(prefix.uri)
    settings = settle(store=prefix.store.uri, launcher="inline")

    def once():
        said.clear()
        watch.watch(prefix.uri, recipe(), settings, every_s=1, settle_s=0, once=True, say=said.append)
        return [line.split()[0] for line in said if line.startswith(("running", "arrive"))]

    for name in ("a", "b"):
        shutil.copytree(tiny, root / name)
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr("flows.triggers.watch.optimize", killed)
        with pytest.raises(KeyboardInterrupt):
            once()
    assert once() == ["running", "arrive"] and "not judged; report: " in said[-1]
    assert once() == []
    (root / "a" / "config.json").write_text('{"auto_map": {"x": "y"}}')
    assert once() == ["running", "arrive"] and "(auto_map)" in said[-1] and "--again" in said[-1]
    assert once() == []
    key = layout.choose(root / "a").digest()
    record = json.loads(prefix.store.objects.read(f"{ARRIVALS}arrive/{key}.done.json"))
    assert "auto_map" in record["error"]
    forget(prefix.store.objects, "arrive", key[:12])
    assert once() == ["running", "arrive"]


def test_run_that_a_bug_or_the_network_ends_is_recorded_only_where_it_is_a_bug(prefix, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    whole(Path(prefix.uri) / "a")
    said, settings, raised = [], settle(store=prefix.store.uri), [Unavailable("no network"), ValueError("a bug")]

    def broken(*_):
        raise raised.pop(0)

    monkeypatch.setattr("flows.triggers.watch.optimize", broken)

    def once():
        watch.watch(prefix.uri, recipe(), settings, every_s=1, settle_s=0, once=True, say=said.append)

    once()
    assert "tried again" in said[-1] and finished(prefix.store.objects, "arrive") == set()
    with pytest.raises(ValueError, match="a bug"):
        once()
    once()
    (key,) = finished(prefix.store.objects, "arrive")
    assert b"ValueError: a bug" in prefix.store.objects.read(f"{ARRIVALS}arrive/{key}.done.json")


@pytest.mark.parametrize(
    ("came", "code"),
    [
        (["passed"], 0),
        (["failed"], 2),
        (["failed", DoesNotFit("too small")], 3),
        ([StageError("it broke"), "failed", DoesNotFit("too small"), "passed"], 1),
        ([Unavailable("no network"), "passed"], 1),
        ([Interrupted("ended")], 130),
    ],
)
def test_watch_once_exits_as_the_worst_of_its_runs(tmp_path, capsys, monkeypatch, came, code):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for number in range(len(came)):
        whole(tmp_path / "in" / str(number), bytes([number]))
    path, left = tmp_path / "r.yaml", list(came)
    path.write_text(recipe().model_dump_json(exclude_none=True, exclude={"gates"}))

    def optimize(*_):
        what = left.pop(0)
        if isinstance(what, BaseException):
            raise what
        return types.SimpleNamespace(passed=what == "passed", verdict=what, run="r", report="/r.html")

    monkeypatch.setattr("flows.triggers.watch.optimize", optimize)
    words = ["watch", str(tmp_path / "in"), "--recipe", str(path), "--once", "--settle", "0s"]
    assert main([*words, "--store", str(tmp_path / "store")]) == code and not left
    assert main([*words[:-3], "--help"]) == 0 and "3 does not fit" in capsys.readouterr().out


def test_watch_once_fails_where_the_event_is_not_confirmed(prefix, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    whole(Path(prefix.uri) / "a")
    answers, settings = [False, True], settle(store=prefix.store.uri)
    monkeypatch.setattr("flows.triggers.watch.deliver", lambda one, confirm_s: answers.pop(0))
    how = {"every_s": 1, "settle_s": 0, "once": True, "say": [].append}
    assert [watch.watch(prefix.uri, recipe(), settings, **how) for _ in range(2)] == [1, 0]


def test_watcher_outlives_looks_that_fail_after_the_first(prefix, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    whole(Path(prefix.uri) / "a")
    turns, settings = [None, Unavailable("no network"), None, KeyboardInterrupt()], settle(store=prefix.store.uri)
    said = []

    def shaky(*args):
        if turn := turns.pop(0):
            raise turn
        return look(*args)

    monkeypatch.setattr("flows.triggers.watch.look", shaky)
    monkeypatch.setattr("flows.triggers.watch.deliver", lambda one, confirm_s: False)
    with pytest.raises(KeyboardInterrupt):
        watch.watch(prefix.uri, recipe(), settings, every_s=0, settle_s=0, once=False, say=said.append)
    assert "watching" in said[0] and "is repeated" in said[1] and "not on record yet" in said[2]
    assert finished(prefix.store.objects, "arrive") == set()
    turns.append(Unavailable("no network"))
    with pytest.raises(Unavailable):
        watch.watch(prefix.uri, recipe(), settings, every_s=0, settle_s=0, once=False, say=said.append)


def test_watch_command_refuses_what_it_cannot_do(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    path = tmp_path / "r.yaml"
    path.write_text(recipe().model_dump_json(exclude_none=True, exclude={"gates"}))
    at = ["--store", str(tmp_path / "store")]
    assert main(["watch", "/no/where", "--recipe", str(path), *at]) == 1
    assert main(["watch", str(tmp_path), "--recipe", "none", *at]) == 1
    assert main(["watch", str(tmp_path), "--recipe", str(path), "--every", "soon", *at]) == 1
    assert main(["watch", str(tmp_path), "--recipe", str(path), "--again", "ab", *at]) == 1
    said = capsys.readouterr().err
    assert "/no/where" in said and "no recipe" in said and "'soon' is no duration" in said and "no arrival" in said
    assert [seconds(text) for text in ("3", "0.5s", "2m", "1h", "90d")] == [3, 0.5, 120, 3600, 7776000]


def upload(folder: Path, uri: str) -> None:
    """File by file, the index or the weights first, as an uploader in no order does."""
    bucket, key = parse(uri)
    client = boto3.client("s3", region_name="us-east-1")
    for path in sorted(folder.iterdir(), reverse=True):
        client.put_object(Bucket=bucket, Key=f"{key}/{path.name}", Body=path.read_bytes())


@pytest.mark.fault
def test_ten_copies_while_the_watcher_is_killed_and_restarted_start_one_run(
    s3_root,
    prefect_api,
    tiny,
    tmp_path,
):
    """Real S3, real server, real processes; SIGKILL at random moments, with the seed in the failure's text."""
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    name = f"ten-copies-{seed}"
    deployment = deployed(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(name).model_dump_json(exclude_none=True, exclude={"gates"}))

    def uploads():
        for n in range(10):
            upload(tiny, f"{s3_root}/in/copy-{n}")
            time.sleep(2)

    def start():
        with (tmp_path / "said").open("a") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "flows", "watch", f"{s3_root}/in", "--recipe", str(path)),
                    *("--every", "0.5s", "--settle", "1s", "--store", f"{s3_root}/store"),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "ENGINERY_HOME": str(tmp_path / "home")},
                cwd=Path(__file__).parents[3],
            )

    uploader = threading.Thread(target=uploads)
    uploader.start()
    kills = 0
    while uploader.is_alive():
        watcher = start()
        time.sleep(chance.uniform(2, 7))
        watcher.kill()
        assert watcher.wait() == -9, (tmp_path / "said").read_text()
        kills += 1
    watcher = start()
    try:
        assert eventually(lambda: runs_of(prefect_api, deployment), 30), (tmp_path / "said").read_text()
        time.sleep(4)  # as long as another event would take to start another run
    finally:
        watcher.terminate()
    assert watcher.wait(20) == 130
    found = runs_of(prefect_api, deployment)
    ours = [
        e for e in events_of(prefect_api, events.CHECKPOINT_CREATED) if e["resource"].get("enginery.recipe") == name
    ]
    assert (len(found), len(ours)) == (1, 1) and kills >= 3, (seed, kills, (tmp_path / "said").read_text())
    assert found[0]["parameters"]["checkpoint"].endswith(f"#{layout.choose(tiny).digest()}")
