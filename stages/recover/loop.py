"""The course of a training run: step, check, save, step back from a loss that left its course, resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stages.algorithms.schedule import batch, cosine
from stages.recover import student
from stages.recover.headless import OF_A_WINDOW
from stages.recover.held_out import NOTHING_LOST, HeldOut, Score, mean_kl, score, worst
from stages.recover.student import Learner, Record
from stages.runtime.contract import Progress, StageError

LARGEST_JUMP = 4.0
"""A loss this many times the median of the last ones is a jump: batches of one text differ by less than 2."""
LARGEST_JUMP_OF_FEW = 16.0
"""The same where a window has one answer or two: of a batch of four, one squared error outweighs the others."""
REMEMBERED = 16
LITTLE = 0.1
"""Nats: a cut that costs no more of a held-out score may leave nothing that so short a training can mend, and losses
of batches that are all lower may differ by any factor."""


@dataclass(frozen=True)
class Plan:
    """Length and rate of a run, and how often it is checked and saved."""

    steps: int
    batch_windows: int
    learning_rate: float
    warmup_steps: int
    check_every_steps: int
    patience: int
    seed: int
    written_windows: int = 0


def train(
    plan: Plan,
    made: Learner,
    held: Sequence[HeldOut],
    start: Callable[[], Mapping[str, Tensor]],
    partial: Path,
    progress: Progress,
) -> Record:
    """Train, or go on from the state in `partial`, until the steps are done or patience ends.

    A step is better than another one where the held-out text is better that has won least so far.

    Args:
        plan: how long and how fast.
        made: student, lessons, optimizer.
        held: texts to judge by.
        start: gives the tensors that the student began with, if a step must be taken back before the first save.
        partial: where state is kept; a state saved there is gone on from.
        progress: told of every step.

    Returns:
        Where the run ended; the best weights lie in `partial`.

    Raises:
        StageError: the loss left its course again after the rate was halved.
    """
    record = student.resume(made, partial)
    if record is None:
        record = _fresh(made, held, progress)
    else:
        progress.note(f"goes on from step {record.step} of {plan.steps}, saved before it was cut off")
    began, first = time.monotonic(), record.step
    while record.step < plan.steps and record.checks_since_best < plan.patience:
        share = cosine(record.step, plan.steps, plan.warmup_steps)
        chosen = batch(record.step, plan.batch_windows, len(made.ids_NT), plan.seed, plan.written_windows)
        loss = student.learn(made, chosen, plan.learning_rate * record.rate_factor * share)
        if jumped(loss, record.losses, _largest_jump(made)):
            record = _rolled_back(made, start, partial, progress, record, loss)
            continue
        record.step += 1
        record.losses = [*record.losses, loss][-REMEMBERED:]
        made.updates.check_one(record.step)
        record.point("kl", loss, record.step)
        progress.metric("kl", loss, record.step)
        progress.advanced(record.step, plan.steps)
        if record.step % plan.check_every_steps == 0 or record.step == plan.steps:
            _check(made, held, record, progress)
            student.save(made, partial, record)
    if record.step > first:
        tokens = made.student.counted_tokens(made.ids_NT[:1]).numel()
        _tell_rate((record.step - first) * plan.batch_windows * tokens, time.monotonic() - began, progress)
    return record


def take_what_helped(
    made: Learner, record: Record, start: Callable[[], Mapping[str, Tensor]], partial: Path, progress: Progress
) -> bool:
    """Give the student its best weights, or those that it began with where none are better on every held-out text.

    Args:
        made: student, lessons, optimizer.
        record: where the run ended.
        start: gives the tensors that the student began with.
        partial: where the best ones lie.
        progress: told why the weights stay.

    Returns:
        Whether training mended anything.

    Raises:
        StageError: much was lost, and nothing mended.
    """
    if record.best_step > 0:
        student.take_best(made, partial, record)
        return True
    judged, before = made.goal.judged, made.goal.of_each(record.before)
    lost = ", ".join(f"{name} {value:.4f}" if len(before) > 1 else f"{value:.4f}" for name, value in before.items())
    won = [f"{name} to {low:.4f}" for name, low in record.lowest.items() if low < before[name] > NOTHING_LOST]
    if not won and max(before.values()) > LITTLE:
        raise StageError(
            "recovery did not help",
            measured=f"{judged} {lost} before, none lower in {record.step} steps",
            limit=f"a lower {judged} than before",
            remedy="Lower `learning_rate`, give more `tokens` or text nearer to the held-out one, or drop the step.",
        )
    student.take(made, start())
    if won:
        why = f"no held-out text got better without another one getting worse: {judged} {lost} before, {', '.join(won)}"
        progress.note(f"{why} at best in {record.step} steps; the weights stay as they came")
    else:
        why = f"little was lost and nothing mended: {judged} {lost} before, none lower in {record.step} steps"
        progress.note(f"{why}; the weights stay as they came")
    return False


def jumped(loss: float, losses: Sequence[float], largest: float = LARGEST_JUMP) -> bool:
    """Whether a loss is not finite, or more than `largest` times the median of those before it.

    Where that is next to nothing a teacher is sure of nearly all: the one window of which it is not is no jump.
    """
    # A comparison with NaN is false, so that this order catches it too.
    if not loss < float("inf"):
        return True
    return len(losses) >= REMEMBERED // 2 and loss > largest * max(LITTLE, sorted(losses)[len(losses) // 2])


def _largest_jump(made: Learner) -> float:
    return LARGEST_JUMP_OF_FEW if made.student.task in OF_A_WINDOW else LARGEST_JUMP


def _tell_rate(tokens: int, seconds: float, progress: Progress) -> None:
    rate = max(1, round(tokens / seconds))
    progress.note(f"read {rate} tokens a second here; `tokens: 20 min at {rate}/s` is a budget of twenty minutes")


def _fresh(made: Learner, held: Sequence[HeldOut], progress: Progress) -> Record:
    record = Record()
    record.before = record.best = _scored(made, held, record, progress)
    record.lowest = made.goal.of_each(record.before)
    return record


def _check(made: Learner, held: Sequence[HeldOut], record: Record, progress: Progress) -> None:
    scores, goal = _scored(made, held, record, progress), made.goal
    before, now = goal.of_each(record.before), goal.of_each(scores)
    record.checks_since_best += 1
    record.lowest = {name: min(record.lowest[name], value) for name, value in now.items()}
    if worst(now, before) < worst(goal.of_each(record.best), before):
        record.best, record.best_step, record.checks_since_best = scores, record.step, 0


def _scored(made: Learner, held: Sequence[HeldOut], record: Record, progress: Progress) -> dict[str, Score]:
    """The score of each text, and of several which part is left of the worst one's loss."""
    scores = score(made.student, made.teacher, held)
    points = {}
    for text, one in scores.items():
        points[f"kl_{text}_held_out"] = one.kl
        if made.goal.kl_weight < 1:
            points[f"excess_{text}_held_out"] = one.excess
    if len(scores) > 1:
        points["worst_held_out"] = worst(*map(made.goal.of_each, (scores, record.before or scores)))
    for name, value in points.items():
        record.point(name, value, record.step)
        progress.metric(name, value, record.step)
    return scores


def _rolled_back(
    made: Learner,
    start: Callable[[], Mapping[str, Tensor]],
    partial: Path,
    progress: Progress,
    record: Record,
    loss: float,
) -> Record:
    what = f"the loss left its course at step {record.step + 1}"
    if record.rate_factor < 1:
        raise StageError(
            f"{what}, again after the learning rate was halved",
            measured=f"loss {loss:.4g}, {record.losses[-1] if record.losses else mean_kl(record.before):.4g} before",
            limit=f"{_largest_jump(made)} times the median of the last {REMEMBERED} losses",
            remedy="Lower `learning_rate`, or look at the text for passages unlike the rest.",
        )
    back = student.resume(made, partial)
    if back is None:
        student.take(made, start())
        before = record.before
        back = Record(before=before, best=before, lowest=made.goal.of_each(before))
    back.rate_factor = 0.5
    progress.note(f"{what} ({loss:.4g}): back to step {back.step} at half the learning rate")
    return back
