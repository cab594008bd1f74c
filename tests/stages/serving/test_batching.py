"""Many prompts at once: each is answered as if it were alone, whoever comes, goes or breaks beside it."""

import dataclasses
import queue
import random
import threading
import time

import numpy as np
import pytest

from stages.adapters.backends import WORTH
from stages.compile.stage import CompileParams, compile_engine
from stages.runtime.contract import StageError
from stages.serving.batching import Batching, Closed, Full
from stages.serving.eager import _Steps
from stages.serving.engine import open_engine
from stages.serving.generation import Generation
from stages.serving.writing import Answer
from tests.conftest import sealer
from tests.engines import Hears, one_block

TEXTS = ["The for statement is used to", "A class", "If the expression is found to be true, then the suite", "b", "  "]


@pytest.fixture(scope="module")
def served(tiny, shared_store, tmp_path_factory):
    """An engine with rows of its own, of one block."""
    root = tmp_path_factory.mktemp("served")
    checkpoint = one_block(tiny, root / "checkpoint")
    seal = sealer(shared_store)
    dense = seal("fetch", {"source": checkpoint.as_uri()}).identity
    graph = shared_store.checkout(seal("export", {}, model=dense).identity)
    (root / "engine").mkdir()
    compile_engine(CompileParams(backend="onnxruntime", maximum_tokens=400), {"graph": graph}, root / "engine", Hears())
    return root


@pytest.fixture(scope="module")
def models(served):
    """By how rows are kept: in one cache, in one each, not at all."""
    engine, torch = open_engine(served / "engine"), open_engine(served / "checkpoint")
    assert engine.slots is not None and torch.slots is None and torch.steps is not None
    return {"own": engine, "apart": torch, "reread": dataclasses.replace(engine, slots=None, steps=None)}


class Watched:
    """Counts what it hears."""

    def __init__(self):
        self.tokens, self.first, self.how = 0, [], []

    def read(self, tokens):
        self.tokens += tokens

    def said(self, seconds, first):
        assert seconds >= 0
        self.first.append(first)

    def ended(self, how):
        self.how.append(how)


def heard(batching, prompts, how, **asked):
    """Each prompt's pieces and its end, once all have ended."""
    got = queue.Queue()
    batching.ask(prompts, how, lambda at, one: got.put((at, one)), **asked)
    pieces, ends = [[] for _ in prompts], [None] * len(prompts)
    while None in ends:
        at, one = got.get(timeout=60)
        if isinstance(one, str):
            pieces[at].append(one)
        else:
            ends[at] = one
    assert got.empty()
    return pieces, ends


def ended(batching):
    batching.close(60)
    assert batching.join(60) and batching.active == batching.waiting == 0


def asked_for(seed):
    draw, made = random.Random(seed), []
    for number in range(8):
        most = draw.choice([1, 2, 5, 17, 40])
        prompt = draw.choice(TEXTS) + draw.choice(["", " and the value of", " x" * draw.randrange(20)])
        drawn = {"temperature": 0.9, "top_p": 0.9, "seed": number} if number % 4 == 3 else {}
        stop = ("e", "on of") if number % 4 == 2 else ()
        made.append((prompt, Generation(max_new_tokens=most, stop=stop, **drawn)))
    return made


@pytest.mark.parametrize("kind", ["own", "apart", "reread"])
def test_prompts_of_many_threads_are_answered_as_if_alone(models, kind):
    model, watch = models[kind], Watched()
    batching = Batching(model, rows=3, waiting=64, watch=watch)
    lists, found = [asked_for(seed) for seed in range(6)], {}

    def client(number):
        wait = random.Random(100 + number)
        for at, (prompt, how) in enumerate(lists[number]):
            time.sleep(wait.random() / 100)
            found[number, at] = heard(batching, [prompt], how, pieces=at % 2 == 0)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(lists))]
    for one in threads:
        one.start()
    for one in threads:
        one.join(120)
    ended(batching)
    prompt_tokens = new_tokens = 0
    for (number, at), ((pieces,), (end,)) in found.items():
        prompt, how = lists[number][at]
        (alone,) = model.answers([prompt], how)
        assert end == alone, (prompt, how)
        assert not pieces if at % 2 else "".join(pieces) == alone.text
        prompt_tokens, new_tokens = prompt_tokens + alone.prompt_tokens, new_tokens + alone.new_tokens
    assert len(found) == 48 and sorted(watch.how) == sorted(end.finish for _, (end,) in found.values())
    assert set(watch.how) == {"stop", "length"} and watch.first.count(True) == 48
    assert (watch.tokens, len(watch.first)) == (prompt_tokens, new_tokens)


def test_prompts_asked_together_keep_their_numbers(models):
    batching, how = Batching(models["own"], rows=2), Generation(max_new_tokens=6)
    tokens = models["own"].tokenizer.encode(TEXTS[0]).ids
    _, ends = heard(batching, [*TEXTS, tokens], how)
    alone = [models["own"].answers([one], how)[0] for one in TEXTS]
    assert ends == [*alone, alone[0]]
    ended(batching)


def test_prompt_that_fills_what_the_model_reads_is_answered_with_nothing(models):
    batching, how = Batching(models["own"], rows=2), Generation(max_new_tokens=6)
    full = models["own"].tokenizer.encode("a " * 500).ids[:400]
    _, ends = heard(batching, [full, full[:398]], how)
    assert ends == models["own"].answers([full, full[:398]], how)
    assert [one.new_tokens for one in ends] == [0, 2] and {one.finish for one in ends} == {"length"}
    ended(batching)


@pytest.mark.parametrize("kind", ["own", "apart", "reread"])
def test_who_goes_frees_the_row_for_the_next(models, kind):
    watch, got, second = Watched(), queue.Queue(), queue.Queue()
    batching, how = Batching(models[kind], rows=1, watch=watch), Generation(max_new_tokens=390)
    (long,) = batching.ask(["b"], how, lambda _, one: got.put(one), pieces=True)
    (never,) = batching.ask(["A class"], how, lambda _, one: got.put(one))
    batching.ask(["b"], Generation(max_new_tokens=1), lambda _, one: second.put((len(long.new), one)))
    for _ in range(3):
        assert isinstance(got.get(timeout=60), str)
    never.leave()
    long.leave()
    said = len(long.new)
    at, answer = second.get(timeout=60)
    assert answer == models[kind].answers(["b"], Generation(max_new_tokens=1))[0]
    assert at <= said + 2
    ended(batching)
    assert sorted(watch.how) == ["gone", "gone", "length"]
    assert all(isinstance(one, str) for one in got.queue) and not never.new


def test_prompts_beyond_those_that_may_wait_are_turned_away(models):
    got = queue.Queue()
    batching, how = Batching(models["own"], rows=1, waiting=2), Generation(max_new_tokens=390)
    (running,) = batching.ask(["b"], how, lambda _, one: got.put(one), pieces=True)
    got.get(timeout=60)
    waiting = [batching.ask(["A class"], how, lambda *_: None)[0] for _ in range(2)]
    with pytest.raises(Full, match="too many prompts wait already; measured 2; limit 2"):
        batching.ask(["b"], how, lambda *_: None)
    with pytest.raises(StageError, match="at once than may be written and wait; measured 4; limit 3"):
        batching.ask(["b"] * 4, how, lambda *_: None)
    with pytest.raises(StageError, match="a prompt is empty"):
        batching.ask([""], how, lambda *_: None)
    assert batching.waiting == 2 and batching.active == 1
    waiting[0].leave()  # and its place is free at once
    waiting += batching.ask(["b"], how, lambda *_: None)
    for one in (running, *waiting):
        one.leave()
    ended(batching)


class Breaking:
    """Rows that break where they meet a token."""

    def __init__(self, inner, token, on):
        self.inner, self.token, self.on = inner, token, on

    def admit(self, ids):
        if self.token in ids[-1:] and (self.on == "admit" or len(ids) > 9):
            raise StageError("broken")
        return self.inner.admit(ids)

    def next(self, tokens):
        if self.token in tokens and self.on == "next":
            raise MemoryError
        return self.inner.next(tokens)

    def leave(self, row):
        if self.on == "leave":
            raise StageError("cannot be freed")
        self.inner.leave(row)


@pytest.mark.parametrize("on", ["admit", "next", "leave"])
def test_prompt_that_breaks_takes_no_other_with_it(models, on):
    model, how = models["own"], Generation(max_new_tokens=20)
    long = model.tokenizer.encode("The value of x is " * 3).ids
    tokens = [model.tokenizer.encode(model.answers([one], how)[0].text).ids for one in (*TEXTS, long)]
    bad = {"admit": long[-1], "leave": -1}.get(on)
    if on == "next":  # what is said to the long prompt alone
        bad = next(one for one in tokens[-1][1:] if not any(one in other for other in tokens[:-1]))
    broken = dataclasses.replace(model, slots=lambda: Breaking(model.slots(), bad, on))
    watch = Watched()
    batching = Batching(broken, rows=4, watch=watch)
    _, ends = heard(batching, [*TEXTS, long], how)
    assert ends[:-1] == [model.answers([one], how)[0] for one in TEXTS]
    assert isinstance(ends[-1], Answer if on == "leave" else StageError)
    assert watch.how.count("failed") == (on != "leave")
    ended(batching)


def test_listener_that_breaks_takes_nobody_with_it(models):
    def deaf(at, one):
        raise ValueError

    batching, how = Batching(models["own"], rows=4), Generation(max_new_tokens=390)
    batching.ask(["b"], how, deaf, pieces=True)
    _, (end,) = heard(batching, ["A class"], Generation(max_new_tokens=9))
    assert end == models["own"].answers(["A class"], Generation(max_new_tokens=9))[0]
    ended(batching)


def test_closing_lets_run_what_runs_for_a_while_and_tells_the_rest(models):
    model, got = models["own"], queue.Queue()
    batching = Batching(model, rows=1)
    for at, most in enumerate((60, 5)):
        how = Generation(max_new_tokens=most)
        batching.ask(["b"], how, lambda _, one, at=at: got.put((at, one)), pieces=True)
    got.get(timeout=60)
    batching.close(60)
    with pytest.raises(Closed):
        batching.ask(["b"], how, lambda *_: None)
    assert batching.join(60)
    last = {at: one for at, one in got.queue if not isinstance(one, str)}
    assert last[0] == model.answers(["b"], Generation(max_new_tokens=60))[0] and isinstance(last[1], Closed)


def test_closing_ends_what_runs_when_it_is_time(models):
    slow = threading.Event()

    class Slow:
        def __init__(self):
            self.inner = models["own"].slots()
            self.admit, self.leave = self.inner.admit, self.inner.leave

        def next(self, tokens):
            slow.wait(0.05)
            return self.inner.next(tokens)

    batching, got = Batching(dataclasses.replace(models["own"], slots=Slow), rows=2), queue.Queue()
    batching.ask(["b"], Generation(max_new_tokens=390), lambda _, one: got.put(one), pieces=True)
    got.get(timeout=60)
    began = time.monotonic()
    batching.close(0.3)
    assert batching.join(60) and 0.2 < time.monotonic() - began < 5
    *pieces, last = got.queue
    assert isinstance(last, Closed) and all(isinstance(one, str) for one in pieces)


def test_tokens_that_are_none_are_refused(models):
    with pytest.raises(StageError, match="there is no such token; measured 768; limit 0 to 767"):
        models["own"].generate([[1, 768]])
    assert np.array_equal(models["own"].generate([[1, 2]]), models["own"].generate([[1, 2]]))


def test_as_many_may_be_asked_at_once_as_have_rows_and_wait(models):
    batching, how = Batching(models["own"], rows=3, waiting=2), Generation(max_new_tokens=3)
    _, ends = heard(batching, TEXTS, how)
    assert ends == [models["own"].answers([one], how)[0] for one in TEXTS] and len(TEXTS) == 5
    with pytest.raises(StageError, match="measured 6; limit 5"):
        batching.ask([*TEXTS, "a"], how, lambda *_: None)
    ended(batching)


@pytest.mark.parametrize("kind", ["own", "apart", "reread"])
def test_next_message_of_a_conversation_is_read_behind_all_before_it(models, kind, monkeypatch):
    model, read = models[kind], []
    if kind == "apart":
        begun = _Steps._read
        monkeypatch.setattr(_Steps, "_read", lambda self, ids: read.append(ids.shape[1]) or begun(self, ids))
    batching, how = Batching(model, rows=1), Generation(max_new_tokens=5)
    first = model.tokenizer.encode("The value of x is " * 9).ids
    assert len(first) > WORTH
    said = model.tokenizer.encode(heard(batching, [first], how)[1][0].text).ids
    longer, other = [*first, *said, *first[:4]], [*first[:-3], *said, *first[:2]]  # it was written anew near its end
    for ids, new in ((longer, 9), (other, 11), (first[1:], len(first) - 1), (other, len(other))):
        read.clear()
        assert heard(batching, [ids], how)[1] == model.answers([ids], how)
        assert kind != "apart" or (read[0] <= new and (new <= 11 or read[0] == new))
    ended(batching)
