"""Student and teacher side by side: the texts that both read, the teacher's answers, and what the student is judged by.

Shapes: N windows, T tokens, S tokens of an encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.algorithms.products import SHORT
from stages.models.anatomy.blocks import Block
from stages.models.anatomy.tasks import task
from stages.models.checkpoint.editing import readable
from stages.models.checkpoint.loading import load_model, load_tokenizer
from stages.models.text.decoder_answers import answered
from stages.models.text.text_ends import special_ends
from stages.models.text.windows import Each, sliced_windows, windows
from stages.recover.headless import ERRORS, Apart, load_apart, said
from stages.recover.held_out import HeldOut, by_source, held_out
from stages.recover.matched_blocks import inputs_of, listened
from stages.recover.params import RecoverParams
from stages.recover.student import Goal, Learner, learner
from stages.recover.teacher_answers import Lessons
from stages.recover.teacher_text import write
from stages.recover.weight_updates import updates
from stages.runtime.contract import Progress, StageError

HIDDEN = 0.15
"""Share of a masked model's tokens that are hidden (Devlin et al. 2018, section 3.1)."""
SPREAD_WINDOWS = 32
"""Windows by which the spread of a teacher's numbers is measured: it is known to an eighth then."""


def side_by_side(
    params: RecoverParams, inputs: Mapping[str, Path], saved: PreTrainedModel, partial: Path, progress: Progress
) -> tuple[Learner, list[HeldOut]]:
    """The student with all that it learns from, and the held-out texts: each source of each input is one.

    Args:
        params: how it learns.
        inputs: of the stage.
        saved: the model that came, whose weights take what is learned.
        partial: folder that keeps the teacher's answers.
        progress: told what is done without being asked for.

    Raises:
        StageError: a text is shorter than one window, or a model cannot learn, teach or write as asked.
    """
    tokenizer, tokens = load_tokenizer(inputs["model"]), readable(inputs["model"], params.window_tokens, progress)
    made_for = task(saved.config)
    ids_NT = windows(inputs["text"], "train", tokenizer, tokens, progress=progress, task=made_for)
    judged: dict[str, Tensor] = {}
    for role in ("text", "other"):
        if role in inputs:
            each = Each(params.check_windows)
            held = sliced_windows(
                inputs[role], "validate", tokenizer, tokens, most=each, progress=progress, task=made_for
            )
            judged |= by_source(role, held)
    if made_for == "fill":
        ids_NT, judged = _with_gaps(tokenizer, ids_NT, judged, params.seed, progress)
    if made_for == "translate":
        ids_NT = ids_NT[: params.steps(tokens) * params.batch_windows]
        ids_NT, judged = _with_answers(inputs["teacher"], ids_NT, judged, partial, progress)
    student, teacher = (load_apart(inputs[role], tokens) for role in ("model", "teacher"))
    if teacher.task in ("score", "choose"):
        student, teacher = _spread(student, teacher, ids_NT)
    pairs = _pairs(params, student, teacher, progress)
    for one, blocks in ((student, [mine for mine, _ in pairs]), (teacher, [theirs for _, theirs in pairs])):
        _check_read(one, ids_NT[:1], blocks)
    lessons = _lessons(params, teacher, ids_NT, [theirs for _, theirs in pairs], partial)
    made = learner(
        student,
        lessons,
        updates(params.update, saved, student.model, rank=params.rank, seed=params.seed),
        goal=Goal(params.kl_weight, params.temperature, params.hidden_weight),
        at_once=-(-params.batch_windows // params.accumulate),
        listened={mine.name: mine.module for mine, _ in pairs},
        written=params.written_windows,
    )
    return made, [held_out(teacher, name, ids_NT) for name, ids_NT in judged.items()]


def _with_answers(
    folder: Path, ids_NS: Tensor, judged: dict[str, Tensor], partial: Path, progress: Progress
) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows of an encoder-decoder: the text, and what the teacher answers to it, kept below `partial`."""
    teacher = load_model(folder, dtype=SHORT)
    progress.note(f"the teacher answers {len(ids_NS)} windows of the text, which its decoder learns from")
    found = {}
    for name, text_NS in {"train": ids_NS, **judged}.items():
        found[name] = torch.cat([text_NS, answered(teacher, text_NS, partial / f"answers-{name}.safetensors")], dim=1)
    return found.pop("train"), found


def _with_gaps(
    tokenizer: PreTrainedTokenizerBase, ids_NT: Tensor, judged: dict[str, Tensor], seed: int, progress: Progress
) -> tuple[Tensor, dict[str, Tensor]]:
    """The windows with some tokens of the text hidden: both models fill the same gaps."""
    mask = tokenizer.mask_token_id
    if mask is None:
        progress.note("the tokenizer has no mask token: student and teacher read whole windows")
        return ids_NT, judged
    generator, found = torch.Generator().manual_seed(seed), {}
    before, after = special_ends(tokenizer)
    text = slice(len(before), ids_NT.shape[1] - len(after))
    for name, one_NT in {"train": ids_NT, **judged}.items():
        hidden_NT = torch.rand(one_NT.shape, generator=generator) < HIDDEN
        found[name] = one_NT.clone()
        found[name][:, text] = one_NT[:, text].masked_fill(hidden_NT[:, text], mask)
    return found.pop("train"), found


@torch.no_grad()
def _spread(student: Apart, teacher: Apart, ids_NT: Tensor) -> tuple[Apart, Apart]:
    """Both with the spread of the teacher's numbers over the first windows, by which a difference counts."""
    numbers = torch.cat([teacher.hidden(ids_1T).float() for ids_1T in ids_NT[:SPREAD_WINDOWS].split(1)])
    spread = float(numbers.std(correction=0))
    if not spread > 0:
        raise StageError(
            "the teacher gives every window the same number, so that nothing can be learned from it",
            measured=f"a spread of {spread:.3g} over {len(numbers)} windows",
            limit="a larger one",
            remedy="Give a text with more windows, or lower `window_tokens` of the step.",
        )
    made = [replace(one, head=replace(one.head, spread=spread)) for one in (student, teacher)]
    return made[0], made[1]


def _pairs(params: RecoverParams, student: Apart, teacher: Apart, progress: Progress) -> list[tuple[Block, Block]]:
    """Blocks of both whose inputs should agree."""
    pairs = listened(student.model, teacher.model) if params.hidden_weight else []
    if (
        pairs
        and student.model.config.get_text_config().hidden_size != teacher.model.config.get_text_config().hidden_size
    ):
        progress.note("the teacher's hidden states are of another width: the student learns from its tokens alone")
        return []
    return pairs


@torch.no_grad()
def _check_read(one: Apart, ids_1T: Tensor, blocks: Sequence[Block]) -> None:
    """Raise StageError where a model does not run on a window, or its blocks read something else than [N, T, H]."""
    name = type(one.model).__name__
    try:
        with inputs_of({block.name: block.module for block in blocks}) as heard:
            one.hidden(ids_1T)
    except ERRORS as error:
        raise StageError(
            f"{name} does not read a window of the text",
            measured=said(error),
            remedy="Give a tokenizer that begins and ends texts as the model learned them, or leave `recover` out.",
        ) from error
    tokens = one.counted_tokens(ids_1T).shape[1]
    for block, x_NTH in heard.items():
        if x_NTH.shape[:2] != (1, tokens):
            raise StageError(
                f"{block} of {name} reads its tokens in another order than one window after another",
                measured=f"{list(x_NTH.shape)} of one window of {tokens} tokens",
                limit="[windows, tokens, hidden]",
                remedy="Set `hidden_weight: 0` in the step.",
            )


def _lessons(params: RecoverParams, teacher: Apart, ids_NT: Tensor, blocks: list[Block], partial: Path) -> Lessons:
    """The teacher's answers to these windows, and to those that it writes itself after them."""
    given, written = len(ids_NT), params.written_windows
    ids_NT = torch.cat([ids_NT, ids_NT.new_zeros(written, ids_NT.shape[1])])
    lessons = Lessons(
        teacher,
        ids_NT,
        partial / "teacher",
        tokens_kept=params.teacher_tokens,
        temperature=params.temperature,
        listened={block.name: block.module for block in blocks},
    )
    if written:
        write(teacher, ids_NT[given:], params.seed, partial / "written.safetensors", lessons, given)
    return lessons
