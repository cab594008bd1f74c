"""Rows that come and go: what begins as a text that was read is read from where they part."""

import numpy as np
import pytest
import torch

from stages.adapters import onnxruntime_slots
from stages.adapters.backends import WORTH
from stages.adapters.onnxruntime import Kept, open_session
from stages.adapters.onnxruntime_slots import REMEMBERED, RowSlots, Stepping
from stages.export import to_onnx
from stages.export.layer_caches import layer_caches
from stages.graphs import onnx_graph
from stages.models.checkpoint.loading import load_model
from tests.stages.models.families import family, library

PLACES = 64


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def model(request, tmp_path_factory):
    """A graph, and transformers' own answers; of Gemma 2 every other layer sees a window alone."""
    root = tmp_path_factory.mktemp(request.param)
    loaded = load_model(family(request.param, root))
    onnx_graph.save(to_onnx.with_cache(loaded, layer_caches(loaded, PLACES)), root / "model.onnx")
    return open_session(root / "model.onnx"), library(request.param, root / request.param)


@pytest.fixture
def slots(model, monkeypatch):
    """Rows, and how many tokens each prompt had read."""
    made, read = RowSlots(model[0], PLACES), Kept.read
    made.counts = []

    def counting(self, ids_NT, *others):
        if len(others) == 2:
            made.counts.append(ids_NT.shape[1])
        return read(self, ids_NT, *others)

    monkeypatch.setattr(Kept, "read", counting)
    return made


def said(count, seed=0):
    return np.random.default_rng(seed).integers(0, 90, count)


def check(model, found_V, ids_T):
    with torch.no_grad():
        wanted_V = model[1](input_ids=torch.from_numpy(ids_T)[None]).logits[0, -1].numpy()
    np.testing.assert_allclose(found_V, wanted_V, atol=1e-3 * wanted_V.std())


def led_on(model, slots, ids_T, tokens_T):
    """The one row there is says some tokens."""
    for token in tokens_T:
        ids_T = np.append(ids_T, token)
        check(model, slots.next(np.array([token]))[0], ids_T)
    return ids_T


def test_next_message_is_read_behind_all_before_it(model, slots):
    check(model, slots.admit(said(40)), said(40))
    first = led_on(model, slots, said(40), [3, 5, 8])
    slots.leave(0)
    second = np.concatenate([first, [9, 1, 4]])
    check(model, slots.admit(second), second)
    whole = led_on(model, slots, second, [7])
    slots.leave(0)
    parted = np.append(whole[:-4], [2, 2])  # a message that was written anew
    check(model, slots.admit(parted), parted)
    assert slots.counts == [40, 3, 2]


def test_prompt_that_begins_as_one_that_is_written_shares_what_was_read(model, slots):
    one, other = np.append(said(36), said(5, 1)), np.append(said(36), said(9, 2))
    check(model, slots.admit(one), one)
    check(model, slots.admit(other), other)
    check(model, slots.admit(one), one)  # the last token is read always
    found = slots.next(np.array([4, 6, 8]))
    for found_V, ids_T, token in zip(found, (one, other, one), (4, 6, 8), strict=True):
        check(model, found_V, np.append(ids_T, token))
    slots.leave(0)  # what was the last stands first
    more = np.concatenate([one, [8, 3]])
    check(model, slots.admit(more), more)
    assert slots.counts == [41, 9, 1, 1]


def test_few_tokens_in_common_are_read_again(model, slots):
    one, other = np.append(said(WORTH - 1), [1, 2]), np.append(said(WORTH - 1), [3, 4])
    slots.admit(one)
    check(model, slots.admit(other), other)
    slots.leave(1)
    slots.leave(0)
    slots.admit(said(WORTH - 1))
    assert slots.counts == [WORTH + 1, WORTH + 1, WORTH - 1]


def test_what_is_kept_of_free_rows_has_an_end(model, slots, monkeypatch):
    monkeypatch.setattr(onnxruntime_slots, "REMEMBERED", 100)
    for seed in range(3):
        slots.admit(said(40, seed))
        slots.leave(0)
    slots.admit(np.append(said(40, 2), [1]))
    slots.leave(0)  # in the place of what it went on from
    assert [len(one) for one, _ in slots._left] == [40, 41]
    assert all(array.base is None and array.shape[1] == 40 for array in slots._left[0][1].values())
    monkeypatch.setattr(onnxruntime_slots, "REMEMBERED", 39)
    slots.admit(said(40, 5))
    slots.leave(0)
    assert said(40, 5).tolist() not in [one for one, _ in slots._left]
    assert slots._buffers["past_key_values.0.key"].shape[0] == 0 and REMEMBERED == 4096


def test_row_is_freed_where_memory_has_no_room_for_what_it_read(model, slots):
    class Scarce:
        def __getitem__(self, _):
            return self

        def copy(self):
            raise MemoryError

    slots.admit(said(40))
    slots.leave(0)
    slots.admit(said(40, 1))
    buffers = slots._buffers
    slots._buffers = dict.fromkeys(buffers, Scarce())
    slots._remember(0)
    assert not slots._left
    slots._buffers = buffers
    check(model, slots.next(np.array([3]))[0], np.append(said(40, 1), 3))


def test_steps_go_on_from_an_earlier_token(model):
    steps, parted = Stepping(model[0], PLACES), np.append(said(20), said(8, 1))
    steps.begin(said(30)[None], np.ones((1, 30), np.int64))
    steps.truncate(20)
    check(model, steps.more(parted[20:]), parted)
    check(model, steps.next(np.array([5]))[0], np.append(parted, 5))
