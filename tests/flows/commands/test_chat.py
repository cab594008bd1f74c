"""`enginery chat`: a conversation is answered with all before it in mind, and ends when a person says so."""

import contextlib
import dataclasses
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from flows.cli import main
from flows.commands.chat import Talk
from stages.runtime.contract import StageError
from stages.serving.engine import open_engine
from stages.serving.generation import Generation
from tests.knowing import CHAT

FIRST, SECOND = "What is the capital of France?", "What is the capital of Italy?"


def user(text):
    return {"role": "user", "content": text}


def conversation(engine, texts, system=None, **how):
    """Its answers, each by the whole conversation."""
    messages, said = [] if system is None else [{"role": "system", "content": system}], []
    for text in texts:
        messages.append(user(text))
        said += engine.generate([messages], **how)
        messages.append({"role": "assistant", "content": said[-1]})
    return said


@pytest.fixture
def talking(tiny, tmp_path):
    """A checkpoint of random weights that takes conversations, and does not end its answers."""
    folder = tmp_path / "talking"
    folder.mkdir()
    for one in tiny.iterdir():
        (folder / one.name).symlink_to(one)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def test_lines_of_a_pipe_are_messages_of_one_conversation(knowing, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{FIRST}\n\n{SECOND}"))
    assert main(["chat", str(knowing), "--max-new-tokens", "9"]) == 0
    told = capsys.readouterr()
    wanted = conversation(open_engine(knowing), [FIRST, SECOND], max_new_tokens=9)
    assert told.out == "".join(f"{one}\n" for one in wanted) and not told.err


def test_every_option_reaches_the_model(talking, capsys, monkeypatch):
    asked = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 4}
    words = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{FIRST}\n{SECOND}\n"))
    assert main(["chat", str(talking), "--system", "Be brief.", *words]) == 0
    wanted = conversation(open_engine(talking), [FIRST, SECOND], "Be brief.", **asked)
    assert capsys.readouterr().out == "".join(f"{one}\n" for one in wanted)
    assert wanted[1] not in conversation(open_engine(talking), [SECOND], "Be brief.", **asked)


def test_oldest_messages_are_forgotten_once_all_are_too_long(knowing):
    engine = dataclasses.replace(open_engine(knowing), maximum_tokens=40)
    talk = Talk(engine, Generation(max_new_tokens=4), "a")
    try:
        said = ["".join(talk.answers(FIRST)) for _ in range(6)]
        assert talk.forgotten > 0 and talk.forgotten % 2 == 0
        assert talk.messages[0] == {"role": "system", "content": "a"}
        assert [one["role"] for one in talk.messages[1:]] == ["user", "assistant"] * ((len(talk.messages) - 1) // 2)
        assert engine.generate([talk.messages[:-1]], max_new_tokens=4) == said[-1:]
        kept = list(talk.messages)
        with pytest.raises(StageError, match="longer than the model reads; measured"):
            "".join(talk.answers("France " * 60))
        assert talk.messages == kept[:1]  # all was forgotten for it, and it is as if it had not been said
        assert "".join(talk.answers(FIRST))
    finally:
        talk.close()


def test_who_stops_to_listen_ends_the_answer_and_goes_on(talking):
    talk = Talk(open_engine(talking), Generation(max_new_tokens=300))
    try:
        with contextlib.closing(talk.answers(FIRST)) as pieces:
            said = next(pieces) + next(pieces)
        assert talk.messages == [user(FIRST), {"role": "assistant", "content": said}]
        with contextlib.closing(talk.answers(SECOND)) as pieces:
            assert next(pieces)
    finally:
        talk.close()
    assert talk._batching.closed and talk._batching.active == 0


def test_model_that_takes_no_conversation_is_one_line(tiny, capsys):
    for words, text in (
        ([], "the model has no chat template; measured none beside its tokenizer"),
        (["--temperature", "nan"], "temperature is out of range; measured nan"),
        (["--max-new-tokens", "100000"], "max_new_tokens is more than the model reads"),
    ):
        assert main(["chat", str(tiny), *words]) == 1
        told = capsys.readouterr()
        assert told.err.startswith(f"error: {text}") and told.err.count("\n") == 1 and not told.out


def test_message_that_is_too_long_ends_a_pipe_with_an_error(talking, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 3000 + "\n" + FIRST))
    assert main(["chat", str(talking)]) == 1
    told = capsys.readouterr()
    assert "longer than the model reads" in told.err and told.err.count("\n") == 1


def until(terminal, pattern, seconds=30.0):
    """What a terminal shows up to there."""
    shown, deadline = "", time.monotonic() + seconds
    while not re.search(pattern, shown):
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, shown
        shown += os.read(terminal, 1 << 16).decode(errors="replace")
    return shown


def pressed(terminal, press, pattern):
    """Press until the terminal shows it."""
    for _ in range(20):
        press()
        with contextlib.suppress(AssertionError):
            until(terminal, pattern, 1.5)
            return
    pytest.fail(f"{pattern} was never shown")


def test_person_at_a_terminal_ends_an_answer_and_then_the_conversation(talking):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "flows", "chat", str(talking), "--max-new-tokens", "350"]
    child = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        until(ours, "> $")
        for _ in range(2):
            os.write(ours, f"{FIRST}\n".encode())
            until(ours, r"France\?\s+\S")
            os.kill(child.pid, signal.SIGINT)
            until(ours, r"\n> $")
            assert child.poll() is None
        # Between what it shows and what it waits for readline hears no signal and may miss a key.
        pressed(ours, lambda: os.kill(child.pid, signal.SIGINT), "Ctrl-D ends the conversation")
        for _ in range(20):
            os.write(ours, b"\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.5)
                break
        assert child.poll() == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
