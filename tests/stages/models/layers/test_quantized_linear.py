import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from stages.adapters.onnxruntime import has_exact_kernels
from stages.graphs.onnx_graph import pack_weights
from stages.models.checkpoint.files import dtypes
from stages.models.checkpoint.loading import load_model
from stages.models.layers import quantized_linear
from stages.models.layers.quantization_spec import describe, install
from stages.models.layers.quantized_linear import (
    FORMS,
    QuantizedEmbedding,
    QuantizedLinear,
    for_export,
    pack_int4,
    quantized_modules,
)
from stages.quantize import rounding
from stages.quantize.rounding import Precision
from stages.quantize.stored_forms import rounded
from tests.stages.models.families import answers, family

pytestmark = [
    # Raised inside torch.export and copyreg on every export, whatever the model.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Net(nn.Module):
    """Every kind of layer: rows and blocks, rounded and float inputs, an instance used twice, a tied head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.rows = nn.Linear(64, 128)
        self.blocks = nn.Linear(128, 64)
        self.basis = nn.Linear(64, 32, bias=False)
        self.again = nn.ModuleList([nn.Module(), nn.Module()])
        for one in self.again:
            one.basis = self.basis
        self.back = nn.Linear(32, 64, bias=False)
        self.head = nn.Linear(64, 50, bias=False)

    def forward(self, ids):
        x = self.blocks(torch.relu(self.rows(self.table(ids))))
        for one in self.again:
            x = self.back(one.basis(x))
        return self.head(x)


def linear(shape, **more):
    return {"kind": "linear", "shape": shape, "format": "int8", "bits": 8, "block": None, "input": "float"} | more


SPEC = {
    "scheme": "mixed",
    "layers": {
        "table": {"kind": "embedding", "shape": [50, 64]},
        "rows": linear([128, 64], input="int8", note={"error": 0.5}),
        "blocks": linear([64, 128], format="int4", bits=4, block=32),
        "basis": linear([32, 64]),
        "back": linear([64, 32], input="int8"),
        "head": linear([50, 64], tied_to="table"),
    },
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Net().eval()
    install(made, SPEC)
    for module in quantized_modules(made).values():
        packed = module.weight.dtype == torch.uint8
        module.weight.random_(0, 256) if packed else module.weight.random_(-128, 128)
        module.weight_scale.uniform_(0.001, 0.002)
        if getattr(module, "input_scale", None) is not None:
            module.input_scale.fill_(0.01)
        if getattr(module, "bias", None) is not None:
            module.bias.normal_()
    return made


def test_install_then_describe_gives_the_spec_back(net):
    found = describe(net)
    assert found["scheme"] == "mixed"
    assert found["layers"].keys() == SPEC["layers"].keys()
    for name, entry in SPEC["layers"].items():
        assert entry.items() <= found["layers"][name].items()
    assert found["layers"]["blocks"]["scales"] == [64, 4]


def test_install_keeps_instances_and_ties(net):
    assert net.again[0].basis is net.again[1].basis is net.basis
    assert isinstance(net.basis, QuantizedLinear)
    assert net.head.weight is net.table.weight
    assert net.head.weight_scale is net.table.weight_scale


def test_install_of_an_unknown_module_is_refused():
    with pytest.raises(ValueError, match="elsewhere"):
        install(Net(), {"layers": {"elsewhere": linear([2, 2])}})


def test_describe_of_a_float_model_is_none():
    assert describe(Net()) is None


def test_forward_equals_numpy_on_integers(net):
    ids = torch.randint(0, 50, (2, 5))
    x = net.table.weight.numpy()[ids] * net.table.weight_scale.numpy()[ids][..., None]
    np.testing.assert_allclose(net.table(ids).numpy(), x, rtol=1e-6)
    q = np.clip(np.rint(x / np.float32(0.01)), -128, 127)
    expected = (q @ net.rows.weight.numpy().T.astype(np.float64)) * 0.01 * net.rows.weight_scale.numpy()
    np.testing.assert_allclose(
        net.rows(torch.tensor(x)).numpy(), expected + net.rows.bias.numpy(), rtol=1e-4, atol=1e-5
    )


def test_int4_forward_equals_its_values_laid_out_by_hand():
    layer = QuantizedLinear(8, 2, form="int4", block=4)
    q_OI = torch.tensor([[-8, 7, 1, 0, 2, -3, 5, -1], [0, 1, 2, 3, -4, -5, -6, -7]], dtype=torch.int8)
    layer.weight = pack_int4(q_OI)
    layer.weight_scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    w_OI = q_OI.float() * layer.weight_scale.repeat_interleave(4, dim=1)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), x @ w_OI.t())


@pytest.mark.parametrize("form", FORMS)
def test_forward_by_some_rows_at_a_time_gives_what_all_rows_give(form, monkeypatch):
    layer = QuantizedLinear(64, 7, form=form, block=32 if form == "int4" else None, bias=True)
    asked = rounded(torch.randn(7, 64), form, layer.block, None)
    layer.put(asked | {"bias": torch.randn(7)})
    x = torch.randn(2, 3, 64)
    expected = torch.nn.functional.linear(x, layer.dequantized(), layer.bias)
    monkeypatch.setattr(quantized_linear, "ROWS", 3)
    torch.testing.assert_close(layer(x), expected)


def test_stored_dtypes_reads_the_bytes(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, dtype=torch.int8), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert dtypes(tmp_path) == {"a": "I8", "b": "F32"}


@pytest.fixture
def exported(net, tmp_path):
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        expected = net(ids)
    for_export(net)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.onnx.export(
        net, (ids,), dynamo=True, opset_version=21, input_names=["ids"], dynamic_shapes=(sizes,), verbose=False
    )
    assert pack_weights(program.model.graph) == 1
    program.save(tmp_path / "net.onnx")
    return ids, expected, tmp_path / "net.onnx"


def test_export_computes_in_onnxruntime_what_torch_computes(exported):
    ids, expected, path = exported
    options = onnxruntime.SessionOptions()
    # At the default level onnxruntime rounds the input of INT4 layers to INT8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not has_exact_kernels():  # what it fuses saturates on this processor
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"ids": ids.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 * float(expected.abs().max()))


def test_export_holds_integers_once_and_no_float_copy(exported):
    *_, path = exported
    graph = onnx.load(path).graph
    types = onnx.TensorProto
    stored = {i.name: (i.data_type, tuple(i.dims)) for i in graph.initializer}
    assert stored["blocks.weight"] == (types.INT4, (128, 64))
    int8 = sorted(dims for kind, dims in stored.values() if kind == types.INT8 and dims)
    assert int8 == sorted([(50, 64), (64, 128), (64, 32), (32, 64)])  # the tied table and the basis stand once
    assert all(len(dims) < 2 or "scale" in name for name, (kind, dims) in stored.items() if kind == types.FLOAT)
    counted = [node.op_type for node in graph.node]
    assert counted.count("QuantizeLinear") == 3  # rows once, back twice
    assert "Cast" not in counted


def test_laying_out_twice_changes_nothing_more(net):
    for_export(net)
    once = {name: module.weight.clone() for name, module in quantized_modules(net).items()}
    for_export(net)
    assert all(torch.equal(module.weight, once[name]) for name, module in quantized_modules(net).items())
    assert isinstance(net.table, QuantizedEmbedding)
    assert net.table.weight.shape == (50, 64)


@pytest.mark.parametrize("form", ["int8", "int4", "fp8_e4m3"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_maps_of_few_bits_answer_like_the_dense_maps_of_their_weights(tmp_path, name, form):
    """T5's feed-forward turns what its last map reads into the type of that map's weight."""
    few, dense = load_model(family(name, tmp_path)), load_model(family(name, tmp_path))
    asked = Precision(form, block=8 if form == "int4" else None)
    rounding.plainly(few, rounding.Rounding(dict.fromkeys(rounding.names(few), asked), search=False), tmp_path)
    with torch.no_grad():
        for path, module in quantized_modules(few).items():
            dense.get_submodule(path).weight.copy_(module.dequantized())
    assert torch.allclose(answers(few), answers(dense), atol=1e-4)
    assert all(module.weight.dtype == FORMS[form].dtype for module in quantized_modules(few).values())
