"""What there is to choose from: registered models with the journal's truth beside MLflow's, and what stages take."""

# ruff: noqa: F401 - fixtures that other modules define are imported and then named as arguments

import json

import pytest

from flows.cli import main
from flows.registry import journal
from flows.reporting.stage_docs import described
from stages import STAGES, stage
from stages.adapters.connect import connect
from stages.measures.table import MEASURES
from stages.runtime.artifacts import blob_key
from tests.flows.commands.test_reading import filled
from tests.flows.recorded import tracking_in
from tests.flows.test_cli import own_store, valid


@pytest.mark.parametrize("name", STAGES)
def test_stage_is_described_whole(name, capsys):
    said, definition = described(name), stage(name)
    fields = {n for n, f in definition.params.model_fields.items() if n not in ("exact", "downloads", "base_exact")}
    assert {one.name for one in said.params} == fields
    assert all(one.about and one.type not in ("any", "") for one in said.params), "each param is documented"
    assert said.about and said.inputs.keys() == definition.inputs.keys()
    required = {n for n, f in definition.params.model_fields.items() if f.is_required()}
    assert {one.name for one in said.params if one.default is None} == required
    for one in said.params:
        if one.default is not None:
            assert definition.params.model_fields[one.name].default in (
                (json.loads(one.default)),
                tuple(json.loads(one.default)) if one.default.startswith("[") else None,
            )
    assert main(["stages", name, "--json"]) == 0
    assert valid(capsys.readouterr().out, "stages")["stages"][0]["name"] == name


def test_stages_shows_values_limits_and_measures(capsys):
    params = {one.name: one for one in described("prune").params}
    assert params["keep"].allowed == "more than 0, less than 1" and params["keep"].default == "0.95"
    assert params["by"].allowed == "loss, influence" and params["pattern"].type == "string or null"
    assert params["skip"].type == "list of string"
    splits = next(one for one in described("corpus").params if one.name == "splits")
    assert splits.type == "mapping of number"
    assert main(["stages"]) == 0
    said = capsys.readouterr().out
    assert [name for name in STAGES if f"│ {name} " not in said] == []
    assert main(["stages", "validate"]) == 0
    said = capsys.readouterr().out
    for name in (*MEASURES, "size_bytes"):
        assert f"measures {name}: " in said
    assert "in nats. The exponential of the mean." in said and "shape" not in said
    assert main(["stages", "nothing"]) == 1
    assert "there is no stage 'nothing'" in capsys.readouterr().err


@pytest.fixture
def registered(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    filled(str(tmp_path / "store"))
    return connect(str(tmp_path / "store"))


def listed(capsys):
    assert main(["models", "--json"]) == 0
    return valid(capsys.readouterr().out, "models")


def test_models_lists_versions_with_figures_size_and_digest(registered, capsys, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (one,) = listed(capsys)["models"]
    engine = next(identity for identity, manifest in registered.manifests() if manifest.kind == "engine")
    assert (one["model"], one["version"], one["aliases"], one["mlflow"]) == ("m", "1", ["champion"], ["champion"])
    assert (one["size_bytes"], one["digest"], one["note"]) == (5, engine, "")
    assert one["measures"] == {"perplexity against dense on text": 1.1} and one["targets"] == {
        "onnxruntime:cpu": "judged"
    }
    assert main(["models", "m"]) == 0
    said = capsys.readouterr().out
    assert engine in said and "!" not in said and "MLflow was not asked" not in said
    assert main(["models", "none"]) == 1
    assert "no recipe registered a model 'none'; limit m" in capsys.readouterr().err
    assert not [*(tmp_path / "here").iterdir()]  # who looks leaves nothing


def test_models_marks_what_mlflow_has_elsewhere_and_what_it_lost(registered, capsys):
    client = tracking_in(registered.scratch).client
    client.delete_registered_model_alias("m", "champion")
    assert listed(capsys)["models"][0]["note"] == "MLflow has champion on nothing: `enginery reconcile m` puts it back"
    assert main(["models"]) == 0
    assert "- !" in capsys.readouterr().out
    client.delete_model_version("m", "1")
    (one,) = listed(capsys)["models"]
    assert one["mlflow"] is None and "has lost this version" in one["note"]


def test_models_and_reconcile_tell_of_an_alias_that_mlflow_refuses_and_promote_ends_it(registered, capsys):
    entry = journal.head(registered.objects, "m", "champion").model_copy(update={"alias": "latest"})
    registered.objects.delete("promotions/m/00000001.json")
    registered.objects.put("promotions/m/00000001.json", entry.model_dump_json().encode())
    tracking_in(registered.scratch).client.delete_registered_model_alias("m", "champion")
    (one,) = listed(capsys)["models"]
    assert "MLflow reserves the alias 'latest'" in one["note"] and "`enginery promote m 1`" in one["note"]
    assert main(["reconcile"]) == 0
    said = capsys.readouterr().out
    assert "m@latest: left alone on version 1" in said and "every other alias stands" in said
    assert main(["promote", "m", "1"]) == 0
    assert "m@champion now stands on version 1" in capsys.readouterr().out
    (one,) = listed(capsys)["models"]
    assert (one["mlflow"], one["note"]) == (["champion"], "")


@pytest.mark.parametrize("command", [["promote", "m", "1"], ["rollback", "m"]])
def test_alias_that_mlflow_refuses_is_refused_by_commands_before_mlflow_is_asked(command, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main([*command, "--alias", "latest"]) == 1
    assert "MLflow reserves the alias 'latest'" in capsys.readouterr().err
    assert main([command[0], "a/b", *command[2:]]) == 1
    assert "no registered model is called 'a/b'; limit letters" in capsys.readouterr().err


def test_models_without_mlflow_is_the_journal_alone_and_says_so(registered, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    data = listed(capsys)
    assert "127.0.0.1:9" in data["away"] and data["models"][0]["aliases"] == ["champion"]
    assert (data["models"][0]["mlflow"], data["models"][0]["note"]) == (None, "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (registered.scratch / "mlflow.db").unlink()
    assert main(["models"]) == 0
    assert "MLflow was not asked, and the journal is listed alone: there is no database" in capsys.readouterr().out
    assert not (registered.scratch / "mlflow.db").exists()


def test_models_tells_versions_of_one_number_apart_and_follows_a_rollback(registered, capsys):
    first = journal.head(registered.objects, "m", "champion").version
    other = first.candidate.executables["cpu"].model_copy(update={"fingerprint": "f" * 64})
    rebuilt = first.model_copy(update={"candidate": first.candidate.model_copy(update={"executables": {"cpu": other}})})
    journal.append(registered.objects, "m", "champion", "promote", lambda _: rebuilt, "again")
    lines = listed(capsys)["models"]
    assert [(one["version"], one["digest"][0] == "f", one["aliases"]) for one in lines] == [
        ("1", False, []),
        ("1", True, ["champion"]),
    ]
    assert lines[1]["size_bytes"] is None and lines[1]["mlflow"] is None


def test_models_tells_a_slice_from_its_corpus(registered, capsys):
    gate = {
        "measure": "kl_divergence",
        "artifact": "cpu",
        "corpus": "text",
        "against": None,
        "slice": "",
        "worst": False,
    }
    gates = [
        gate | {"measured": 1.023e-05},
        gate | {"measured": 1.519e-05, "slice": "docs", "worst": True},
        gate | {"measured": 2e-06, "slice": "code"},
    ]
    first = journal.head(registered.objects, "m", "champion").version
    candidate = first.candidate.model_copy(update={"verdict": {"passed": True, "gates": gates}})
    held = first.model_copy(update={"candidate": candidate})
    journal.append(
        registered.objects, "m", "next", "promote", lambda _: held.model_copy(update={"number": "2"}), "again"
    )
    assert listed(capsys)["models"][1]["measures"] == {
        "kl_divergence on text": 1.023e-05,
        "kl_divergence on text, worst slice docs": 1.519e-05,
        "kl_divergence on text, slice code": 2e-06,
    }


def test_sweep_leaves_the_engine_that_an_alias_serves(registered, capsys):
    engine = journal.head(registered.objects, "m", "champion").candidate.served
    assert engine in dict(registered.manifests())
    for more in ([], ["--dry-run"]):
        assert main(["sweep", "--artifact", engine[:12], *more]) == 1
        said = capsys.readouterr().err
        assert f"artifact {engine[:12]} is served; measured m@champion stands on version 1 of it" in said
        assert "enginery promote" in said and engine in dict(registered.manifests())
    first = journal.head(registered.objects, "m", "champion").version
    other = first.candidate.executables["cpu"].model_copy(update={"fingerprint": "f" * 64})
    later = first.candidate.model_copy(update={"executables": {"cpu": other}})
    moved = first.model_copy(update={"number": "2", "candidate": later})
    journal.append(registered.objects, "m", "next", "promote", lambda _: first, "again")
    journal.append(registered.objects, "m", "champion", "promote", lambda _: moved, "again")
    assert main(["sweep", "--artifact", engine[:12]]) == 1
    said = capsys.readouterr().err
    assert "m@next stands on version 1 of it" in said and "m@champion" not in said
    journal.append(registered.objects, "m", "next", "withdraw", lambda _: first, "away")
    assert main(["sweep", "--artifact", engine[:12]]) == 0
    assert engine not in dict(registered.manifests())


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_sweep_takes_a_damaged_engine_though_an_alias_serves_it(registered, capsys, damage):
    engine = journal.head(registered.objects, "m", "champion").candidate.served
    entry = next(iter(dict(registered.manifests())[engine].files.values()))
    blob = registered.objects.root / blob_key(entry.sha256)
    data = blob.read_bytes()
    blob.unlink()
    if damage == "changed":
        blob.write_bytes(bytes(one ^ 1 for one in data))
    assert main(["sweep", "--artifact", engine[:12], "--dry-run"]) == 0
    assert main(["sweep", "--artifact", engine[:12]]) == 0
    assert f"took away artifact {engine[:12]}" in capsys.readouterr().out
    assert engine not in dict(registered.manifests()) and not blob.exists()


def test_manifest_that_cannot_be_read_is_told_by_ls_and_taken_away_by_sweep(registered, capsys):
    broken, *others = dict(registered.manifests())
    path = registered.objects.root / "artifacts" / f"{broken}.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:100])
    assert main(["ls"]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"! the manifest of {broken[:12]}" in said and f"enginery sweep --artifact {broken[:12]}" in said
    assert all(one[:12] in said for one in others)
    assert main(["models"]) == 0
    assert main(["sweep", "--dry-run"]) == 1
    assert broken[:12] in capsys.readouterr().err
    assert main(["sweep", "--artifact", broken[:12]]) == 0
    assert not path.exists()


def test_damaged_journal_is_named_with_a_way_on(registered, capsys):
    path = registered.objects.root / "promotions" / "m" / "00000001.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:50])
    for words in (["models"], ["reconcile"], ["rollback", "m"]):
        assert main(words) == 1
        said = capsys.readouterr().err
        assert "promotions/m/00000001.json" in said and "measured 50 bytes" in said and "backup" in said, words
    main(["doctor"])
    assert "missing aliases: an entry of the promotion journal cannot be read" in capsys.readouterr().out
