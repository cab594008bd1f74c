"""Plans with a cache on a GPU, with ONNX Runtime's products and memory of this process in place of the GPU's."""

import ctypes
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from stages.adapters.tensorrt import build as tensorrt_build
from stages.adapters.tensorrt.build import DECODE, PREFILL, Shapes
from stages.adapters.tensorrt_execution import execute_plan
from stages.graphs import onnx_graph, static_cache
from stages.runtime.contract import DoesNotFit, StageError
from tests.engines import literal, mixed, mixed_graph, token_windows  # noqa: F401
from tests.stages.adapters.gpus import Driver, Engine

PLACES, BATCH = 24, 2


@pytest.fixture(scope="module")
def graphs(mixed_graph, tmp_path_factory):  # noqa: F811
    """The mixed graph with float activations, as it was exported and as a plan is built of it."""
    folder = tmp_path_factory.mktemp("cached")
    model = onnx_graph.load(mixed_graph / "model.onnx")
    onnx_graph.drop_rounding(model)
    onnx_graph.save(model, folder / "model.onnx")
    static_cache.with_places(model, PLACES)
    onnx_graph.save(model, folder / "model.plan")
    return folder


@pytest.fixture
def opened(graphs, monkeypatch):
    """The plan on an sm_89 that has room, and its driver and engine."""
    monkeypatch.setattr(tensorrt_build, "MOST_ASKED", 7)
    driver, plan = Driver(), graphs / "model.plan"
    engine = Engine(plan.read_bytes(), Shapes(maximum_batch=BATCH, maximum_tokens=PLACES))
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _data: engine)
    library = SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}), Runtime=lambda _logger: runtime
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    return SimpleNamespace(
        execution=execute_plan(plan, "tensorrt_rtx", ["sm_89"], verified=True), driver=driver, engine=engine
    )


def test_whole_texts_are_read_in_parts_and_groups_and_leave_no_memory(opened, graphs):
    ids, mask = token_windows(5, 20), np.ones((5, 20), np.int64)
    mask[1, 13:] = 0
    wanted = literal(graphs / "model.onnx", ids)
    found = opened.execution.forward(ids, mask)
    np.testing.assert_allclose(found[mask > 0], wanted[mask > 0], atol=1e-4 * wanted.std())
    assert not found[mask == 0].any()
    assert not opened.driver.memory
    shapes = [shape for _, shape in opened.engine.ran]
    assert shapes == [(rows, tokens) for rows in (2, 2, 1) for tokens in (7, 7, 6)]


def test_tokens_are_written_one_by_one_behind_prompts_of_unequal_length(opened, graphs):
    ids, lengths = token_windows(3, 20), np.array([9, 14, 4])
    wanted = literal(graphs / "model.onnx", ids)
    mask = (np.arange(14) >= 14 - lengths[:, None]).astype(np.int64)  # on the left, as prompts are
    prompts = np.zeros((3, 14), np.int64)
    for row, count in enumerate(lengths):
        prompts[row, 14 - count :] = ids[row, :count]
    steps, limit = opened.execution.steps(PLACES), 1e-4 * wanted.std()
    np.testing.assert_allclose(steps.begin(prompts, mask), wanted[range(3), lengths - 1], atol=limit)
    for more in range(6):
        said = steps.next(ids[range(3), lengths + more])
        np.testing.assert_allclose(said, wanted[range(3), lengths + more], atol=limit)
    assert opened.engine.ran[:2] == [(PREFILL, (2, 14)), (PREFILL, (1, 4))]
    assert opened.engine.ran[2:] == [(DECODE, (2, 1)), (DECODE, (1, 1))] * 6
    held = len(opened.driver.memory)
    assert held == 2 * 12  # keys and values of six layers, of each group
    order = np.array([2, 0, 0, 1, 2])
    steps.begin(prompts, mask)
    assert len(opened.driver.memory) == held
    steps.reorder(order)
    assert len(opened.driver.memory) == 3 * 12
    np.testing.assert_allclose(steps.next(ids[order, lengths[order]]), wanted[order, lengths[order]], atol=limit)
    steps.reorder(np.array([3, 1, 4]))
    order = order[[3, 1, 4]]
    said = steps.next(ids[order, lengths[order] + 1])
    np.testing.assert_allclose(said, wanted[order, lengths[order] + 1], atol=limit)
    assert len(opened.driver.memory) == held
    del steps
    gc.collect()
    assert not opened.driver.memory


def test_row_that_ended_is_led_on_at_the_last_place(opened):
    steps = opened.execution.steps(PLACES)
    steps.begin(token_windows(1, PLACES - 1), np.ones((1, PLACES - 1), np.int64))
    for _ in range(3):
        assert np.isfinite(steps.next(np.array([5]))).all()


def test_text_that_the_cache_has_no_place_for_is_refused(opened):
    ids = token_windows(1, PLACES + 1)
    with pytest.raises(StageError, match=r"longer than the cache; measured 25 tokens; limit 24 tokens"):
        opened.execution.steps(100).begin(ids, np.ones_like(ids))
    with pytest.raises(StageError, match="longer than the cache"):
        opened.execution.forward(ids, np.ones_like(ids))
    gc.collect()
    assert not opened.driver.memory


def test_gpu_without_room_is_told_before_anything_is_taken(opened):
    opened.driver.free_bytes = 256 << 20
    ids = token_windows(2, 4)
    with pytest.raises(DoesNotFit, match=r"2 texts of 24 tokens need \d+ MB; limit 0 MB"):
        opened.execution.steps(PLACES).begin(ids, np.ones_like(ids))
    opened.driver.free_bytes = 1 << 40
    opened.driver.failing, opened.driver.code = "cuMemsetD8_v2", 2
    with pytest.raises(DoesNotFit, match="refused cuMemsetD8_v2"):
        opened.execution.steps(PLACES).begin(ids, np.ones_like(ids))
    assert not opened.driver.memory


def test_plan_without_a_profile_for_steps_is_refused(opened, graphs):
    opened.engine.profiles.pop()
    with pytest.raises(StageError, match="the engine lacks a profile; measured number 1"):
        execute_plan(graphs / "model.plan", "tensorrt_rtx", ["sm_89"], verified=True)


def test_plan_is_executed_by_other_threads_than_opened_it(opened):
    ids = token_windows(1, 9)
    here = opened.execution.forward(ids, np.ones_like(ids))

    def there():
        steps = opened.execution.steps(PLACES)
        steps.begin(ids[:, :8], np.ones((1, 8), np.int64))
        return steps.next(ids[:, 8])

    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            np.testing.assert_allclose(pool.submit(there).result(60), here[:, 8], atol=1e-4 * here.std())


def test_text_is_gone_on_from_an_earlier_token(opened):
    ids = token_windows(2, 20)
    parted = np.concatenate([ids[0, :6], ids[1, :9]])
    wanted = opened.execution.forward(parted[None], np.ones((1, 15), np.int64))[0]
    steps = opened.execution.steps(PLACES)
    steps.begin(ids[:1, :12], np.ones((1, 12), np.int64))
    steps.truncate(6)
    np.testing.assert_allclose(steps.more(parted[6:13]), wanted[12], atol=1e-4 * wanted.std())
    for at in (13, 14):
        np.testing.assert_allclose(steps.next(parted[at : at + 1])[0], wanted[at], atol=1e-4 * wanted.std())
