"""One face over every backend: open an engine, a graph or a checkpoint, and ask it for logits or text.

This module travels inside the registered model, and the backend of its engine with it. For an ONNX Runtime engine it
imports numpy, onnxruntime and tokenizers, nothing larger.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stages.adapters.backends import GRAPHS_BACKEND, Forward, backend, refuse_impossible
from stages.models.checkpoint.json_files import read_json
from stages.runtime.contract import StageError
from stages.serving.generate import Steps, greedy

GRAPH, DESCRIBED, ENGINE = "model.onnx", "graph.json", "engine.json"
ENDLESS = 2**31 - 1
"""Tokens that a model reads whose positions have no end."""


@dataclass(frozen=True)
class Answerer:
    """A model that answers.

    Attributes:
        target: what executes it: `onnxruntime:cpu`, `torch:cpu`, `torch:cuda`, `tensorrt_rtx:sm_89`, ...
        task: what it is for: `generate` for what continues a text, see `stages.models.anatomy.tasks`.
        maximum_tokens: the longest sequence it reads.
        tokenizer: turns text into its tokens.
        ends: tokens that end a sequence.
        forward: (ids_NT, mask_NT) -> logits_NTV, or what else a model of its task answers.
        steps: begins to keep what it reads of some sequences; None where nothing does.
    """

    target: str
    task: str
    maximum_tokens: int
    tokenizer: Tokenizer
    ends: frozenset[int]
    forward: Forward
    steps: Callable[[], Steps] | None = None

    def logits(self, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """logits_NTV of whole sequences, or what else a model of its task answers.

        Raises:
            StageError: they are longer than the model reads.
        """
        ids_NT = np.ascontiguousarray(ids_NT, dtype=np.int64)
        self._check(ids_NT.shape[1])
        return self.forward(ids_NT, np.ones_like(ids_NT))

    def generate(self, prompts: list[str], *, max_new_tokens: int = 32) -> list[str]:
        """Continue each prompt by the most likely tokens, up to the first that ends a sequence.

        The prompt is taken as it stands: no chat template is put around it.

        Raises:
            StageError: the model continues no text, or a prompt is empty or longer than it reads.
        """
        if self.task != "generate":
            raise StageError(
                "the model continues no text",
                measured=f"its task is {self.task}",
                limit="generate",
                remedy="Ask it for its `logits`.",
            )
        encoded = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        for ids in encoded:
            if not ids:
                raise StageError("a prompt is empty", remedy="Give each prompt at least one character.")
            self._check(len(ids))
        new = greedy(
            self.steps() if self.steps else self.forward,
            encoded,
            ends=self.ends,
            max_new_tokens=max_new_tokens,
            maximum_tokens=self.maximum_tokens,
        )
        texts: list[str] = self.tokenizer.decode_batch(new, skip_special_tokens=True)
        return texts

    def _check(self, tokens: int) -> None:
        if tokens > self.maximum_tokens:
            raise StageError(
                "the sequence is longer than the model reads",
                measured=f"{tokens} tokens",
                limit=f"{self.maximum_tokens} tokens",
                remedy="Shorten it, or compile with a larger `maximum_tokens`.",
            )


def open_engine(folder: Path, *, verified: bool = False, device: str = "cpu") -> Answerer:
    """Open an ENGINE, ONNX or CHECKPOINT folder.

    Args:
        folder: of the artifact.
        verified: the caller hashed the files against a manifest. A TensorRT plan is executable code and is not
            deserialized otherwise.
        device: where a checkpoint is executed, `cpu` or `cuda`; an engine or a graph says so itself.

    Raises:
        StageError: the folder is none of the three, damaged, or a graph of numbers that no processor multiplies here.
        DoesNotFit: the engine is for a device that this machine has not.
    """
    config = _read(folder / "config.json")
    if not any((folder / name).is_file() for name in (ENGINE, GRAPH)):
        return _checkpoint(folder, config, device)
    if (folder / ENGINE).is_file():
        described = _read(folder / ENGINE)
        target, forward = _executable(folder, described, verified=verified)
    else:
        described = _read(folder / DESCRIBED)
        refuse_impossible(GRAPHS_BACKEND, (), described["precisions"])
        target, forward = backend(GRAPHS_BACKEND).execute(folder / GRAPH, (), False)
    if not (folder / "tokenizer.json").is_file():
        raise StageError(f"{folder.name} has no tokenizer.json", remedy="Make the artifact again.")
    task, most = described.get("task", "generate"), int(described["maximum_tokens"])
    return Answerer(
        target, task, most, _bare(Tokenizer.from_file(str(folder / "tokenizer.json"))), _ends(folder, config), forward
    )


def _checkpoint(folder: Path, config: dict[str, Any], device: str) -> Answerer:
    # torch is a gigabyte that an engine does not need.
    from stages.serving.eager import eager, fast_tokenizer

    opened = eager(folder, device)
    most = ENDLESS if opened.longest is None else opened.longest
    tokenizer, ends = _bare(fast_tokenizer(folder)), _ends(folder, config)
    return Answerer(f"torch:{device}", opened.task, most, tokenizer, ends, opened.forward, opened.steps)


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that neither pads nor cuts."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _executable(folder: Path, described: dict[str, Any], *, verified: bool) -> tuple[str, Forward]:
    chosen = backend(described["backend"])
    return chosen.execute(folder / described["executable"], described["architectures"], verified)


def _ends(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    path = folder / "generation_config.json"
    found = (_read(path) if path.is_file() else config).get("eos_token_id", config.get("eos_token_id"))
    return frozenset() if found is None else frozenset(found if isinstance(found, list) else [found])


def _read(path: Path) -> dict[str, Any]:
    absent = StageError(
        f"{path.parent.name} holds no engine, graph or checkpoint",
        measured=f"{path.name} is missing",
        remedy="Give the folder of such an artifact.",
    )
    return read_json(path, absent=absent)
