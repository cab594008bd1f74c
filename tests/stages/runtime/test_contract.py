import json
import pickle

import pytest
from pydantic import ValidationError

from stages.runtime.contract import (
    DoesNotFit,
    FileEntry,
    Interrupted,
    Kind,
    Location,
    Manifest,
    Params,
    Provenance,
    StageError,
    Unavailable,
    Work,
)


class SomeParams(Params):
    source: str = Location()
    digest: str = ""
    kind: Kind = Kind.ONNX


def test_error_says_what_measured_limit_and_remedy():
    error = StageError("too wide", measured=5, limit=3, remedy="Fold it.")
    assert str(error) == "too wide; measured 5; limit 3. Fold it."
    assert str(StageError("too wide")) == "too wide"
    assert str(StageError("not there", measured="No file.", remedy="Look.")) == "not there; measured No file. Look."
    assert str(StageError("none left", measured=0)) == "none left; measured 0"


@pytest.mark.parametrize("kind", [StageError, DoesNotFit, Interrupted, Unavailable])
def test_error_keeps_kind_and_parts_through_pickle(kind):
    found = pickle.loads(pickle.dumps(kind("what", measured=1.5, limit="two", remedy="three")))
    assert type(found) is kind
    assert (found.what, found.measured, found.limit, found.remedy) == ("what", 1.5, "two", "three")


def test_only_unavailable_is_retried_and_only_its_own_kind_is_caught():
    assert not issubclass(DoesNotFit, Unavailable)
    assert all(issubclass(kind, StageError) for kind in (DoesNotFit, Interrupted, Unavailable))


def test_params_are_frozen_and_refuse_unknown_keys():
    params = SomeParams(source="here")
    with pytest.raises(ValidationError, match="frozen"):
        params.digest = "other"
    with pytest.raises(ValidationError, match="Extra inputs"):
        SomeParams(source="here", speed=3)


def test_identity_leaves_locations_out_and_is_json():
    first, second = SomeParams(source="here", digest="d"), SomeParams(source="there", digest="d")
    assert first.identity() == second.identity() == {"digest": "d", "kind": "onnx"}
    json.dumps(first.identity())


def test_manifest_returns_from_json_as_it_was_and_adds_up_its_files():
    manifest = Manifest(
        work=Work(stage="fetch", code="c", params={"n": 1}, inputs={}, requires={"torch": "2"}),
        kind=Kind.CHECKPOINT,
        files={"a": FileEntry(sha256="0", size=3), "b/c": FileEntry(sha256="1", size=4)},
        metrics={"parameters": 5.0},
        provenance=Provenance(host="h", device="d", created="now", seconds=1.5, peak_rss_bytes=7),
    )
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert manifest.size_bytes == 7
    with pytest.raises(ValidationError):
        Manifest.model_validate({**manifest.model_dump(), "signature": ""})
