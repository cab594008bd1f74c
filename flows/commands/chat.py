"""The command chat: a conversation with a model, a line a message."""

from __future__ import annotations

import queue
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.asked import AskedArgument, asked_folder, opened
from flows.commands.options import (
    RepetitionPenaltyOption,
    SeedOption,
    StoreOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from flows.running.interruption import only_stops

if TYPE_CHECKING:
    from stages.serving.asked import Heard
    from stages.serving.engine import Answerer
    from stages.serving.generation import Generation

TOKENS = 1024
"""New tokens of an answer at most, where nobody says how many, or half of what the model reads."""


def chat(
    model: AskedArgument,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told before all messages.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", help="At most so many tokens an answer. Default: 1024."),
    ] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    store: StoreOption = None,
) -> None:
    """Talk with a model, a line a message.

    Each is answered with all before it in mind. Ctrl-C ends an answer, Ctrl-D the conversation. From a pipe every line
    is a message, too. The oldest messages are forgotten, and that is said, once all are longer than the model reads.
    Nothing is written.
    """
    from stages.serving.generation import generation

    given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
    given |= {"top_p": top_p, "repetition_penalty": repetition_penalty, "seed": seed}
    generation(given)
    with asked_folder(model, store) as (folder, verified):
        engine = opened(folder, verified=verified)
        if max_new_tokens is None:
            given["max_new_tokens"] = min(TOKENS, max(1, engine.maximum_tokens // 2))
        talk = Talk(engine, generation(given), system)
        try:
            _converse(talk)
        finally:
            talk.close()


class Talk:
    """A conversation with a model.

    Args:
        engine: it continues texts, and has a chat template.
        how: an answer is continued.
        system: what it is told before all messages.

    Attributes:
        messages: that were said, the model's among them.
        forgotten: of the oldest, which the model has no room for any more.

    Raises:
        StageError: the model takes no conversation.
    """

    def __init__(self, engine: Answerer, how: Generation, system: str | None = None) -> None:
        from stages.serving.batching import Batching

        self.engine, self.how = engine, how
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self._told, self.forgotten = len(self.messages), 0
        engine.admitted([[{"role": "user", "content": "Hello"}]], how)
        self._batching = Batching(engine, rows=1, waiting=2)

    def answers(self, message: str) -> Generator[str, None, None]:
        """What the model says to a message, in pieces; who stops to listen ends the answer there.

        Raises:
            StageError: the message alone is longer than the model reads; it is as if it had not been said.
        """
        from stages.serving.writing import Answer

        heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self.messages.append({"role": "user", "content": message})
        said = ""
        try:
            self._make_room()
            (asked,) = self._batching.ask([self.messages], self.how, lambda _, one: heard.put(one), pieces=True)
            try:
                while isinstance(one := heard.get(), str):
                    said += one
                    yield one
            finally:
                asked.leave()
            if not isinstance(one, Answer):
                raise one
        finally:
            # Templates want one answer to each message.
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def close(self) -> None:
        """End what is being answered."""
        self._batching.close()
        self._batching.join(1.0)

    def _make_room(self) -> None:
        """Forget the oldest messages and their answers until an answer has room, or none but the last is left."""
        from stages.serving.inputs import encoded

        most = self.engine.maximum_tokens
        room = most - min(self.how.most(most), most // 4)  # answers are seldom as long as they may be
        while len(self.messages) > self._told + 2:
            if len(encoded(self.engine.tokenizer, self.engine.chat, self.messages)) <= room:
                return
            del self.messages[self._told : self._told + 2]
            self.forgotten += 2


def _converse(talk: Talk) -> None:
    """Answer what a person says until there is no more."""
    from stages.runtime.contract import StageError

    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines by it
        sys.stderr.write(f"{talk.engine.target}; Ctrl-C ends an answer, Ctrl-D the conversation\n")
    with only_stops():
        while (message := _message(typed)) is not None:
            if not message.strip():
                continue
            before = talk.forgotten
            try:
                with closing(talk.answers(message)) as pieces:
                    for piece in pieces:
                        if talk.forgotten != before:
                            sys.stderr.write(f"({talk.forgotten - before} oldest messages no longer fit: forgotten)\n")
                            before = talk.forgotten
                        typer.echo(piece, nl=False)
            except StageError as error:
                if not typed:
                    raise
                sys.stderr.write(f"error: {error}\n")
            except KeyboardInterrupt:
                pass
            typer.echo()


def _message(typed: bool) -> str | None:
    """The next line; None when there is none."""
    while True:
        try:
            return input("> ") if typed else _line()
        except EOFError:
            if typed:
                typer.echo()
            return None
        except KeyboardInterrupt:
            if not typed:
                raise
            sys.stderr.write("\nCtrl-D ends the conversation\n")


def _line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
