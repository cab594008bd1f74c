"""MLflow's own validators are the oracle of what a model and an alias may be called."""

import subprocess
import sys

import jsonschema
import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils import validation
from pydantic import TypeAdapter, ValidationError

from flows.names import Alias, Title, alias_fault, checked_alias, checked_model
from stages.runtime.contract import StageError

ALIASES = [
    *("champion", "Champion", "a", "v", "V", "v1", "V07", "v1a", "1", "v-1", "version1", "xv1", "latest", "LaTest"),
    *("latest-one", "", " ", "a b", "a.b", "a/b", "a:b", "a@b", "é", "v\u0661", "_", "-", "x" * 255, "x" * 256),
]
MODELS = ["qwen2.5", "A-b_c", "a", "a/b", "a:b", "", " ", ".", "..", "../a", "a'b", "é", "x" * 100, "x" * 101]


def takes(check, name):
    try:
        check(name)
    except MlflowException:
        return False
    return True


def mlflow_takes_alias(name):
    reserved = validation._validate_model_alias_name_reserved
    return takes(validation._validate_model_alias_name, name) and takes(reserved, name)


def follows(schema, name):
    try:
        jsonschema.validate(name, schema)
    except jsonschema.ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", ALIASES)
def test_alias_is_taken_where_mlflow_takes_it_by_recipe_schema_and_command(name):
    taken = mlflow_takes_alias(name)
    assert (alias_fault(name) == "") == taken
    assert follows(TypeAdapter(Alias).json_schema(), name) == taken
    if taken:
        assert TypeAdapter(Alias).validate_python(name) == checked_alias(name) == name
    else:
        with pytest.raises(ValidationError, match="allowed: letters"):
            TypeAdapter(Alias).validate_python(name)
        with pytest.raises(StageError, match=r"limit letters.*Name another"):
            checked_alias(name)


def test_alias_that_ends_its_line_is_refused_though_mlflow_overlooks_it():
    assert mlflow_takes_alias("a\n") and alias_fault("a\n")


@pytest.mark.parametrize("name", MODELS)
def test_model_that_a_recipe_may_name_is_taken_by_mlflow_and_by_commands(name):
    try:
        TypeAdapter(Title).validate_python(name)
    except ValidationError:
        return
    assert takes(validation._validate_model_name, name) and checked_model(name) == name


@pytest.mark.parametrize("name", [one for one in MODELS if not takes(validation._validate_model_name, one)])
def test_model_that_mlflow_refuses_is_refused_by_commands(name):
    with pytest.raises(StageError, match="limit letters"):
        checked_model(name)


def test_names_are_known_without_mlflow():
    code = "import sys, flows.recipe.read; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
