"""What `validate` is asked, and which machine and library its scores are a fact about."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from stages.adapters.targets import CPU, Target, backend_code, executor, image_on
from stages.measures.own import identity
from stages.measures.table import MEASURES, OWN
from stages.runtime.contract import Image, Params, StageError
from stages.serving.generation import MOST_BEAMS

Variant = Literal["typos", "case", "space"]
Own = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
"""The name of a measure that a package brings."""


class ValidateParams(Params):
    """What is measured, and where.

    Attributes:
        split: the split that is scored, of the corpus or of the set of items.
        window_tokens: length of a window of text, at most what the model reads; one window is one document.
        windows: at most this many windows, the first ones; None for all.
        items: at most this many items of a set, the first ones; None for all.
        variants: how the items of a set are typed otherwise and asked once more, see `stages.validate.variants`; each
            takes as long as the set itself.
        own: measures of items that other packages bring by the entry point `enginery.measures`.
        harness: the set is a task of lm-evaluation-harness, which must be installed.
        beams: beginnings that an encoder-decoder follows at once where it writes; None for what its settings say.
        target: what the model is executed on; it must be the artifact's own.
    """

    split: Literal["calibrate", "train", "validate", "test"] = "test"
    window_tokens: int = Field(512, ge=2)
    windows: int | None = Field(None, ge=1)
    items: int | None = Field(None, ge=1)
    variants: tuple[Variant, ...] = ()
    own: tuple[Own, ...] = ()
    harness: bool = False
    beams: int | None = Field(None, ge=1, le=MOST_BEAMS)
    target: Target = CPU

    @field_validator("variants")
    @classmethod
    def _ordered(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        return tuple(one for one in get_args(Variant) if one in variants)

    @field_validator("own")
    @classmethod
    def _sorted(cls, own: tuple[Own, ...]) -> tuple[Own, ...]:
        return tuple(sorted({*own}))


def check_asked_of_text(params: ValidateParams) -> None:
    """Raise StageError where text is to be measured as only items are."""
    if asked := [name for name in ("variants", "own", "beams") if getattr(params, name)]:
        raise StageError(
            "this is text, and what is asked for is measured of items",
            measured=", ".join(asked),
            remedy=f"Leave out {' and '.join(asked)}, or name a step of the stage items.",
        )


def check_harness(params: ValidateParams, there: bool) -> None:
    """Raise StageError where a set is a task of lm-evaluation-harness and is not asked for as one, or the reverse."""
    if there != params.harness or (there and (params.variants or params.own or params.beams)):
        raise StageError(
            "the set is a task of lm-evaluation-harness" if there else "the set is no task of lm-evaluation-harness",
            measured=f"harness: {str(params.harness).lower()}"
            + ("" if there != params.harness else ", variants, own or beams"),
            remedy=f"Set the step's parameter `harness` to {str(there).lower()}, and ask for nothing else of a task.",
        )


def check_beams(params: ValidateParams, task: str) -> None:
    """Raise StageError where beams are asked for of a model that is not judged by them."""
    if params.beams and task != "translate":
        raise StageError(
            "beams are followed by models with an encoder and a decoder that write",
            measured=f"its task is {task}",
            limit="translate",
            remedy="Leave out beams: other models are judged by what they say greedily.",
        )


def executed_on(params: ValidateParams) -> dict[str, str]:
    """The machine, the library and the packages of one's own measures that the scores are a fact about.

    Raises:
        StageError: a measure is not installed.
    """
    return {
        **executor(params.target),
        **{f"{OWN}{one}": identity(one) for one in params.own},
        **({"harness": version()} if params.harness else {}),
    }


def version() -> str:
    """The lm-evaluation-harness that is installed.

    Raises:
        StageError: none is.
    """
    try:
        return f"lm_eval {importlib.metadata.version('lm_eval')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise StageError(
            "the set is a task of lm-evaluation-harness, which is not installed",
            remedy="Install it where steps run: pip install 'enginery[harness]'.",
        ) from error


def chosen_code(params: ValidateParams) -> tuple[str, ...]:
    """The modules of the measures and of the backend."""
    measures = dict.fromkeys(one.function.partition(":")[0] for one in MEASURES.values())
    return (*measures, *backend_code(params.target))


def chosen_image(params: ValidateParams) -> Image:
    """The image that holds what executes the target."""
    return image_on(params.target)
