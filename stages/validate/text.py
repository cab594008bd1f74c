"""Text in windows, each of which is a document that is scored by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.measures.documents import Document, by_slice, read_documents, score_documents, sliced, summary
from stages.measures.predictions import Answer, Asking
from stages.models.anatomy import tasks
from stages.models.checkpoint.hub_folders import gives_vectors
from stages.models.checkpoint.loading import load_config, load_tokenizer
from stages.models.checkpoint.pooling import reads
from stages.models.text.segments import segments, separator
from stages.models.text.text_ends import special_ends
from stages.models.text.windows import sliced_windows
from stages.runtime.contract import Metrics, Progress, StageError
from stages.serving.engine import WRITES, Answerer
from stages.serving.found import SEVERAL

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from stages.validate.params import ValidateParams


@dataclass(frozen=True)
class Text:
    """Windows, how they are put to the model, and the source of each, empty where there is one."""

    ids_NT: Tensor
    asking: Asking
    split: str
    sources: tuple[str, ...]
    units: str = "documents"
    separator: int | None = None
    """Behind it a window's second text begins, of which models are told; see `stages.models.text.segments`."""

    @property
    def task(self) -> str:
        """What the model is for."""
        return self.asking.task

    def __len__(self) -> int:
        """How many windows are scored; each by itself, so that a score does not depend on what is scored beside it."""
        return len(self.ids_NT)

    def scorer(self, judged: Answerer, dense: Answerer | None) -> Callable[[range], Iterator[list[Document]]]:
        """Returns a range of windows -> their scores."""

        def score(span: range) -> Iterator[list[Document]]:
            ids = self.ids_NT[span.start : span.stop]
            ours, theirs = self._told(judged), self._told(dense) if dense else None
            for one in score_documents(ids, ours, theirs, self.asking, self.split, first=span.start):
                yield [one]

        return score

    def _told(self, model: Answerer) -> Answer:
        """Its answers to windows, in which it is told which of two texts each token is of."""
        if self.separator is None:
            return model.logits
        between = self.separator
        return lambda ids_NT: model.logits(ids_NT, segments(torch.from_numpy(ids_NT), None, between).numpy())

    def read(self, data: bytes, span: range, *, paired: bool) -> list[list[Document]] | None:
        """The scores of a range of windows as they were written, None unless they are of exactly these."""
        ids = self.ids_NT[span.start : span.stop]
        try:
            flat = [one for unit in json.loads(data) for one in unit]
        except (ValueError, TypeError):
            return None
        found = read_documents(json.dumps(flat).encode(), ids, self.asking, self.split, first=span.start, paired=paired)
        return None if found is None or len(found) != len(span) else [[one] for one in found]

    def report(self, units: list[list[Document]]) -> dict[str, Any]:
        """What report.json says of all windows."""
        documents = sliced([one for unit in units for one in unit], self.sources)
        found = {"window_tokens": self.ids_NT.shape[1], "documents": documents, "measures": summary(documents)}
        return found | by_slice(documents)

    def metrics(self, documents: list[Document]) -> Metrics:
        """Figures beside the measures."""
        return {"tokens": float(sum(document["tokens"] for document in documents))}


def text_of(params: ValidateParams, inputs: Mapping[str, Path], progress: Progress | None = None) -> Text:
    """The windows of a corpus, as the model reads them.

    Raises:
        StageError: it has not the split, or the engine does not read so much.
    """
    model = inputs["model"]
    config, tokenizer = load_config(model), load_tokenizer(model)
    task = tasks.task(config)
    tokens = min(params.window_tokens, reads(model, config) or params.window_tokens)
    check_length(of_engine(model), tokens)
    mask = mask_of(tokenizer) if task == "fill" else None
    before, after = map(len, special_ends(tokenizer))
    found = sliced_windows(
        inputs["text"], params.split, tokenizer, tokens, most=params.windows, progress=progress, task=task
    )
    if progress and tokens < params.window_tokens:
        progress.note(f"windows of {tokens} tokens, all that the model reads, not of {params.window_tokens}")
    asking = Asking(task, before, after, mask, pooled=gives_vectors(model), several=config.problem_type == SEVERAL)
    between = separator(tokenizer) if task not in WRITES else None
    return Text(found.ids_NT, asking, params.split, found.names, separator=between)


def mask_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that hides another one.

    Raises:
        StageError: there is none.
    """
    if tokenizer.mask_token_id is None:
        raise StageError(
            "a masked model is judged by hiding tokens, and its tokenizer has none to hide them with",
            measured="no mask_token",
            remedy='Set "mask_token" in tokenizer_config.json.',
        )
    return int(tokenizer.mask_token_id)


def of_engine(folder: Path) -> int | None:
    """The longest sequence that an engine was built for; None of what is no engine."""
    engine = folder / "engine.json"
    return json.loads(engine.read_text(encoding="utf-8")).get("maximum_tokens") if engine.is_file() else None


def check_length(most: int | None, window_tokens: int) -> None:
    """Raise StageError where an engine was built for less than the windows: its scores would stand beside no others."""
    if most is not None and window_tokens > most:
        raise StageError(
            "the windows are longer than the engine can read",
            measured=f"{window_tokens} tokens",
            limit=f"{most} tokens",
            remedy=f"Set `window_tokens` of `judge` to {most}.",
        )
