"""A task of lm-evaluation-harness put to a model that continues text, one small group of its requests after another.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.measures.documents import Document, by_slice, summary
from stages.measures.items import HARNESS
from stages.measures.table import HARNESS_MEASURES
from stages.models.checkpoint.loading import load_tokenizer
from stages.runtime.contract import Metrics, StageError
from stages.serving.engine import Answerer
from stages.serving.generate import ROWS, Weighed, greedy, padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.adapters.lm_eval_harness.tasks import Pair, Served
    from stages.validate.params import ValidateParams

TOGETHER = 32
"""Requests of a group."""
_RIGHT = ("acc", "exact_match")
"""Measures of the harness that say whether an item is answered right."""
_SHOWN = 300


@dataclass(frozen=True)
class HarnessTask:
    """A task, its requests in groups of one type."""

    name: str
    opened: Any
    groups: list[list[int]]
    tokenizer: PreTrainedTokenizerBase
    about: Mapping[str, Any]
    task: str = "generate"
    units: str = "groups of requests"

    def __len__(self) -> int:
        """How many groups there are; each by itself."""
        return len(self.groups)

    def scorer(self, judged: Answerer, dense: Answerer | None) -> Callable[[range], Iterator[list[Document]]]:
        """Returns a range of groups -> the responses to each one's requests. A baseline is compared by its report."""
        from stages.adapters.lm_eval_harness.tasks import answered

        model = served(judged, self.tokenizer)

        def score(span: range) -> Iterator[list[Document]]:
            for group in self.groups[span.start : span.stop]:
                said = answered(model, [self.opened.instances[at] for at in group])
                yield [{"id": self._id(at), "response": one} for at, one in zip(group, said, strict=True)]

        return score

    def _id(self, at: int) -> str:
        return f"{at}-{_digest(self.opened.instances[at].args)}"

    def read(self, data: bytes, span: range, *, paired: bool) -> list[list[Document]] | None:
        """The responses to a range of groups as they were written, None unless they are of exactly these."""
        try:
            found: list[list[Document]] = json.loads(data)
            names = [[one["id"] for one in unit] for unit in found]
            whole = all("response" in one for unit in found for one in unit)
        except (ValueError, TypeError, KeyError):
            return None
        wanted = [[self._id(at) for at in group] for group in self.groups[span.start : span.stop]]
        return found if whole and names == wanted else None

    def report(self, units: list[list[Document]]) -> dict[str, Any]:
        """What report.json says of all items."""
        from stages.adapters.lm_eval_harness.tasks import measured, whole

        places = [at for group in self.groups for at in group]
        said = dict(zip(places, (one["response"] for unit in units for one in unit), strict=True))
        items = measured(self.opened, [said[at] for at in range(len(said))])
        documents = [self._document(number, *one) for number, one in enumerate(items)]
        figures = whole(self.opened, [measures for *_, measures in items])
        found = {"items": True, **self.about, "documents": documents, "measures": summary(documents)}
        return found | by_slice(documents) | {"harness": figures}

    def _document(
        self,
        number: int,
        doc: Mapping[str, Any],
        requests: Sequence[Any],
        said: Sequence[Any],
        measures: dict[str, Any],
    ) -> Document:
        prompt, target = str(requests[0].args[0]), self.opened.doc_to_target(doc)
        numbers = {name: float(value) for name, value in measures.items() if isinstance(value, bool | int | float)}
        if not all(map(math.isfinite, numbers.values())):
            raise StageError(f"a measure of {self.name} is no finite number", measured=str(numbers), limit="finite")
        choice = self.opened.OUTPUT_TYPE == "multiple_choice"
        if choice:
            choices = self.opened.doc_to_choice(doc)
            target = choices[target] if isinstance(target, int) else target
            # With mutual information there are requests of the choices alone behind these.
            answer = choices[max(range(len(choices)), key=lambda at: said[at][0])]
        else:
            answer = said[0]
        name = _digest([doc, [list(one.args) for one in requests]])
        document: Document = {"id": f"{self.name}-{number}-{name}", "slice": self.name}
        document |= {"tokens": max(len(self.tokenizer(prompt)["input_ids"]), 1), "prompt": prompt}
        document |= {"expected": str(target)[:_SHOWN], "answer": str(answer)[:_SHOWN], "repeated": 0}
        document["chance"] = 1 / len(choices) if choice else 0.0
        if right := next((one for one in _RIGHT if one in numbers), ""):
            document["right"] = int(numbers[right] == 1)
        return document | {f"{HARNESS_MEASURES}{key}": value for key, value in numbers.items()}

    def metrics(self, documents: list[Document]) -> Metrics:
        """Figures beside the measures."""
        return {"items": float(len(documents))}


def harness_of(params: ValidateParams, inputs: Mapping[str, Path]) -> HarnessTask:
    """A task that the stage `items` brought, with its requests.

    Raises:
        StageError: the harness cannot read the task.
    """
    from stages.adapters.lm_eval_harness.tasks import opened

    record = json.loads((inputs["text"] / "corpus.json").read_text(encoding="utf-8"))
    said = dict(record[HARNESS])
    folder = inputs["text"] / HARNESS
    files = {split: str(folder / name) for split, name in said["dataset_kwargs"]["data_files"].items()}
    said["dataset_kwargs"] = said["dataset_kwargs"] | {"data_files": files}
    with tempfile.TemporaryDirectory() as cache:
        try:
            task = opened(said, Path(cache), params.items)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise StageError(
                f"lm-evaluation-harness cannot open the task {said['task']}",
                measured=f"{type(error).__name__}: {error}",
                remedy="Try it there: lm_eval --include_path FOLDER --tasks NAME.",
            ) from error
    if not task.instances or any(one.repeats != 1 for one in task.instances):
        raise StageError(
            f"the task {said['task']} asks for nothing, or for several answers to one request",
            measured=f"{len(task.instances or ())} requests",
            limit="one answer to each, the likeliest",
            remedy="Set `repeats: 1`, and a split with items.",
        )
    kinds: dict[str, list[int]] = {}
    for at, one in enumerate(task.instances):
        kinds.setdefault(one.request_type, []).append(at)
    groups = [of[at : at + TOGETHER] for of in kinds.values() for at in range(0, len(of), TOGETHER)]
    tokenizer = load_tokenizer(inputs["model"])
    about = {"vocabulary": len(tokenizer), "shipped": False}
    return HarnessTask(said["task"], task, groups, tokenizer, about)


def served(judged: Answerer, tokenizer: PreTrainedTokenizerBase) -> Served:
    """An artifact as the harness asks for a model."""
    from stages.adapters.lm_eval_harness.tasks import Served

    after = len(tokenizer("a")["input_ids"]) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else min(judged.ends, default=None)
    if prefix is None:
        raise StageError("the tokenizer has neither a token that begins a text nor one that ends it")

    def encode(text: str, special: bool) -> list[int]:
        own = bool(after) and tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = list(tokenizer(text, add_special_tokens=special and not own)["input_ids"])
        # What ends a text would stand between a context and what follows it.
        return ids[:-1] if special and after and len(ids) > 1 and ids[-1] in judged.ends - {prefix} else ids

    def scores(pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        return [score for at in range(0, len(pairs), ROWS) for score in _scored(pairs[at : at + ROWS], judged)]

    def continues(contexts: Sequence[list[int]], ends: Sequence[Sequence[str]], most: Sequence[int]) -> list[str]:
        def text(new: list[int]) -> str:
            return str(tokenizer.decode(new, skip_special_tokens=True))

        def enough(number: int, new: list[int]) -> bool:
            return any(end and end in text(new) for end in ends[number])

        model, longest = judged.steps() if judged.steps else judged.forward, judged.maximum_tokens
        allowed = Weighed(model, judged.weighing(contexts))
        new = greedy(allowed, contexts, ends=judged.ends, max_new_tokens=most, maximum_tokens=longest, enough=enough)
        return [_cut(text(one), until) for one, until in zip(new, ends, strict=True)]

    return Served(encode, int(prefix), judged.maximum_tokens, scores, continues)


def _cut(text: str, ends: Sequence[str]) -> str:
    return text[: min((text.index(end) for end in ends if end and end in text), default=len(text))]


def _scored(pairs: Sequence[Pair], judged: Answerer) -> Iterator[tuple[float, bool]]:
    """Log-likelihoods; of what is too long the beginning is not read."""
    rows = [(context + following)[-judged.maximum_tokens :] for context, following in pairs]
    for (_, following), row, logits_TV in zip(pairs, rows, judged.forward(*padded(rows)), strict=True):
        start = max(1, len(row) - len(following))
        said_TV = torch.from_numpy(logits_TV[start - 1 : len(row) - 1]).double()
        next_T = torch.tensor(row[start:])
        chosen = torch.log_softmax(said_TV, -1).gather(-1, next_T[:, None])
        yield float(chosen.sum()), bool((said_TV.argmax(-1) == next_T).all())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, default=str).encode()).hexdigest()[:12]
