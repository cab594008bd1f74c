"""The table of measures: one line a measure, imported when it is asked for, so that the table is read without torch.

On text a measure is a function of predictions that gives one value a row: `(rows_RV, target_R)`, or with a baseline
`(baseline_RV, rows_RV)`. What a row is depends on the task: a predicted token, a text's classes, a token's vector. On a
set of items it is a mean of what each item's document says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TOKENS = frozenset({"generate", "translate"})
"""Tasks whose answer is a token after the other."""
_READS = frozenset({"fill", "classify", "score", "choose", "tag", "answer", "embed"})
BENCH, SPEED = "bench", "speed"
"""The stage that measures how fast an artifact is, which no corpus decides, and the key of its report."""


@dataclass(frozen=True)
class Measure:
    """What `validate` measures on text or on items.

    Attributes:
        function: module and name of the function that measures.
        score: the key of its sum over a document in report.json; the measure is the mean over all rows.
        tasks: what the models are for that it says something of.
        title: its heading, where that is not its name.
        paired: it compares with a baseline.
        count: its sum counts tokens.
        exponential: the measure is the mean's exponential.
        of_items: it is measured on a set of items: the function is one of the items' documents, which all have the
            score, and of how often each is drawn; see `stages.measures.item_scores`.
        between: it is seen in two reports only, item by item.
        reads: keys of the items' documents that it reads beside its score.
        of_labels: the function in place of `function` where any number of classes may hold at once.
        graded: an item is not right or wrong by it but so far: a model that has none of it knows nothing.
    """

    function: str
    score: str
    tasks: frozenset[str] = TOKENS
    title: str = ""
    paired: bool = False
    count: bool = False
    exponential: bool = False
    of_items: bool = False
    between: bool = False
    reads: tuple[str, ...] = ()
    graded: bool = False
    of_labels: str = ""


_CHOICES = TOKENS | {"fill", "classify", "tag", "answer"}
_VECTORS = frozenset({"classify", "tag", "answer", "embed"})
_CLASSES = ("expected", "answer")
_ASKED = frozenset({"generate", "translate", "classify", "tag", "answer", "choose", "embed"})
"""Tasks of models that are asked items."""
_WRITES = frozenset({"generate"})


def _of_items(
    name: str,
    score: str,
    title: str = "",
    reads: tuple[str, ...] = (),
    *,
    between: bool = False,
    tasks: frozenset[str] = _ASKED,
) -> Measure:
    function = f"stages.measures.item_scores:{name}"
    return Measure(function, score, tasks, title, of_items=True, between=between, reads=reads)


def _of_vectors(name: str, score: str, title: str, reads: tuple[str, ...] = ()) -> Measure:
    return Measure(f"stages.measures.ranking:{name}", score, frozenset({"embed"}), title, of_items=True, reads=reads)


def _of_classes(name: str, score: str, title: str, reads: tuple[str, ...]) -> Measure:
    function = f"stages.measures.classification:{name}"
    return Measure(function, score, frozenset({"classify"}), title, of_items=True, reads=reads)


def _graded(function: str, score: str, tasks: set[str], title: str) -> Measure:
    return Measure(f"stages.measures.{function}", score, frozenset(tasks), title, of_items=True, graded=True)


MEASURES: Mapping[str, Measure] = {
    "perplexity": Measure("stages.measures.perplexity:negative_log_likelihood", "nll", TOKENS, exponential=True),
    "pseudo_perplexity": Measure(
        "stages.measures.perplexity:masked_negative_log_likelihood",
        "masked_nll",
        frozenset({"fill"}),
        "pseudo-perplexity",
        exponential=True,
    ),
    "kl_divergence": Measure(
        "stages.measures.divergence:kl_divergence",
        "kl",
        _CHOICES,
        "KL divergence",
        paired=True,
        of_labels="stages.measures.divergence:kl_of_labels",
    ),
    "top1_agreement": Measure(
        "stages.measures.divergence:top1_agreement", "agree", _CHOICES, "top-1 agreement", paired=True, count=True
    ),
    "cosine": Measure("stages.measures.divergence:cosine", "cosine", _VECTORS, "cosine similarity", paired=True),
    "relative_error": Measure(
        "stages.measures.divergence:relative_error",
        "error",
        _VECTORS | {"score", "choose"},
        "relative error",
        paired=True,
    ),
    "contrast": Measure(
        "stages.measures.divergence:contrast", "contrast", frozenset({"embed"}), "what differs", paired=True
    ),
    "accuracy": _of_items("accuracy", "right", "right answers"),
    "accuracy_by_length": _of_items(
        "accuracy_by_length", "right_by_length", "right answers, choices by length", tasks=_WRITES
    ),
    "above_chance": _of_items("above_chance", "right", "right above chance", ("chance",)),
    "exact_match": _graded("spans:exact_match", "exact", {"generate", "answer"}, "exact match"),
    "answer_f1": _graded("spans:answer_f1", "overlap", {"generate", "answer"}, "answer F1"),
    "entity_f1": _graded("entities:entity_f1", "entities", {"tag"}, "entity F1"),
    "entity_precision": _graded("entities:entity_precision", "entities", {"tag"}, "entity precision"),
    "entity_recall": _graded("entities:entity_recall", "entities", {"tag"}, "entity recall"),
    "tag_accuracy": _graded("entities:tag_accuracy", "tags", {"tag"}, "right tags"),
    "bleu": _graded("texts:bleu", "bleu", {"generate", "translate"}, "BLEU"),
    "chrf": _graded("texts:chrf", "chrf", {"generate", "translate"}, "chrF"),
    "rouge1": _graded("texts:rouge1", "rouge1", {"generate", "translate"}, "ROUGE-1"),
    "rouge2": _graded("texts:rouge2", "rouge2", {"generate", "translate"}, "ROUGE-2"),
    "rougel": _graded("texts:rougel", "rougeL", {"generate", "translate"}, "ROUGE-L"),
    "flips": _of_items("flips", "right", between=True),
    "lost": _of_items("lost", "right", "right answers lost", between=True),
    "same_answers": _of_items("same_answers", "answer", "same answers", between=True),
    "same_beginning": _of_items("same_beginning", "said", "same beginnings", between=True, tasks=_WRITES),
    "repetition": _of_items("repetition", "repeated"),
    "repeating": _of_items("repeating", "repeated", "repeats itself anew", between=True),
    "endless": _of_items("endless", "ended", "no longer ends", between=True, tasks=_WRITES),
    "respelt": _of_items("respelt", "spelt", "right, spelt otherwise", ("right",), between=True, tasks=_WRITES),
    "leaks": _of_items("leaks", "leaked"),
    "robustness": _of_items("robustness", "varied_right", "right answers under variants", ("right", "varied")),
    "variant_flips": _of_items("variant_flips", "varied_flipped", "flips by variants", ("varied",)),
    "precision": _of_classes("precision", "confidence", "precision", _CLASSES),
    "recall": _of_classes("recall", "confidence", "recall", _CLASSES),
    "f1": _of_classes("f1", "confidence", "F1", _CLASSES),
    "calibration_error": _of_classes("calibration_error", "confidence", "calibration error", ("right",)),
    "spearman": _of_vectors("spearman", "similarity", "Spearman's rank correlation", ("gold",)),
    **{f"recall_at_{most}": _of_vectors(f"recall_at_{most}", "rank", f"recall at {most}") for most in (1, 5, 10)},
}


_RIGHT = ("answers", "choices", "instructions", "question", "classify", "tag", "retrieval")
MEASURED_BY: Mapping[str, tuple[str, ...]] = {
    "right": _RIGHT,
    "exact": ("question",),
    "overlap": ("question",),
    "entities": ("tag",),
    "tags": ("tag",),
    "bleu": ("translate",),
    "chrf": ("translate",),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), ("summarize",)),
    "confidence": ("classify",),
    "similarity": ("similarity",),
    "rank": ("retrieval",),
}
"""Score of a measure of items -> the tasks of items that have it; all have what does not stand here."""


OWN = "own."
"""Begins the names of measures that other packages bring, see `stages.measures.own`."""


HARNESS_MEASURES = "harness."
"""Begins the names of what lm-evaluation-harness measures of each item."""
BROUGHT = (OWN, HARNESS_MEASURES)


def known(measure: str) -> Measure | None:
    """A measure of the table, or one that others bring: the mean of what it says of each item."""
    if measure.startswith(BROUGHT):
        return Measure("stages.measures.item_scores:own", measure, _ASKED, of_items=True)
    return MEASURES.get(measure)


def measure_of(name: str) -> Measure:
    """A measure that is known."""
    found = known(name)
    assert found is not None, name
    return found


def measured(task: str, *, paired: bool) -> dict[str, Measure]:
    """The measures on text of a model of this task, in the table's order: those with a baseline, or those without."""
    fitting = {name: one for name, one in MEASURES.items() if task in one.tasks and not one.of_items}
    return {name: one for name, one in fitting.items() if one.paired == paired}


def foremost(*metrics: Iterable[str]) -> str:
    """The measure that stands for models where there is room for one: the first of the table that any was measured by.

    Where none was measured it is the table's first.
    """
    names = set().union(*metrics)
    return next((name for name in MEASURES if name in names), next(iter(MEASURES)))


def title(measure: str) -> str:
    """A measure's heading."""
    found = known(measure)
    return (found.title if found else "") or measure


@dataclass(frozen=True)
class Speed:
    """What `bench` measures of an artifact.

    Attributes:
        title: its heading.
        tasks: what the models are for that it says something of.
        faster: whether more of it is better.
        once: it is seen once, and has no interval.
    """

    title: str
    tasks: frozenset[str] = TOKENS
    faster: bool = False
    once: bool = False


SPEEDS: Mapping[str, Speed] = {
    "decode_tokens_per_s": Speed("tokens/s written", faster=True),
    "prefill_tokens_per_s": Speed("tokens/s read", faster=True),
    "items_per_s": Speed("items/s", _READS, faster=True),
    "time_to_first_token_ms": Speed("first token, ms"),
    "token_latency_p50_ms": Speed("token p50, ms"),
    "token_latency_p95_ms": Speed("token p95, ms"),
    "token_latency_p99_ms": Speed("token p99, ms"),
    "load_s": Speed("load, s", TOKENS | _READS, once=True),
    "peak_rss_bytes": Speed("peak memory", TOKENS | _READS, once=True),
    "bandwidth_share": Speed("of copy bandwidth", frozenset({"generate"}), faster=True, once=True),
}


def foremost_speed(task: str) -> str:
    """The measure that stands for the speed of a model of this task: the first of the table that it has."""
    return next(name for name, one in SPEEDS.items() if task in one.tasks)
