"""The command generate: a model of any kind is asked, and its answer is printed while it is written."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.asked import AskedArgument, asked_folder
from flows.commands.options import StoreOption


def generate(
    model: AskedArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue, or to answer for an encoder-decoder.")
    ],
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a message, to answer by the chat template.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", help="At most so many new tokens. Default: 32.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", metavar="T", help="Draw tokens; 0, the default, takes the likeliest."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="N", help="Draw from the likeliest N alone; 0 for all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", help="Draw from the likeliest that together have probability P."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", metavar="X", help="Above 1, what was said comes less often.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text. May be given again.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed draws the same text.")] = None,
    store: StoreOption = None,
) -> None:
    """Ask a model, and print its answer as it comes.

    Checkpoints, graphs, engines and registered models alike. Nothing is written.
    """
    from stages.serving.engine import open_engine
    from stages.serving.generation import generation

    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "seed": seed,
    }
    generation(given)
    with asked_folder(model, store) as (folder, verified):
        engine = open_engine(folder, verified=verified)
        for piece in engine.stream([{"role": "user", "content": prompt}] if chat else prompt, **given):
            typer.echo(piece, nl=False)
        typer.echo()
