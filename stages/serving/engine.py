"""One face over every backend: open an engine, a graph or a checkpoint, and ask it for logits or text.

This module travels inside the registered model, and the backend of its engine with it. For an ONNX Runtime engine it
imports numpy, onnxruntime and tokenizers, nothing larger.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stages.adapters.backends import GRAPHS_BACKEND, Forward, Slots, Steps, backend, refuse_impossible
from stages.runtime.contract import StageError
from stages.serving.answering import asking, rows_apart
from stages.serving.artifact_files import bare, described_by, ends_of, read_beside, read_tokenizer, settings_of
from stages.serving.beams import Beams, beams_of, chosen, refuse_pieces, searched
from stages.serving.chat import Chat, chat
from stages.serving.generate import ROWS, Weigh, written
from stages.serving.generation import Generation, generation
from stages.serving.inputs import Prompt, encoded, require_rows
from stages.serving.rules import FREE, Rules, rules_of
from stages.serving.sampling import Drawing, weighing
from stages.serving.writing import Answer, Writing

GRAPH, DESCRIBED, ENGINE = "model.onnx", "graph.json", "engine.json"
WRITES = ("generate", "translate")
"""The tasks of models that write: what continues a text, and a decoder that answers what an encoder reads."""
_ENGINE_FIELDS = {"backend": str, "executable": str, "architectures": list, "maximum_tokens": int}
_GRAPH_FIELDS = {"precisions": list, "maximum_tokens": int}
ENDLESS = 2**31 - 1
"""Tokens that a model reads whose positions have no end."""


@dataclass(frozen=True)
class Answerer:
    """A model that answers; to one with an encoder and a decoder, a prompt is what the encoder reads.

    Attributes:
        target: what executes it: `onnxruntime:cpu`, `torch:cpu`, `torch:cuda`, `tensorrt_rtx:sm_89`, ...
        task: what it is for: `generate` for what continues a text, see `stages.models.anatomy.tasks`.
        maximum_tokens: the longest sequence it reads.
        tokenizer: turns text into its tokens.
        ends: tokens that end a sequence.
        forward: (ids_NT, mask_NT) -> logits_NTV, or what else a model of its task answers.
        steps: begins to keep what it reads of some sequences; None where nothing does.
        chat: how conversations are written; None where the tokenizer has no chat template.
        slots: as `steps`, for sequences that come and go.
        config: what config.json says; `stages.serving.reading` finds the names of classes there.
        tells_segments: `forward` takes the segments of a pair's tokens, too.
        scores: as `steps`, told by log-probabilities.
        beams: how answers are searched by its settings.
        rules: what may come next by its settings.
        start: the token that a decoder behind an encoder reads first.
    """

    target: str
    task: str
    maximum_tokens: int
    tokenizer: Tokenizer
    ends: frozenset[int]
    forward: Forward
    steps: Callable[[], Steps] | None = None
    chat: Chat | None = None
    slots: Callable[[], Slots] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tells_segments: bool = False
    scores: Callable[[], Steps] | None = None
    beams: Beams = field(default_factory=Beams)
    start: int | None = None
    rules: Rules = FREE

    def logits(self, ids_NT: NDArray[np.int64], type_NT: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """logits_NTV of whole sequences, or what else a model of its task answers.

        Args:
            ids_NT: rows of one length.
            type_NT: the segment of each token, for a model that tells them; all are of the first without it.

        Raises:
            StageError: they are none, or longer than the model reads.
        """
        ids_NT = np.ascontiguousarray(ids_NT, dtype=np.int64)
        require_rows(ids_NT)
        self._check(ids_NT.shape[1])
        segments = [type_NT] if self.tells_segments and type_NT is not None else []
        return self.forward(ids_NT, np.ones_like(ids_NT), *segments)

    def generate(self, prompts: Sequence[Prompt], **asked: Any) -> list[str]:
        """Continue or answer each prompt, up to the first token that ends a sequence.

        Args:
            prompts: texts and tokens, taken as they stand, and conversations.
            asked: see `stages.serving.generation.Generation`; the most likely tokens unless told otherwise.

        Raises:
            StageError: the model continues no text, a prompt is empty or longer than it reads, it has no chat template
                for a conversation, or what is asked is out of range or beams of a model that keeps nothing.
        """
        return [one.text for one in self.answers(prompts, generation(asked))]

    def answers(self, prompts: Sequence[Prompt], how: Generation) -> list[Answer]:
        """As `generate`; says besides how each answer ended."""
        most, rows = self.admitted(prompts, how)
        beams = self.searching(how)
        if beams.count > 1:
            return self._by_beams(rows, how, beams, most)
        # What keeps all that it reads has room for no number of prompts.
        at_once = ROWS if self.steps else max(1, len(rows))
        found: list[Answer] = []
        for some in (rows[start : start + at_once] for start in range(0, len(rows), at_once)):
            writings, new = [Writing(self.tokenizer, how.stop) for _ in some], [list[int]() for _ in some]
            for _ in self._written(some, new, writings, how, most):
                pass
            found += [
                self.answer(len(row), *said) for row, said in zip(some, zip(new, writings, strict=True), strict=True)
            ]
        return found

    def searching(self, how: Generation) -> Beams:
        """How answers are searched that are asked for so.

        Raises:
            StageError: by beams, and nothing of what is read is kept.
        """
        return chosen(how, self.beams, follows=self.task == "translate", kept=self.scores is not None)

    def _by_beams(self, rows: Sequence[list[int]], how: Generation, beams: Beams, most: int) -> list[Answer]:
        def ended(new: list[int]) -> bool:
            return bool(how.stop) and Writing(self.tokenizer, how.stop).ends(new)

        assert self.scores is not None
        limits, weigh = [self.most_new(len(row), most) for row in rows], self.weighing(rows, how)
        found = searched(self.scores, rows, beams, ends=self.ends, most=limits, ended=ended, weigh=weigh)
        writings = [Writing(self.tokenizer, how.stop) for _ in rows]
        return [self.answer(len(row), new, one) for row, new, one in zip(rows, found, writings, strict=True)]

    def stream(self, prompt: Prompt, /, **asked: Any) -> Generator[str, None, Answer]:
        """The pieces of one answer as they come: joined they are what `generate` says; the answer is returned.

        Where the model's settings ask for beams the answer is one piece.

        Raises:
            StageError: as of `generate`, or for beams.
        """
        how = generation(asked)
        refuse_pieces(how)
        most, rows = self.admitted([prompt], how)
        return self._pieces(rows, how, most)

    def _pieces(self, rows: list[list[int]], how: Generation, most: int) -> Generator[str, None, Answer]:
        if (beams := self.searching(how)).count > 1:
            (answer,) = self._by_beams(rows, how, beams, most)
            if answer.text:
                yield answer.text
            return answer
        writing, new = Writing(self.tokenizer, how.stop), list[int]()
        for _ in self._written(rows, [new], [writing], how, most):
            if piece := writing.piece(new):
                yield piece
        if piece := writing.piece(new, last=True):
            yield piece
        return self.answer(len(rows[0]), new, writing)

    def _written(
        self, rows: list[list[int]], new: list[list[int]], writings: list[Writing], how: Generation, most: int
    ) -> Iterator[int]:
        def goes_on(number: int) -> bool:
            return self.goes_on(len(rows[number]), new[number], writings[number], most)

        draw = Drawing(how, len(rows), self.rules)

        def choose(number: int, row: Sequence[int], logits_V: NDArray[np.float32]) -> int:
            new = row[len(rows[number]) :]
            return draw(number, self.seen(rows[number], new), logits_V, len(new))

        return written(self.steps() if self.steps else self.forward, rows, new, goes_on, choose)

    def seen(self, prompt: Sequence[int], new: Sequence[int]) -> list[int]:
        """What a decoder has read when it has said so much; what an encoder reads it may well say again."""
        if self.task != "translate":
            return [*prompt, *new]
        return [*new] if self.start is None else [self.start, *new]

    def weighing(self, rows: Sequence[Sequence[int]], how: Generation | None = None) -> Weigh:
        """What the settings allow to follow prompts, and what it costs there to say a token again."""
        return weighing(how or Generation(), self.rules, lambda number, new: self.seen(rows[number], new))

    def most_new(self, prompt_tokens: int, most: int) -> int:
        """New tokens that there is room for; a decoder behind an encoder reads one before them, and not the prompt.

        The last place is that of an end, where the settings want one there.
        """
        room = min(most, self.maximum_tokens - (1 if self.task == "translate" else prompt_tokens))
        return room - bool(self.beams.last)

    def goes_on(self, prompt_tokens: int, new: list[int], writing: Writing, most: int) -> bool:
        """Whether another token of an answer is wanted.

        Args:
            prompt_tokens: that were read.
            new: tokens that were said.
            writing: their text.
            most: at most so many of them.
        """
        if len(new) >= self.most_new(prompt_tokens, most):
            return False
        return not new or not (new[-1] in self.ends or (writing.stop and writing.ends(new)))

    def answer(self, prompt_tokens: int, new: list[int], writing: Writing) -> Answer:
        """What was said, once no token follows; see `goes_on`."""
        text = writing.text(new)
        ended = writing.stopped or (new and new[-1] in self.ends)
        return Answer(text, "stop" if ended else "length", prompt_tokens, len(new))

    def admitted(self, prompts: Sequence[Prompt], how: Generation) -> tuple[int, list[list[int]]]:
        """At most so many new tokens, and the tokens of each prompt; refuses as `generate` does."""
        if self.task not in WRITES:
            raise StageError(
                "the model continues no text",
                measured=f"its task is {self.task}",
                limit=" or ".join(WRITES),
                remedy="Ask it for its `logits`.",
            )
        most, rows = how.most(self.maximum_tokens), [encoded(self.tokenizer, self.chat, prompt) for prompt in prompts]
        for ids in rows:
            if not ids:
                raise StageError("a prompt is empty", remedy="Give each prompt at least one character.")
            self._check(len(ids))
        return most, rows

    def _check(self, tokens: int) -> None:
        if tokens > self.maximum_tokens:
            raise StageError(
                "the sequence is longer than the model reads",
                measured=f"{tokens} tokens",
                limit=f"{self.maximum_tokens} tokens",
                remedy="Shorten it, or compile with a larger `maximum_tokens`.",
            )


def open_engine(folder: Path, *, verified: bool = False, device: str = "cpu") -> Answerer:
    """Open an ENGINE, ONNX or CHECKPOINT folder.

    Args:
        folder: of the artifact.
        verified: the caller hashed the files against a manifest. A TensorRT plan is executable code and is not
            deserialized otherwise.
        device: where a checkpoint is executed, `cpu` or `cuda`; an engine or a graph says so itself.

    Raises:
        StageError: the folder is none of the three, damaged, or a graph of numbers that no processor multiplies here.
        DoesNotFit: the engine is for a device that this machine has not.
    """
    config = read_beside(folder / "config.json")
    if not any((folder / name).is_file() for name in (ENGINE, GRAPH)):
        return _checkpoint(folder, config, device)
    if (folder / ENGINE).is_file():
        described = described_by(folder / ENGINE, _ENGINE_FIELDS)
        executable = folder / described["executable"]
        opened = backend(described["backend"]).execute(executable, described["architectures"], verified)
    else:
        described = described_by(folder / DESCRIBED, _GRAPH_FIELDS)
        refuse_impossible(GRAPHS_BACKEND, (), described["precisions"])
        opened = backend(GRAPHS_BACKEND).execute(folder / GRAPH, (), False)
    task, most = described.get("task", "generate"), int(described["maximum_tokens"])
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    forward, steps, scores, start = asking(opened, described, most)
    slots: Callable[[], Slots] | None = None if opened.slots is None else partial(opened.slots, most)
    slots = slots if opened.stacks is None else rows_apart(slots, described)
    made = Answerer(opened.target, task, most, tokenizer, frozenset(), forward, steps, chat(folder), slots, config)
    return _set(folder, replace(made, tells_segments=opened.tells_segments, scores=scores, start=start))


def _checkpoint(folder: Path, config: dict[str, Any], device: str) -> Answerer:
    # torch is a gigabyte that an engine does not need.
    from stages.serving.eager import eager, fast_tokenizer, names_segments

    opened = eager(folder, device)
    most = ENDLESS if opened.longest is None else opened.longest
    tokenizer = bare(fast_tokenizer(folder))
    how = (opened.forward, opened.steps, chat(folder))
    made = Answerer(f"torch:{device}", opened.task, most, tokenizer, frozenset(), *how, config=config)
    made = replace(made, tells_segments=opened.tells_segments and names_segments(folder))
    return _set(folder, replace(made, scores=opened.scores, start=opened.start))


def _set(folder: Path, made: Answerer) -> Answerer:
    """A model that answers by the settings of generation in its folder."""
    settings = settings_of(folder, made.config)
    ends = ends_of(settings, made.config)
    return replace(made, ends=ends, beams=beams_of(settings, made.task), rules=rules_of(settings, ends))
