"""Text that a model writes itself: as texts begin, behind a drawn word, and as a question and its answer.

It is as various as what the model learned from, and what the model is for.

Source: Ji et al. 2025, Beware of Calibration Data for Pruning Large Language Models, section 5.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.adapters.texts import Document
from stages.algorithms.products import SHORT
from stages.corpus.params import CorpusParams, SourceParams
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import tasks
from stages.models.checkpoint.loading import load_model, load_tokenizer
from stages.models.checkpoint.subject import Subject
from stages.models.layers import rounded_cache
from stages.models.text.openings import Opening, ends, openings
from stages.models.text.writing import Manner, Written, together, write
from stages.runtime.contract import Progress, StageError
from stages.runtime.parts import keep, kept
from stages.runtime.rows import Message

UNLIKELY = 0.1
"""Share of the texts that goes, the least likely ones: where a draw went astray, the rest of a text went with it."""
_ROLES = ("user", "assistant")


def check_known(model: Subject, params: CorpusParams) -> None:
    """Raise StageError where a model that is not made yet cannot write what is asked of it."""
    check_writer(model.model, model.task)
    for one in params.each:
        if one.writes:
            _check_length(model.model, one.sample_tokens, model.reads)


def check_writer(model: PreTrainedModel, task: str) -> None:
    """Raise StageError unless a model goes on with a text."""
    if not anatomy.predicts(model, task):
        raise StageError(
            f"{type(model).__name__} does not go on with a text, so that it cannot write one by itself",
            measured=f"its task is {task}",
            limit="generate, by a decoder alone",
            remedy="Give texts of what it reads as the corpus's source in place of model://self.",
        )


def written(
    params: SourceParams, folder: Path, partial: Path, progress: Progress, advanced: Callable[[float], None]
) -> tuple[list[Document], dict[str, Any]]:
    """The texts that a model wrote and that are kept, in the order of their numbers.

    Args:
        params: how many, how long and how they are drawn.
        folder: of the checkpoint.
        partial: folder that keeps what is written; what stands there is not written again.
        progress: told what is not as asked for.
        advanced: told how many texts are written.

    Returns:
        Documents, and how many were written and left out, and by what numbers.

    Raises:
        StageError: the model does not go on with texts, or nothing that it wrote is text.
    """
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=SHORT)
    check_writer(model, tasks.task(model.config))
    _check_length(model, params.sample_tokens, tasks.longest(model.config))
    kinds = openings(tokenizer, model.config)
    if not any(one.turn for one in kinds):
        progress.note("the tokenizer has no chat template that begins with a user's words: no conversation is written")
    manner = Manner(
        params.sample_tokens, params.temperature, params.nucleus, params.seed, ends(tokenizer, model.config)
    )
    _check_room(kinds, manner)
    texts = []
    for opening, numbers in zip(kinds, _numbers(params.samples, len(kinds)), strict=True):
        texts.append(_every(model, opening, numbers, manner, partial, advanced))
    sifted = [_sifted(tokenizer, opening, some) for opening, some in zip(kinds, texts, strict=True)]
    documents = [one for found, _, _ in sifted for one in found]
    if not documents:
        raise StageError(
            f"nothing that {type(model).__name__} wrote is text",
            measured=f"{params.samples} samples of {params.sample_tokens} tokens at most",
            limit="one with a letter",
            remedy="Judge the checkpoint first, or write more samples; a corpus of another source needs no model.",
        )
    known = {
        "samples": params.samples,
        "kept": len(documents),
        "duplicates": sum(twice for _, twice, _ in sifted),
        "least_likely": sum(unlikely for _, _, unlikely in sifted),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return documents, known


def _numbers(samples: int, kinds: int) -> list[range]:
    """The numbers of the texts of each kind, equally many of each."""
    ends = [-(-samples * one // kinds) for one in range(kinds + 1)]
    return [range(first, end) for first, end in pairwise(ends)]


def _every(
    model: PreTrainedModel,
    opening: Opening,
    numbers: range,
    manner: Manner,
    partial: Path,
    advanced: Callable[[float], None],
) -> list[Written]:
    """The texts of these numbers: those kept in `partial`, and the others, written and kept there as they come."""
    known = {span: data for span, data in kept(partial) if span.start in numbers}
    found: list[Written] = []
    with rounded_cache.by(model, _attention(model)):
        size = together(model, opening, manner) if numbers else 1
        for start in range(numbers.start, numbers.stop, size):
            # What is written side by side depends on the numbers alone: products of other shapes round otherwise.
            span = range(start, min(start + size, numbers.stop))
            if span not in known:
                texts = write(model, opening, span, manner, lambda share, s=span: advanced(s.start + share * len(s)))  # type: ignore[misc]
                known[span] = json.dumps([one.record() for one in texts]).encode()
                keep(partial, span, known[span])
            found += [Written(**one) for one in json.loads(known[span])]
            advanced(span.stop)
    return found


def _attention(model: PreTrainedModel) -> str:
    """An attention for single tokens, where the model rounds no keys and values and takes it."""
    now = str(model.config._attn_implementation)
    return rounded_cache.STEPWISE if now in ("sdpa", "eager") else now


def _sifted(
    tokenizer: PreTrainedTokenizerBase, opening: Opening, texts: Sequence[Written]
) -> tuple[list[Document], int, int]:
    """The texts of one kind that are kept, how many are duplicates, and how many the least likely ones are."""
    seen: set[str] = set()
    found: list[tuple[float, Document]] = []
    twice = 0
    for one in texts:
        said = [_text(tokenizer, part) for part in one.parts]
        if not all(said) or len(said) != (len(_ROLES) if opening.turn else 1):
            continue  # it says nothing, or the question has no answer
        document = _document(one, said)
        compared = " ".join(document.text.lower().split())
        if compared in seen:
            twice += 1
            continue
        seen.add(compared)
        found.append((one.mean_log_p, document))
    unlikely = sorted(range(len(found)), key=lambda n: found[n][0])[: int(len(found) * UNLIKELY)]
    return [one for n, (_, one) in enumerate(found) if n not in unlikely], twice, len(unlikely)


def _document(one: Written, said: Sequence[str]) -> Document:
    if len(said) == 1:
        return Document(str(one.number), said[0])
    messages = tuple(Message(role, part) for role, part in zip(_ROLES, said, strict=True))
    return Document(str(one.number), "\n\n".join(said), messages)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What tokens say, without what is no text: halves of characters, control characters, blank ends."""
    said = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return "".join(_sound(str(said))).strip()


def _sound(said: str) -> Iterator[str]:
    for one in said.replace("\r\n", "\n").replace("\r", "\n"):
        if one in "\n\t" or (one != "\ufffd" and unicodedata.category(one) not in ("Cc", "Cs", "Cn", "Co")):
            yield one


def _check_length(model: PreTrainedModel, tokens: int, most: int | None) -> None:
    if most is not None and tokens > most:
        raise StageError(
            f"{type(model).__name__} reads no texts of this length",
            measured=tokens,
            limit=most,
            remedy=f"Set `sample_tokens` of the corpus to {most}.",
        )


def _check_room(kinds: Sequence[Opening], manner: Manner) -> None:
    """Raise StageError where what a text begins with leaves no room for a token of each of its parts."""
    need = max(one.longest + len(one.turn) + (2 if one.turn else 1) for one in kinds)
    if need > manner.tokens:
        raise StageError(
            "samples of the model's own text have no room for text behind what they begin with",
            measured=f"{manner.tokens} tokens",
            limit=f"{need} tokens",
            remedy=f"Set `sample_tokens` of the corpus to {need} or more.",
        )
