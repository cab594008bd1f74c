"""The registered model: MLflow runs this file where the model is loaded, far from the project that made it.

It travels with the engine it answers from and the part of `stages` that opens it. MLflow is imported on top, since the
class derives from its own; nothing of the project imports this file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

MAX_NEW_TOKENS = 32


class Served(PythonModel):
    """Answers prompts with the engine that the model carries."""

    def load_context(self, context: Any) -> None:
        """Open the engine once its bytes are those that were judged.

        Raises:
            ValueError: a file is missing or has other bytes: an engine is executable code.
        """
        from stages.serving.engine import open_engine

        folder = Path(context.artifacts["engine"])
        for name, sha256 in json.loads(Path(context.artifacts["digests"]).read_text(encoding="utf-8")).items():
            if not (folder / name).is_file():
                raise ValueError(f"{name} of the registered engine is missing: register the model again")
            with (folder / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != sha256:
                raise ValueError(
                    f"{name} of the registered engine is not what was judged: measured {found[:12]}, limit "
                    f"{sha256[:12]}. Register the model again"
                )
        self._engine = open_engine(folder, verified=True)

    # MLflow would derive a signature from any other hint and drop the stated one, with its params.
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """Continue each prompt.

        Args:
            context: not used.
            model_input: a list of texts, or a table whose first column holds them.
            params: `max_new_tokens`.
        """
        prompts = model_input.iloc[:, 0] if isinstance(model_input, pd.DataFrame) else model_input
        most = int((params or {}).get("max_new_tokens", MAX_NEW_TOKENS))
        return list(self._engine.generate([str(prompt) for prompt in prompts], max_new_tokens=most))


set_model(Served())
