"""What a recipe may say of recover. Needs no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stages.runtime.contract import Params


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
        check_windows: windows of each held-out text: of `other`, and of each source where one has several.
            That step is best after which the text that has won least, of what it had lost, has won most.
        patience: checks without a better step until training ends.
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

    def steps(self, window_tokens: int) -> int:
        """Steps of the optimizer by windows of this length, which a model that reads less makes shorter."""
        return max(1, round(self.tokens / (window_tokens * self.batch_windows)))
