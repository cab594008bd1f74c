"""Commands that wait for what arrives: watch, hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import SetOption, StoreOption, seconds

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]


def watch(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="s3://bucket/prefix or a folder of checkpoints, or models:/NAME@ALIAS.")
    ],
    recipe: RecipeOption,
    every: Annotated[str, typer.Option("--every", metavar="TIME", help="Between looks: 30s, 5m.")] = "30s",
    settled: Annotated[
        str, typer.Option("--settle", metavar="TIME", help="How long a checkpoint must not have changed.")
    ] = "10s",
    once: Annotated[bool, typer.Option("--once", help="End after what is there now.")] = False,
    again: Annotated[
        str | None, typer.Option("--again", metavar="DIGEST", help="Take this arrival for new, and try it once more.")
    ] = None,
    sets: SetOption = None,
    store: StoreOption = None,
) -> int:
    """Start one run for each checkpoint that arrives.

    The same bytes at two places are one checkpoint. With $PREFECT_API_URL an event is sent, and the recipe's automation
    starts the run; without it the recipe runs here. A run that breaks or fails a gate is told, and the watch goes on;
    with --once the exit code is that of the worst run: 1 broken, or its event not confirmed, 3 does not fit, 2 a gate
    failed.
    """
    from flows.recipe.read import load_recipe
    from flows.settings import enter, settle

    loaded = load_recipe(recipe, sets or ())
    settings = settle(store=store)
    enter(settings)
    from flows.triggers.arrival_records import forget
    from flows.triggers.watch import watch as begin

    every_s, settle_s = seconds(every), seconds(settled)
    if again:
        forget(settings.connect().objects, loaded.name, again)
    return begin(uri, loaded, settings, every_s=every_s, settle_s=settle_s, once=once, say=typer.echo)


def hooks(
    uri: Annotated[str, typer.Argument(metavar="URI", help="The alias to listen for: models:/NAME@ALIAS.")],
    recipe: RecipeOption,
    cert: Annotated[Path, typer.Option("--cert", metavar="FILE", help="The TLS certificate, PEM.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Its private key, PEM.")],
    port: Annotated[int, typer.Option("--port", metavar="N", help="Port to listen on.")] = 8443,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    store: StoreOption = None,
) -> None:
    """Receive MLflow's webhooks over TLS.

    An alias that moved is announced. What Prefect's server has not confirmed is answered by 503, so that MLflow sends
    it again, and is announced anew each minute until it is. $ENGINERY_WEBHOOK_SECRET is the webhook's secret.
    `enginery watch models:/NAME@ALIAS` does the same by polling.
    """
    from flows.recipe.read import load_recipe
    from flows.settings import enter, settle

    loaded = load_recipe(recipe)
    settings = settle(store=store)
    enter(settings)
    from flows.triggers.webhooks import Address, serve

    serve(uri, loaded, settings, Address(host=host, port=port, cert=cert, key=key), typer.echo)
