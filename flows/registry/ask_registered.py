"""Asks a registered model, in a process of its own that loads it as anybody would; nothing of the project imports this.

The request comes as JSON on standard input; the last line of standard output is the answer: what the model said, or
why it said nothing (`broken`), or why it could not be fetched (`away`).
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore")


def asked(model: Any, texts: list[list[str]], tokens: int) -> list[Any]:
    """What a registered model answers: a text's continuation or answer, or the logits of a model that writes none.

    The latter is asked as users ask it, too: whatever it says of classes, entities and places comes from these logits.
    """
    engine = model.unwrap_python_model()._engine
    if engine.task in ("generate", "translate"):
        most = {"max_new_tokens": min(tokens, engine.maximum_tokens)}
        return list(model.predict([text for text, *_ in texts], params=most))
    from stages.serving.told import asked_by, numbers

    if columns := asked_by(engine, texts):
        model.predict(columns)
    return numbers(engine, texts)


def main() -> dict[str, Any]:
    """Answer the request on standard input."""
    import mlflow

    request = json.load(sys.stdin)
    try:
        model = mlflow.pyfunc.load_model(request["model"])
    except Exception as error:  # noqa: BLE001 - what it was is told below
        told = f"{type(error).__name__}: {error}"
        try:
            mlflow.artifacts.download_artifacts(request["model"])
        except Exception:  # noqa: BLE001 - then it is MLflow that does not give it out
            return {"away": told}
        return {"broken": told}
    known = {"model_id": model.metadata.model_id}
    try:
        return known | {"answers": asked(model, request["texts"], request["tokens"])}
    except Exception as error:  # noqa: BLE001 - whatever it is, users would have it too
        return known | {"broken": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main()) + "\n")
