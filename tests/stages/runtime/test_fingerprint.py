import hashlib
import importlib.metadata
import json
import math
import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.runtime import fingerprint as module
from stages.runtime.contract import Image, StageError, Work
from stages.runtime.fingerprint import (
    assert_installed,
    canonical,
    constraints,
    digest_bytes,
    digest_file,
    digest_tree,
    fingerprint,
    first_difference,
    required,
)

WORK = Work(
    stage="prune",
    code="a" * 64,
    params={"keep": 0.9, "nested": {"deep": [1, 2]}},
    inputs={"model": "b" * 64, "text": "c" * 64},
    requires={"torch": "2.13.0"},
    executor={"device": "cpu"},
)
CHANGES = {
    "stage": "share",
    "code": "d" * 64,
    "params": {"keep": 0.8, "nested": {"deep": [1, 2]}},
    "inputs": {"model": "b" * 64, "text": "e" * 64},
    "requires": {"torch": "2.14.0"},
    "executor": {"device": "gpu"},
}


def changed(field):
    return WORK.model_copy(update={field: CHANGES[field]})


def test_fingerprint_is_the_sha256_of_sorted_json():
    text = json.dumps(WORK.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    assert fingerprint(WORK) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("field", list(Work.model_fields))
def test_every_field_of_work_changes_the_fingerprint_and_is_named_as_the_difference(field):
    assert fingerprint(changed(field)) != fingerprint(WORK)
    assert first_difference(WORK, changed(field)).startswith(field)
    assert first_difference(WORK, WORK) == ""


def test_order_of_keys_changes_no_fingerprint():
    turned = WORK.model_copy(update={"params": dict(reversed(WORK.params.items()))})
    assert list(turned.params) != list(WORK.params)
    assert fingerprint(turned) == fingerprint(WORK)


def test_exchanged_inputs_change_the_fingerprint():
    swapped = WORK.model_copy(update={"inputs": {"model": "c" * 64, "text": "b" * 64}})
    assert fingerprint(swapped) != fingerprint(WORK)


def test_difference_shows_values_and_shortens_digests():
    assert first_difference(WORK, changed("params")) == "params.keep: 0.9 -> 0.8"
    assert first_difference(WORK, changed("inputs")) == f"inputs.text: {'c' * 12} -> {'e' * 12}"
    more = WORK.model_copy(update={"params": {**WORK.params, "alpha": 1}})
    assert first_difference(WORK, more) == "params.alpha: absent -> 1"
    both = changed("params").model_copy(update={"code": "d" * 64})
    assert first_difference(WORK, both).startswith("params.keep")


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_canonical_json_returns_as_it_was(value):
    assert json.loads(canonical(value)) == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_canonical_json_refuses_what_is_not_json(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": value})


def test_digests_of_bytes_file_and_tree_see_content_and_names_alone(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "b").write_bytes(b"bb")
        (tmp_path / name / "a").write_bytes(b"a" * 3_000_000)
    assert digest_file(tmp_path / "one" / "a") == hashlib.sha256(b"a" * 3_000_000).hexdigest()
    assert digest_bytes(b"bb") == digest_file(tmp_path / "one" / "deep" / "b")
    before = digest_tree(tmp_path / "one")
    assert before == digest_tree(tmp_path / "two")
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "c")
    assert digest_tree(tmp_path / "two") != before
    (tmp_path / "one" / "deep" / "b").write_bytes(b"bc")
    assert digest_tree(tmp_path / "one") != before


STAGE = '''"""Docstring."""
import json
from pathlib import Path

from stages.algorithms.twice import twice
from stages.runtime.contract import Params


def run(x):
    """Docstring."""
    import stages.models.late as late

    return twice(x) + late.ADDED  # reason
'''
FILES = {
    "stages/__init__.py": "STAGES = {}",
    "stages/trial.py": STAGE,
    "stages/other.py": "A = 1",
    "stages/algorithms/__init__.py": "",
    "stages/algorithms/twice.py": "from stages.algorithms import thrice\n\ndef twice(x):\n    return x * 2\n",
    "stages/algorithms/thrice.py": "from stages.algorithms import twice\n\nTHREE = 3\n",
    "stages/models/__init__.py": "",
    "stages/models/late.py": "ADDED = 5\n",
    "stages/runtime/__init__.py": "",
    "stages/runtime/contract.py": "import stages.other\n\nclass Params: ...\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Write a project; returns what digests its stage after edits given as (path, old, new)."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "_read", module._Modules(tmp_path / "none"))  # whose folder is not there

    def digest(*edits):
        for path, text in FILES.items():
            for edited, old, new in edits:
                if edited == path:
                    assert old in text
                    text = text.replace(old, new)
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        module._module.cache_clear()
        module._read._kept = {}  # files that are written twice in a moment may have one time
        return module.code_digest.__wrapped__("stages.trial")

    yield digest
    module._module.cache_clear()


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("stages/trial.py", "# reason", "# another reason"),
        ("stages/trial.py", '    """Docstring."""\n', ""),
        ("stages/trial.py", '"""Docstring."""\nimport', '"""Other."""\nimport'),
        ("stages/trial.py", "\n\n\ndef", "\n\n\n\n\ndef"),
        ("stages/algorithms/twice.py", "x * 2", "(x *\n  2)"),
        ("stages/runtime/contract.py", "class Params: ...", "class Params: changed = 1"),
        ("stages/other.py", "A = 1", "A = 2"),
        ("stages/__init__.py", "STAGES = {}", "STAGES = {1: 2}"),
    ],
)
def test_code_digest_stays_when_nothing_that_computes_changed(project, path, old, new):
    assert project() == project((path, old, new))


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("stages/trial.py", "twice(x) + late", "twice(x) - late"),
        ("stages/algorithms/twice.py", "x * 2", "x ** 2"),
        ("stages/algorithms/thrice.py", "THREE = 3", "THREE = 4"),
        ("stages/models/late.py", "ADDED = 5", "ADDED = 6"),
        ("stages/models/__init__.py", "", "import os"),
        ("stages/trial.py", "import json", "import os"),
    ],
)
def test_code_digest_changes_with_an_operator_in_the_stage_or_what_it_imports(project, path, old, new):
    assert project() != project((path, old, new))


def test_code_digest_of_unlike_stages_differs_though_both_import_the_runtime(project):
    project()
    assert module.code_digest.__wrapped__("stages.trial") != module.code_digest.__wrapped__("stages.other")


def test_every_image_has_pinned_libraries_that_are_installed():
    for image in Image:
        found = required(image)
        assert found
        assert_installed(found)
        assert all(constraints()[name] == version for name, version in found.items())


def test_constraints_are_found_inside_an_installed_wheel_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.raises(StageError, match=r"constraints\.txt is missing"):
        module.constraints.__wrapped__()
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "constraints.txt").write_text(
        "# pins\nTorch==2.13.0\nnew_name.x==1\nnumpy==2.0 ; python_version > '3'\n"
    )
    assert module.constraints.__wrapped__() == {"torch": "2.13.0", "new-name-x": "1", "numpy": "2.0"}


def test_a_local_suffix_of_a_version_is_no_difference():
    assert_installed({"torch": importlib.metadata.version("torch").split("+")[0] + "+other"})


@pytest.mark.parametrize(("name", "measured"), [("no-such-library-here", "absent"), ("numpy", None)])
def test_an_absent_or_other_library_is_refused_with_both_versions(name, measured):
    with pytest.raises(StageError, match=f"requires {name}") as caught:
        assert_installed({name: "0.0.1"})
    assert caught.value.measured == (measured or importlib.metadata.version(name))
    assert caught.value.limit == "0.0.1"


@pytest.fixture
def kept(project, tmp_path, monkeypatch):
    """The project's digest in a process that begins: whether a module was read anew, and the digest."""
    project()
    (tmp_path / "stages" / "__pycache__").mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path, imported = tmp_path / "stages" / "trial.py", module.imported

    def digest(text=None):
        if text is not None:
            path.write_text(text)
            later = path.stat().st_mtime_ns + 10**9
            os.utime(path, ns=(later, later))
        read = []
        monkeypatch.setattr(module, "imported", lambda tree: (read.append(tree), imported(tree))[1])
        monkeypatch.setattr(module, "_read", module._Modules(tmp_path / "stages"))
        module._module.cache_clear()
        found = module.code_digest.__wrapped__("stages.trial")
        return len(read), found

    return digest


def test_what_was_read_of_modules_is_kept_until_their_files_change(kept):
    read, first = kept()
    assert read > 1 and kept() == (0, first)
    assert kept(STAGE.replace("# reason", "# other")) == (1, first)
    changed, second = kept(STAGE + "MORE = 1\n")
    assert changed == 1 and second != first
    assert kept() == (0, second)


@pytest.mark.parametrize("broken", [b"", b"{}", b'{"by": 1, "modules": {}}', b"[1]", b"\xff"])
def test_kept_digests_that_cannot_be_read_are_made_again(kept, tmp_path, broken):
    read, first = kept()
    (path,) = (tmp_path / "stages" / "__pycache__").iterdir()
    path.write_bytes(broken)
    assert kept() == (read, first) and kept() == (0, first)


def test_digests_are_kept_nowhere_where_python_may_keep_nothing(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    read, first = kept()
    assert kept() == (read, first) and not list((tmp_path / "stages" / "__pycache__").iterdir())
