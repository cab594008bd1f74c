"""Abilities kept: figures beside a bootstrap written anew, marks, a lent model, a whole bench that resumes."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flows.tracking.connect import open_tracking
from stages.measures.interval import Interval
from stages.models.checkpoint.layout import carry, travelling
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import StageError
from stages.runtime.progress import JsonLines, Silent
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests.benchmarks import abilities, asked, cells, kept, peers_saved
from tests.benchmarks import bench as bench_module
from tests.benchmarks.child import TASKS
from tests.benchmarks.kept import Cell, Row
from tests.benchmarks.lent import Lent, borrowed
from tests.benchmarks.peers import PEERS
from tests.benchmarks.techniques import GENTLE, TECHNIQUES, Technique
from tests.flows.recorded import tracking_in
from tests.knowing import facts, stories


def report(documents, **measures):
    return {"documents": documents, "measures": {"size_bytes": 8.0, "kl_divergence": 0.25} | measures}


def reports(right, nll=(1.0, 2.0), names="q"):
    asked = [{"id": f"{names}{n}", "tokens": 3, "right": one, "chance": 0} for n, one in enumerate(right)]
    other = [{"id": f"w{n}", "tokens": 10, "nll": 10 * one} for n, one in enumerate(nll)]
    return {"abilities": report(asked), "other": report(other)}


def test_more_is_the_difference_in_shares_of_denses_answers_and_its_interval_that_of_pairs():
    rng = np.random.default_rng(3)
    dense_D, ours_D, theirs_D = (rng.random(300) < share for share in (0.6, 0.5, 0.45))
    found = kept.more(*(reports([int(x) for x in one]) for one in (ours_D, theirs_D, dense_D)))
    assert found.point == pytest.approx((ours_D.sum() - theirs_D.sum()) / dense_D.sum())
    at_RD = rng.integers(0, 300, (20_000, 300))
    again_R = (ours_D[at_RD].sum(1) - theirs_D[at_RD].sum(1).astype(float)) / dense_D[at_RD].sum(1)
    assert (found.low, found.high) == pytest.approx(np.quantile(again_R, [0.025, 0.975]), abs=0.012)


def test_more_than_itself_is_nothing_surely_however_few_are_right():
    one = reports([1, 0, 1, 1, 0])
    assert kept.more(one, one, reports([1, 1, 1, 0, 0])) == Interval(0.0, 0.0, 0.0)


def test_cell_has_the_share_of_denses_answers_and_the_ratio_of_perplexities():
    found = kept.cell(reports([1, 0, 0, 1], nll=(1.5, 2.5)), reports([1, 1, 1, 1]))
    assert (found.right, found.kept.point, found.kl_short, found.size_bytes) == (2, 0.5, 0.25, 8.0)
    assert found.elsewhere.point == pytest.approx(np.exp(0.5))


def test_reports_of_other_items_are_not_compared():
    with pytest.raises(StageError, match="cannot be paired"):
        kept.cell(reports([1, 1]), reports([1, 1], names="other"))
    with pytest.raises(StageError, match="cannot be paired"):
        kept.more(reports([1, 1]), reports([1, 1], names="other"), reports([1, 1]))


def test_rows_where_the_mix_or_a_peer_is_worse_beyond_the_interval_are_marked_and_others_are_not():
    lost, near = Interval(-0.1, -0.2, -0.01), Interval(-0.1, -0.2, 0.1)
    one = Row("int4", "why", gains={"mixed": lost, "self": near}, beside={"a": near, "b": lost, "c": Interval(0, 0, 0)})
    assert one.marks == ("mixed WORSE than narrow", "less, within the interval, than a", "LESS than b") and one.wrong
    within = Row("int4", gains={"mixed": near}, beside={"a": near})
    assert within.marks == ("less, within the interval, than a",) and not within.wrong
    assert kept.cells(one, ("narrow", "mixed"))[-1].startswith("mixed WORSE than narrow; less")
    styles = [each.style for each in kept.table([one, within], ("mixed",), "").rows]
    assert styles == ["red", ""]


def test_cells_show_each_calibration_and_what_failed():
    whole = Cell(9, Interval(0.9, 0.8, 0.95), 0.01, Interval(1.25, 1.2, 1.3), 2e6)
    one = Row("x", "why", cells={"narrow": whole, "mixed": Cell(error="broke")})
    assert kept.cells(one, ("narrow", "mixed")) == [
        "x", "2.0 MB", "90.0 (80 to 95)", "-", "-", "0.010 -", "1.250 -", "broke; why"
    ]  # fmt: skip
    told = json.loads(json.dumps(kept.as_json(one), allow_nan=False))
    assert told["cells"]["narrow"]["kept"] == {"point": 0.9, "low": 0.8, "high": 0.95}
    assert told["cells"]["mixed"]["size_bytes"] is None


def test_peer_stands_beside_ours_of_its_format_by_the_last_text_that_both_were_calibrated_on():
    dense, better, worse = reports([1, 1, 1, 1]), reports([1, 1, 1, 0]), reports([1, 0, 0, 0])
    found = {"w8a8": {"narrow": worse, "mixed": better}, "peer": {"narrow": better, "mixed": "broke"}}
    rows = [kept.row("w8a8", found["w8a8"], dense), kept.row("peer", found["peer"], dense, ours="w8a8")]
    assert rows[0].gains["mixed"].point == 0.5
    assert kept.beside(found, rows[1:], dense)["w8a8"]["peer"].point == -0.5
    assert kept.beside({"peer": found["peer"]}, rows[1:], dense) == {}


def test_gentle_techniques_are_all_but_those_bound_to_time_take_known_params_and_read_what_stands_above():
    names = [one.name for one in GENTLE]
    assert {one.name for one in TECHNIQUES if not one.as_long_as} <= {*names} and len({*names}) == len(names)
    seen, options = {"dense", "text", "other"}, bench_module.Options("m", "t", "o", budget=100)
    for one in GENTLE:
        assert {*one.inputs.values()} <= seen
        seen.add(one.name)
        assert one.params.get("keep", 1) >= 0.95
        if one.stage not in cells.CONTROLS:
            bench_module.stage(one.stage).params.model_validate(bench_module.adapted(one, options))
    assert {one.ours for one in PEERS} <= {*names}


def test_fp8_of_another_tool_is_saved_as_it_computes(tiny, tmp_path):
    model = load_model(tiny)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            on, most = name != "lm_head", module.weight.detach().abs().max()
            module.weight_quantizer = SimpleNamespace(is_enabled=on, amax=most)
            module.input_quantizer = SimpleNamespace(is_enabled=on, amax=torch.tensor(7.0))
    peers_saved.modelopt_fp8(model, tmp_path / "out")
    carry(tiny, tmp_path / "out", travelling(tiny))
    found, dense = load_model(tmp_path / "out"), load_model(tiny)
    ours, theirs = (one.model.layers[1].mlp.up_proj for one in (found, dense))
    # E4M3 by its definition: three bits behind the first one, down to 2^-9.
    scaled = theirs.weight.detach().double().numpy()
    scale = np.float32(np.abs(scaled).max() / 448)
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled / scale), 1e-30))), -6) - 3)
    expected = np.rint(scaled / scale / step) * step * scale
    assert np.abs(ours.dequantized().numpy() - expected).max() <= 1e-6 * np.abs(expected).max()
    assert float(ours.input_scale) == pytest.approx(7 / 448)
    assert torch.equal(found.model.embed_tokens.weight, dense.model.embed_tokens.weight)


SERVES = """
import sys
from pathlib import Path
from stages.models.checkpoint.loading import load_model
from stages.runtime.progress import JsonLines
from tests.benchmarks.lent import serve
serve(load_model(Path(sys.argv[1])), Path(sys.argv[2]), sys.stdin, JsonLines(sys.stdout))
"""


def items_in(folder):
    folder.mkdir()
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in facts())
    (folder / "items.jsonl").write_text(lines, encoding="utf-8")
    return folder / "items.jsonl"


def test_model_in_another_process_answers_as_validate_says_of_its_checkpoint(knowing, tmp_path, seal, store):
    text = store.checkout(seal("items", {"source": items_in(tmp_path / "items").as_uri()}).identity)
    (tmp_path / "out").mkdir()
    VALIDATE.run(ValidateParams(), {"model": knowing, "text": text, "baseline": knowing}, tmp_path / "out", Silent())
    command = [sys.executable, "-c", SERVES, str(knowing), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        ask = {"params": {}, "text": str(text), "baseline": True}
        found = asked.reports(Lent(process, tmp_path), knowing, {"abilities": ask}, Silent())["abilities"]
        process.stdin.close()
    expected = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["documents"] == expected["documents"] and sum(one["right"] for one in found["documents"]) > 30


def test_tool_that_is_not_there_ends_in_a_sentence(knowing, tmp_path):
    task = {"do": "peer lent", "peer": "compressor-w8a8", "windows": str(tmp_path / "none"), "dense": str(knowing)}
    with pytest.raises(StageError, match="the tool's process ended"), borrowed(task, sys.executable):
        raise AssertionError("it is not there")


@pytest.fixture
def inside(monkeypatch):
    """Tasks of children done in this process; the names of those done."""
    done = []

    def child(bench, name, task, python=""):
        done.append(name)
        return json.loads(json.dumps(TASKS[task["do"]](task, JsonLines(sys.stderr))))

    monkeypatch.setattr(bench_module, "child", child)
    return done


def test_bench_goes_on_after_a_failure_finds_what_it_measured_and_keeps_no_checkpoint(
    knowing, tmp_path, monkeypatch, inside, capsys
):
    def prune(name, like="dense", **params):
        return Technique(name, "prune", {"method": "magnitude"} | params, {"model": like, "text": "text"})

    folded = Technique("folded", "fold_norms", inputs={"model": "dense"}, scored=False)
    broken = prune("broken", method="blocks", keep=0.01)
    table = [folded, prune("first", "folded", pattern="4:8"), broken, prune("last", "broken", keep=0.9)]
    monkeypatch.setattr(abilities, "GENTLE", table)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_in(tmp_path / "mlflow").uri)
    given = ["--model", str(knowing), "--abilities", str(items_in(tmp_path / "items")), "--launcher", "inline"]
    for seed, name in enumerate(("text", "other")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(stories(seed, 2000)))
        given += [f"--{name}", str(tmp_path / f"{name}.txt")]
    given += ["--store", str(tmp_path / "store"), "--windows", "2", "--tokens", "32", "--calibration", "2"]
    given += ["--samples", "160", "--sample-tokens", "96", "--calibrations", "narrow,self", "--only", "first,last"]
    assert abilities.main(given) == 1
    assert "needs broken, which failed" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert inside == ["windows narrow", "folded narrow", "windows self", "folded self"]
    root = tmp_path / "store" / "state" / "bench" / "abilities"
    rows = {one["name"]: one for one in json.loads((root / "abilities.json").read_text())["rows"]}
    assert 0 < rows["first"]["cells"]["self"]["kept"]["point"] <= 1.2 and rows["first"]["gains"]["self"]
    assert rows["last"]["cells"]["narrow"]["kept"] is None
    sealed = {path: path.stat().st_mtime_ns for path in (root / "store" / "artifacts").iterdir()}
    kinds = [json.loads(path.read_text())["work"]["stage"] for path in sealed]
    assert sorted(kinds) == ["corpus"] * 3 + ["fetch", "items"] + ["validate"] * 6
    inside.clear()
    table[2] = broken = replace(broken, params={"method": "magnitude", "keep": 0.9})
    assert abilities.main(given) == 0
    assert inside == []
    after = {path: path.stat().st_mtime_ns for path in (root / "store" / "artifacts").iterdir()}
    assert after.items() >= sealed.items() and len(after) == len(sealed) + 8
    tracking = open_tracking(tmp_path / "store" / "state", experiment="bench")
    run = tracking.client.search_runs([tracking.experiment_id], order_by=["attributes.start_time DESC"])[0]
    assert run.data.metrics["first/self/kept"] == rows["first"]["cells"]["self"]["kept"]["point"]
