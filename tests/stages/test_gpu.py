"""What runs on a GPU answers as on the processor; `make gpu-test` runs it where there is one."""

import json

import numpy as np
import pytest
import torch

from stages import stage
from stages.adapters.backends import backend
from stages.adapters.tensorrt.device import Device, open_device
from stages.adapters.torch_gpu import require_gpu
from stages.bench.params import BenchParams
from stages.bench.stage import BENCH
from stages.runtime.contract import DoesNotFit, StageError
from stages.runtime.cuda_driver import gpu_name, loaded
from stages.runtime.progress import Silent
from stages.serving.eager import eager
from stages.serving.engine import open_engine
from stages.validate.params import ValidateParams, executed_on
from stages.validate.stage import VALIDATE
from tests.benchmarks.families import CELLS, ROWS, _made, checkpoint, text
from tests.stages.models.families import EXPERTS, FAMILIES, VOCABULARY, WIDER, family
from tests.stages.validate.test_written import SOURCES
from tests.stages.validate.words import lively

pytestmark = pytest.mark.gpu
MADE = {
    **{name: CELLS[name] for name in ("channels", "heads", "blocks", "2:4", "factorize", "share")},
    **{name: CELLS[name] for name in ("W8A8", "INT8", "INT4", "FP8", "NVFP4")},
    "MXFP4": ("quantize", {"scheme": "mxfp4", "skip": ("*.down_proj",), "windows": 4, "window_tokens": 32}),
    "bf16": ("quantize", {"scheme": "bf16"}),
    "sparse": ("factorize", {"keep": 0.9, "sparse": 0.5, "windows": 4, "window_tokens": 32}),
    "cache": ("quantize", {"scheme": "int8_weight_only", "kv_cache": "int8", "windows": 4, "window_tokens": 32}),
}
ROUNDED = ("W8A8", "FP8", "NVFP4", "cache")
"""What rounds activations: a sum in another order can fall to the next step."""


@pytest.fixture(scope="module", autouse=True)
def _gpu():
    try:
        require_gpu()
    except DoesNotFit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


def apart(folder):
    """How far the GPU's answers are from the processor's, of the largest, on a short and a padded text."""
    ids_NT = 3 + np.arange(40, dtype=np.int64).reshape(2, 20) * 7 % (VOCABULARY - 3)
    mask_NT = np.ones_like(ids_NT)
    mask_NT[1, 12:] = 0
    one, other = eager(folder), eager(folder, "cuda")
    want, got = one.forward(ids_NT, mask_NT), other.forward(ids_NT, mask_NT)
    assert np.array_equal(got, other.forward(ids_NT, mask_NT)), "the same bits each time"
    if want.ndim > 2 and want.shape[1] == ids_NT.shape[1]:
        want, got = want[mask_NT > 0], got[mask_NT > 0]
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", FAMILIES | WIDER | EXPERTS)
def test_family_answers_as_on_the_processor(name, root):
    assert apart(family(name, root)) < 1e-5


@pytest.mark.parametrize("made", MADE)
def test_what_a_technique_made_answers_as_on_the_processor(made, root, tmp_path):
    out = _made(*MADE[made], checkpoint(ROWS["Llama"], root), root, tmp_path)
    assert apart(out) < (3e-2 if made in ROUNDED else 1e-5)


def test_a_verdict_of_the_gpu_is_the_processors(root, tmp_path):
    dense = checkpoint(ROWS["Llama"], root)
    (tmp_path / "made").mkdir()
    inputs = {"model": _made(*CELLS["INT4"], dense, root, tmp_path / "made"), "text": text(root), "baseline": dense}
    found = {}
    for target in ("torch:cpu", "torch:cuda"):
        params = ValidateParams(window_tokens=32, windows=4, target=target)
        VALIDATE.admit(params, {"model": _Generates()})
        out = tmp_path / target.replace(":", "-")
        out.mkdir()
        found[target] = VALIDATE.run(params, inputs, out, Silent())
        assert json.loads((out / "report.json").read_text())["artifact_target"] == target
    assert found["torch:cuda"] == pytest.approx(found["torch:cpu"], rel=1e-3)
    assert executed_on(ValidateParams(target="torch:cuda")) == {
        "target": "torch:cuda",
        "device": torch.cuda.get_device_name(0),
        "runtime": f"torch {torch.__version__.partition('+')[0]} CUDA {torch.version.cuda}",
    }


def test_the_driver_says_what_torch_says_and_a_plan_for_another_gpu_is_refused():
    here = "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    assert gpu_name() == torch.cuda.get_device_name(0)
    assert Device(loaded()[0]).architecture == here
    assert open_device("tensorrt_rtx", ["sm_75", here]).architecture == here
    with pytest.raises(DoesNotFit, match=rf"measured {here}; limit sm_1\. Compile with {here}"):
        open_device("tensorrt_rtx", ["sm_1"])


def test_memory_of_the_gpu_holds_zeros_and_what_is_written_and_says_what_is_free():
    device = Device(loaded()[0])
    before = device.free_bytes()
    held = device.zeros(256 << 20)
    assert before - device.free_bytes() >= 200 << 20
    read = np.ones(256 << 18, np.float32)
    device.download(held, read)
    assert not read.any()
    wrote = np.arange(1000, dtype=np.float32)
    device.fill(held, wrote)
    device.download(held, read)
    assert np.array_equal(read[:1000], wrote) and not read[1000:].any()
    device.release(held)
    assert device.free_bytes() >= before - (32 << 20)


@pytest.fixture(scope="module", params=["tensorrt_rtx", "tensorrt"])
def plans_for(request):
    """A library that builds plans for this GPU, and the GPU."""
    pytest.importorskip(request.param)
    here = "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    if here not in backend(request.param).architectures:
        pytest.skip(f"{request.param} builds nothing for {here}")
    return request.param, here


def _opened(made, exporting, plans_for, rows, folder):
    """A checkpoint's plan for so many rows and its engine for the processor, made in a folder and opened."""
    library, here = plans_for
    ways = {"graph": ("export", exporting, "model", made)}
    asked = {"plan": {"backend": library, "architectures": [here], "maximum_batch": rows, "maximum_tokens": 48},
             "cpu": {"backend": "onnxruntime", "maximum_tokens": 48}}  # fmt: skip
    ways |= {name: ("compile", params, "graph", folder / "graph") for name, params in asked.items()}
    for name, (verb, params, role, source) in ways.items():
        (folder / name).mkdir()
        definition = stage(verb)
        definition.run(definition.params.model_validate(params), {role: source}, folder / name, Silent())
    return open_engine(folder / "plan", verified=True), open_engine(folder / "cpu")


@pytest.fixture(params=["Llama", "Mistral", "Gemma 2", "GPT-2", "BLOOM", "W8A8", "INT4"])
def both(request, plans_for, root, tmp_path):
    """A model's plan and its engine for the processor, opened, and the plan's folder."""
    made = checkpoint(ROWS.get(request.param, ROWS["Llama"]), root)
    if request.param in CELLS:
        (tmp_path / "made").mkdir()
        made = _made(*CELLS[request.param], made, root, tmp_path / "made")
    return *_opened(made, {}, plans_for, 3, tmp_path), request.param


def test_plan_with_a_cache_answers_as_the_engine_for_the_processor(both):
    plan, cpu, made = both
    assert plan.steps is not None and plan.maximum_tokens == 48
    ids_NT = 3 + np.arange(5 * 40, dtype=np.int64).reshape(5, 40) * 7 % (VOCABULARY - 3)
    mask_NT = np.ones_like(ids_NT)
    mask_NT[1, 12:] = 0
    want, got = cpu.forward(ids_NT, mask_NT)[mask_NT > 0], plan.forward(ids_NT, mask_NT)[mask_NT > 0]
    assert np.abs(got - want).max() < (3e-2 if made in ROUNDED else 1e-3) * np.abs(want).max()


def test_plan_with_a_cache_writes_token_by_token_what_it_reads_at_once(both):
    plan, _, made = both
    ids_NT = 3 + np.arange(5 * 24, dtype=np.int64).reshape(5, 24) * 7 % (VOCABULARY - 3)
    lengths_N = np.array([9, 14, 4, 1, 12])
    whole_NTV = plan.forward(ids_NT, np.ones_like(ids_NT))
    mask_NT = (np.arange(14) >= 14 - lengths_N[:, None]).astype(np.int64)
    prompts_NT = np.zeros((5, 14), np.int64)
    for row, count in enumerate(lengths_N):
        prompts_NT[row, 14 - count :] = ids_NT[row, :count]
    limit, rows = (3e-2 if made in ROUNDED else 1e-3) * np.abs(whole_NTV).max(), np.arange(5)
    free = Device(loaded()[0]).free_bytes()
    steps = plan.steps()
    said_NV = steps.begin(prompts_NT, mask_NT)
    for more in range(10):
        assert np.abs(said_NV - whole_NTV[rows, lengths_N - 1 + more]).max() < limit
        said_NV = steps.next(ids_NT[rows, lengths_N + more])
    del steps
    assert Device(loaded()[0]).free_bytes() >= free - (32 << 20)


def test_plan_with_a_cache_refuses_what_is_longer_than_its_cache(both):
    plan, _, _ = both
    with pytest.raises(StageError, match="longer than the cache; measured 49 tokens; limit 48 tokens"):
        plan.forward(np.full((1, 49), 5), np.ones((1, 49), np.int64))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_plans_of_an_encoder_and_a_decoder_answer_as_the_engine_for_the_processor(name, plans_for, root, tmp_path):
    plan, cpu = _opened(lively(name, root), {"parity_tokens": 24}, plans_for, 2, tmp_path)
    ids_NT = 5 + np.arange(5 * 20, dtype=np.int64).reshape(5, 20) * 7 % 40
    mask_NT = np.ones_like(ids_NT)
    mask_NT[1, 12:] = 0
    want, got = cpu.forward(ids_NT, mask_NT), plan.forward(ids_NT, mask_NT)
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()
    free = Device(loaded()[0]).free_bytes()
    assert plan.generate(list(SOURCES), max_new_tokens=12) == cpu.generate(list(SOURCES), max_new_tokens=12)
    assert Device(loaded()[0]).free_bytes() >= free - (32 << 20)


def test_verdict_and_speed_of_a_plan_are_of_the_gpu_and_its_answers_the_processors(plans_for, root, tmp_path):
    library, here = plans_for
    dense = checkpoint(ROWS["Llama"], root)
    _opened(dense, {}, plans_for, 3, tmp_path)
    found = {}
    for name, target in (("plan", f"{library}:{here}"), ("cpu", "onnxruntime:cpu")):
        out = tmp_path / f"{name}-report"
        out.mkdir()
        inputs = {"model": tmp_path / name, "text": text(root), "baseline": dense}
        found[name] = VALIDATE.run(ValidateParams(window_tokens=32, windows=4, target=target), inputs, out, Silent())
    assert found["plan"]["perplexity"] == pytest.approx(found["cpu"]["perplexity"], rel=1e-3)
    timed = tmp_path / "timed"
    timed.mkdir()
    asked = BenchParams(target=f"{library}:{here}", prompt_tokens=(16,), new_tokens=4, batches=(1,), repeats=2)
    inputs = {"artifact": tmp_path / "plan", "text": text(root), "baseline": dense}
    measured = BENCH.run(asked, inputs, timed, Silent())
    report = json.loads((timed / "report.json").read_text())
    assert measured["decode_tokens_per_s"] > 0 and report["executor"]["device"] == gpu_name()
    assert report["speed"]["baseline"]["target"] == "torch:cuda"


class _Generates:
    """As much of a checkpoint as `admit` asks of one that generates."""

    task = "generate"
