"""An engine becomes a logged model: engine, tokenizer and the code that opens them, in one folder MLflow can load."""

from __future__ import annotations

import ast
import itertools
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.tracking.connect import NOTE, Tracking, quiet
from flows.tracking.errors import MISSING, Refused, answered
from stages.adapters.backends import GRAPHS_BACKEND, backend, module_of
from stages.models.checkpoint.json_files import read_json
from stages.runtime.fingerprint import ROOT, canonical, constraints, digest_bytes, digest_file, digest_tree, imported
from stages.serving.generation import NEW_TOKENS, Generation
from stages.serving.inputs import PROMPT
from stages.serving.told import COLUMNS, LISTS, OPTIONAL
from stages.serving.told import PARAMETERS as READING

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

SERVED = Path(__file__).with_name("served.py")
FACE = "stages.serving.engine"
"""The module that opens an engine; it, the engine's backend, what SERVED imports, and what they import travel."""
EXAMPLE = "The capital of France is"
"""What a model's page and its server show as an example of what can be asked."""
REQUIREMENTS = ("jinja2", "mlflow", "numpy", "pydantic", "tokenizers")
"""Beside the library that executes the engine."""
PACKAGE, TASK = "enginery.package", "enginery.task"


def logged_model(tracking: Tracking, engine: Path, name: str, fingerprint: str, run_id: str) -> LoggedModel:
    """The logged model that carries an engine; made once for the same engine and code.

    Args:
        tracking: where.
        engine: folder of an ENGINE artifact, already verified.
        name: of the model.
        fingerprint: of the artifact.
        run_id: MLflow's run that it belongs to.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    with tempfile.TemporaryDirectory(prefix="enginery-model-") as scratch, answered(tracking.uri):
        code = travelling_code(Path(scratch), _backend_name(engine))
        package = digest_bytes(canonical([fingerprint, digest_tree(code), digest_file(SERVED)]))
        made = _found(tracking, package)
        if made is None or made.status != LoggedModelStatus.READY or not _carries(tracking, engine, made.model_id):
            # One that was cut off or lost its files is filled again: no second copy of the engine is left behind.
            made = made or tracking.client.create_logged_model(
                tracking.experiment_id,
                name=name,
                source_run_id=run_id,
                tags={
                    PACKAGE: package,
                    "enginery.fingerprint": fingerprint,
                    TASK: _task(engine),
                    NOTE: f"The engine `{fingerprint[:12]}` of {name} with its tokenizer and the code that opens it.",
                },
                model_type="enginery",
            )
            _save(Path(scratch, "model"), engine, code, made.model_id, run_id)
            tracking.client.log_model_artifacts(made.model_id, str(Path(scratch, "model")))
            tracking.client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)
        if not _linked(tracking, run_id, made.model_id):
            tracking.client.log_outputs(run_id, models=[LoggedModelOutput(made.model_id, step=0)])
    return made


def refilled(tracking: Tracking, engine: Path, model_id: str, run_id: str) -> bool:
    """Put an engine into its logged model again where that has lost its files; whether it had.

    Args:
        tracking: where.
        engine: folder of the ENGINE artifact that the logged model carries, already verified.
        model_id: the logged model's; empty for one that is not known.
        run_id: MLflow's run that does it.
    """
    if not model_id or _carries(tracking, engine, model_id):
        return False
    with tempfile.TemporaryDirectory(prefix="enginery-model-") as scratch, answered(tracking.uri):
        code = travelling_code(Path(scratch), _backend_name(engine))
        _save(Path(scratch, "model"), engine, code, model_id, run_id)
        tracking.client.log_model_artifacts(model_id, str(Path(scratch, "model")))
    return True


def _carries(tracking: Tracking, engine: Path, model_id: str) -> bool:
    """Whether a logged model has its files, by names and sizes; of one that was deleted in MLflow nobody asks."""
    try:
        listed = [
            tracking.client.list_logged_model_artifacts(model_id, path) for path in (None, f"artifacts/{engine.name}")
        ]
    except Refused as error:
        if error.code != MISSING:
            raise
        return True
    sizes = {one.path.rpartition("/")[2]: one.file_size for one in itertools.chain(*listed)}
    engines = {file.name: file.stat().st_size for file in engine.iterdir() if file.is_file()}
    return "MLmodel" in sizes and all(sizes.get(name) == size for name, size in engines.items())


def travelling_code(into: Path, backend_name: str) -> Path:
    """Copy FACE, a backend and the project modules that they and SERVED import; returns the copied package."""
    served = [name for name in imported(ast.parse(SERVED.read_text(encoding="utf-8"))) if name.startswith("stages.")]
    pending, seen = [FACE, module_of(backend_name), *served], set[Path]()
    while pending:
        parts = pending.pop().split(".")
        for path in [ROOT.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)] + [
            ROOT.joinpath(*parts).with_suffix(".py")
        ]:
            if path.is_file() and path not in seen:
                seen.add(path)
                ours = imported(ast.parse(path.read_text(encoding="utf-8")))
                pending += [name for name in ours if name.split(".")[0] == "stages"]
    for path in seen:
        copy = into / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return into / FACE.split(".")[0]


def _backend_name(engine: Path) -> str:
    target = _described(engine).get("target")
    return str(target).partition(":")[0] if target else GRAPHS_BACKEND


def _described(engine: Path) -> dict[str, Any]:
    return read_json(engine / "engine.json", optional=True)


def _linked(tracking: Tracking, run_id: str, model_id: str) -> bool:
    outputs = tracking.client.get_run(run_id).outputs
    return outputs is not None and model_id in [one.model_id for one in outputs.model_outputs]


def _found(tracking: Tracking, package: str) -> LoggedModel | None:
    found = tracking.client.search_logged_models(
        [tracking.experiment_id], filter_string=f"tags.`{PACKAGE}` = '{package}'"
    )
    ready = [model for model in found if str(model.status) == "READY"]
    return next(iter([*ready, *found]), None)


def _save(path: Path, engine: Path, code: Path, model_id: str, run_id: str) -> None:
    quiet()
    from mlflow import pyfunc
    from mlflow.models import Model

    digests = path.parent / "digests.json"
    files = sorted(file for file in engine.rglob("*") if file.is_file())
    digests.write_text(json.dumps({file.relative_to(engine).as_posix(): digest_file(file) for file in files}), "utf-8")
    pins, needed = constraints(), sorted({*REQUIREMENTS, backend(_backend_name(engine)).library})
    pyfunc.save_model(
        path,
        python_model=str(SERVED),
        artifacts={"engine": str(engine), "digests": str(digests)},
        code_paths=[str(code)],
        signature=_signature(_task(engine), int(_described(engine).get("maximum_tokens", NEW_TOKENS))),
        input_example=_with_params(_task(engine)),
        pip_requirements=[f"{name}=={pins[name]}" if name in pins else name for name in needed],
        mlflow_model=Model(artifact_path=None, run_id=run_id, model_uuid=model_id, model_id=model_id),
    )


def _task(engine: Path) -> str:
    return str(_described(engine).get("task", "generate"))


def example(task: str) -> list[dict[str, Any]]:
    """What a model can be asked, in the columns of its task."""
    texts = {"question": "What is the capital of France?", "context": f"{EXAMPLE} Paris.", "choices": ["Paris", "Rome"]}
    return [{name: texts.get(name, EXAMPLE) for name in COLUMNS.get(task, (PROMPT,)) if name not in OPTIONAL}]


def _with_params(task: str) -> Any:
    return example(task) if task in COLUMNS else (example(task), {"max_new_tokens": 1})


def _signature(task: str, maximum_tokens: int) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    if task in COLUMNS:
        columns = [
            ColSpec(Array(DataType.string) if name in LISTS else DataType.string, name, required=name not in OPTIONAL)
            for name in COLUMNS[task]
        ]
        switches = [ParamSpec(name, "boolean", False) for name in READING]
        return ModelSignature(inputs=Schema(columns), params=ParamSchema(switches))
    kinds = {"max_new_tokens": "long", "top_k": "long", "seed": "long", "beams": "long", "stop": "string"}
    plain = Generation()
    defaults = asdict(plain) | {"max_new_tokens": plain.most(maximum_tokens), "stop": []}
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, PROMPT)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec(name, kinds.get(name, "double"), value, (-1,) if name == "stop" else None)
                for name, value in defaults.items()
            ]
        ),
    )
