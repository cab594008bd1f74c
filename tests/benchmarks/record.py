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
_TABLE = [{"path": "techniques.json", "type": "table"}]
"""What MLflow's own `log_table` notes of a table, so that its page shows one; that function needs pandas."""


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
    tracking = open_tracking(scratch, experiment=EXPERIMENT)
    client = tracking.client
    run_id = client.create_run(tracking.experiment_id, run_name="bench").info.run_id
    figures = {f"{row.name}/{name}": value for row in rows for name, value in summary(row, dense).items()}
    figures |= {f"dense/{name}": value for name, value in dense.figures.items()}
    tags = {"enginery.commit": commit(), "enginery.device": device_name(), "mlflow.loggedArtifacts": json.dumps(_TABLE)}
    send(client, run_id, Buffer(params=flattened(params), points=now(figures), tags=tags))
    made = columns(rows, dense)
    client.log_dict(run_id, {"columns": [*made], "data": [*zip(*made.values(), strict=True)]}, "techniques.json")
    lines = "".join(json.dumps(asdict(row)) + "\n" for row in (dense, *rows))
    client.log_text(run_id, lines, "rows.jsonl")
    client.log_text(run_id, page(rows, dense, peers), "loss.html")
    client.set_terminated(run_id, "FAILED" if any(row.error for row in rows) else "FINISHED")
    return tracking.link(run_id)
