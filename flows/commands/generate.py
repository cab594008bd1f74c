"""The command generate: a model of any kind is asked, and its answer is printed while it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

if TYPE_CHECKING:
    from stages.serving.engine import Answerer
    from stages.serving.inputs import Prompt


def generate(
    model: AskedArgument,
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="The text to continue or to answer; to some models a question."),
    ],
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="TEXT", help="What a question is about; the other text of a pair."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a message, to answer by the chat template.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", help="At most so many new tokens. Default: 32.")
    ] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text. May be given again.")
    ] = None,
    seed: SeedOption = None,
    beams: Annotated[
        int | None,
        typer.Option("--beams", metavar="N", help="Follow N beams. Default: as the model's settings say, or 1."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Ask a model, and print its answer as it comes.

    Of a model that writes no text it is one line of JSON.
    Checkpoints, graphs, engines and registered models alike. Nothing is written.
    """
    from stages.serving.engine import WRITES
    from stages.serving.generation import generation

    given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
    given |= {"top_p": top_p, "repetition_penalty": repetition_penalty, "stop": stop or None}
    given |= {"seed": seed, "beams": beams}
    generation(given)
    with asked_folder(model, store) as (folder, verified):
        engine = opened(folder, verified=verified)
        if engine.task in WRITES:
            _write(engine, [{"role": "user", "content": prompt}] if chat else prompt, context, given)
        else:
            _tell(engine, prompt, context, given | {"chat": chat or None})


def _write(engine: Answerer, prompt: Prompt, context: str | None, given: Mapping[str, Any]) -> None:
    """Print an answer as it comes; one by beams once it is whole.

    Raises:
        StageError: there is a context, which has no place of its own in a prompt.
    """
    from stages.runtime.contract import StageError
    from stages.serving.generation import generation

    if context is not None:
        raise StageError("a model that writes takes no context", remedy="Write it into the prompt.")
    pieces = (
        (one.text for one in engine.answers([prompt], generation(given)))
        if given["beams"]
        else engine.stream(prompt, **given)
    )
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


def _tell(engine: Answerer, prompt: str, context: str | None, given: Mapping[str, Any]) -> None:
    """Print what a model that writes no text says: classes, entities, an answer's place, a vector.

    Raises:
        StageError: it is asked to write, or without what it is asked about.
    """
    from stages.runtime.contract import StageError
    from stages.serving.told import COLUMNS, LISTS, told

    if asked := [name for name, value in given.items() if value is not None]:
        raise StageError(
            "the model continues no text, so that there is nothing to say of how",
            measured=", ".join(f"--{name.replace('_', '-')}" for name in asked),
            limit="--context",
            remedy="Leave it out.",
        )
    columns = COLUMNS.get(engine.task, ("text",))
    row: dict[str, Any] = {columns[0]: prompt}
    if context is not None:
        beside = columns[1] if len(columns) > 1 else "context"
        row[beside] = [one.strip() for one in context.split("|")] if beside in LISTS else context
    typer.echo(json.dumps(told(engine, {name: [value] for name, value in row.items()}, {})[0], ensure_ascii=False))
