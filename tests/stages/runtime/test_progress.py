import io
import json

import pytest

from stages.runtime.progress import JsonLines, Listeners, Pass, Silent, forward

CALLS = [("advanced", (1, 4)), ("metric", ("loss", 0.25, 7)), ("note", ("half 'way' → there\nnow",))]


class Recorder:
    def __init__(self):
        self.heard = []

    def __getattr__(self, name):
        return lambda *values: self.heard.append((name, values))


def tell(progress):
    for name, values in CALLS:
        getattr(progress, name)(*values)


def test_events_written_as_lines_arrive_as_they_were_told():
    stream, recorder = io.StringIO(), Recorder()
    tell(JsonLines(stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(CALLS)
    assert all(forward(json.loads(line), recorder) for line in lines)
    assert recorder.heard == CALLS


def test_each_listener_hears_everything_in_order():
    first, second = Recorder(), Recorder()
    tell(Listeners((first, Silent(), second)))
    assert first.heard == second.heard == CALLS


def test_passes_are_told_as_one_advance_from_nothing_to_all():
    recorder = Recorder()
    for place in range(2):
        for done in range(3):
            Pass(recorder, place, 2).advanced(done, 2)
    assert recorder.heard == [("advanced", (half / 2, 2)) for half in (0, 1, 2, 2, 3, 4)]
    tell(Pass(recorder, 0, 1))
    assert recorder.heard[6:] == [("advanced", (1 / 4, 1)), *CALLS[1:]]


@pytest.mark.parametrize("event", [{"event": "sealed", "identity": "x"}, {}, {"event": "error"}])
def test_an_event_that_is_no_progress_is_not_forwarded(event):
    recorder = Recorder()
    assert not forward(event, recorder)
    assert recorder.heard == []


def test_each_event_is_flushed_at_once(tmp_path):
    path = tmp_path / "events"
    with path.open("w") as stream:
        JsonLines(stream).advanced(1, 2)
        assert json.loads(path.read_text()) == {"event": "advanced", "done": 1, "total": 2}
