"""TensorRT plans on a GPU, with a driver and a library made of numpy in place of CUDA's."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from stages.adapters import tensorrt_execution as adapter
from stages.runtime.contract import DoesNotFit, StageError
from tests.stages.adapters.gpus import Driver


class Context:
    """An engine whose logits are [token, mask, -token] at each place; with segments [token, mask, segment]."""

    def __init__(self):
        self.at, self.shape, self.fails, self.segments = {}, (), False, False
        self.shapes = []

    def set_input_shape(self, _name, shape):
        self.shape = shape
        return shape[0] <= 2 and shape[1] <= 8

    def set_tensor_address(self, name, address):
        self.at[name] = address

    def get_tensor_shape(self, _name):
        return (*self.shape, 3)

    def execute_async_v3(self, _stream):
        if self.fails:
            return False
        self.shapes.append(self.shape)
        count = int(np.prod(self.shape))
        ids, mask = (self._array(name, ctypes.c_int64, count) for name in ("input_ids", "attention_mask"))
        third = self._array("token_type_ids", ctypes.c_int64, count) if self.segments else -ids
        self._array("logits", ctypes.c_float, count * 3)[:] = np.stack([ids, mask, third], axis=-1).ravel()
        return True

    def _array(self, name, kind, count):
        return np.ctypeslib.as_array((kind * count).from_address(self.at[name]))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with an sm_89 GPU, a plan on it and the library that reads the plan."""
    driver, context = Driver(), Context()
    names = ("input_ids", "attention_mask", "logits")
    engine = SimpleNamespace(
        create_execution_context=lambda: context,
        num_io_tensors=len(names),
        get_tensor_name=names.__getitem__,
        get_tensor_profile_shape=lambda _name, _profile: ((1, 1), (1, 4), (2, 8)),
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine if data == b"plan" else None)
    library = SimpleNamespace(Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
                              Runtime=lambda _logger: runtime)  # fmt: skip
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    (tmp_path / "model.plan").write_bytes(b"plan")
    return SimpleNamespace(driver=driver, context=context, engine=engine, plan=tmp_path / "model.plan")


def test_plan_is_executed_and_its_memory_given_back(machine):
    opened = adapter.execute_plan(machine.plan, "tensorrt_rtx", ["sm_86", "sm_89"], verified=True)
    target, run = opened.target, opened.forward
    assert target == "tensorrt_rtx:sm_89"
    ids, mask = np.array([[5, 6, 7], [8, 9, 10]]), np.array([[0, 1, 1], [1, 1, 1]])
    assert np.array_equal(run(ids, mask), np.stack([ids, mask, -ids], axis=-1))
    assert not machine.driver.memory and not opened.tells_segments


def test_more_texts_than_the_plan_is_for_are_answered_in_groups(machine):
    run = adapter.execute_plan(machine.plan, "tensorrt_rtx", ["sm_89"], verified=True).forward
    ids, mask = np.arange(15).reshape(5, 3), np.ones((5, 3), np.int64)
    assert np.array_equal(run(ids, mask), np.stack([ids, mask, -ids], axis=-1))
    assert machine.context.shapes == [(2, 3), (2, 3), (1, 3)]


def test_plan_that_tells_segments_is_given_them_or_zeros(machine):
    machine.context.segments = True
    names = ("input_ids", "attention_mask", "token_type_ids", "logits")
    machine.engine.num_io_tensors, machine.engine.get_tensor_name = len(names), names.__getitem__
    opened = adapter.execute_plan(machine.plan, "tensorrt_rtx", ["sm_89"], verified=True)
    ids, mask, types = np.array([[5, 6, 7]]), np.array([[1, 1, 0]]), np.array([[0, 1, 1]])
    assert opened.tells_segments
    assert np.array_equal(opened.forward(ids, mask, types), np.stack([ids, mask, types], axis=-1))
    assert np.array_equal(opened.forward(ids, mask), np.stack([ids, mask, 0 * ids], axis=-1))
    assert not machine.driver.memory


def test_weights_that_the_gpu_has_no_room_for_are_read_as_it_goes(machine):
    runs = lambda: adapter.execute_plan(machine.plan, "tensorrt_rtx", ["sm_89"], verified=True)  # noqa: E731
    machine.engine.streamable_weights_size, machine.engine.get_weight_streaming_automatic_budget = 1 << 30, lambda: 77
    runs()
    assert not hasattr(machine.engine, "weight_streaming_budget_v2")
    machine.driver.free_bytes = 1 << 29
    runs()
    assert machine.engine.weight_streaming_budget_v2 == 77


def test_plan_whose_digest_nobody_checked_is_not_deserialized(machine):
    with pytest.raises(StageError, match="executable code whose digest nobody checked"):
        adapter.execute_plan(machine.plan, "tensorrt_rtx", ["sm_89"], verified=False)


def test_plan_for_another_gpu_does_not_fit(machine):
    with pytest.raises(DoesNotFit, match=r"measured sm_89; limit sm_120\. Compile with sm_89"):
        adapter.execute_plan(machine.plan, "tensorrt_rtx", ["sm_120"], verified=True)


def test_damaged_plan_is_refused(machine):
    machine.plan.write_bytes(b"other")
    with pytest.raises(StageError, match=r"refuses model\.plan"):
        adapter.execute_plan(machine.plan, "tensorrt_rtx", ["sm_89"], verified=True)


def test_failing_call_names_itself_and_leaks_nothing(machine):
    run = adapter.execute_plan(machine.plan, "tensorrt_rtx", ["sm_89"], verified=True).forward
    with pytest.raises(StageError, match=r"takes no input_ids of this shape; measured \(1, 9\)"):
        run(np.zeros((1, 9), np.int64), np.zeros((1, 9), np.int64))
    machine.context.fails = True
    with pytest.raises(StageError, match="failed to execute"):
        run(np.zeros((1, 4), np.int64), np.zeros((1, 4), np.int64))
    machine.driver.failing, machine.driver.code = "cuMemAlloc_v2", 2
    with pytest.raises(DoesNotFit, match="refused cuMemAlloc_v2; measured error 2"):
        run(np.zeros((1, 4), np.int64), np.zeros((1, 4), np.int64))
    assert not machine.driver.memory


def test_machine_without_gpu_or_driver_says_compiled_not_executed(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Driver(failing="cuInit", code=100))
    with pytest.raises(DoesNotFit, match=r"compiled, not executed.*error 100"):
        adapter.open_device("tensorrt_rtx", ["sm_89"])
    monkeypatch.undo()
    with pytest.raises(DoesNotFit, match=r"compiled, not executed.*no CUDA driver"):
        adapter.open_device("tensorrt_rtx", ["sm_89"], driver="libcuda-absent.so.1")
