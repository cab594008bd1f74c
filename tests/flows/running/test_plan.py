"""What a plan says that making a step needs: what was measured on its like, and what is missing where it runs."""

from importlib.metadata import version

import pytest

from flows.running.order import Order
from flows.running.placement import Place, Pools
from flows.running.plan import Planned, needs
from stages import stage
from stages.runtime.contract import Work
from tests.flows.definitions import plain_stages  # noqa: F401
from tests.flows.test_cli import sealed

pytestmark = pytest.mark.usefixtures("plain_stages")


def planned(name="int8", kind="share", requires=None, force=False, manifest=None, **params) -> Planned:
    given = stage(kind).params.model_validate(params)
    work = Work(stage=kind, code="0" * 64, params=params, inputs={}, requires=requires or {})
    order = Order(step=name, stage=kind, params=given, work=work, force=force)
    return Planned(order=order, identity="a" * 64, manifest=manifest, why="", roles={})


def said(store, pools=None, **how) -> str:
    return needs([planned(**how)], store, pools)["int8"]


def test_needs_are_those_of_the_nearest_sealed_artifact(store):
    assert "memory and disk not known before the first" in said(store)
    sealed(store, "other", {"model.safetensors": b"x" * 70_000})
    assert "70.0 kB disk" in said(store)
    sealed(store, "int8", {"model.safetensors": b"x" * 3_000})
    assert "1 B memory, 3.0 kB disk, as its like took" in said(store)
    assert "before the first" in said(store, kind="prune")


def test_needs_of_a_sealed_step_are_none_unless_it_is_made_again(store):
    manifest = store.manifest(sealed(store, "int8", {"a": b"1"}))
    assert said(store, manifest=manifest) == "nothing: sealed"
    assert "1 B disk" in said(store, manifest=manifest, force=True)


@pytest.mark.parametrize(
    ("source", "network"), [("file:///a", False), ("pydoc://topics", False), ("hf://a/b", True), ("s3://a/b", True)]
)
def test_needs_name_the_network_only_for_a_source_beyond_this_machine(store, source, network):
    assert ("network to " in said(store, kind="fetch", source=source)) == network


def test_needs_name_what_is_not_installed_here_with_what_installs_it(store):
    torch = version("torch").split("+")[0]
    assert "torch" not in said(store, requires={"torch": torch, "numpy": version("numpy")})
    lacking = said(store, requires={"no-such-library": "1.0", "torch": "0.1"})
    assert "no-such-library, which is not installed: pip install 'enginery[base]'" in lacking
    assert f"torch 0.1, not {torch}: install the versions of constraints.txt" in lacking
    assert "image" not in lacking and "container" not in lacking
    compiled = said(store, kind="compile", backend="tensorrt", architectures=["sm_90"])
    assert "tensorrt, which is not installed" in compiled


def test_needs_name_the_container_and_its_limits_only_in_a_pool(store):
    pools = Pools(stages={"share": Place(pool="big", memory_bytes=24_000_000_000, minutes=90)})
    pooled = said(store, pools, requires={"no-such-library": "1.0"})
    assert "a container of enginery/base:0.1.0 in pool big (24.00 GB memory and 90 min at most)" in pooled
    assert "not installed" not in pooled  # here, where it does not run
