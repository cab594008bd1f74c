"""What MLflow's own search finds of a promoted model: its measures, each on its dataset."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.pipeline.figures import model_metrics
from flows.registry.mlflow_versions import CARRIER
from flows.registry.model_card import CARD
from flows.tracking.datasets import Dataset, digest, inputs
from flows.tracking.model_metrics import ModelMetric, log_model_metrics
from tests.flows.pipeline.tiny_run import place, sealed
from tests.flows.recorded import tracking_in
from tests.flows.reporting.test_abilities import CHAIN, REPORTS

__all__ = ["place", "sealed"]
TEXT, ITEMS = "a" * 64, "b" * 64


def models(client, experiment, text="", **more):
    return client.search_logged_models([experiment], filter_string=text or None, **more)


@pytest.fixture
def judged():
    reports = REPORTS | {("cpu", "text"): {"measures": {"perplexity": 9.5, "size_bytes": 7}}}
    for name in ("dense", "cpu"):
        one = dict(reports[name, "abilities"])
        reports[name, "abilities"] = one | {"slices": {"capitals": {"accuracy": 0.25}}}
    done = {"text": TEXT, "abilities": ITEMS, "cpu": "c" * 64}
    session = SimpleNamespace(
        recipe=SimpleNamespace(judge=SimpleNamespace(baseline="dense", artifacts=["cpu"])),
        asked=SimpleNamespace(chains={"cpu": CHAIN}),
        done={name: SimpleNamespace(fingerprint=of, metrics={"size_bytes": 90.0}) for name, of in done.items()},
    )
    return model_metrics(session, SimpleNamespace(reports=reports, serves="cpu", speeds={}))


def test_measures_of_the_served_engine_stand_on_their_datasets(judged):
    found = {one.key: one for one in judged}
    assert found["perplexity.text"] == ModelMetric("perplexity.text", 9.5, ("text", TEXT))
    assert found["accuracy.abilities"].dataset == ("abilities", ITEMS)
    assert found["accuracy.abilities.capitals"].value == 0.25
    assert found["size_bytes"] == ModelMetric("size_bytes", 90.0)
    share = [found[f"accuracy.abilities of dense{end}"].value for end in (" low", "", " high")]
    assert share == sorted(share) and share[1] == pytest.approx(4 / 7)


def test_models_are_found_by_what_they_were_measured_by_on_a_dataset(judged, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = tracking_in(tmp_path / "mlflow")
    client, experiment = tracking.client, tracking.experiment_id
    made = []
    for worse in (0, 3):
        run = client.create_run(experiment).info.run_id
        client.log_inputs(run, inputs([Dataset("text", TEXT, "pydoc://topics", ("test",))]))
        made.append(client.create_logged_model(experiment, name=f"m{worse}", source_run_id=run).model_id)
        moved = [ModelMetric(one.key, one.value + worse, one.dataset) for one in judged]
        moved.append(ModelMetric("odd", float("nan")))
        log_model_metrics(client, run, made[-1], moved)
        (dataset,) = client.get_run(run).inputs.dataset_inputs
        assert dataset.dataset.digest == digest(TEXT)
    better = models(client, experiment, "metrics.`perplexity.text` < 10")
    assert [one.model_id for one in better] == made[:1]
    on = [{"dataset_name": "text", "dataset_digest": digest(TEXT)}]
    assert len(models(client, experiment, "metrics.`perplexity.text` > 0", datasets=on)) == 2
    other = [{"dataset_name": "text", "dataset_digest": digest(ITEMS)}]
    assert not models(client, experiment, "metrics.`perplexity.text` > 0", datasets=other)
    by = {"field_name": "metrics.accuracy.abilities of dense", "ascending": False, **on[0], "dataset_name": "abilities"}
    ordered = models(client, experiment, order_by=[by | {"dataset_digest": digest(ITEMS)}])
    assert [one.model_id for one in ordered] == made[::-1]
    metrics = {one.key: one for one in better[0].metrics}
    assert (metrics["perplexity.text"].dataset_name, metrics["perplexity.text"].value) == ("text", 9.5)
    assert metrics["size_bytes"].dataset_name is None and "odd" not in metrics


def test_promoted_model_has_its_measures_and_the_run_its_card(place):
    result = place.run()
    client, run = place.client, place.followed(result.run)
    version = client.get_model_version(place.model, result.model.version)
    (model,) = [
        one
        for one in models(client, run.info.experiment_id, "metrics.`perplexity.text` = 8")
        if one.name == place.model
    ]
    assert model.model_id == version.tags[CARRIER]
    (metric,) = [one for one in model.metrics if one.key == "perplexity.text"]
    read = {one.dataset.name: one.dataset.digest for one in run.inputs.dataset_inputs}
    assert (metric.dataset_name, metric.dataset_digest) == ("text", read["text"])
    assert metric.run_id == run.info.run_id and run.data.metrics["perplexity.text"] == 8
    card = client.download_artifacts(run.info.run_id, CARD)
    assert Path(card).read_text(encoding="utf-8") == version.description
