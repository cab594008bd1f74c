import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.runtime import parts
from stages.runtime.contract import Divided, StageError
from stages.runtime.dividing import count_units, execute_part
from stages.runtime.execute import work_of
from stages.runtime.progress import Silent
from stages.runtime.sweep import sweep
from tests.stages.runtime.trial import TRIAL, TrialParams

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)).map(lambda one: range(one[0], sum(one))), max_size=5)


@given(st.integers(0, 50), SPANS, st.integers(1, 20))
def test_gaps_are_exactly_what_is_missing_in_ranges_of_at_most_the_size(count, present, size):
    found = parts.gaps(count, present, size)
    missing = sorted(set(range(count)) - {unit for span in present for unit in span})
    assert [unit for span in found for unit in span] == missing
    assert all(1 <= len(span) <= size for span in found)
    split = sum(b.start == a.stop and len(a) < size for a, b in pairwise(found))
    assert split == 0, "no range is smaller than it must be"


def test_part_comes_back_from_the_store_and_is_never_replaced_by_another(store):
    parts.put(store.objects, "w", range(3, 7), b'["one"]')
    parts.put(store.objects, "w", range(3, 7), b'["other"]')
    assert parts.read(store.objects, "w", range(3, 7)) == b'["one"]'
    assert parts.read(store.objects, "w", range(3, 8)) is None
    assert parts.standing(store.objects, "w") == [range(3, 7)]
    parts.put(store.objects, "w2", range(1), b"[]")
    parts.drop(store.objects, "w")
    assert (parts.standing(store.objects, "w"), parts.standing(store.objects, "w2")) == ([], [range(1)])


@pytest.mark.parametrize("poison", ["range", "work", "bytes", "cut", "list", "empty", "partless"])
def test_part_that_is_damaged_or_of_other_work_is_not_brought_and_gives_way_to_a_whole_one(store, tmp_path, poison):
    parts.put(store.objects, "w", range(4), b'["whole"]')
    key = "parts/w/0-4.json"
    sealed = json.loads(store.objects.read(key))
    spoiled = {
        "range": json.dumps(sealed | {"range": [4, 8]}),
        "work": json.dumps(sealed | {"work": "v"}),
        "bytes": json.dumps(sealed | {"part": '["whale"]'}),
        "cut": json.dumps(sealed)[:-9],
        "list": "[]",
        "empty": "",
        "partless": json.dumps({k: v for k, v in sealed.items() if k != "part"}),
    }[poison]
    store.objects.put(key, spoiled.encode(), replace=True)
    store.objects.put("parts/w/notes.txt", b"no part")
    store.objects.put("parts/w/9-2.json", b"no range")
    notes = []

    class Ear(Silent):
        def note(self, text):
            notes.append(text)

    parts.bring(store.objects, "w", tmp_path, Ear())
    assert list(parts.kept(tmp_path / parts.FOLDER)) == []
    assert notes == ["part 0-4.json in the store is damaged or of other work: it is computed again"]
    parts.put(store.objects, "w", range(4), b'["whole"]')
    parts.bring(store.objects, "w", tmp_path, Ear())
    assert list(parts.kept(tmp_path / parts.FOLDER)) == [(range(4), b'["whole"]')]


def test_parts_that_no_run_gathered_are_swept_when_they_are_old(store):
    parts.put(store.objects, "w", range(4), b"[]")
    assert sweep(store).counts["parts"] == 0
    assert parts.standing(store.objects, "w") == [range(4)]
    swept = sweep(store, older_than_s=-1)
    assert (swept.counts["parts"], swept.bytes > 0, parts.standing(store.objects, "w")) == (1, True, [])


def divided_trial(computed):
    def part(params, inputs, span, progress):
        computed.append(span)
        return json.dumps(list(span)).encode()

    return replace(TRIAL, divided=Divided(count=lambda params, inputs: 12, part=part))


def test_part_is_computed_once_and_stands_for_the_work(store):
    computed = []
    stage, params = divided_trial(computed), TrialParams()
    work = work_of(stage, params, {})
    assert count_units(stage, params, work, store) == 12
    for _ in range(2):
        execute_part(stage, params, work, store, range(2, 5), Silent())
    assert computed == [range(2, 5)]
    ((identity, *_),) = [found.key.split("/")[1:] for found in store.objects.list(parts.PARTS)]
    assert parts.read(store.objects, identity, range(2, 5)) == b"[2, 3, 4]"


def test_part_of_an_undivided_stage_or_of_another_machine_is_refused(store):
    params = TrialParams()
    with pytest.raises(StageError, match="not divided"):
        execute_part(TRIAL, params, work_of(TRIAL, params, {}), store, range(1), Silent())
    stage = divided_trial([])
    work = work_of(stage, params, {}).model_copy(update={"executor": {"device": "abacus"}})
    with pytest.raises(StageError, match="device"):
        execute_part(stage, params, work, store, range(1), Silent())
    assert list(store.objects.list(parts.PARTS)) == []
