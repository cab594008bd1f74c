"""lm-evaluation-harness: a task's requests, a model as it asks for one, and what responses come to.

The extra `harness` installs it; nothing of it is imported before a task is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # noqa: F401 fills the registry
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

logging.getLogger("lm_eval").setLevel(logging.ERROR)

SEED = 1234
"""The harness's own, by which it draws examples."""
Pair = tuple[list[int], list[int]]
"""Tokens of a context, and of what follows it."""


class Served(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model as the harness asks for one, over functions that ask the artifact as it is executed.

    Args:
        encode: (text, with special tokens) -> its tokens.
        prefix: the token before a text that has nothing before it.
        most: tokens that are read at once.
        scores: pairs -> log-likelihood of what follows, and whether each token of it is the likeliest.
        continues: (contexts, where each ends, most new tokens of each) -> texts.
    """

    def __init__(
        self,
        encode: Callable[[str, bool], list[int]],
        prefix: int,
        most: int,
        scores: Callable[[Sequence[Pair]], list[tuple[float, bool]]],
        continues: Callable[[Sequence[list[int]], Sequence[Sequence[str]], Sequence[int]], list[str]],
    ) -> None:
        super().__init__()
        self._encode, self._prefix, self._most = encode, prefix, most
        self._scores, self._continues = scores, continues

    @property
    def eot_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text as the model reads it when it serves, with its special tokens unless told otherwise."""
        return self._encode(string, add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        return self._scores([(context, following) for _, context, following in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of whole texts, window after window."""
        found = []
        for text in (one.args[0] for one in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(
                token_list=tokens, prefix_token=self._prefix, max_seq_len=self._most, context_len=1
            )
            pairs = [make_disjoint_window(one) for one in windows]
            found.append(sum(score for score, _ in self._scores([(list(a), list(b)) for a, b in pairs])))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The likeliest text up to where the task says that an answer ends; nothing is drawn."""
        contexts, ends, most = [], [], []
        for text, how in (one.args for one in requests):
            until = how.get("until") or []
            new = min(int(how.get("max_gen_toks", 256)), self._most - 1)
            contexts.append(self.tok_encode(text)[-(self._most - new) :])
            ends.append([until] if isinstance(until, str) else list(until))
            most.append(new)
        return self._continues(contexts, ends, most)


def opened(said: Mapping[str, Any], cache: Path, most: int | None) -> Any:
    """A task with its requests built.

    Args:
        said: what its YAML says, with absolute places of its data.
        cache: where its data are kept in the form in which they are read.
        most: at most this many items, the first ones.
    """
    measures = [one.get("hf_evaluate") or one.get("metric") for one in said.get("metric_list") or []]
    # What the harness does not know itself it would load from the hub, as code.
    if strange := [one for one in measures if one not in METRIC_REGISTRY]:
        raise ValueError(f"it measures what the harness does not know itself: {', '.join(map(str, strange))}")
    kwargs = dict(said.get("dataset_kwargs") or {}) | {"cache_dir": str(cache)}
    task = ConfigurableTask(config=dict(said) | {"dataset_kwargs": kwargs})
    task.set_fewshot_seed(SEED)
    task.build_all_requests(rank=0, world_size=1, limit=most)
    return task


def answered(model: Served, instances: Sequence[Any]) -> list[Any]:
    """What a model responds to requests of one type."""
    if not instances:
        return []
    found: list[Any] = getattr(model, instances[0].request_type)(instances, disable_tqdm=True)
    return found


def measured(task: Any, responses: Sequence[Any]) -> list[tuple[Any, list[Any], Any, dict[str, Any]]]:
    """(item, its requests, what the task made of the responses, its measures) of each item.

    Of a task with several filters the first counts.
    """
    for instance, response in zip(task.instances, responses, strict=True):
        instance.resps = [tuple(response) if isinstance(response, list) else response]
    task.apply_filters()
    by_item: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_item.setdefault(instance.doc_id, []).append(instance)
    first = next(iter(task.instances[0].filtered_resps))
    found = []
    for instances in by_item.values():
        instances.sort(key=lambda one: one.idx)
        said = [one.filtered_resps[first] for one in instances]
        found.append((instances[0].doc, instances, said, task.process_results(instances[0].doc, said)))
    return found


def whole(task: Any, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The task's own figures over all items, by its own way to gather them."""
    gathered = task.aggregation()
    return {name: float(gathered[name]([one[name] for one in items])) for name in items[0] if name in gathered}
