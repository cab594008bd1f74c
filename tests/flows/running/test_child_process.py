"""Steps in child processes: the same artifact as inline, errors whole, children that can be ended."""

import signal
import threading
import time

import pytest

from flows.running.child_process import Launcher
from flows.running.order import Order
from stages import stage
from stages.adapters.connect import pins
from stages.runtime.contract import Interrupted, StageError
from stages.runtime.execute import work_of
from stages.runtime.fingerprint import fingerprint
from stages.runtime.progress import Silent


def order(store, name, params, **inputs):
    definition = stage(name)
    made = definition.params.model_validate(params)
    if definition.pin:
        made = definition.pin(made, pins(store), Silent())
    return Order(step=name, stage=name, params=made, work=work_of(definition, made, inputs))


@pytest.fixture
def launcher(store, tmp_path):
    return Launcher(store, "process", 1, tmp_path / "logs")


def text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {i} speaks of the number {i * i} and of nothing else." for i in range(200)))
    return path.as_uri()


SPLITS = {"calibrate": 0.2, "train": 0.4, "validate": 0.2, "test": 0.2}


def test_launcher_child_and_inline_seal_the_same_artifact(launcher, store, tmp_path):
    one = order(store, "corpus", {"source": text(tmp_path), "splits": SPLITS})
    made = launcher.run(one, Silent())
    assert not made.cached
    again = Launcher(store, "inline", 1, tmp_path).run(one, Silent())
    assert again.cached
    assert again.manifest == made.manifest
    forced = Order(step="corpus", stage="corpus", params=one.params, work=one.work, force=True)
    assert Launcher(store, "inline", 1, tmp_path).run(forced, Silent()).changed is False


def test_launcher_stage_error_arrives_with_its_four_parts(launcher, store, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Too short for four splits.")
    one = order(store, "corpus", {"source": path.as_uri(), "splits": SPLITS})
    with pytest.raises(StageError) as told:
        launcher.run(one, Silent())
    assert told.value.what
    assert told.value.remedy
    assert store.manifest(fingerprint(one.work)) is None


def long_step(store, tiny, seal):
    dense = seal("fetch", {"source": tiny.as_uri()}).identity
    topics = seal("corpus", {"source": "pydoc://topics", "splits": SPLITS}).identity
    # A student that differs from its teacher, and far more tokens than the test waits for.
    pruned = seal("prune", {"method": "channels", "keep": 0.8, "windows": 4, "window_tokens": 64},
                  model=dense, text=topics).identity  # fmt: skip
    params = {"tokens": 10_000_000, "window_tokens": 64}
    return order(store, "recover", params, model=pruned, teacher=dense, text=topics)


class Watch(Silent):
    def __init__(self):
        self.moving = threading.Event()

    def advanced(self, done, total):
        self.moving.set()


def in_thread(launcher, one, watch):
    errors = []

    def run():
        try:
            launcher.run(one, watch)
        except StageError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert watch.moving.wait(60)
    return thread, errors


@pytest.mark.fault
def test_launcher_child_killed_says_signal_and_seals_nothing(launcher, store, tiny, seal):
    one = long_step(store, tiny, seal)
    thread, errors = in_thread(launcher, one, Watch())
    (child,) = launcher._running.values()
    child.signal(signal.SIGKILL)
    thread.join(20)
    assert "SIGKILL" in str(errors[0])
    assert "partial state" in str(errors[0])
    assert store.manifest(fingerprint(one.work)) is None


@pytest.mark.fault
def test_launcher_stopped_children_end_and_none_starts(launcher, store, tiny, seal, tmp_path):
    one = long_step(store, tiny, seal)
    thread, errors = in_thread(launcher, one, Watch())
    (child,) = launcher._running.values()
    launcher.stop()
    thread.join(20)
    assert isinstance(errors[0], Interrupted)
    assert child.poll() is not None
    with pytest.raises(Interrupted):
        launcher.run(order(store, "corpus", {"source": text(tmp_path), "splits": SPLITS}), Silent())


@pytest.mark.fault
def test_child_parent_gone_ends_itself(store, tiny, seal, tmp_path):
    one = long_step(store, tiny, seal)
    launcher = Launcher(store, "process", 1, tmp_path / "logs")
    watch = Watch()
    thread, _ = in_thread(launcher, one, watch)
    (child,) = launcher._running.values()
    child.close()
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.poll() == -signal.SIGKILL
    thread.join(10)
