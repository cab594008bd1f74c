"""Whether a registered model answers as the engine that was judged: both are asked the same few texts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.tracking.connect import Tracking
from stages.measures.items import holds_harness, holds_items, read_items
from stages.runtime.contract import Unavailable

TEXTS, TOKENS = 10, 8
"""So many texts are asked; so many tokens are wanted of what continues one."""
CHARACTERS = 60
"""Of a document, from its beginning."""
ANY = ("The", "Once", "I", "1, 2, 3", "What is", "她")
"""What is asked where nothing that was judged can be: a harness has rows that it alone can read, an engine may read
less than a text is long."""
PATIENCE_S = 600
NEAR = 1e-3
"""How far logits may be from each other, over their length: threads add in another order."""
SCRIPT = Path(__file__).with_name("ask_registered.py")

Answers = list[Any]
Asked = tuple[str, ...]
"""A text, or a question with its context."""


def questions(corpora: Sequence[Path], split: str) -> list[Asked]:
    """The first texts of some corpora, taken in turn: beginnings of documents, prompts of items with their contexts."""
    found = [list(_beginnings(corpus, split)) for corpus in corpora]
    turns = (texts[turn] for turn in range(TEXTS) for texts in found if turn < len(texts))
    return list(dict.fromkeys(turns))[:TEXTS]


def _beginnings(corpus: Path, split: str) -> list[Asked]:
    if holds_harness(corpus):
        return []
    if holds_items(corpus):
        items = [item for _, item in zip(range(TEXTS), read_items(corpus, split), strict=False)]
        return [(one.prompt, one.context) if one.context.strip() else (one.prompt,) for one in items]
    found: list[Asked] = []
    with (corpus / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = row.get("text") or " ".join(str(one.get("content", "")) for one in row.get("messages", ()))
            if begins := text.strip()[:CHARACTERS].strip():
                found.append((begins,))
            if len(found) == TEXTS:
                break
    return found


def engines_answers(engine: Path, texts: Sequence[Asked]) -> tuple[Sequence[Asked], Answers]:
    """What of some texts an engine can be asked, and its answers; it is opened from its folder, verified before."""
    from stages.serving.engine import WRITES, open_engine
    from stages.serving.told import numbers

    opened = open_engine(engine, verified=True)
    if opened.task not in WRITES:
        return texts, numbers(opened, texts)

    def read(some: Sequence[Asked]) -> list[Asked]:
        return [one for one in some if 0 < len(opened.tokenizer.encode(one[0]).ids) < opened.maximum_tokens]

    asked = read(texts) or read([(one,) for one in ANY])
    return asked, opened.generate([text for text, *_ in asked], max_new_tokens=min(TOKENS, opened.maximum_tokens))


def registered_answers(tracking: Tracking, model: str, alias: str, texts: Sequence[Asked]) -> tuple[str, Answers | str]:
    """What the model under an alias answers in a fresh process: its logged model, and the answers or why there is none.

    Raises:
        Unavailable: MLflow does not give it out.
    """
    request = {"model": f"models:/{model}@{alias}", "texts": texts, "tokens": TOKENS}
    env = {**os.environ, "MLFLOW_TRACKING_URI": tracking.uri, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="enginery-asked-") as nowhere:
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(SCRIPT)],
                input=json.dumps(request),
                env=env,
                cwd=nowhere,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "", f"it did not answer within {PATIENCE_S} s"
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return "", f"its process ended with exit code {done.returncode}: {said}"
    answer: dict[str, Any] = json.loads(last)
    if "away" in answer:
        raise Unavailable(f"MLflow does not give out {request['model']}", measured=answer["away"])
    if "broken" in answer:
        return str(answer.get("model_id", "")), str(answer["broken"])
    return str(answer["model_id"]), list(answer["answers"])


def alike(ours: Answers, theirs: Answers) -> int:
    """How many of the answers are equal: texts to the letter, logits but for the order of sums."""
    return sum(_equal(one, other) for one, other in zip(ours, theirs, strict=False))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    if len(one) != len(other):
        return False
    return math.dist(one, other) <= NEAR * math.hypot(*one)
