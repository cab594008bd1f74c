"""One policy of asking again: a clock an outage, a pause that ends at once, an answer that is used when it comes."""

from __future__ import annotations

import threading
import time

import pytest

from stages.runtime import patience
from stages.runtime.contract import Interrupted, StageError, Unavailable
from stages.runtime.patience import Tolerance, be_patient, left_s, patiently


class Service:
    """Away for some seconds from its making."""

    def __init__(self, away_s):
        self.back, self.asked = time.monotonic() + away_s, 0

    def __call__(self):
        self.asked += 1
        if time.monotonic() < self.back:
            raise Unavailable("away")
        return 5


def timed(ask):
    began = time.monotonic()
    with pytest.raises(StageError) as told:
        ask()
    return time.monotonic() - began, told.value


def test_patience_uses_the_answer_of_a_service_that_comes_back_and_tells_once():
    service, said = Service(0.5), []
    assert patiently(service, away_s=30, say=said.append) == 5
    assert service.asked > 1
    assert len(said) == 1 and "for up to 30 s" in said[0]


def test_patience_with_what_stays_away_ends_within_its_deadline():
    seconds, error = timed(lambda: patiently(Service(60), away_s=0.8))
    assert isinstance(error, Unavailable)
    assert seconds < 1.2


def test_patience_of_nested_calls_is_one_deadline():
    service = Service(60)
    seconds, _ = timed(
        lambda: patiently(lambda: patiently(lambda: patiently(service, away_s=0.8), away_s=0.8), away_s=0.8)
    )
    assert 0.2 < seconds < 1.2


def test_patience_of_a_call_that_worked_for_long_begins_when_it_breaks():
    failed = []

    def ask():
        if not failed:
            time.sleep(0.4)
            failed.append(True)
            raise Unavailable("away")
        return 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "ANSWER_S", 0.01)
        patch.setattr(patience, "LONGEST_PAUSE_S", 0.2)
        assert patiently(ask, away_s=0.3) == 5


def test_patience_of_an_answer_that_takes_all_of_it_is_not_asked_for_again():
    def hang():
        time.sleep(0.3)
        raise Unavailable("away")

    assert timed(lambda: patiently(hang, away_s=0.3))[0] < 0.5


def test_patience_that_is_stopped_ends_at_once_also_in_what_it_asked():
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    seconds, error = timed(lambda: patiently(lambda: patiently(Service(60), away_s=60), away_s=60, stopped=stopped))
    assert isinstance(error, Interrupted)
    assert seconds < 1


def test_patience_leaves_errors_of_their_own_alone():
    def wrong():
        raise StageError("wrong")

    assert timed(lambda: patiently(wrong, away_s=60))[0] < 0.2


def test_patience_of_a_process_is_brief_until_it_works_for_hours(monkeypatch):
    monkeypatch.setattr(patience, "_of_process_s", 0.3)
    assert timed(lambda: patiently(Service(60)))[0] < 0.6
    be_patient(0.9)
    service = Service(0.5)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.2)
    assert patiently(service) == 5


def test_time_for_an_answer_is_what_the_callers_patience_leaves():
    assert left_s(10) == 10
    seen = []

    def ask():
        seen.append(left_s(10))
        raise Unavailable("away")

    timed(lambda: patiently(ask, away_s=0.6))
    assert all(one <= 0.6 for one in seen)
    assert seen == sorted(seen, reverse=True)
    timed(lambda: patiently(ask, away_s=0))
    assert seen[-1] == 10


def test_tolerance_gives_none_while_a_service_is_away_and_raises_in_time():
    tolerance, service = Tolerance(0.4), Service(0.2)
    answers = []
    while not answers or answers[-1] is None:
        answers.append(tolerance.ask(service))
        time.sleep(0.05)
    assert answers[0] is None and answers[-1] == 5
    service = Service(60)

    def until_it_raises():
        while True:
            tolerance.ask(service)
            time.sleep(0.05)

    assert 0.3 < timed(until_it_raises)[0] < 0.7
