"""What a child says, as lines of a pipe: whole events, in order, or a line that is none."""

import json
import os

import pytest

from flows.running.child_events import MALFORMED, Events


def said(*lines):
    """The events of a stream of these lines, once all are read."""
    reading, writing = os.pipe()
    events = Events(os.fdopen(reading, "rb"))
    with os.fdopen(writing, "wb") as stream:
        for line in lines:
            stream.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
    with events._changed:
        assert events._changed.wait_for(lambda: events._ended, 10)
    taken = []
    while not events.ended:
        taken.append(events.take(10))
    assert events.take(0) is None
    return taken


def test_events_are_taken_in_order_and_of_advances_in_a_row_the_last():
    note, metric = {"event": "note", "text": "é"}, {"event": "metric", "name": "loss", "value": 0.5, "step": 1}
    moved = [{"event": "advanced", "done": done, "total": 4} for done in range(4)]
    last = {"event": "units", "count": 3}
    assert said(*moved[:2], note, moved[2], metric, metric, moved[3], last) == [
        moved[1], note, moved[2], metric, metric, moved[3], last,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"Killed\n", "Killed"),
        (b"\n", ""),
        (b"3\n", "3"),
        (b'{"event": "hello"}\n', '{"event": "hello"}'),
        (b'{"event": ["note"]}\n', '{"event": ["note"]}'),
        (b'{"event": "advanced", "done": 1}\n', '{"event": "advanced", "done": 1}'),
        (b'{"event": "sealed"}\n', '{"event": "sealed"}'),
        (b"\xff\xfe\n", "\ufffd\ufffd"),
    ],
)
def test_line_that_is_no_event_is_said_to_be_none(line, text):
    assert said(line, {"event": "units", "count": 3})[0] == {"event": MALFORMED, "line": text}


def test_line_that_a_kill_cut_short_is_left_out():
    assert said({"event": "note", "text": "a"}, b'{"event": "note", "te') == [{"event": "note", "text": "a"}]
