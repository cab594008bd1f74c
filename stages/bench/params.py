"""What `bench` is asked, and which machine and library its figures are a fact about."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages.adapters.targets import CPU, Target, backend_code, executor, image_on
from stages.runtime.contract import Image, Params

Count = Annotated[int, Field(ge=1)]


class BenchParams(Params):
    """What is measured, and where.

    Attributes:
        split: the split of the corpus that prompts are taken from.
        prompt_tokens: lengths of prompts; where a model reads less, as much as it reads. What gates hold against is
            measured at the longest, for one prompt at a time or the smallest of `batches`.
        new_tokens: tokens that are written behind each prompt; a model that writes nothing is asked the prompts alone.
        batches: prompts at once, measured at the shortest of `prompt_tokens`.
        repeats: rounds, in each of which the artifact and its baseline take turns.
        target: what the artifact is executed on; it must be its own.
    """

    split: Literal["calibrate", "train", "validate", "test"] = "test"
    prompt_tokens: tuple[Count, ...] = Field((128, 512), min_length=1)
    new_tokens: int = Field(20, ge=2)
    batches: tuple[Count, ...] = Field((1, 4), min_length=1)
    repeats: int = Field(4, ge=2)
    target: Target = CPU

    @field_validator("prompt_tokens", "batches")
    @classmethod
    def _ascending(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({*given}))


def executed_on(params: BenchParams) -> dict[str, str]:
    """The machine and the library that the figures are a fact about."""
    return executor(params.target)


def chosen_code(params: BenchParams) -> tuple[str, ...]:
    """The module of the backend."""
    return backend_code(params.target)


def chosen_image(params: BenchParams) -> Image:
    """The image that holds what executes the target."""
    return image_on(params.target)
