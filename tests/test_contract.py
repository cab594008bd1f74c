"""What holds for every stage of the table, whoever wrote it."""

import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import ValidationError

from stages import STAGES, stage
from stages.runtime.contract import Image, Kind, Params, Stage, StageError
from stages.runtime.execute import work_of
from stages.runtime.fingerprint import canonical, code_digest, fingerprint

ROOT = Path(__file__).parents[1]
NAMES = [name for name in STAGES if find_spec(f"stages.{name}")]
HEAVY = (
    "torch",
    "transformers",
    "mlflow",
    "prefect",
    "onnx",
    "onnxruntime",
    "tensorrt_rtx",
    "boto3",
    "huggingface_hub",
)


GIVEN = {"source": "pydoc://topics", "splits": {"validate": 0.5, "test": 0.5}}
"""What no default can stand for; a corpus has either `source` or `sources`."""


def module_of(name):
    """Where a stage stands: a file, or a folder's `stage`."""
    return STAGES[name].partition(":")[0]


def locations(params):
    """The fields that say where bytes lie."""
    extras = {name: field.json_schema_extra for name, field in params.model_fields.items()}
    return {name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("location")}


def example(definition, **fields):
    """Params of a stage, as pydantic fills them, with required fields given by type."""
    required = {name for name, field in definition.params.model_fields.items() if field.is_required()}
    chosen = {name: value for name, value in GIVEN.items() if name in definition.params.model_fields}
    properties = definition.params.model_json_schema()["properties"]
    for name in required - chosen.keys():
        if "enum" in properties[name]:
            chosen[name] = properties[name]["enum"][0]
    return definition.params.model_validate(chosen | fields)


@pytest.fixture(params=NAMES)
def definition(request):
    return stage(request.param)


def test_name_is_the_key_and_the_module(definition):
    assert isinstance(definition, Stage)
    module, _, attribute = STAGES[definition.name].partition(":")
    assert module in (f"stages.{definition.name}", f"stages.{definition.name}.stage")
    assert attribute == definition.name.upper()
    assert re.fullmatch(r"[a-z]+", definition.name)


def test_definition_is_frozen_and_of_declared_types(definition):
    with pytest.raises(FrozenInstanceError):
        definition.name = "other"
    assert isinstance(definition.output, Kind)
    assert isinstance(definition.image, Image)
    for role, taken in definition.inputs.items():
        assert re.fullmatch(r"[a-z_]+", role), "a dot would be read as the number of a repeated role"
        assert taken.kinds
        assert all(isinstance(kind, Kind) for kind in taken.kinds)


def test_only_stages_that_need_no_input_reach_outside(definition):
    needs = [role for role, taken in definition.inputs.items() if not taken.optional]
    assert (definition.pin is not None) == (definition.name in ("fetch", "corpus", "items")) == (not needs)


def test_params_are_named_after_the_verb_frozen_and_refuse_unknown_keys(definition):
    assert definition.params.__name__ == f"{definition.name.capitalize()}Params"
    assert issubclass(definition.params, Params)
    made = example(definition)
    field = next(iter(definition.params.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, field, None)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        example(definition, no_such_field=1)


def test_params_return_from_json_as_they_were_and_have_a_closed_schema(definition):
    made = example(definition)
    assert definition.params.model_validate_json(made.model_dump_json()) == made
    assert definition.params.model_validate(json.loads(json.dumps(made.model_dump(mode="json")))) == made
    schema = definition.params.model_json_schema()
    assert schema["additionalProperties"] is False
    json.dumps(schema, allow_nan=False)


def test_defaults_are_values_that_the_params_accept(definition):
    fields = definition.params.model_fields
    optional = {name: field for name, field in fields.items() if not field.is_required() and name not in GIVEN}
    defaults = {name: field.get_default(call_default_factory=True) for name, field in optional.items()}
    assert example(definition, **defaults) == example(definition)


def test_locations_enter_no_identity_and_everything_else_does(definition):
    made = example(definition)
    hidden = locations(definition.params)
    assert hidden <= {"source", "exact", "base", "base_exact", "downloads"}
    assert set(made.identity()) == set(definition.params.model_fields) - hidden
    for name in hidden:
        moved = made.model_copy(update={name: "elsewhere"})
        assert fingerprint(work_of(definition, moved, {})) == fingerprint(work_of(definition, made, {}))
    canonical(made.identity())


def test_no_param_speaks_of_devices_paths_minutes_credentials_or_workers(definition):
    words = "device path folder minutes seconds hours token_ password secret key threads workers".split()
    for name in set(definition.params.model_fields) - locations(definition.params):
        assert not any(name == word or name.startswith(f"{word}_") or name.endswith(f"_{word}") for word in words), name


def test_work_has_code_of_its_own_and_pinned_libraries(definition):
    made = example(definition)
    if definition.name in ("validate", "bench"):
        made = made.model_copy(update={"target": "onnxruntime:cpu"})  # torch's own code is imported anyway
    work = work_of(definition, made, {})
    used = definition.uses(made) if definition.uses else ()
    assert work.code == code_digest(module_of(definition.name), *used)
    # What the params choose counts: a changed measure or backend is other work.
    assert bool(used) == (definition.name in ("compile", "validate", "bench"))
    assert (work.code != code_digest(module_of(definition.name))) == bool(used)
    assert work.requires
    assert bool(work.executor) == (definition.name in ("validate", "bench"))


def test_no_two_stages_have_the_same_code():
    assert len({code_digest(module_of(name)) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_importing_a_stage_loads_nothing_heavy(name):
    code = f"import sys, stages; stages.stage({name!r}); print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_importing_the_table_loads_no_stage():
    code = "import sys, stages; print(*[m for m in sys.modules if m.startswith('stages.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"stages.runtime", "stages.runtime.contract"}


def test_every_stage_has_tests_of_its_own():
    tests = ROOT / "tests" / "stages"
    without = [n for n in NAMES if not any((tests / p).is_file() for p in (f"test_{n}.py", f"{n}/test_stage.py"))]
    assert without == []


def test_unknown_stage_is_refused_with_those_that_there_are():
    with pytest.raises(StageError, match="there is no stage 'fly'") as caught:
        stage("fly")
    assert caught.value.limit == ", ".join(STAGES)
