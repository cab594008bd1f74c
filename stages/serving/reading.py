"""What a model says of texts that it does not continue: vectors, classes, entities, choices, and answers found in a
context.

It travels inside the registered model, as `engine` does.

Shapes: N texts, T tokens, C classes, E of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from stages.runtime.contract import StageError
from stages.serving.engine import Answerer
from stages.serving.found import SEVERAL, Choice, Entity, Label, Span
from stages.serving.generate import ROWS, padded
from stages.serving.inputs import require_text

PART_TOKENS, SHARED_TOKENS, LONGEST_TOKENS = 384, 128, 30
"""A part of a context with its question, what a part shares with the next, and an answer: SQuAD's usual ones."""
Pair = tuple[str, str]


def embed(model: Answerer, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
    """vector_NE of texts, as the modules of sentence-transformers say; the mean over tokens where there are none.

    Args:
        model: its task is `embed`.
        texts: at least one; space at their ends does not count, as in sentence-transformers.
        truncate: of a text that is too long the beginning is read, as in sentence-transformers; else it is refused.

    Raises:
        StageError: the model gives no vectors, or a text is empty, too long or no text.
    """
    return embedded(model, texts, truncate=truncate)[0]


def embedded(model: Answerer, texts: Sequence[str], *, truncate: bool = False) -> tuple[NDArray[np.float32], int]:
    """As `embed`; besides, the number of tokens that were read."""
    _require(model, "embed")
    rows = [_encoded(model, one.strip(), truncate=truncate) for one in _texts(texts)]
    said = _said(model, rows)
    return np.stack([one if one.ndim == 1 else one.mean(0) for one in said]), sum(len(one.ids) for one in rows)


def classify(model: Answerer, texts: Sequence[str | Pair], *, truncate: bool = False) -> list[list[Label]]:
    """All classes of each text or pair of texts, the likeliest first.

    Args:
        model: its task is `classify` or `score`.
        texts: or pairs of them; at least one.
        truncate: see `embed`.

    Raises:
        StageError: the model tells no classes, or a text is empty, too long or no text.
    """
    _require(model, "classify", "score")
    pairs = [one if isinstance(one, tuple | list) and len(one) == 2 else (one, None) for one in texts]
    _texts([part for pair in pairs for part in pair if part is not None])
    said = _said(model, [_encoded(model, *pair, truncate=truncate) for pair in pairs])
    found = []
    for logits_C in said:
        several = model.config.get("problem_type") == SEVERAL
        score_C = logits_C if model.task == "score" else _sigmoid(logits_C) if several else _softmax(logits_C)
        labels = [Label(_label(model, at), float(score)) for at, score in enumerate(score_C)]
        found.append(sorted(labels, key=lambda one: -one.score))
    return found


def tag(model: Answerer, texts: Sequence[str]) -> list[list[Entity]]:
    """The entities of each text; the first token of a word says what it is, and words of one entity are joined.

    Raises:
        StageError: the model tags nothing, or a text is empty, too long or no text.
    """
    _require(model, "tag")
    given = _texts(texts)
    rows = [_encoded(model, one) for one in given]
    said = _said(model, rows)
    return [_entities(model, *one) for one in zip(given, rows, said, strict=True)]


def answer(model: Answerer, question: str, context: str, *, unanswerable: bool = False) -> Span:
    """The likeliest span of the context; a long context is read in parts that share tokens.

    Args:
        model: its task is `answer`.
        question: that is asked.
        context: where the answer is sought.
        unanswerable: there may be none.

    Raises:
        StageError: the model finds no answers, one of both is empty or no text, or the question leaves no room.

    Source: Devlin et al., BERT, 2019, section 4.3.
    """
    _require(model, "answer")
    _texts([question, context])
    parts = _parts(model, question, context)
    found, none = list[tuple[float, Span]](), list[tuple[float, float]]()
    for part, logits_2T in zip(parts, _said(model, parts), strict=True):
        inside = [at for at, whose in enumerate(part.sequence_ids) if whose == 1]
        first = next((at for at, special in enumerate(part.special_tokens_mask) if special), 0)
        starts_C, stops_C = logits_2T[:, inside].astype(np.float64)
        # The first special token's own span says that there is no answer.
        sides = zip((starts_C, stops_C), logits_2T[:, first], strict=True)
        whole = float(sum(np.logaddexp.reduce([*side_C, of_none]) for side_C, of_none in sides))
        silent = float(logits_2T[:, first].sum())
        none.append((silent, float(np.exp(silent - whole))))
        score, begin, end = best_span(starts_C, stops_C, LONGEST_TOKENS)
        here = part.offsets[inside[begin]][0], part.offsets[inside[end]][1]
        found.append((score, Span(context[slice(*here)], float(np.exp(score - whole)), *here)))
    score, span = max(found, key=lambda one: one[0])
    silent, likely = min(none)
    return Span("", likely, 0, 0) if unanswerable and silent > score else span


def choose(model: Answerer, question: str, choices: Sequence[str]) -> list[Choice]:
    """All choices of a question, the likeliest first; of equal ones the earlier.

    Args:
        model: its task is `choose`.
        question: that is asked, or a text that goes on.
        choices: at least one.

    Raises:
        StageError: the model chooses nothing, or question or choice is empty, no text, or too long together.
    """
    _require(model, "choose")
    _texts([question, *_texts(choices)])
    said = _said(model, [_encoded(model, question, one) for one in choices])
    share_C = _softmax(np.array([float(one[0]) for one in said]))
    found = [Choice(at, one, float(share_C[at])) for at, one in enumerate(choices)]
    return sorted(found, key=lambda one: -one.score)


def best_span(starts_C: NDArray[np.float64], stops_C: NDArray[np.float64], longest: int) -> tuple[float, int, int]:
    """The largest sum of a start and a stop that is not before it, and both places; the shortest of equal ones."""
    best = (-np.inf, 0, 0)
    for length in range(min(longest, len(starts_C))):
        sums = starts_C[: len(starts_C) - length] + stops_C[length:]
        at = int(sums.argmax())
        if sums[at] > best[0]:
            best = (float(sums[at]), at, at + length)
    return best


def _require(model: Answerer, *tasks: str) -> None:
    if model.task not in tasks:
        raise StageError(
            f"the model is not for this: {' or '.join(tasks)}",
            measured=f"its task is {model.task}",
            limit=" or ".join(tasks),
            remedy="Ask it for what it is for.",
        )


def _texts(texts: Sequence[str]) -> Sequence[str]:
    if not texts:
        raise StageError("nothing is asked", measured="no text", limit="at least one", remedy="Give a text.")
    for one in texts:
        require_text(one)
    return texts


def _encoded(model: Answerer, text: str, other: str | None = None, *, truncate: bool = False) -> Encoding:
    """A text's tokens with those that the tokenizer puts around it, or a pair's."""
    tokenizer, most = model.tokenizer, model.maximum_tokens
    found = tokenizer.encode(text, other)
    if len(found.ids) <= most:
        return found
    if not truncate or other is not None:
        raise StageError(
            "a text is longer than the model reads",
            measured=f"{len(found.ids)} tokens",
            limit=f"{most} tokens",
            remedy="Shorten it." if other is not None else "Shorten it, or set `truncate` to read its beginning.",
        )
    bare = tokenizer.encode(text, add_special_tokens=False)
    bare.truncate(most - tokenizer.num_special_tokens_to_add(False))
    return tokenizer.post_process(bare)


def _said(model: Answerer, rows: Sequence[Encoding]) -> list[NDArray[np.float32]]:
    """What the model answers to each row; those of like lengths are read side by side, padded on the right."""
    found: dict[int, NDArray[np.float32]] = {}
    ids = [one.ids for one in rows]
    places = sorted(range(len(rows)), key=lambda place: len(ids[place]))
    for some in _batches(ids, places, alike=model.target.startswith("torch")):
        segments = [padded([rows[place].type_ids for place in some])[0]] if model.tells_segments else []
        for place, said in zip(some, model.forward(*padded([ids[place] for place in some]), *segments), strict=True):
            tokens = len(ids[place])
            # Answers along the tokens end where the row does: [T, C] and [T, H], or [2, T].
            alone = said if said.ndim == 1 else said[:, :tokens] if model.task == "answer" else said[:tokens]
            found[place] = alone
    return [found[place] for place in range(len(rows))]


def _batches(rows: Sequence[Sequence[int]], places: Sequence[int], *, alike: bool) -> Iterator[list[int]]:
    """Batches of rows; a checkpoint's own class need not know padding, so that its rows are of one length."""
    batch: list[int] = []
    for place in places:
        if batch and (len(batch) == ROWS or (alike and len(rows[place]) != len(rows[batch[0]]))):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _entities(model: Answerer, text: str, row: Encoding, logits_TC: NDArray[np.float32]) -> list[Entity]:
    found: list[tuple[str, list[float], int, int]] = []
    open_kind, word = "", None
    for at, own in enumerate(row.word_ids):
        if own is None:
            continue
        start, end = row.offsets[at]
        if own == word:
            if open_kind:
                kind, scores, first, _ = found[-1]
                found[-1] = (kind, scores, first, end)
            continue
        word, score_C = own, _softmax(logits_TC[at])
        said = _label(model, best := int(score_C.argmax()))
        begins, _, kind = said.rpartition("-") if said[:2] in ("B-", "I-") else ("", "", said)
        if said == "O":
            open_kind = ""
            continue
        if kind == open_kind and begins != "B":
            found[-1] = (kind, [*found[-1][1], float(score_C[best])], found[-1][2], end)
        else:
            found.append((kind, [float(score_C[best])], start, end))
        open_kind = kind
    return [_entity(text, *one) for one in found]


def _entity(text: str, kind: str, scores: list[float], start: int, end: int) -> Entity:
    while start < end and text[start].isspace():  # a byte-level token begins with the space before its word
        start += 1
    return Entity(kind, sum(scores) / len(scores), start, end, text[start:end])


def _parts(model: Answerer, question: str, context: str) -> list[Encoding]:
    """A question with each part of its context."""
    tokenizer, whole = model.tokenizer, min(PART_TOKENS, model.maximum_tokens)
    asked = tokenizer.encode(question, add_special_tokens=False)
    around = tokenizer.num_special_tokens_to_add(True)
    room = whole - len(asked.ids) - around
    if room < 1:
        raise StageError(
            "the question leaves no room for its context",
            measured=f"{len(asked.ids)} tokens",
            limit=f"{whole - around - 1} tokens",
            remedy="Ask a shorter one.",
        )
    rest = tokenizer.encode(context, add_special_tokens=False)
    if not rest.ids:
        raise StageError("the context has no token", measured=0, limit="at least one", remedy="Give another one.")
    rest.truncate(room, stride=min(SHARED_TOKENS, room // 2))
    return [tokenizer.post_process(asked, part) for part in (rest, *rest.overflowing)]


def _label(model: Answerer, at: int) -> str:
    names = model.config.get("id2label")
    return str(names.get(str(at), f"LABEL_{at}") if isinstance(names, dict) else f"LABEL_{at}")


def _softmax(logits_C: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    raised_C = np.exp(logits_C.astype(np.float64) - logits_C.max())
    found: NDArray[np.float64] = raised_C / raised_C.sum()
    return found


def _sigmoid(logits_C: NDArray[np.float32]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.exp(-np.logaddexp(0, -logits_C.astype(np.float64)))
    return found
