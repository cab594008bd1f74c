"""export: the graph computes what torch computes, holds integers as integers and every tensor once."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper

from stages.adapters.backends import refuse_impossible
from stages.adapters.tensorrt.build import Shapes, build_plan
from stages.export import to_onnx
from stages.export.checks import SLACK_BYTES, expected, require_effect, require_numbers
from stages.export.stage import ExportParams, export
from stages.graphs import onnx_graph
from stages.graphs.parity import parity, require_parity
from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.models.layers import quantized_linear
from stages.quantize.stored_forms import rounded
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.serving.engine import open_engine
from tests.conftest import sealer
from tests.engines import Hears, literal, mixed, mixed_graph, one_block, token_windows, without_cache  # noqa: F401


def torch_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return load_model(folder)(input_ids=torch.from_numpy(ids)).logits.numpy()


@pytest.fixture(scope="module")
def dense_graph(tiny, tmp_path_factory):
    """One block in fp32 at the older opset, with windows of a text."""
    root = tmp_path_factory.mktemp("dense")
    checkpoint = one_block(tiny, root / "checkpoint")
    (root / "graph").mkdir()
    metrics = export(ExportParams(opset=21), {"model": checkpoint}, root / "graph", Silent())
    return checkpoint, root / "graph", metrics


def test_graph_at_other_shapes_gives_torchs_logits(mixed, mixed_graph):  # noqa: F811
    ids = token_windows(3, 37)
    found = literal(mixed_graph / "model.onnx", ids)
    reference = torch_logits(mixed, ids)
    assert found.shape == (3, 37, 768)
    assert np.abs(found - reference).mean() < 2e-3 * reference.std()


def test_graph_of_floats_is_torch_to_the_last_digits(dense_graph):
    checkpoint, folder, metrics = dense_graph
    ids = token_windows(2, 50)
    found = literal(folder / "model.onnx", ids)
    assert np.abs(found - torch_logits(checkpoint, ids)).max() < 1e-4
    assert metrics["parity_logit_difference"] < 1e-4


def test_graph_of_the_older_opset_has_no_newer_operators(dense_graph):
    _, folder, _ = dense_graph
    model = onnx.load(folder / "model.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [21]
    assert not {"Attention", "RotaryEmbedding", "RMSNormalization"} & {node.op_type for node in model.graph.node}


def test_left_padding_does_not_change_a_row(dense_graph):
    _, folder, _ = dense_graph
    ids = token_windows(1, 20)
    alone = literal(folder / "model.onnx", ids)
    batch, mask = np.zeros((2, 26), np.int64), np.zeros((2, 26), np.int64)
    batch[0, 6:], mask[0, 6:] = ids, 1
    batch[1], mask[1] = token_windows(1, 26), 1
    together = literal(folder / "model.onnx", batch, mask)
    assert np.isfinite(together).all()
    assert np.abs(together[0, 6:] - alone[0]).max() < 1e-4


def test_quantized_weights_are_integers_under_their_names(mixed, mixed_graph):  # noqa: F811
    held = {t.name: t for t in onnx.load(mixed_graph / "model.onnx").graph.initializer}
    for block, kind in ((0, TensorProto.INT8), (1, TensorProto.INT4), (2, TensorProto.INT8)):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            assert held[f"model.layers.{block}.{part}.weight"].data_type == kind
    layer = load_model(mixed).model.layers[1].mlp.down_proj
    stored = numpy_helper.to_array(held["model.layers.1.mlp.down_proj.weight"]).astype(np.int8)
    assert np.array_equal(stored, quantized_linear.unpack_int4(layer.weight).numpy().T)
    copies = [t for t in held.values() if t.data_type == TensorProto.FLOAT and np.prod(t.dims) >= 32 * 64]
    assert not [t.name for t in copies if not t.name.startswith(("model.layers.3", "model.layers.4", "model.layers.5"))]


def test_shared_tensors_stand_once(mixed_graph):  # noqa: F811
    held = onnx.load(mixed_graph / "model.onnx").graph.initializer
    shapes = Counter(tuple(t.dims) for t in held)
    assert shapes[768, 64] + shapes[64, 768] == 1
    assert [t.name for t in held if "basis" in t.name] == ["model.layers.4.mlp.gate_proj.basis.weight"]


def test_graph_is_valid_and_says_nothing_of_where_it_was_made(mixed_graph):  # noqa: F811
    onnx.checker.check_model(onnx.load(mixed_graph / "model.onnx"), full_check=True)
    data = (mixed_graph / "model.onnx").read_bytes()
    assert b".py" not in data and b"stack_trace" not in data and b"torch" not in data


def test_same_work_gives_the_same_bytes_and_a_hit(tiny, store, tmp_path):
    seal = sealer(store)
    checkpoint = seal("fetch", {"source": one_block(tiny, tmp_path / "one").as_uri()}).identity
    first = seal("export", {}, model=checkpoint)
    assert seal("export", {}, model=checkpoint).cached
    export(ExportParams(), {"model": store.checkout(checkpoint)}, _folder(tmp_path), Silent())
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (
        store.checkout(first.identity) / "model.onnx"
    ).read_bytes()


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "again").mkdir()
    return tmp_path / "again"


def test_weights_left_unpacked_are_refused_and_nothing_is_sealed(mixed, store, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(to_onnx, "with_cache", lambda *_: onnx_graph.load(_unpacked(tmp_path)))
    seal = sealer(store)
    checkpoint = seal("fetch", {"source": mixed.as_uri()}).identity
    with pytest.raises(StageError, match="quantized weights as integers; measured 0 tensors; limit 22"):
        seal("export", {}, model=checkpoint)
    assert {manifest.kind for _, manifest in store.manifests()} == {"checkpoint"}


def test_a_graph_with_other_numbers_is_refused(dense_graph, tmp_path, monkeypatch):
    checkpoint, folder, _ = dense_graph

    def wrong(*_, **_asked):
        model = onnx_graph.load(folder / "model.onnx")
        norm = model.graph.initializers["model.norm.weight"]
        norm.const_value = ir.tensor(norm.const_value.numpy() * 1.01)
        return model

    monkeypatch.setattr(to_onnx, "to_onnx", wrong)
    with pytest.raises(StageError, match="the graph and the torch model differ"):
        export(ExportParams(opset=21), {"model": checkpoint}, tmp_path, Silent())
    assert not (tmp_path / "graph.json").exists()


def _unpacked(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 21]> g (float x) => (float y) {y = Abs(x)}'),
              tmp_path / "other.onnx")  # fmt: skip
    return tmp_path / "other.onnx"


def test_effect_is_proven_from_the_written_graph(mixed, mixed_graph):  # noqa: F811
    held = onnx_graph.held(onnx_graph.load(mixed_graph / "model.onnx"))
    wanted = expected(load_model(mixed), token_windows(1, 4))
    require_effect(held, wanted)
    stored = sum(path.stat().st_size for path in mixed.glob("*.safetensors"))
    assert abs(wanted.size_bytes - stored) < 10_000
    for changed, said in (
        (replace(held, quantized=held.quantized - Counter({(4, 4096): 1})), "integers; measured 21 tensors; limit 22"),
        (replace(held, rounding={}), r"does not round .* by \[\] instead of \["),
        (replace(held, size_bytes=held.size_bytes + 2 * SLACK_BYTES), "not the checkpoint's; measured"),
        (replace(held, size_bytes=held.size_bytes // 2), "not the checkpoint's; measured"),
    ):
        with pytest.raises(StageError, match=said):
            require_effect(changed, wanted)


def test_rounding_of_activations_stands_in_the_graph_as_in_the_checkpoint(mixed, mixed_graph):  # noqa: F811
    layer = load_model(mixed).model.layers[0]
    rounding = onnx_graph.held(onnx_graph.load(mixed_graph / "model.onnx")).rounding
    assert rounding["model.layers.0.mlp.down_proj.weight"] == {float(layer.mlp.down_proj.input_scale)}
    assert len(rounding) == 6


def test_numbers_of_another_model_are_refused(mixed, mixed_graph):  # noqa: F811
    ids = token_windows(1, 24)
    wanted = expected(load_model(mixed), ids)
    folder = mixed_graph / "model.onnx"
    assert require_numbers(_writable(folder), ids, wanted) < 1e-4
    with pytest.raises(StageError, match="the graph and the torch model differ"):
        require_numbers(
            _writable(folder), ids, replace(wanted, answer_N=wanted.answer_N + np.eye(768, dtype=np.float32)[3])
        )
    with pytest.raises(StageError, match="the padded graph and the torch model differ"):
        require_numbers(_writable(folder), ids, replace(wanted, shorter_1=wanted.shorter_1[:, ::-1]))


def _writable(path: Path) -> Path:
    folder = Path(tempfile.mkdtemp())
    shutil.copy(path, folder)
    return folder / path.name


def test_parity_beyond_its_limit_is_refused():
    ids = token_windows(2, 9)
    reference = np.random.default_rng(0).standard_normal((2, 9, 768)).astype(np.float32)
    require_parity(parity(ids, reference, reference + 1e-5), "x")
    other = reference.copy()
    other[1, 3, 5] += 0.01
    with pytest.raises(StageError, match=r"graph and torch differ in their logits; measured 0\.0"):
        require_parity(parity(ids, reference, other), "graph and torch")
    other[1, 3, 5] = np.nan
    with pytest.raises(StageError, match="nan"):
        require_parity(parity(ids, reference, other), "x")


def test_cross_entropy_of_parity_is_torchs():
    ids = token_windows(2, 9)
    reference, found = np.random.default_rng(1).standard_normal((2, 2, 9, 768)).astype(np.float32)
    losses = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(x[:, :-1]).flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten()
        )
        for x in (reference, found)
    ]
    measured = parity(ids, reference, found)
    assert measured.cross_entropy_difference == pytest.approx(abs(float(losses[0] - losses[1])), rel=1e-3)
    shifted = reference * np.where(np.arange(768) % 2, 1.4, 0.6).astype(np.float32)
    assert parity(ids, reference, shifted).cross_entropy_difference > 0.01
    with pytest.raises(StageError, match="nats"):
        require_parity(type(measured)(1e-4, 0.0011), "x")


def test_large_graphs_keep_their_weights_beside_them(dense_graph, tmp_path, monkeypatch):
    _, folder, _ = dense_graph
    monkeypatch.setattr(onnx_graph, "EXTERNAL_BYTES", 1000)
    onnx_graph.save(onnx_graph.load(folder / "model.onnx"), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 200_000 < (tmp_path / "model.onnx.data").stat().st_size
    ids = token_windows(1, 8)
    assert np.array_equal(literal(tmp_path / "model.onnx", ids), literal(folder / "model.onnx", ids))


def test_weights_beside_a_graph_are_read_by_any_name_of_their_file(mixed_graph, tmp_path, monkeypatch):  # noqa: F811
    first, second = tmp_path / "store", tmp_path / "view"
    first.mkdir()
    second.mkdir()
    monkeypatch.setattr(onnx_graph, "EXTERNAL_BYTES", 1000)
    wanted = onnx_graph.load(mixed_graph / "model.onnx").graph.initializers
    onnx_graph.save(onnx_graph.load(mixed_graph / "model.onnx"), first / "model.onnx")
    for name in ("model.onnx", "model.onnx.data"):
        (second / name).hardlink_to(first / name)
    read = onnx_graph.load(second / "model.onnx")
    assert {one.const_value.dtype for one in wanted.values()} >= {ir.DataType.INT4, ir.DataType.INT8, ir.DataType.FLOAT}
    for name, value in wanted.items():
        assert read.graph.initializers[name].const_value.dtype == value.const_value.dtype
        assert np.array_equal(read.graph.initializers[name].const_value.numpy(), value.const_value.numpy())
    onnx_graph.save(read, second / "model.onnx")  # over what it is read from, and the store's file stays
    assert (first / "model.onnx.data").read_bytes() == (second / "model.onnx.data").read_bytes()
    assert (first / "model.onnx.data").stat().st_nlink == 1


@pytest.mark.parametrize("fault", ["gone", "elsewhere", "short"])
def test_weights_that_are_not_beside_their_graph_are_told(dense_graph, tmp_path, monkeypatch, fault):
    folder = tmp_path / "graph"
    folder.mkdir()
    monkeypatch.setattr(onnx_graph, "EXTERNAL_BYTES", 1000)
    onnx_graph.save(onnx_graph.load(dense_graph[1] / "model.onnx"), folder / "model.onnx")
    data = folder / "model.onnx.data"
    if fault == "short":
        data.write_bytes(data.read_bytes()[:100])
    else:
        data.rename(tmp_path / data.name)
    if fault == "elsewhere":
        data.symlink_to(tmp_path / data.name)
    said = "ends before" if fault == "short" else r"not beside it; measured model\.onnx\.data: "
    with pytest.raises(StageError, match=said):
        onnx_graph.load(folder / "model.onnx")


def test_exporters_own_text_reaches_the_user(tiny, tmp_path):
    model = load_model(one_block(tiny, tmp_path / "one"))
    layer = model.model.layers[0]
    layer.mlp.forward = lambda x: x * (1 if float(x.sum()) > 0 else 2)
    with pytest.raises(StageError, match=r"the exporter could not turn LlamaForCausalLM into ONNX; measured .+"):
        to_onnx.to_onnx(model, 23, "generate", token_windows(1, 16))


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\xff\xfenot a graph")
    with pytest.raises(StageError, match=r"model.onnx is no ONNX graph"):
        onnx_graph.load(tmp_path / "model.onnx")


def test_text_windows_come_from_the_corpus(tiny, tmp_path):
    from stages.export.stage import _windows

    (tmp_path / "calibrate.jsonl").write_text('{"id": "a", "text": "' + "the statement is executed " * 40 + '"}\n')
    found = _windows({"model": tiny, "text": tmp_path}, load_tokenizer(tiny), 1, 16)
    assert load_tokenizer(tiny).decode(found[0]).startswith("the statement is executed")


def test_tokenizer_of_an_older_format_is_written_as_one_file(tiny, tmp_path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from stages.export.stage import _carry

    shutil.copytree(tiny, tmp_path / "old")
    (tmp_path / "old" / "tokenizer.json").unlink()
    Tokenizer.from_file(str(tiny / "tokenizer.json")).model.save(str(tmp_path / "old"))
    (tmp_path / "old" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "new").mkdir()
    _carry(tmp_path / "old", tmp_path / "new")
    text = "The statement is executed."
    assert (
        Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json")).encode(text).ids
        == PreTrainedTokenizerFast(tokenizer_file=str(tiny / "tokenizer.json"))(text).input_ids
    )


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FORMS = {
    "q_proj": ("fp8_e4m3", None, "fp8_e4m3"), "k_proj": ("fp8_e4m3", None, None), "v_proj": ("mxfp4", 32, None),
    "o_proj": ("nvfp4", 16, None), "gate_proj": ("int4", 32, None), "up_proj": ("int8", None, "int8"),
    "down_proj": ("nvfp4", 16, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def forms(tiny, tmp_path_factory):
    """One block with a map in each form that weights can have: the model's folder and its graph's."""
    root = tmp_path_factory.mktemp("forms")
    one = one_block(tiny, root / "one")
    model = load_model(one)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            form, block, read = FORMS[name.rpartition(".")[2]]
            new = quantized_linear.QuantizedLinear(
                module.in_features, module.out_features, form=form, block=block, input_form=read
            )
            tensors = rounded(module.weight.detach(), form, block, None, search=False)
            new.put(tensors | ({"input_scale": torch.tensor(0.011)} if read else {}))
            quantized_linear.replace(model, f"model.{name}", new)
    save_model(model, root / "checkpoint", like=one)
    (root / "graph").mkdir()
    export(ExportParams(), {"model": root / "checkpoint"}, root / "graph", Silent())
    return root / "checkpoint", root / "graph"


def _map(name: str) -> str:
    return f"model.layers.0.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"


def test_graph_holds_each_form_in_its_own_bits_under_its_name(forms):
    held = {t.name: t for t in onnx.load(forms[1] / "model.onnx").graph.initializer}
    kinds = {"fp8_e4m3": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4, "int8": TensorProto.INT8}
    layer = load_model(forms[0])
    for name, (form, block, _) in FORMS.items():
        found, module = held[f"{_map(name)}.weight"], layer.get_submodule(_map(name))
        assert found.data_type == kinds.get(form, TensorProto.FLOAT4E2M1)
        if form in ("nvfp4", "mxfp4"):
            byte = module.weight.numpy()
            values = E2M1[np.stack((byte % 16, byte // 16), -1).reshape(len(byte), -1)]
            assert np.array_equal(numpy_helper.to_array(found).astype(np.float32), values.T)
        if block:
            scale = held[f"{_map(name)}.weight_scale"]
            assert scale.data_type == (TensorProto.FLOAT8E4M3FN if form == "nvfp4" else TensorProto.FLOAT)
            assert tuple(scale.dims) == (module.in_features // block, module.out_features)
    assert json.loads((forms[1] / "graph.json").read_text())["precisions"] == ["float32", "fp4", "fp8", "int4", "int8"]


def test_graph_of_every_form_gives_torchs_logits_once_its_four_bit_floats_are_widened(forms, tmp_path):
    model = onnx_graph.load(forms[1] / "model.onnx")
    assert onnx_graph.widen_fp4(model) == 3
    assert onnx_graph.widen_fp4(model) == 0
    onnx_graph.save(model, tmp_path / "model.onnx")
    ids = token_windows(2, 21)
    found = literal(tmp_path / "model.onnx", ids)
    reference = torch_logits(forms[0], ids)
    assert np.abs(found - reference).mean() < 2e-3 * reference.std()
    kinds = [
        node.attribute for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "QuantizeLinear"
    ]
    assert len(kinds) == 2


def test_graph_is_valid_and_a_gpu_of_its_precisions_takes_it(forms, tmp_path):
    onnx.checker.check_model(onnx.load(forms[1] / "model.onnx"), full_check=True)
    precisions = json.loads((forms[1] / "graph.json").read_text())["precisions"]
    for backend, architectures, said in (
        ("onnxruntime", (), "onnxruntime multiplies no fp4"),
        ("tensorrt_rtx", ("sm_120", "sm_89"), "sm_89 has no fp4"),
    ):
        with pytest.raises(StageError, match=said):
            refuse_impossible(backend, architectures, precisions)
    with pytest.raises(StageError, match=r"onnxruntime multiplies no fp4.*tensorrt_rtx or tensorrt from sm_100 on"):
        open_engine(forms[1])
    with pytest.raises(StageError, match=r"sm_86 has no fp8.*sm_89 and newer"):
        refuse_impossible("tensorrt_rtx", ("sm_86",), ["float32", "fp8"])
    refuse_impossible("tensorrt_rtx", ("sm_89",), ["float32", "fp8"])
    pytest.importorskip("tensorrt_rtx")
    shapes = Shapes(maximum_batch=1, maximum_tokens=16)
    whole = without_cache(forms[1] / "model.onnx", tmp_path)
    assert build_plan(whole, "tensorrt_rtx", ("sm_120",), shapes, Silent())


@pytest.mark.parametrize("name", ["v_proj.weight_scale", "o_proj.weight_scale_2", "k_proj.weight"])
def test_other_bits_in_a_graph_of_floats_are_refused(forms, tmp_path, name):
    model = onnx_graph.load(forms[1] / "model.onnx")
    layer = "model.layers.0.self_attn."
    value = next(v for v in model.graph.initializers.values() if v.name == layer + name)
    array = value.const_value.numpy()
    value.const_value = ir.tensor((array.astype(np.float32) * 2).astype(array.dtype))
    onnx_graph.save(model, tmp_path / "model.onnx")
    ids = token_windows(1, 16)
    wanted = expected(load_model(forms[0]), ids)
    with pytest.raises(StageError, match="the graph and the torch model differ"):
        require_numbers(tmp_path / "model.onnx", ids, wanted)


def test_four_bit_floats_are_refused_at_an_opset_without_them(forms):
    with pytest.raises(StageError, match=r"opset 21 has no four-bit floats; measured 3 maps.*Set `opset: 23`"):
        to_onnx.to_onnx(load_model(forms[0]), 21, "generate", token_windows(1, 16))


def test_tied_maps_of_blocks_are_laid_out_as_one_tensor(forms):
    model = load_model(forms[0])
    first = model.get_submodule(_map("gate_proj"))
    second = quantized_linear.QuantizedLinear(first.in_features, first.out_features, form="int4", block=32)
    second.put({"weight": first.weight, "weight_scale": first.weight_scale})
    quantized_linear.replace(model, _map("up_proj"), second)
    values_OI = first.values()
    quantized_linear.for_export(model)
    assert second.weight is first.weight
    assert second.weight_scale is first.weight_scale
    assert torch.equal(first.weight.float(), values_OI.T)
    assert anatomy.head(model).weight is anatomy.embedding(model).weight
