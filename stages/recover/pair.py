"""Student and teacher side by side: the texts that both read, the teacher's answers, and what the student is judged by.

Shapes: N windows, T tokens, S tokens of an encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.models.anatomy.blocks import Block
from stages.models.checkpoint.editing import readable
from stages.models.checkpoint.loading import load_model, load_tokenizer
from stages.models.text.decoder_answers import answered
from stages.models.text.windows import windows
from stages.recover.headless import Apart, load_apart
from stages.recover.matched_blocks import listened
from stages.recover.params import RecoverParams
from stages.recover.student import Goal, HeldOut, Learner, held_out, learner
from stages.recover.teacher_answers import Lessons
from stages.recover.teacher_text import write
from stages.recover.weight_updates import updates
from stages.runtime.contract import Progress


def side_by_side(
    params: RecoverParams, inputs: Mapping[str, Path], saved: PreTrainedModel, partial: Path, progress: Progress
) -> tuple[Learner, list[HeldOut]]:
    """The student with all that it learns from, and the held-out texts.

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
    ids_NT = windows(inputs["text"], "train", tokenizer, tokens, progress=progress)
    roles = [role for role in ("text", "other") if role in inputs]
    judged = {role: windows(inputs[role], "validate", tokenizer, tokens, most=params.check_windows) for role in roles}
    if saved.config.is_encoder_decoder:
        ids_NT = ids_NT[: params.steps * params.batch_windows]
        ids_NT, judged = _with_answers(inputs["teacher"], ids_NT, judged, partial, progress)
    student, teacher = (load_apart(inputs[role], tokens) for role in ("model", "teacher"))
    pairs = _pairs(params, student, teacher, progress)
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
    return made, [held_out(teacher, role, judged[role]) for role in roles]


def _with_answers(
    folder: Path, ids_NS: Tensor, judged: dict[str, Tensor], partial: Path, progress: Progress
) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows of an encoder-decoder: the text, and what the teacher answers to it, kept below `partial`."""
    teacher = load_model(folder, dtype=torch.bfloat16)
    progress.note(f"the teacher answers {len(ids_NS)} windows of the text, which its decoder learns from")
    found = {}
    for name, text_NS in {"train": ids_NS, **judged}.items():
        found[name] = torch.cat([text_NS, answered(teacher, text_NS, partial / f"answers-{name}.safetensors")], dim=1)
    return found.pop("train"), found


def _pairs(params: RecoverParams, student: Apart, teacher: Apart, progress: Progress) -> list[tuple[Block, Block]]:
    """Blocks of both whose inputs should agree."""
    pairs = listened(student.model, teacher.model) if params.hidden_weight else []
    if pairs and student.model.config.hidden_size != teacher.model.config.hidden_size:
        progress.note("the teacher's hidden states are of another width: the student learns from its tokens alone")
        return []
    return pairs


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
