"""What the network policies let through, decided as Kubernetes decides it."""

from __future__ import annotations

import ipaddress

import pytest

from flows.running.placement import Pools
from tests.infra.manifests import Resource, of_kind, pods_of, selects


def _passes(peer: Resource, other: dict[str, str] | str) -> bool:
    if block := peer.get("ipBlock"):
        if isinstance(other, dict):
            return False
        address = ipaddress.ip_address(other)
        nets = [ipaddress.ip_network(net) for net in [block["cidr"], *block.get("except", [])]]
        return address in nets[0] and not any(address in net for net in nets[1:])
    return isinstance(other, dict) and "namespaceSelector" not in peer and selects(peer["podSelector"], other)


def _may(direction: str, labels: dict[str, str], other: dict[str, str] | str, port: int) -> bool:
    """Whether the policies let a pod with these labels send to (Egress) or hear from (Ingress) another."""
    held = [
        policy["spec"]
        for policy in of_kind("gpu", "NetworkPolicy")
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], labels)
    ]
    rules = [rule for spec in held for rule in spec.get(direction.lower(), [])]
    return not held or any(
        any(one["port"] == port for one in rule["ports"])
        and any(_passes(peer, other) for peer in rule["to" if direction == "Egress" else "from"])
        for rule in rules
    )


_REACHES = {
    "enginery-stages": {"prefect", "s3"},
    "enginery-outside": {"prefect", "s3", "internet"},
    "enginery-flows": {"prefect", "s3", "mlflow", "internet"},
    "enginery-workers": {"prefect", "internet"},  # the Kubernetes API's address is anybody's
    "enginery-services": {"prefect", "postgres", "redis"},
    "enginery-mlflow": {"s3", "postgres"},
    "enginery-data": set(),
}
_PLACES: dict[str, tuple[dict[str, str] | str, int]] = {
    "prefect": ({"enginery.part": "prefect-server", "enginery.network": "enginery-services"}, 4200),
    "s3": ({"enginery.part": "s3", "enginery.network": "enginery-data"}, 8333),
    "mlflow": ({"enginery.part": "mlflow", "enginery.network": "enginery-mlflow"}, 5000),
    "postgres": ({"enginery.part": "postgres", "enginery.network": "enginery-data"}, 5432),
    "redis": ({"enginery.part": "redis", "enginery.network": "enginery-data"}, 6379),
    "internet": ("93.184.216.34", 443),
}


@pytest.mark.parametrize("network", _REACHES)
def test_network_policies_for_a_label_open_its_places_and_no_other(network: str) -> None:
    labels = {"enginery.network": network}
    reached = set()
    for name, (place, port) in _PLACES.items():
        heard = isinstance(place, str) or _may("Ingress", place, labels, port)
        if _may("Egress", labels, place, port) and heard:
            reached.add(name)
        assert isinstance(place, str) or not _may("Ingress", place, labels, 22)

    assert reached == _REACHES[network]


def test_network_policies_for_pods_that_fetch_keep_private_addresses_closed() -> None:
    labels = {"enginery.network": "enginery-outside"}

    for address in ("10.0.0.1", "172.20.1.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "fd00::1", "fe80::1"):
        assert not _may("Egress", labels, address, 443), address
    assert not _may("Egress", labels, "93.184.216.34", 80)
    assert _may("Egress", labels, "2606:4700::1111", 443)


def test_network_policies_for_a_pod_without_a_label_close_everything() -> None:
    assert not _may("Ingress", {}, {"enginery.network": "enginery-flows"}, 80)
    for place, port in _PLACES.values():
        assert not _may("Egress", {}, place, port)
        assert isinstance(place, str) or not _may("Ingress", place, {}, port)


def test_network_labels_of_pods_are_those_that_the_policies_know() -> None:
    assert {labels["enginery.network"] for _, labels, _ in pods_of("gpu")} == set(_REACHES)
    assert set(Pools().networks.values()) == {"enginery-stages", "enginery-outside"}
