"""The command `enginery`: what a person asks for.

One file a group of commands, with the options they share, `doctor`, and the JSON Schemas.

May be imported from here: nothing but `flows.cli`'s way in. Never comes in: what a run does once it is asked for; a
command's module imports typer alone, and the rest when it runs, so that `enginery --help` loads neither torch nor
Prefect.
"""
