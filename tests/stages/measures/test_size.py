import pytest

from stages.measures.size import size_bytes


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"model.safetensors": 7, "config.json": 100, "tokenizer.json": 1000}, 7),
        ({"model-00001-of-00002.safetensors": 7, "model-00002-of-00002.safetensors": 5}, 12),
        ({"model.onnx": 3, "model.onnx.data": 40, "graph.json": 9}, 43),
        ({"model.plan": 11, "engine.json": 2}, 11),
    ],
)
def test_size_counts_the_models_files_alone(files, expected):
    assert size_bytes(files) == expected


@pytest.mark.parametrize("files", [{}, {"config.json": 3}])
def test_size_without_a_model_is_refused(files):
    with pytest.raises(ValueError, match="no model among"):
        size_bytes(files)
