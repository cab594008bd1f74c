"""The real model, from its package to a verdict and an answer, on short texts. Run by `make real-test`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]


def test_slice_real_model_is_judged_registered_and_answers(tmp_path):
    store = tmp_path / "store"
    command = [sys.executable, "-m", "flows", "run", ROOT / "tests/real/slice.yaml", "--store", store, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(done.stdout[done.stdout.find("{") :])
    assert result["model"]["targets"] == ["onnxruntime:cpu"]
    assert result["compiled"] == ["gpu for tensorrt_rtx:sm_89"]
    steps = {step["name"]: step for step in result["steps"]}
    assert (
        steps["pruned"]["metrics"]["block_parameters"] <= 0.95 * steps["pruned"]["metrics"]["block_parameters_before"]
    )
    answered = {gate["measure"] for gate in result["gates"] if gate["corpus"] == "abilities"}
    assert answered == {"accuracy", "above_chance", "kl_divergence", "repetition", "leaks"}
    code = (
        "import mlflow; model = mlflow.pyfunc.load_model('models:/slice@champion')\n"
        "print(model.predict(['The capital of France is'], params={'max_new_tokens': 8})[0])"
    )
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}/state/mlflow.db"}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert "Paris" in answer.stdout, answer.stdout + answer.stderr[-2000:]
