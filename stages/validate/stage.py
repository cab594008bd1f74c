"""Measure one artifact on one corpus on one executor: perplexity, distance from a baseline, size."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.adapters.backends import backend, module_of, processor_targets
from stages.measures.table import MEASURES
from stages.runtime.contract import Divided, Image, Input, Kind, Metrics, Params, Progress, Stage, StageError
from stages.runtime.cuda_driver import gpu_name
from stages.runtime.execute import device_name
from stages.runtime.parts import FOLDER, gaps, keep, kept

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from stages.measures.documents import Document
    from stages.measures.predictions import Asking
    from stages.models.checkpoint.subject import Subject

CUDA = "torch:cuda"
TORCH = ("torch:cpu", CUDA)
"""Targets of checkpoints."""
if TYPE_CHECKING:
    Target = str
else:
    Target = Literal[(*TORCH, *processor_targets())]

KEPT_DOCUMENTS = 8
"""A run that was killed computes at most so many documents again."""


@dataclass(frozen=True)
class _Text:
    """Windows, and how they are put to the model."""

    ids_NT: Tensor
    asking: Asking


class ValidateParams(Params):
    """What is measured, and where.

    Attributes:
        split: the corpus split that is scored.
        window_tokens: length of a window, at most what the model reads; one window is one document.
        windows: at most this many windows, the first ones; None for all.
        target: what the model is executed on; it must be the artifact's own.
    """

    split: Literal["calibrate", "train", "validate", "test"] = "test"
    window_tokens: int = Field(512, ge=2)
    windows: int | None = Field(None, ge=1)
    target: Target = "torch:cpu"


def executed_on(params: ValidateParams) -> dict[str, str]:
    """The machine and library that the scores are a fact about."""
    name = params.target.partition(":")[0]
    library = name if params.target in TORCH else backend(name).library
    on_gpu = params.target == CUDA
    return {
        "target": params.target,
        "device": (gpu_name() or "no GPU") if on_gpu else device_name(),
        "runtime": f"{library} {importlib.metadata.version(library)}" + (f" CUDA {_cuda_version()}" if on_gpu else ""),
    }


def _cuda_version() -> str:
    """The CUDA that torch is built for, read where planning does not load torch itself."""
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    return str(run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] or "none")


def chosen_code(params: ValidateParams) -> tuple[str, ...]:
    """The modules of the measures and of the backend."""
    measures = (one.function.partition(":")[0] for one in MEASURES.values())
    return (*measures, *(() if params.target in TORCH else (module_of(params.target.partition(":")[0]),)))


def validate(params: ValidateParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Score every window that no part holds yet, and write `report.json`."""
    from stages.measures.documents import summary
    from stages.measures.size import size_bytes

    model = inputs["model"]
    text = _text(params, inputs, progress)
    documents = _all_scores(params, inputs, text, output / FOLDER, progress)
    files = {p.relative_to(model).as_posix(): p.stat().st_size for p in model.rglob("*") if p.is_file()}
    measures = summary(documents) | {"size_bytes": float(size_bytes(files))}
    report = {
        "artifact_target": params.target,
        "split": params.split,
        "task": text.asking.task,
        "window_tokens": text.ids_NT.shape[1],
        "corpus": _corpus_digest(inputs["text"]),
        "documents": documents,
        "measures": measures,
    }
    (output / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    return measures | {"tokens": float(sum(document["tokens"] for document in documents))}


def count_windows(params: ValidateParams, inputs: Mapping[str, Path]) -> int:
    """How many windows are scored; each by itself, so that a score does not depend on what is scored beside it."""
    return len(_text(params, inputs).ids_NT)


def score_part(params: ValidateParams, inputs: Mapping[str, Path], span: range, progress: Progress) -> bytes:
    """The scores of some windows, as `validate` gathers them."""
    text = _text(params, inputs)
    if span.stop > len(text.ids_NT):
        raise StageError("the part ends behind the last window", measured=span.stop, limit=len(text.ids_NT))
    documents = []
    for document in _scorer(params, inputs, text)(span):
        documents.append(document)
        progress.advanced(len(documents), len(span))
    return _written(documents)


def _all_scores(
    params: ValidateParams, inputs: Mapping[str, Path], text: _Text, folder: Path, progress: Progress
) -> list[Document]:
    """Every window's scores: those of the parts in `folder`, and the others computed and kept there as they come."""
    count, tokens = text.ids_NT.shape
    if tokens < params.window_tokens:
        progress.note(f"windows of {tokens} tokens, all that the model reads, not of {params.window_tokens}")
    scored = _kept_scores(params, text, folder, "baseline" in inputs, progress)
    if scored:
        progress.note(f"{len(scored)} of {count} documents are scored already")
        progress.advanced(len(scored), count)
    missing = gaps(count, [range(index, index + 1) for index in scored], KEPT_DOCUMENTS)
    score = _scorer(params, inputs, text) if missing else None
    for span in missing:
        assert score is not None
        for index, document in zip(span, score(span), strict=True):
            scored[index] = document
            progress.advanced(len(scored), count)
        keep(folder, span, _written([scored[index] for index in span]))
    return [scored[index] for index in range(count)]


def _kept_scores(
    params: ValidateParams, text: _Text, folder: Path, paired: bool, progress: Progress
) -> dict[int, Document]:
    from stages.measures.documents import read_documents

    scored: dict[int, Document] = {}
    for span, data in kept(folder):
        ids = text.ids_NT[span.start : span.stop]
        documents = read_documents(data, ids, text.asking, params.split, first=span.start, paired=paired)
        if documents is None or len(documents) != len(span):
            progress.note(f"the scores of documents {span.start} to {span.stop - 1} are not of this corpus: made anew")
        else:
            scored |= dict(zip(span, documents, strict=True))
    return scored


def _text(params: ValidateParams, inputs: Mapping[str, Path], progress: Progress | None = None) -> _Text:
    from stages.measures.predictions import Asking
    from stages.models.anatomy import tasks
    from stages.models.checkpoint.loading import load_config, load_tokenizer
    from stages.models.text.windows import special_ends, windows

    model, baseline = inputs["model"], inputs.get("baseline")
    config, tokenizer = load_config(model), load_tokenizer(model)
    task = tasks.task(config)
    if baseline:
        theirs = load_tokenizer(baseline).get_vocab()
        _check_alike(tokenizer.get_vocab(), theirs, task, tasks.task(load_config(baseline)))
    tokens = min(params.window_tokens, tasks.longest(config) or params.window_tokens)
    _check_length(_of_engine(model), tokens)
    mask = _mask(tokenizer) if task == "fill" else None
    before, after = special_ends(tokenizer)
    asking = Asking(task, len(before), len(after), mask)
    ids_NT = windows(inputs["text"], params.split, tokenizer, tokens, most=params.windows, progress=progress)
    return _Text(ids_NT, asking)


def admit(params: ValidateParams, known: Mapping[str, Any]) -> Subject:
    """The model that is judged, if it can be, where it is to be."""
    if params.target == CUDA:
        from stages.serving.cuda import require_gpu

        require_gpu()
    from stages.models.checkpoint.loading import load_tokenizer
    from stages.models.checkpoint.subject import vocabularies
    from stages.models.text.windows import check_split

    check_split(known, params.split)
    model: Subject = known["model"]
    if model.task == "fill":
        _mask(load_tokenizer(model.folder))
    if baseline := known.get("baseline"):
        _check_alike(*vocabularies(model, baseline), model.task, baseline.task)
    _check_length(model.built, min(params.window_tokens, model.reads or params.window_tokens))
    return model


def _mask(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.mask_token_id is None:
        raise StageError(
            "a masked model is judged by hiding tokens, and its tokenizer has none to hide them with",
            measured="no mask_token",
            remedy='Set "mask_token" in tokenizer_config.json.',
        )
    return int(tokenizer.mask_token_id)


def _scorer(params: ValidateParams, inputs: Mapping[str, Path], text: _Text) -> Callable[[range], Iterator[Document]]:
    """Load the model and its baseline; returns a range of windows -> their scores."""
    from stages.measures.documents import score_documents
    from stages.serving.engine import open_engine

    baseline = inputs.get("baseline")
    device = "cuda" if params.target == CUDA else "cpu"
    # An input's every byte was hashed against its manifest.
    judged = open_engine(inputs["model"], verified=True, device=device)
    if judged.target != params.target:
        raise StageError(
            "the artifact is executed on another target than the one asked for",
            measured=judged.target,
            limit=params.target,
            remedy=f"Set the step's parameter `target` to {judged.target}.",
        )
    dense = open_engine(baseline, verified=True, device=device).logits if baseline else None

    def score(span: range) -> Iterator[Document]:
        ids = text.ids_NT[span.start : span.stop]
        return score_documents(ids, judged.logits, dense, text.asking, params.split, first=span.start)

    return score


def _written(documents: list[Document]) -> bytes:
    return json.dumps(documents, allow_nan=False).encode()


def _check_alike(ours: Mapping[str, int], theirs: Mapping[str, int], task: str, other: str) -> None:
    from stages.measures.documents import other_vocabulary

    if ours != theirs:
        raise other_vocabulary(len(theirs), len(ours))
    if other != task:
        raise StageError(
            "the baseline answers something else than the model, so they cannot be compared",
            measured=f"its task is {other}",
            limit=f"the model's own, {task}",
            remedy="Name the checkpoint the model was made from as baseline, or judge without one.",
        )


def _of_engine(folder: Path) -> int | None:
    engine = folder / "engine.json"
    return json.loads(engine.read_text(encoding="utf-8")).get("maximum_tokens") if engine.is_file() else None


def _check_length(most: int | None, window_tokens: int) -> None:
    """Raise StageError where an engine was built for less than the windows: its scores would stand beside no others."""
    if most is not None and window_tokens > most:
        raise StageError(
            "the windows are longer than the engine can read",
            measured=f"{window_tokens} tokens",
            limit=f"{most} tokens",
            remedy=f"Set `window_tokens` of `judge` to {most}.",
        )


def _corpus_digest(corpus: Path) -> str:
    path = corpus / "corpus.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("digest", "")) if path.is_file() else ""


VALIDATE = Stage(
    name="validate",
    params=ValidateParams,
    inputs={
        "model": Input(kinds=frozenset({Kind.CHECKPOINT, Kind.ONNX, Kind.ENGINE})),
        "text": Input(kinds=frozenset({Kind.CORPUS})),
        "baseline": Input(kinds=frozenset({Kind.CHECKPOINT}), optional=True),
    },
    output=Kind.REPORT,
    image=Image.TORCH,
    run=validate,
    admit=admit,
    executed_on=executed_on,
    uses=chosen_code,
    divided=Divided(count=count_windows, part=score_part),
)
