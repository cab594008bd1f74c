"""The table of measures: one line a measure, imported when it is asked for, so that the table is read without torch.

A measure is a function of predictions that gives one value a row: `(rows_RV, target_R)`, or with a baseline
`(baseline_RV, rows_RV)`. What a row is depends on the task: a predicted token, a text's classes, a token's vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TOKENS = frozenset({"generate", "translate"})
"""Tasks whose answer is a token after the other."""


@dataclass(frozen=True)
class Measure:
    """What `validate` measures on text.

    Attributes:
        function: module and name of the function of predictions.
        score: the key of its sum over a document in report.json; the measure is the mean over all rows.
        tasks: what the models are for that it says something of.
        title: its heading, where that is not its name.
        paired: it compares with a baseline.
        count: its sum counts tokens.
        exponential: the measure is the mean's exponential.
    """

    function: str
    score: str
    tasks: frozenset[str] = TOKENS
    title: str = ""
    paired: bool = False
    count: bool = False
    exponential: bool = False


_CHOICES = TOKENS | {"fill", "classify", "tag", "answer"}
_VECTORS = frozenset({"classify", "tag", "answer", "embed"})

MEASURES: Mapping[str, Measure] = {
    "perplexity": Measure("stages.measures.perplexity:negative_log_likelihood", "nll", TOKENS, exponential=True),
    "pseudo_perplexity": Measure(
        "stages.measures.perplexity:masked_negative_log_likelihood",
        "masked_nll",
        frozenset({"fill"}),
        "pseudo-perplexity",
        exponential=True,
    ),
    "kl_divergence": Measure("stages.measures.divergence:kl_divergence", "kl", _CHOICES, "KL divergence", paired=True),
    "top1_agreement": Measure(
        "stages.measures.divergence:top1_agreement", "agree", _CHOICES, "top-1 agreement", paired=True, count=True
    ),
    "cosine": Measure("stages.measures.divergence:cosine", "cosine", _VECTORS, "cosine similarity", paired=True),
    "relative_error": Measure(
        "stages.measures.divergence:relative_error", "error", _VECTORS | {"score"}, "relative error", paired=True
    ),
}


def measured(task: str, *, paired: bool) -> dict[str, Measure]:
    """The measures of a model of this task, in the table's order: those with a baseline, or those without."""
    return {name: one for name, one in MEASURES.items() if one.paired == paired and task in one.tasks}


def foremost(*metrics: Iterable[str]) -> str:
    """The measure that stands for models where there is room for one: the first of the table that any was measured by.

    Where none was measured it is the table's first.
    """
    names = set().union(*metrics)
    return next((name for name in MEASURES if name in names), next(iter(MEASURES)))


def title(measure: str) -> str:
    """A measure's heading."""
    return MEASURES[measure].title or measure
