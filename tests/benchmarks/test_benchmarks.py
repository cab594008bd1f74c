import json
import math
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flows.tracking.connect import open_tracking
from stages.models.anatomy.blocks import blocks, norms
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import StageError
from stages.runtime.progress import JsonLines, Silent
from tests.benchmarks import __main__ as command
from tests.benchmarks import bench as bench_module
from tests.benchmarks import controls, results
from tests.benchmarks.chart import page
from tests.benchmarks.child import TASKS
from tests.benchmarks.results import Row
from tests.benchmarks.scoring import score
from tests.benchmarks.techniques import TECHNIQUES, Technique, chosen
from tests.flows.recorded import tracking_in

DENSE = Row("dense", figures={"perplexity_text": 20.0, "perplexity_other": 10.0})


def test_chosen_technique_brings_those_whose_checkpoints_it_reads_in_the_tables_order():
    assert [one.name for one in chosen(["slerp"], TECHNIQUES)] == ["blocks", "recover", "slerp"]
    assert [one.name for one in chosen(["tuned-dense"], TECHNIQUES)] == ["blocks", "recover", "tuned-dense"]
    assert chosen([], TECHNIQUES) == TECHNIQUES
    with pytest.raises(KeyError):
        chosen(["int3"], TECHNIQUES)


def test_techniques_read_only_what_stands_above_them_and_take_params_that_their_stage_knows():
    seen = {"dense", "text", "other"}
    options = bench_module.Options("m", "t", "o", budget=100)
    for one in TECHNIQUES:
        assert {*one.inputs.values()} <= seen
        seen.add(one.name)
        if one.stage not in controls.__dict__:
            bench_module.stage(one.stage).params.model_validate(bench_module.adapted(one, options))


def test_score_of_two_tables_of_logits_equals_perplexity_and_kl_by_numpy():
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(7, 7)) for _ in range(2)]
    ids = {name: torch.tensor(rng.integers(0, 7, (3, 5))) for name in ("text", "other")}
    models = [lambda ids_NT, table=table: torch.tensor(table)[ids_NT] for table in tables]
    found = score(models[1], models[0], ids, kl_windows=2)
    logp = [t - np.log(np.exp(t).sum(1, keepdims=True)) for t in tables]
    for name, ids_NT in ids.items():
        x = ids_NT.numpy()
        nll = -logp[1][x[:, :-1].ravel(), x[:, 1:].ravel()]
        assert found[f"perplexity_{name}"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    read = ids["text"].numpy()[:2, :-1].ravel()
    kl = (np.exp(logp[0]) * (logp[0] - logp[1])).sum(1)[read].mean()
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    every = (np.exp(logp[0]) * (logp[0] - logp[1])).sum(1)[ids["text"].numpy()].mean()
    assert found["kl_short"] == pytest.approx(every, rel=1e-4)


def test_cut_loses_on_outputs_what_eckart_and_young_allow_and_less_than_any_other_cut():
    generator = torch.Generator().manual_seed(1)
    w_OI = torch.randn(12, 9, generator=generator)
    x_TI = torch.randn(200, 9, generator=generator) * torch.logspace(-1, 1, 9)
    moment_II = x_TI.t() @ x_TI / 200
    made = controls.cut(w_OI, moment_II, 4)
    assert torch.linalg.matrix_rank(made, rtol=1e-4) == 4
    least = np.linalg.svd((x_TI @ w_OI.t()).numpy(), compute_uv=False)[4:]
    assert float((x_TI @ (w_OI - made).t()).norm()) == pytest.approx(float(np.linalg.norm(least)), rel=1e-3)
    torch.testing.assert_close(controls.cut(w_OI, moment_II, 9), w_OI, rtol=1e-3, atol=1e-3)


def test_folded_copy_has_norms_of_ones_and_the_same_logits(tiny, tmp_path):
    controls.fold_norms({}, {"model": tiny}, tmp_path / "out", Silent())
    folded, dense, ids = load_model(tmp_path / "out"), load_model(tiny), torch.arange(40)[None]
    weights = [norm.weight for block in blocks(folded) for norm in norms(block).values()]
    assert all(torch.equal(one, torch.ones_like(one)) for one in weights)
    assert not torch.equal(folded.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(folded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_rows_kept_are_the_last_of_each_name_and_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert results.kept(path) == {}
    for key in ("old", "new"):
        results.keep(path, Row("int4", key, {"kl": 0.5}))
    with path.open("a") as lines:
        lines.write('{"name": "int8", "ke')
    assert results.kept(path) == {"int4": Row("int4", "new", {"kl": 0.5})}


def test_cells_are_ratios_to_dense_and_a_failure_shows_its_error():
    figures = {"perplexity_text": 21.0, "perplexity_other": 15.0, "kl": 0.1, "kl_short": 0.2}
    figures |= {"seconds": 3.0, "peak_rss_bytes": 2e9}
    told = {"block_parameters": 80.0, "block_parameters_before": 100.0}
    assert results.cells(Row("a", figures=figures, metrics=told, about="x"), DENSE) == (
        "a", "+5.00", "1.5000", "0.1000", "0.2000", "80.0%", "-", "3.0", "2.00", "x",
    )  # fmt: skip
    assert results.summary(Row("b", metrics={"sparsity": 0.5}), DENSE) == {"kept_share": 0.5}
    assert results.cells(Row("c", error="broke"), DENSE) == ("c", *["-"] * 8, "broke")
    assert results.columns([Row("c", error="broke")], DENSE)["loss_percent"] == [None]


def test_recovered_row_is_told_beside_the_fine_tuned_model_and_others_are_not():
    rows = [Row(name, figures={"perplexity_text": value}) for name, value in (("r", 30.0), ("q", 30.0), ("t", 15.0))]
    told = results.beside(rows, "t", ["r"])
    assert told[0].about.endswith("x2.000 of t in-domain") and told[1:] == rows[1:]


def test_page_draws_what_has_a_loss_and_marks_peers():
    rows = [Row("<a>", figures={"perplexity_text": 21.0, "perplexity_other": 11.0, "seconds": 3.0, "size_bytes": 1e6})]
    rows += [Row("peer", figures={"perplexity_text": 19.0, "perplexity_other": 11.0, "seconds": 9.0}), Row("broke")]
    drawn = page(rows, DENSE, ["peer"])
    assert drawn.count("<circle") == 3 and drawn.count('class="peer"') == 1
    assert "&lt;a&gt;" in drawn and "<a>" not in drawn and "broke" not in drawn


@pytest.fixture
def inside(monkeypatch):
    """Tasks done in this process; the names of those done."""
    done = []

    def child(bench, name, task, python=""):
        done.append(name)
        try:
            return json.loads(json.dumps(TASKS[task["do"]](task, JsonLines(StringIO()))))
        except StageError as error:
            raise bench_module.FailedError(str(error)) from error

    monkeypatch.setattr(bench_module, "child", child)
    return done


def test_bench_goes_on_after_a_failure_resumes_and_records_every_row(
    tiny, reference, tmp_path, monkeypatch, inside, capsys
):
    def prune(name, like, pattern):
        return Technique(name, "prune", {"method": "magnitude", "pattern": pattern}, {"model": like, "text": "text"})

    table = [prune("first", "dense", "2:4"), Technique("none", "prune", {"keep": 0.01}), prune("last", "none", "4:8")]
    monkeypatch.setattr(command, "TECHNIQUES", table)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_in(tmp_path / "mlflow").uri)
    asked = ["--model", str(tiny), "--windows", "2", "--tokens", "64", "--calibration", "2", "--kl-windows", "1"]
    for name, text in (("text", reference[:60_000]), ("other", reference[60_000:90_000])):
        (tmp_path / f"{name}.txt").write_text(text)
        asked += [f"--{name}", str(tmp_path / f"{name}.txt")]
    asked += ["--store", str(tmp_path / "store"), "--only", "first,last"]
    assert command.main(asked) == 1
    assert "needs none, which failed" in capsys.readouterr().out.replace("\n", " ")
    assert {"windows", "dense", "first", "first judged", "none"} == {*inside}
    inside.clear()
    table[1] = prune("none", "dense", "4:8")
    assert command.main(asked) == 0
    assert inside == ["none", "none judged", "last", "last judged"]
    rows = results.kept(next(Path(tmp_path).rglob("rows.jsonl")))
    assert rows["first"].metrics["sparsity"] == 0.5 and rows["first"].figures["kl"] > 0
    assert not list((tmp_path / "store" / "state" / "bench").rglob("*.safetensors"))[1:]
    found = SimpleNamespace(**_last_run(tmp_path))
    assert found.metrics["first/loss_percent"] == pytest.approx(
        100 * (rows["first"].figures["perplexity_text"] / rows["dense"].figures["perplexity_text"] - 1)
    )
    assert {"techniques.json", "rows.jsonl", "loss.html"} <= found.files


def _last_run(folder):
    tracking = open_tracking(folder / "store" / "state", experiment="bench")
    run = tracking.client.search_runs([tracking.experiment_id], order_by=["attributes.start_time DESC"])[0]
    return {"metrics": run.data.metrics, "files": {one.path for one in tracking.client.list_artifacts(run.info.run_id)}}
