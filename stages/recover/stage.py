"""recover: what surgery cost is learned back from the original, and what a held-out text did not gain is not kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.recover.student import HeldOut, Learner

LITTLE = 0.1
"""Held-out score, nats: a cut that costs no more may leave nothing that so short a training can mend."""
MASKS = "masks.safetensors"
"""What `prune` puts beside the weights where single ones went."""


def tokens_of(budget: Any) -> Any:
    """Tokens of a budget in minutes: "20 min at 800/s" -> 960000. Anything else is given back."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) min at (\d+)/s", budget) if isinstance(budget, str) else None
    return round(float(found[1]) * 60 * int(found[2])) if found else budget


class RecoverParams(Params):
    """How long, how fast and in which way the student learns.

    Attributes:
        tokens: length of the training in tokens read, or minutes at a rate, "20 min at 800/s": a run tells its rate.
        update: `full`: all weights but embedding and head; `lora`: every other matrix by a low-rank product, merged at
            the end; `sparse`: like full, but zeros of matrices with many stay zeros.
        rank: of `lora`'s products.
        window_tokens: tokens of one window.
        batch_windows: windows a step.
        accumulate: parts in which a step's windows are computed; more take less memory.
        learning_rate: at its peak. Of a 135 M model, 5e-5 mended one that had lost little (held-out KL 0.09, which 3e-4
            made 0.22). One without a fifth of its blocks (KL 0.3, on other text 0.7) came to 1.13 times the teacher's
            perplexity with 1.2e-4, on other text to 1.45; with 4e-4 to 1.12 and 1.50. Smaller models take more.
        kl_weight: share of the distance to the teacher in the loss; the rest is the next token's cross-entropy. The
            held-out texts are judged in the same shares, by the cross-entropy that exceeds the teacher's.
        hidden_weight: how much the inputs of blocks before which others are missing should equal the teacher's, or of
            three blocks where none is missing. Without effect where the widths differ.
        written_windows: windows that the teacher, a decoder, writes itself, every other one that is learned from, for
            the sake of other texts; the next token's cross-entropy leaves them out. 64 of them beside `kl_weight: 0.5`
            brought the model without a fifth of its blocks, in 64 steps of 1,024 tokens at 3e-4, to 0.88 times the
            teacher's perplexity on the text's own source and to 1.44 on another.
        teacher_tokens: likeliest tokens of the teacher that are kept at each position.
        temperature: softens teacher and student.
        warmup_steps: steps until the peak rate.
        check_every_steps: how often the held-out texts are scored and the state is saved.
        check_windows: windows of each held-out text.
        patience: checks without a better score until training ends.
        seed: of the order of windows.
    """

    tokens: Annotated[int, BeforeValidator(tokens_of, json_schema_input_type=int | str)] = Field(default=100_000, ge=1)
    update: Literal["full", "lora", "sparse"] = "full"
    rank: int = Field(default=16, ge=1)
    window_tokens: int = Field(default=256, ge=8)
    batch_windows: int = Field(default=4, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    kl_weight: float = Field(default=1.0, ge=0, le=1)
    hidden_weight: float = Field(default=0.3, ge=0)
    written_windows: int = Field(default=0, ge=0)
    teacher_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=8, ge=0)
    check_every_steps: int = Field(default=50, ge=1)
    check_windows: int = Field(default=8, ge=1)
    patience: int = Field(default=3, ge=1)
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return max(1, round(self.tokens / (self.window_tokens * self.batch_windows)))


def recover(params: RecoverParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See RecoverParams. Partial state is saved at every check; a resumed run ends in the same bytes.

    `curve.json` holds every score, `layers.json` how far each tensor moved.
    """
    from stages.models.checkpoint.loading import load_model, save_model
    from stages.recover import student as training
    from stages.recover.loop import Plan, train
    from stages.recover.weight_updates import begin

    _check(params, inputs)
    saved, partial = load_model(inputs["model"]), output / PARTIAL
    made, held = _learner(params, inputs, saved, partial, progress)
    plan = Plan(**params.model_dump(include={field.name for field in fields(Plan)}), steps=params.steps)

    def start() -> Mapping[str, Tensor]:
        fresh = dict(load_model(inputs["model"]).named_parameters())
        return begin(params.update, {name: fresh[name] for name in made.updates.saved}, params.rank, params.seed)

    record = train(plan, made, held, start, partial, progress)
    mended = record.best_step > 0
    judged = "held-out KL" if params.kl_weight == 1 else "held-out score"
    if not mended and record.best > LITTLE:
        raise StageError(
            "recovery did not help",
            measured=f"{judged} {record.best:.4f} before, none lower in {record.step} steps",
            limit=f"a lower {judged} than before",
            remedy="Lower `learning_rate`, give more `tokens` or text nearer to the held-out one, or drop the step.",
        )
    if mended:
        training.take_best(made, partial, record)
    else:
        training.take(made, start())
        progress.note(
            f"little was lost and nothing mended: {judged} {record.best:.4f} before, none lower in {record.step} "
            "steps; the weights stay as they came"
        )
    after = training.last_score(record, held) or training.score(made, held)
    made.updates.finish()
    save_model(saved, output, like=inputs["model"])
    (output / "curve.json").write_text(json.dumps(record.curve) + "\n", encoding="utf-8")
    return {
        **_proven(params, inputs["model"], output, mended),
        **{f"kl_{role}_after": one.kl for role, one in after.items()},
        **({f"excess_{role}_after": one.excess for role, one in after.items()} if params.kl_weight < 1 else {}),
        "kl_before": record.kl_before,
        "kl_after": record.best_kl,
        "steps": float(record.step),
        "best_step": float(record.best_step),
        "tokens": float(record.step * params.batch_windows * params.window_tokens),
    }


def _learner(
    params: RecoverParams, inputs: Mapping[str, Path], saved: PreTrainedModel, partial: Path, progress: Progress
) -> tuple[Learner, list[HeldOut]]:
    """Student and teacher side by side, the teacher's answers below `partial`, and what is judged by."""
    import torch

    from stages.models.checkpoint.loading import load_tokenizer
    from stages.models.text.windows import windows
    from stages.recover import student as training
    from stages.recover.headless import load_apart
    from stages.recover.matched_blocks import listened
    from stages.recover.teacher_answers import Lessons
    from stages.recover.teacher_text import write
    from stages.recover.weight_updates import updates

    tokenizer, tokens = load_tokenizer(inputs["model"]), params.window_tokens
    ids_NT = windows(inputs["text"], "train", tokenizer, tokens)
    roles = [role for role in ("text", "other") if role in inputs]
    judged = {role: windows(inputs[role], "validate", tokenizer, tokens, most=params.check_windows) for role in roles}
    if saved.config.is_encoder_decoder:
        ids_NT = ids_NT[: params.steps * params.batch_windows]
        ids_NT, judged = _with_answers(inputs["teacher"], ids_NT, judged, partial, progress)
    student, teacher = (load_apart(inputs[role], tokens) for role in ("model", "teacher"))
    given, written = len(ids_NT), params.written_windows
    ids_NT = torch.cat([ids_NT, ids_NT.new_zeros(written, ids_NT.shape[1])])
    pairs = listened(student.model, teacher.model) if params.hidden_weight else []
    if pairs and student.model.config.hidden_size != teacher.model.config.hidden_size:
        progress.note("the teacher's hidden states are of another width: the student learns from its tokens alone")
        pairs = []
    lessons = Lessons(
        teacher,
        ids_NT,
        partial / "teacher",
        tokens_kept=params.teacher_tokens,
        temperature=params.temperature,
        listened={theirs.name: theirs.module for _, theirs in pairs},
    )
    if written:
        write(teacher, ids_NT[given:], params.seed, partial / "written.safetensors", lessons, given)
    made = training.learner(
        student,
        teacher,
        ids_NT,
        lessons,
        updates(params.update, saved, student.model, rank=params.rank, seed=params.seed),
        goal=training.Goal(params.kl_weight, params.temperature, params.hidden_weight),
        at_once=-(-params.batch_windows // params.accumulate),
        listened={mine.name: mine.module for mine, _ in pairs},
        written=written,
    )
    return made, [training.held_out(teacher, role, judged[role]) for role in roles]


def _with_answers(
    folder: Path, ids_NS: Tensor, judged: dict[str, Tensor], partial: Path, progress: Progress
) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows of an encoder-decoder: the text, and what the teacher answers to it, kept below `partial`."""
    import torch

    from stages.models.checkpoint.loading import load_model
    from stages.models.text.decoder_answers import answered

    teacher = load_model(folder, dtype=torch.bfloat16)
    progress.note(f"the teacher answers {len(ids_NS)} windows of the text, which its decoder learns from")
    found = {}
    for name, text_NS in {"train": ids_NS, **judged}.items():
        found[name] = torch.cat([text_NS, answered(teacher, text_NS, partial / f"answers-{name}.safetensors")], dim=1)
    return found.pop("train"), found


def _check(params: RecoverParams, inputs: Mapping[str, Path]) -> None:
    """Raise StageError unless model and teacher speak the same tokens, and the model can learn in the way asked."""
    from stages.models.checkpoint.loading import QUANTIZATION, load_config, load_tokenizer

    model, teacher = inputs["model"], inputs["teacher"]
    sizes = [load_config(folder).vocab_size for folder in (model, teacher)]
    if sizes[0] != sizes[1] or load_tokenizer(model).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise StageError(
            "model and teacher do not speak the same tokens",
            measured=f"vocabulary of {sizes[1]} in the teacher",
            limit=f"the model's own, {sizes[0]}",
            remedy="Give as teacher the checkpoint that the model was made from.",
        )
    for role in ("model", "teacher"):
        if (inputs[role] / QUANTIZATION).is_file():
            raise StageError(
                f"a quantized checkpoint cannot {'learn' if role == 'model' else 'teach'}",
                remedy="Put `recover` before `quantize`.",
            )
    if (model / MASKS).is_file() and params.update != "sparse":
        raise StageError(
            f"`update: {params.update}` would fill the zeros that {MASKS} keeps", remedy="Give `update: sparse`."
        )


def _proven(params: RecoverParams, before: Path, after: Path, mended: bool) -> Metrics:
    """Write what became of each tensor, and count those that changed between the two checkpoints on disk."""
    from stages.models.checkpoint.loading import stored_parameters
    from stages.recover.proof import changes

    rows = changes(before, after, zeros_stay=params.update == "sparse", mended=mended)
    if (before / MASKS).is_file():
        shutil.copyfile(before / MASKS, after / MASKS)
    (after / "layers.json").write_text(
        json.dumps({"update": params.update, "layers": rows}, indent=1) + "\n", encoding="utf-8"
    )
    changed = sum(row["relative_change"] > 0 for row in rows)
    return {"changed_tensors": float(changed), "parameters": float(stored_parameters(after))}


RECOVER = Stage(
    name="recover",
    params=RecoverParams,
    inputs={
        "model": Input(kinds=frozenset({Kind.CHECKPOINT})),
        "teacher": Input(kinds=frozenset({Kind.CHECKPOINT})),
        "text": Input(kinds=frozenset({Kind.CORPUS})),
        "other": Input(kinds=frozenset({Kind.CORPUS}), optional=True),
    },
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=recover,
)
