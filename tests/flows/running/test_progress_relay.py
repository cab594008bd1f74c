"""What a container says through the store: whole, once, of its newest start, and that it lives."""

from __future__ import annotations

import time

import pytest

from flows.running import progress_relay
from flows.running.progress_relay import Receiver, Sender
from stages.runtime.artifacts import RELAYS
from stages.runtime.contract import Unavailable
from stages.runtime.progress import Silent
from stages.runtime.stores import LocalObjects


class Lossy:
    """A folder's objects, away at times; a put may take place although its answer is lost."""

    def __init__(self, root):
        self._objects = LocalObjects(root)
        self.away, self.puts = False, 0

    def put(self, key, data, *, replace=False):
        self.puts += 1
        if self.away or self.puts % 7 == 1:
            raise Unavailable("away")
        placed = self._objects.put(key, data, replace=replace)
        if self.puts % 7 == 2:
            raise Unavailable("the answer was lost")
        return placed

    def read(self, key):
        if self.away:
            raise Unavailable("away")
        return self._objects.read(key)

    def list(self, prefix):
        return self._objects.list(prefix)

    def delete(self, key):
        self._objects.delete(key)


class Listener:
    def __init__(self):
        self.heard = []

    def advanced(self, done, total):
        self.heard.append(("advanced", done))

    def metric(self, name, value, step):
        self.heard.append((name, value, step))

    def note(self, text):
        self.heard.append(text)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"FLUSH_S": 0.01, "BEAT_S": 0.05, "LOOK_S": 0.02}.items():
        monkeypatch.setattr(progress_relay, name, value)
    monkeypatch.setattr("stages.runtime.patience.LONGEST_PAUSE_S", 0.2)


def eventually(value):
    until = time.monotonic() + 5
    while not value() and time.monotonic() < until:
        time.sleep(0.01)
    assert value()


def test_relay_carries_everything_once_and_in_order_over_a_store_that_was_away(tmp_path):
    objects, listener = Lossy(tmp_path), Listener()
    receiver, sender = Receiver(objects, "one"), Sender(objects, "one")
    for number in range(40):
        sender.metric("loss", number / 2, number)
        sender.note(f"note {number}")
        receiver.hear(listener)
    sender.advanced(1, 3)
    sender.advanced(3, 3)
    sender.end({"event": "sealed", "identity": "abc"})
    receiver.hear(listener, anew=True)
    heard = listener.heard
    assert [one for one in heard if isinstance(one, str)] == [f"note {number}" for number in range(40)]
    assert [one for one in heard if one[0] == "loss"] == [("loss", number / 2, number) for number in range(40)]
    assert heard[-1] == ("advanced", 3)
    assert receiver.last == {"event": "sealed", "identity": "abc"}
    receiver.forget()
    assert not list(objects.list(RELAYS))


def test_relay_of_a_container_that_starts_again_is_the_newest_starts(tmp_path):
    objects, follower = LocalObjects(tmp_path), Receiver(LocalObjects(tmp_path), "one")
    first = Sender(objects, "one")
    for number in range(3):  # more batches than the second start sends
        first.note(f"first {number}")
        eventually(lambda: first._number > number)  # noqa: B023
    first.end({"event": "error", "kind": "StageError", "what": "of the first start"})
    follower.hear(Silent())
    assert follower.last["what"] == "of the first start"
    second = Sender(objects, "one")
    second.note("second")
    listener, late = Listener(), Listener()
    eventually(lambda: (follower.hear(listener), "second" in listener.heard)[1])
    assert follower.last == {}
    newcomer = Receiver(objects, "one")
    newcomer.hear(late)
    assert late.heard == ["second"] and newcomer.last == {}
    second.end({"event": "sealed", "identity": "abc"})
    follower.hear(listener, anew=True)
    assert follower.last == {"event": "sealed", "identity": "abc"}


def test_relay_whose_old_words_were_swept_is_heard_from_what_is_left(tmp_path):
    objects, listener = LocalObjects(tmp_path), Listener()
    sender = Sender(objects, "one")
    for number in range(3):
        sender.note(f"note {number}")
        eventually(lambda: sender._number > number)  # noqa: B023
    sent = sender._beats
    eventually(lambda: sender._beats > sent + 1)
    for number in range(2):
        objects.delete(f"{RELAYS}one/0001/{number:06d}.jsonl")
    objects.delete(f"{RELAYS}one/0001/begun")
    Receiver(objects, "one").hear(listener)
    assert listener.heard == ["note 2"]
    again = Sender(objects, "one")
    assert again._start == 2
    for one in (sender, again):
        one.end({"event": "sealed"})


def test_pulse_goes_on_while_nothing_is_said_and_its_end_is_noticed(tmp_path):
    objects = LocalObjects(tmp_path)
    sender, receiver = Sender(objects, "one"), Receiver(objects, "one")
    assert receiver.silent_s is None
    eventually(lambda: (receiver.hear(Silent()), receiver.silent_s is not None)[1])
    until, longest = time.monotonic() + 0.5, 0.0
    while time.monotonic() < until:
        receiver.hear(Silent())
        longest = max(longest, receiver.silent_s)
        time.sleep(0.01)
    assert longest < 0.4
    sender._closed.set()
    sender._writer.join()
    receiver.hear(Silent())
    time.sleep(0.5)
    receiver.hear(Silent())
    assert receiver.silent_s > 0.4


def test_silence_is_not_counted_while_the_store_is_away(tmp_path):
    objects = Lossy(tmp_path)
    sender, receiver = Sender(objects, "one"), Receiver(objects, "one")
    eventually(lambda: (receiver.hear(Silent()), receiver.silent_s is not None)[1])
    objects.away = True
    for _ in range(10):
        time.sleep(0.06)
        with pytest.raises(Unavailable):
            receiver.hear(Silent())
    assert receiver.silent_s < 0.3
    objects.away = False
    beat = sender._beats
    eventually(lambda: sender._beats > beat)
    sender.end({"event": "sealed"})
    receiver.hear(Silent(), anew=True)
    assert receiver.last == {"event": "sealed"}
