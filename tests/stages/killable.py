"""A stage in a process of its own that can be killed: `python -m tests.stages.killable STAGE OUTPUT PARAMS INPUTS`.

It says a line for every step forward. A pass over blocks saves after each, not every few seconds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stages import stage
from stages.models.blockwise import compress


class Said:
    """Progress that says a line for each step forward."""

    def advanced(self, done: float, total: float) -> None:
        """See Progress."""
        _say(f"{done} of {total}")

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""

    def note(self, text: str) -> None:
        """See Progress."""
        _say(text)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the stage."""
    name, output, params, inputs = sys.argv[1:]
    compress.SAVE_EVERY_S = 0.0
    Path(output).mkdir(parents=True, exist_ok=True)  # as a draft is made before a stage starts
    definition = stage(name)
    folders = {role: Path(folder) for role, folder in json.loads(inputs).items()}
    definition.run(definition.params.model_validate_json(params), folders, Path(output), Said())


if __name__ == "__main__":
    main()
