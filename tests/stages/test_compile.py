"""compile: engines for the CPU compute the graph's numbers; plans are built for real; the impossible is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from stages import stage
from stages.adapters.backends import backend, refuse_impossible
from stages.adapters.onnxruntime import has_exact_kernels
from stages.adapters.tensorrt.build import Shapes, build_plan
from stages.compile.processor import prose
from stages.compile.stage import CompileParams, compile_engine
from stages.export.stage import ExportParams, export
from stages.graphs import onnx_graph, ort_lowering
from stages.graphs.parity import divergence
from stages.runtime.contract import DoesNotFit, StageError
from stages.serving.engine import open_engine
from tests.engines import Hears, literal, mixed, mixed_graph, one_block, token_windows, without_cache  # noqa: F401

SMALL = Shapes(maximum_batch=2, maximum_tokens=64)


@pytest.fixture(scope="module")
def cpu(mixed_graph, tmp_path_factory):  # noqa: F811
    """The mixed graph's engine for the CPU, and its metrics."""
    folder = tmp_path_factory.mktemp("cpu")
    return folder, compile_engine(CompileParams(backend="onnxruntime"), {"graph": mixed_graph}, folder, Hears())


@pytest.fixture(scope="module")
def gpu(mixed_graph, tmp_path_factory):  # noqa: F811
    """The mixed graph's plan for two architectures, and what was heard."""
    folder, heard = tmp_path_factory.mktemp("gpu"), Hears()
    params = CompileParams(backend="tensorrt_rtx", architectures=("sm_89", "sm_120"), maximum_tokens=64)
    compile_engine(params, {"graph": mixed_graph}, folder, heard)
    return folder, heard


def test_engine_for_the_cpu_gives_the_graphs_logits(mixed_graph, cpu):  # noqa: F811
    ids = token_windows(2, 33)
    reference = literal(mixed_graph / "model.onnx", ids)
    found = open_engine(cpu[0]).logits(ids)
    assert np.abs(found - reference).mean() < 2e-3 * reference.std()


def test_engine_for_the_cpu_multiplies_integers(cpu):
    model = onnx.load(cpu[0] / "model.onnx")
    makers = {out: node for node in model.graph.node for out in node.output}
    every = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    products = [node for node in every if makers[node.input[0]].op_type == "QuantizeLinear"]
    assert len(products) == cpu[1]["integer_products"] == 4
    # Of INT8 weights with float activations, and of the table as the head: those in digits.
    assert len(every) - len(products) == cpu[1]["split_products"] == 6
    assert {makers[node.input[0]].op_type for node in every if node not in products} == {"Concat"}
    held = {t.name: t for t in model.graph.initializer}
    for node in products:
        assert held[node.input[1]].data_type == (TensorProto.INT8 if has_exact_kernels() else TensorProto.UINT8)
        rounding = makers[node.input[0]]
        assert rounding.op_type == "QuantizeLinear"
        assert numpy_helper.to_array(held[rounding.input[2]]) == 128
    # q, k and v, or gate and up, are one product: each reads what no other reads.
    assert len({node.input[0] for node in every}) == len(every)
    assert cpu[1]["merged_products"] == 8  # 5 of these, 3 of INT4


def test_engine_for_the_cpu_never_dequantizes_the_table_for_its_rows(cpu):
    model = onnx.load(cpu[0] / "model.onnx")
    makers = {out: node.op_type for node in model.graph.node for out in node.output}
    table = next(t for t in model.graph.initializer if tuple(t.dims) == (768, 64))
    rows = [n for n in model.graph.node if n.op_type == "Gather" and n.input[0] == table.name]
    assert len(rows) == 1
    assert not [n for n in model.graph.node if n.op_type == "Gather" and makers.get(n.input[0]) == "DequantizeLinear"]
    assert sum(tuple(t.dims) in ((768, 64), (64, 768)) for t in model.graph.initializer) == 1


def test_engine_for_the_cpu_is_described_and_carries_its_tokenizer(cpu, mixed_graph):  # noqa: F811
    described = json.loads((cpu[0] / "engine.json").read_text())
    assert described["target"] == "onnxruntime:cpu"
    assert described["executable"] == "model.onnx"
    assert described["vocabulary"] == 768
    assert described["maximum_tokens"] == 512
    assert described["precisions"] == ["float32", "int4", "int8"]
    session, called = onnxruntime.InferenceSession(cpu[0] / "model.onnx"), described["components"]["model"]
    assert [one.name for one in session.get_inputs()] == called["inputs"]
    assert [one.name for one in session.get_outputs()] == called["outputs"]
    assert called["state"]["past_key_values.5.value"] == "present.5.value" and len(called["state"]) == 12
    assert len(described["cache"]["layers"]) == 6
    assert (cpu[0] / "tokenizer.json").read_bytes() == (mixed_graph / "tokenizer.json").read_bytes()
    assert (cpu[0] / "model.onnx").stat().st_size < 1.02 * (mixed_graph / "model.onnx").stat().st_size


def classes_graph(tiny, folder: Path) -> Path:
    """A graph that gives each text three numbers: the sum of the rows of its tokens."""
    rows = np.random.default_rng(0).standard_normal((768, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["rows", "input_ids"], ["read"]),
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["kept_1"]),
        helper.make_node("Mul", ["read", "kept_1"], ["counted"]),
        helper.make_node("ReduceSum", ["counted", "axis"], ["logits"], keepdims=0),
    ]
    held = [numpy_helper.from_array(rows, "rows"), *(
        numpy_helper.from_array(np.array([value]), name) for name, value in (("last", -1), ("axis", 1))
    )]  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["N", "T"]) for name in ("input_ids", "attention_mask")
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])
    made = helper.make_graph(nodes, "g", inputs, [logits], held)
    folder.mkdir()
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    described = {"task": "classify", "precisions": ["float32"], "vocabulary": 768, "maximum_tokens": 64}
    (folder / "graph.json").write_text(json.dumps(described))
    shutil.copy(tiny / "tokenizer.json", folder)
    (folder / "config.json").write_text("{}")
    return folder


def test_engine_of_classes_is_proven_by_its_classes_and_says_its_task(tiny, tmp_path, monkeypatch):
    from stages.graphs import ort_lowering

    graph = classes_graph(tiny, tmp_path / "graph")
    (tmp_path / "engine").mkdir()
    metrics = compile_engine(CompileParams(backend="onnxruntime"), {"graph": graph}, tmp_path / "engine", Hears())
    assert metrics["parity_logit_difference"] < 1e-5
    assert json.loads((tmp_path / "engine" / "engine.json").read_text())["task"] == "classify"
    assert open_engine(tmp_path / "engine").logits(token_windows(2, 9)).shape == (2, 3)

    def wrong(model):
        rows = model.graph.initializers["rows"]
        rows.const_value = ir.tensor(rows.const_value.numpy() * np.array([1, 1, 1.01], np.float32))
        return {}

    monkeypatch.setattr(ort_lowering, "lower", wrong)
    (tmp_path / "other").mkdir()
    with pytest.raises(StageError, match="the engine and the graph differ in their logits"):
        compile_engine(CompileParams(backend="onnxruntime"), {"graph": graph}, tmp_path / "other", Hears())


def test_engine_may_round_activations_and_says_how_far_that_takes_it(mixed_graph, cpu, tmp_path):  # noqa: F811
    folder = tmp_path / "fast"
    folder.mkdir()
    params = CompileParams(backend="onnxruntime", activations="int8")
    made = compile_engine(params, {"graph": mixed_graph}, folder, Hears())
    split_maps = cpu[1]["split_products"] - 1  # the head keeps all digits
    assert made["rounded_activations"] == cpu[1]["few_bits_products"] + split_maps
    assert 0 < made["rounding_kl_divergence"] < 0.01
    ids = token_windows(2, 33)
    exact, fast = (open_engine(one).logits(ids).astype(np.float64) for one in (cpu[0], folder))
    assert 1e-6 < np.abs(exact - fast).max() / exact.std() < 0.3
    nodes = onnx.load(folder / "model.onnx").graph.node
    levels = [
        next(one.i for one in node.attribute if one.name == "accuracy_level")
        for node in nodes
        if node.op_type == "MatMulNBits"
    ]
    assert len(levels) == cpu[1]["few_bits_products"] > 0 and set(levels) == {4}
    makers = {out: node.op_type for node in nodes for out in node.output}
    read = Counter(makers[node.input[0]] for node in nodes if node.op_type == "MatMulIntegerToFloat")
    assert read == {"QuantizeLinear": cpu[1]["integer_products"] + split_maps, "Concat": 1}


def test_rounding_where_there_is_nothing_to_round_is_refused(tiny, tmp_path):
    checkpoint = one_block(tiny, tmp_path / "one")
    for name in ("graph", "engine"):
        (tmp_path / name).mkdir()
    export(ExportParams(), {"model": checkpoint}, tmp_path / "graph", Hears())
    with pytest.raises(StageError, match="no product of INT4 or INT8 weights and float activations"):
        params = CompileParams(backend="onnxruntime", activations="int8")
        compile_engine(params, {"graph": tmp_path / "graph"}, tmp_path / "engine", Hears())
    with pytest.raises(StageError, match="`activations` is for onnxruntime, not for tensorrt_rtx"):
        params = CompileParams(backend="tensorrt_rtx", architectures=("sm_89",), activations="int8")
        compile_engine(params, {"graph": tmp_path / "graph"}, tmp_path / "engine", Hears())
    assert not (tmp_path / "engine" / "engine.json").exists()


def test_a_rewriting_that_changes_the_numbers_is_refused(mixed_graph, tmp_path, monkeypatch):  # noqa: F811
    from stages.graphs import ort_lowering

    lower = ort_lowering.lower

    def wrong(model):
        done = lower(model)
        scale = next(v for name, v in model.graph.initializers.items() if name.endswith("embed_tokens.weight_scale"))
        scale.const_value = ir.tensor(scale.const_value.numpy() * np.linspace(0.5, 2, 768, dtype=np.float32))
        return done

    monkeypatch.setattr(ort_lowering, "lower", wrong)
    with pytest.raises(StageError, match="the engine and the graph differ"):
        compile_engine(CompileParams(backend="onnxruntime"), {"graph": mixed_graph}, tmp_path, Hears())
    assert not (tmp_path / "engine.json").exists()


def test_an_engine_with_a_wrong_product_is_not_written(mixed_graph, tmp_path, monkeypatch):  # noqa: F811
    from stages.graphs import ort_lowering

    lower = ort_lowering.lower

    def wrong(model):
        done = lower(model)
        for node in list(model.graph):
            rounds = node.inputs and node.inputs[0] is not None and node.inputs[0].producer()
            if node.op_type == "MatMulIntegerToFloat" and rounds.op_type == "QuantizeLinear":
                node.replace_input_with(4, None)
        return done

    monkeypatch.setattr(ort_lowering, "lower", wrong)
    with pytest.raises(
        StageError, match=r"product with model\.layers\.0\.self_attn\.q_proj\.weight\+.*v_proj\.weight is not exact"
    ):
        compile_engine(CompileParams(backend="onnxruntime"), {"graph": mixed_graph}, tmp_path, Hears())
    assert not (tmp_path / "engine.json").exists()


def test_a_product_that_is_not_exact_is_refused(cpu, tmp_path):
    from stages.graphs.ort_checks import require_exact_products

    ids = token_windows(1, 16)
    shutil.copy(cpu[0] / "model.onnx", tmp_path / "right.onnx")
    assert 0 < require_exact_products(tmp_path / "right.onnx", ids) < 1e-5
    model = onnx.load(cpu[0] / "model.onnx")
    product = next(node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat")
    product.input[4] = ""  # the unsigned activations without their zero
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(
        StageError, match=r"product with model\.layers\.0\.self_attn\.q_proj\.weight\+.*v_proj\.weight is not exact"
    ):
        require_exact_products(tmp_path / "wrong.onnx", ids)


def test_a_rewriting_that_loses_a_precision_is_refused(mixed_graph, tmp_path):  # noqa: F811
    from stages.compile.processor import require_lowered

    require_lowered(frozenset({"int8"}), {"precisions": ["int8"]})
    with pytest.raises(StageError, match="lost a number format"):
        require_lowered(frozenset({"float32"}), {"precisions": ["float32", "int8"]})


def test_plan_for_two_architectures_holds_the_integers(gpu, mixed_graph):  # noqa: F811
    plan = (gpu[0] / "model.plan").read_bytes()
    held = {t.name: t for t in onnx.load(mixed_graph / "model.onnx").graph.initializer}
    table = next(t for t in held.values() if tuple(t.dims) == (768, 64))
    # As columns, in the order in which the head multiplies it, and in no other.
    assert plan.count(numpy_helper.to_array(table).T.tobytes()) == 1
    assert numpy_helper.to_array(table)[1:3].tobytes() not in plan
    described = json.loads((gpu[0] / "engine.json").read_text())
    assert described["target"] == "tensorrt_rtx:sm_89+sm_120"
    assert described["executed"] is False
    assert described["maximum_tokens"] == 64


def test_plan_keeps_what_it_has_read_and_says_its_profiles_inputs_and_places(gpu, mixed_graph):  # noqa: F811
    described = json.loads((gpu[0] / "engine.json").read_text())
    assert described["profiles"] == [
        {"name": "prefill", "number": 0, "rows": [1, 8], "new_tokens": [1, 64]},
        {"name": "decode", "number": 1, "rows": [1, 8], "new_tokens": [1, 1]},
    ]
    assert described["cache"]["maximum"] == 64 and len(described["cache"]["layers"]) == 6
    graph = json.loads((mixed_graph / "graph.json").read_text())
    assert described["components"]["model"] == graph["components"]["model"] | {"file": "model.plan"}
    assert not [note for note in gpu[1].notes if "keeps nothing" in note]
    plan = (gpu[0] / "model.plan").read_bytes()
    assert all(name.encode() in plan for name in graph["components"]["model"]["inputs"])


def test_building_tells_how_far_it_is_and_keeps_expected_reminders_to_itself(gpu):
    fractions = gpu[1].fractions
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < 0.05 and fractions[-2] <= 0.1 and fractions[-1] == 1
    assert not any("Int64" in note for note in gpu[1].notes)


def test_plan_cannot_be_opened_without_a_gpu(gpu):
    with pytest.raises(DoesNotFit, match=r"compiled, not executed.*sm_89, sm_120"):
        open_engine(gpu[0])


def test_same_step_again_is_a_hit(shared_store, mixed_graph):  # noqa: F811
    from tests.conftest import sealer

    seal = sealer(shared_store)
    first = seal("compile", {"backend": "onnxruntime"}, graph=mixed_graph.name)
    assert seal("compile", {"backend": "onnxruntime"}, graph=mixed_graph.name).cached
    kept = {name: entry.sha256 for name, entry in first.manifest.files.items()}
    again = seal("compile", {"backend": "onnxruntime", "maximum_tokens": 128}, graph=mixed_graph.name)
    assert {n: e.sha256 for n, e in again.manifest.files.items() if n == "model.onnx"}["model.onnx"] == kept[
        "model.onnx"
    ]
    sealed = len(list(shared_store.manifests()))
    with pytest.raises(StageError, match="builds nothing for 'sm_1'"):
        seal("compile", {"backend": "tensorrt_rtx", "architectures": ["sm_1"]}, graph=mixed_graph.name)
    assert len(list(shared_store.manifests())) == sealed


@pytest.mark.parametrize(
    ("backend", "architectures", "precisions", "said"),
    [
        ("tensorrt_rtx", ["sm_86"], ["fp8", "float32"], "sm_86 has no fp8.*limit sm_89 and newer"),
        ("tensorrt_rtx", ["sm_89", "sm_75"], ["int4"], "sm_75 has no int4"),
        ("tensorrt_rtx", ["sm_75"], ["int8", "float32"], "no float32 on sm_75"),
        ("tensorrt_rtx", ["sm_90"], [], "nothing for 'sm_90'; limit sm_75, .*backend: tensorrt "),
        ("tensorrt_rtx", ["sm_99"], [], "nothing for 'sm_99'.*Name one of these"),
        ("tensorrt_rtx", [], [], "needs `architectures`"),
        ("onnxruntime", ["sm_89"], [], "takes no `architectures`"),
    ],
)
def test_impossible_pair_is_refused_before_building(backend, architectures, precisions, said):
    with pytest.raises(StageError, match=said):
        refuse_impossible(backend, architectures, precisions)


def test_possible_pairs_pass():
    refuse_impossible("tensorrt_rtx", ["sm_89", "sm_120"], ["fp8", "int4", "int8", "float32"])
    refuse_impossible("tensorrt", ["sm_90", "sm_75"], ["int8", "float32"])
    refuse_impossible("onnxruntime", [], ["int4"])


def test_refusal_needs_no_heavy_library():
    import subprocess

    code = (
        "import sys; from stages.compile.stage import refuse_impossible; refuse_impossible('onnxruntime', []);"
        "sys.exit(any(n in sys.modules for n in ('torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_listed_target_is_one_that_the_compiler_has():
    import tensorrt_rtx

    known = {n.lower().replace("sm", "sm_") for n in tensorrt_rtx.ComputeCapability.__members__ if n.startswith("SM")}
    assert known == set(backend("tensorrt_rtx").architectures)


def small_graph(path: Path, kind: str, **attributes: object) -> Path:
    node = helper.make_node(kind, ["input_ids"], ["y"], name="the_odd_one", **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("input_ids", TensorProto.FLOAT, ["n", "t"])], [value("y", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.save(model, path)
    return path


def test_parsers_own_text_and_the_nodes_name_reach_the_user(tmp_path):
    graph = small_graph(tmp_path / "model.onnx", "StringNormalizer")
    with pytest.raises(StageError, match=r"cannot read the graph; measured .*the_odd_one, StringNormalizer"):
        build_plan(graph, "tensorrt_rtx", ["sm_89"], SMALL, Hears())


def test_builders_own_text_reaches_the_user(mixed_graph, tmp_path):  # noqa: F811
    with pytest.raises(StageError, match=r"could not build an engine for sm_75; measured .*(sm75|SM75)"):
        build_plan(without_cache(mixed_graph / "model.onnx", tmp_path), "tensorrt_rtx", ["sm_75"], SMALL, Hears())


def test_weights_with_two_zeros_in_four_are_built(tmp_path):
    w_IO = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    w_IO[1::2] = 0
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node("Gather", ["rows", "input_ids"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("input_ids", TensorProto.INT64, ["n", "t"])],
        [value("y", TensorProto.FLOAT, ["n", "t", 64])],
        [numpy_helper.from_array(w_IO, "w"), numpy_helper.from_array(w_IO[:8], "rows")],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    shapes = Shapes(maximum_batch=2, maximum_tokens=64, sparse=True)
    assert build_plan(tmp_path / "m.onnx", "tensorrt_rtx", ["sm_89"], shapes, Hears())


def test_interrupted_build_ends_as_interrupted(mixed_graph, tmp_path):  # noqa: F811
    class Impatient(Hears):
        def advanced(self, done, total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(without_cache(mixed_graph / "model.onnx", tmp_path), "tensorrt_rtx", ["sm_89"], SMALL, Impatient())


def test_missing_library_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DoesNotFit, match="pip install tensorrt`"):
        build_plan(tmp_path / "model.onnx", "tensorrt", ["sm_90"], SMALL, Hears())


def test_large_graph_of_a_store_becomes_an_engine(tiny, tmp_path, seal, store, monkeypatch):
    """A store shows its bytes by a second name, and large weights lie in a file of their own."""
    from stages.graphs import onnx_graph

    monkeypatch.setattr(onnx_graph, "EXTERNAL_BYTES", 1000)
    dense = seal("fetch", {"source": one_block(tiny, tmp_path / "one").as_uri()}).identity
    graph = seal("export", {}, model=dense).identity
    engine = store.checkout(seal("compile", {"backend": "onnxruntime"}, graph=graph).identity)
    assert (engine / "model.onnx.data").stat().st_size > (engine / "model.onnx").stat().st_size
    ids = token_windows(1, 16)
    wanted = open_engine(store.checkout(dense)).logits(ids)
    np.testing.assert_allclose(open_engine(engine).logits(ids), wanted, atol=1e-3 * wanted.std())


def test_kind_whose_rounding_moves_answers_most_for_a_weight_keeps_sixteen_bits(tiny, tmp_path):
    quantize, names = stage("quantize"), ("int8", "graph", "exact", "coarse", "fine", "none")
    folders = {name: tmp_path / name for name in names}
    for folder in folders.values():
        folder.mkdir()
    given = quantize.params.model_validate({"scheme": "int8_weight_only"})
    quantize.run(given, {"model": one_block(tiny, tmp_path / "one")}, folders["int8"], Hears())
    export(ExportParams(), {"model": folders["int8"]}, folders["graph"], Hears())

    def built(name, **how):
        params = CompileParams(backend="onnxruntime", **how)
        return compile_engine(params, {"graph": folders["graph"]}, folders[name], Hears())

    built("exact")
    products = ort_lowering.split_products(onnx_graph.load(folders["exact"] / "model.onnx"))
    sizes = {node.inputs[1].name: node.inputs[1].const_value.size for node in products}
    assert len(sizes) == 4  # q, k and v; o; gate and up; down
    ids, rates = prose(folders["graph"]), {}
    before = open_engine(folders["exact"]).logits(ids)
    for name, size in sizes.items():
        alone = tmp_path / f"alone{len(rates)}"
        shutil.copytree(folders["exact"], alone)
        model = onnx_graph.load(alone / "model.onnx")
        assert ort_lowering.round_activations(model, lambda one, name=name: 1 if one == name else 3) == 1
        onnx_graph.save(model, alone / "model.onnx")
        rates[name] = divergence(before, open_engine(alone).logits(ids)) / size
    worst = max(rates, key=rates.__getitem__)
    share = sizes[worst] / sum(sizes.values())
    coarse, fine = built("coarse", activations="int8"), built("fine", activations="int8", fine=share)
    assert built("none", activations="int8", fine=share / 100)["fine_weights"] == 0
    assert fine["fine_weights"] == pytest.approx(share) and "fine_weights" not in coarse
    assert fine["rounding_kl_divergence"] < coarse["rounding_kl_divergence"]
    makers = {out: node for node in onnx.load(folders["fine"] / "model.onnx").graph.node for out in node.output}
    found = {
        node.input[1]: len(makers[node.input[0]].input) if makers[node.input[0]].op_type == "Concat" else 1
        for node in makers.values()
        if node.op_type == "MatMulIntegerToFloat" and node.input[1] in sizes
    }
    assert found == {name: 2 if name == worst else 1 for name in sizes}


def test_fine_without_rounding_or_without_int8_weights_is_refused(tiny, mixed_graph, tmp_path):  # noqa: F811
    with pytest.raises(StageError, match="`fine` says which activations are not rounded to INT8, and none are"):
        params = CompileParams(backend="onnxruntime", fine=0.3)
        compile_engine(params, {"graph": mixed_graph}, tmp_path, Hears())
    folders = [tmp_path / name for name in ("int4", "graph", "engine")]
    for folder in folders:
        folder.mkdir()
    quantize = stage("quantize")
    given = quantize.params.model_validate({"scheme": "int4_weight_only", "search": "off", "embedding": "keep"})
    quantize.run(given, {"model": one_block(tiny, tmp_path / "one")}, folders[0], Hears())
    export(ExportParams(), {"model": folders[0]}, folders[1], Hears())
    with pytest.raises(StageError, match="`fine` is for INT8 weights that float activations meet"):
        params = CompileParams(backend="onnxruntime", activations="int8", fine=0.3)
        compile_engine(params, {"graph": folders[1]}, folders[2], Hears())
