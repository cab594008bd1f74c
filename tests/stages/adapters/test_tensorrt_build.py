"""What the builder is told, by the objects of the library itself; TensorRT's are those of TensorRT-RTX."""

import pytest
import tensorrt_rtx

from stages.adapters.tensorrt.build import configure, timings


@pytest.fixture(scope="module")
def builder():
    return tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backend", ["tensorrt_rtx", "tensorrt"])
def test_flags_are_those_of_the_backend_and_the_weights(builder, backend, sparse):
    config, flags = builder.create_builder_config(), tensorrt_rtx.BuilderFlag
    configure(tensorrt_rtx, config, backend, ["sm_86", "sm_120"], sparse=sparse)
    assert config.get_flag(flags.SPARSE_WEIGHTS) == sparse
    assert config.get_flag(flags.WEIGHT_STREAMING) == (backend == "tensorrt")
    if backend == "tensorrt_rtx":
        found = [config.get_compute_capability(number) for number in range(config.num_compute_capabilities)]
        assert found == [tensorrt_rtx.ComputeCapability.SM86, tensorrt_rtx.ComputeCapability.SM120]


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_timings_are_kept_in_a_file_and_what_is_none_is_written_anew(builder, tmp_path):
    file = tmp_path / "timings"
    with timings(builder.create_builder_config(), str(file)):
        assert not file.exists()
    first = file.read_bytes()
    assert first
    with timings(builder.create_builder_config(), str(file)):
        pass
    assert file.read_bytes() == first
    file.write_bytes(b"of something else")
    with timings(builder.create_builder_config(), str(file)):
        pass
    assert file.read_bytes() == first and [*tmp_path.iterdir()] == [file]
    with timings(None, ""):
        pass
