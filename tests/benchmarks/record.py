"""The bench in MLflow: one run with the table, the picture, every row's figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.tracking.batches import Buffer, flattened, now, send
from flows.tracking.connect import open_tracking
from stages.runtime.execute import commit, device_name
from tests.benchmarks.chart import page
from tests.benchmarks.results import Row, columns, summary

EXPERIMENT = "bench"
TABLE = "techniques.json"
"""Noted in a tag as MLflow's own `log_table` does, so that its page shows one; that function needs pandas."""


def record(scratch: Path, rows: Sequence[Row], dense: Row, peers: Sequence[str], params: Mapping[str, Any]) -> str:
    """Log the bench as one run of the experiment `bench`.

    Args:
        scratch: folder of the embedded database, where $MLFLOW_TRACKING_URI names none.
        rows: what was measured.
        dense: the dense model's row.
        peers: names of the rows of other tools.
        params: what was asked.

    Returns:
        where a person sees it.
    """
    figures = {f"{row.name}/{name}": value for row in rows for name, value in summary(row, dense).items()}
    figures |= {f"dense/{name}": value for name, value in dense.figures.items()}
    made = columns(rows, dense)
    files = {
        TABLE: json.dumps({"columns": [*made], "data": [*zip(*made.values(), strict=True)]}),
        "rows.jsonl": "".join(json.dumps(asdict(row)) + "\n" for row in (dense, *rows)),
        "loss.html": page(rows, dense, peers),
    }
    return logged(scratch, "bench", params, figures, files, failed=any(row.error for row in rows))


def logged(
    scratch: Path,
    name: str,
    params: Mapping[str, Any],
    figures: Mapping[str, float],
    files: Mapping[str, str],
    *,
    failed: bool,
) -> str:
    """Log a run of the experiment `bench`; returns where a person sees it.

    Args:
        scratch: see `record`.
        name: of the run.
        params: what was asked.
        figures: name -> value.
        files: name -> text; TABLE is shown as a table.
        failed: something broke.
    """
    tracking = open_tracking(scratch, experiment=EXPERIMENT)
    client = tracking.client
    run_id = client.create_run(tracking.experiment_id, run_name=name).info.run_id
    tags = {"enginery.commit": commit(), "enginery.device": device_name()}
    if TABLE in files:
        tags["mlflow.loggedArtifacts"] = json.dumps([{"path": TABLE, "type": "table"}])
    send(client, run_id, Buffer(params=flattened(params), points=now(dict(figures)), tags=tags))
    for path, text in files.items():
        client.log_text(run_id, text, path)
    client.set_terminated(run_id, "FAILED" if failed else "FINISHED")
    return tracking.link(run_id)
