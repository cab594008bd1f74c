"""What every family becomes elsewhere, dense and compressed: graph, engine for the processor, TensorRT-RTX plan.

`make engines-test` asks all of README's families; with $ENGINERY_ENGINES=fifth, as `.ci/run` sets it, a fifth of them,
so that five days in a row have all.
"""

import pytest

from stages import stage
from stages.models.checkpoint.loading import load_config
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.benchmarks.families import (
    CELLS,
    EQUAL,
    FEW,
    PAGE,
    ROWS,
    RUN,
    checkpoint,
    read_table,
    run_elsewhere,
    shown,
    text,
)
from tests.cases.day import fifth

TABLE = read_table(PAGE.read_text(encoding="utf-8"))
COMPRESSED = ("channels", "W8A8", "INT8", "INT4", "FP8")
ROUNDED = 1e-3
"""Nats: activations that lie between two steps fall to either, and so small a model forgives none."""


@pytest.mark.engine
@pytest.mark.parametrize("title", fifth([*ROWS]))
def test_family_runs_elsewhere_as_the_table_says_dense_and_compressed(title, tmp_path):
    dense, wrong = checkpoint(ROWS[title], tmp_path), {}
    found = run_elsewhere(dense, tmp_path)
    said = {column: TABLE[title][column] for column in RUN}
    assert {column: shown(cell) for column, cell in found.items()} == said, found
    runs = [column for column in RUN if said[column] == "yes"]
    for technique in COMPRESSED:
        if TABLE[title][technique] == "no":
            continue
        verb, params = CELLS[technique]
        made, definition = tmp_path / technique, stage(verb)
        made.mkdir()
        given = definition.params.model_validate(params)
        definition.run(given, {"model": dense, "text": text(tmp_path)}, made, Silent())
        most = ROUNDED if technique == "W8A8" else EQUAL
        for column, cell in run_elsewhere(made, tmp_path).items():
            if column in runs and not (cell.distance is not None and cell.distance < most):
                wrong[technique, column] = cell
    assert not wrong
    if load_config(dense).is_encoder_decoder:
        (tmp_path / "halved").mkdir()
        export = stage("export")
        with pytest.raises(StageError, match="an encoder and a decoder are written in 32-bit floats alone"):
            export.run(export.params.model_validate({"dtype": "fp16"}), {"model": dense}, tmp_path / "halved", Silent())
    elif "plan" in runs:
        graph, plan = tmp_path / "halved", tmp_path / "plan"
        for folder, verb, role, source, params in (
            (graph, "export", "model", dense, {"dtype": "fp16"}),
            (plan, "compile", "graph", graph, {"backend": "tensorrt_rtx", "architectures": ["sm_89"]}),
        ):
            folder.mkdir()
            definition = stage(verb)
            definition.run(definition.params.model_validate(params), {role: source}, folder, Silent())


@pytest.mark.engine
def test_blocks_that_share_quantized_weights_run_elsewhere_too(tmp_path):
    dense, made = checkpoint("llama", tmp_path), [tmp_path / "looped", tmp_path / "quantized"]
    ways = (("share", {"method": "recursive", "keep": 0.97, **FEW}), ("quantize", {"scheme": "int8_weight_only"}))
    for source, folder, (verb, params) in zip([dense, *made], made, ways, strict=False):
        folder.mkdir()
        definition = stage(verb)
        given = definition.params.model_validate(params)
        definition.run(given, {"model": source, "text": text(tmp_path)}, folder, Silent())
    found = run_elsewhere(made[-1], tmp_path)
    assert all(one.distance is not None and one.distance < EQUAL for one in found.values()), found
