"""CUDA's driver and TensorRT's runtime, over memory of this process."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import onnxruntime

from stages.adapters.tensorrt import build as tensorrt_build

_FLOATS = ("past_key_values", "cross")


class Driver:
    """CUDA's C functions over memory of this process; `missing` names a function that fails, with its code."""

    def __init__(self, architecture=(8, 9), failing=None, code=1):
        self.memory, self.architecture, self.failing, self.code = {}, architecture, failing, code
        self.free_bytes = 1 << 40
        self.current = set()

    def __getattr__(self, name):
        def function(*arguments):
            known = getattr(type(self), f"_{name}", None)
            if name == self.failing:
                return self.code
            if name.startswith("cuMem") and threading.get_ident() not in self.current:
                return 201  # no context is current to this thread
            return known(self, *arguments) if known else 0

        return function

    def _cuCtxSetCurrent(self, _context):
        self.current.add(threading.get_ident())
        return 0

    def _cuDeviceGetName(self, out, size, _device):
        out.value = b"a GPU"[:size]
        return 0

    def _cuDeviceGetAttribute(self, out, attribute, _device):
        out._obj.value = self.architecture[attribute - 75]
        return 0

    def _cuMemAlloc_v2(self, out, size):
        buffer = ctypes.create_string_buffer(b"\xff" * size.value, size.value)
        out._obj.value = ctypes.addressof(buffer)
        self.memory[out._obj.value] = buffer
        return 0

    def _cuMemsetD8_v2(self, pointer, value, size):
        ctypes.memset(pointer.value, value.value, size.value)
        return 0

    def _cuMemGetInfo_v2(self, free, total):
        free._obj.value = total._obj.value = self.free_bytes
        return 0

    def _cuMemFree_v2(self, pointer):
        del self.memory[pointer.value]
        return 0

    def _cuMemcpyHtoD_v2(self, pointer, source, size):
        ctypes.memmove(pointer.value, source, size.value)
        return 0

    def _cuMemcpyDtoD_v2(self, target, source, size):
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def _cuMemcpyDtoH_v2(self, target, pointer, size):
        ctypes.memmove(target, pointer.value, size.value)
        return 0


class Engine:
    """A plan that is an ONNX graph with a cache of fixed places, or an encoder's: ONNX Runtime computes.

    Memory is the driver's.

    Args:
        graph: its bytes.
        shapes: what its profiles are for.
    """

    def __init__(self, graph, shapes):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(graph, options)
        self.given = {one.name: _sizes(one.shape) for one in self.session.get_inputs()}
        self.made = {one.name: _sizes(one.shape) for one in self.session.get_outputs()}
        self.names = [*self.given, *self.made]
        self.num_io_tensors = len(self.names)
        self.profiles = [one.shapes for one in tensorrt_build.profiles(_Profiles(), _Network(self.given), shapes)]
        self.ran = []

    def get_tensor_name(self, number):
        return self.names[number]

    def get_tensor_shape(self, name):
        return (self.given | self.made)[name]

    def get_tensor_dtype(self, _name):
        return SimpleNamespace(itemsize=4)

    def get_tensor_profile_shape(self, name, profile):
        return self.profiles[profile][name]

    def create_execution_context(self):
        return Context(self)


class Context:
    """What executes an engine by one of its profiles."""

    def __init__(self, engine):
        self.engine, self.profile, self.at, self.shapes = engine, 0, {}, {}

    def set_optimization_profile_async(self, profile, _stream):
        self.profile = profile
        return profile < len(self.engine.profiles)

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.profiles[self.profile][name]
        self.shapes[name] = tuple(shape)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name, address):
        self.at[name] = address

    def get_tensor_shape(self, name):
        assert all(one in self.shapes for one in self.engine.given)
        known = iter(self.shapes["logits_at" if name == "logits" else "input_ids"])
        return tuple(next(known) if size < 0 else size for size in self.engine.made[name])

    def execute_async_v3(self, _stream):
        self.engine.ran.append((self.profile, self.shapes["input_ids"]))
        feeds = {
            name: self._array(name, np.float32 if name.startswith(_FLOATS) else np.int64, self.shapes[name])
            for name in self.engine.given
        }
        found = self.engine.session.run(None, feeds)
        for name, value in zip(self.engine.made, found, strict=True):
            if name.startswith("present"):
                # The plan's operator writes where it reads.
                assert self.at[name] == self.at[name.replace("present", "past_key_values")]
            self._array(name, np.float32, value.shape)[...] = value
        return True

    def _array(self, name, kind, shape):
        count = int(np.prod(shape)) * np.dtype(kind).itemsize
        return np.frombuffer((ctypes.c_char * count).from_address(self.at[name]), kind).reshape(shape)


class _Profiles:
    def create_optimization_profile(self):
        made = SimpleNamespace(shapes={})
        made.set_shape = lambda name, *shapes: made.shapes.__setitem__(name, shapes)
        return made


class _Network:
    def __init__(self, given):
        self.inputs = [SimpleNamespace(name=name, shape=shape) for name, shape in given.items()]
        self.num_inputs = len(self.inputs)

    def get_input(self, number):
        return self.inputs[number]


def _sizes(shape):
    return tuple(size if isinstance(size, int) else -1 for size in shape)
