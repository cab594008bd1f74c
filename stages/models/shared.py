"""Surgery that shares: linear maps on a common basis, and tensors stored once. `structure.json` describes it.

A map may also be the sum of a dense one, whose weight other blocks may share, and one of low rank of its own. The dense
one may be sparse: `values` in row-major order are all of it that is stored, beside their positions in one of two forms.

Shapes: I inputs, O outputs, r rank of the basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.positions import FORMS
from stages.models.sparse_linear import SparseLinear
from stages.runtime.contract import StageError


class SharedLinear(nn.Module):
    """y = coefficient(basis(x)). One `basis` instance stands in every map of its group."""

    def __init__(self, basis: nn.Module, coefficient: nn.Module) -> None:
        super().__init__()
        self.basis = basis
        self.coefficient = coefficient

    @property
    def in_features(self) -> int:
        """I."""
        return int(self.basis.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """O."""
        return int(self.coefficient.out_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The map's output."""
        return self.coefficient(self.basis(x))


class ResidualLinear(nn.Module):
    """y = dense(x) + low(x): `low` is a map on a basis, `dense` may be sparse, or tied to others."""

    def __init__(self, dense: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.low = low

    @property
    def in_features(self) -> int:
        """I."""
        return int(self.dense.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """O."""
        return int(self.dense.out_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The map's output."""
        return self.dense(x) + self.low(x)


def install(model: PreTrainedModel, spec: Mapping[str, Any]) -> None:
    """Give a dense model the structure that `spec` describes; the new maps hold no values yet.

    Args:
        model: a model in whose place `nn.Linear` modules stand.
        spec: {"residual": [path, ...], "shared": [{"modules": [path, ...], "rank": r}, ...],
            "sparse": {"maps": {path: {"values": n, "positions": form}, ...}, "forms": {form: its tensors, ...}},
            "tied": [[tensor name, ...], ...]}; what is added to a residual map's dense part is shared as `<path>.low`.

    Raises:
        StageError: a module is not there or is no linear map, or a form of positions is not known.
    """
    for path in spec.get("residual", []):
        dense = _linear(model, path)
        low = nn.Linear(dense.in_features, dense.out_features, bias=False)
        model.set_submodule(path, ResidualLinear(dense, low))
    for group in spec.get("shared", []):
        found = [(path, _linear(model, path)) for path in group["modules"]]
        basis = nn.Linear(found[0][1].in_features, group["rank"], bias=False)
        for path, linear in found:
            coefficient = nn.Linear(group["rank"], linear.out_features, bias=linear.bias is not None)
            model.set_submodule(path, SharedLinear(basis, coefficient))
    for path, one in spec.get("sparse", {}).get("maps", {}).items():
        linear = _linear(model, path)
        if one["positions"] not in FORMS:
            raise StageError(f"the positions of {path} are unknown", measured=one["positions"], limit=", ".join(FORMS))
        sizes = (linear.in_features, linear.out_features, one["values"], one["positions"])
        model.set_submodule(path, SparseLinear(*sizes, bias=linear.bias is not None))
    for names in spec.get("tied", []):
        tie(model, names)


def tie(model: nn.Module, names: list[str]) -> None:
    """Make the parameters of these names one tensor.

    Raises:
        StageError: a name is not a parameter of the model.
    """
    try:
        first = model.get_parameter(names[0])
        for name in names[1:]:
            model.get_parameter(name)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, first)
    except AttributeError as error:
        raise StageError(f"structure.json ties a tensor that the model does not have: {error}") from error


def describe(model: PreTrainedModel) -> dict[str, Any] | None:
    """The spec from which `install` makes this structure again; None for a model without surgery."""
    groups: dict[int, dict[str, Any]] = {}
    inside: set[str] = set()
    residual: list[str] = []
    sparse: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SharedLinear):
            group = groups.setdefault(id(module.basis), {"modules": [], "rank": int(module.basis.out_features)})  # type: ignore[arg-type]
            group["modules"].append(path)
            inside.add(f"{path}.basis.")
        elif isinstance(module, ResidualLinear):
            residual.append(path)
        elif isinstance(module, SparseLinear):
            sparse[path] = {"values": len(module.values), "positions": module.form}
    tied = [names for names in _tied(model) if not any(names[0].startswith(path) for path in inside)]
    spec: dict[str, Any] = {}
    if residual:
        spec["residual"] = residual
    if groups:
        spec["shared"] = list(groups.values())
    if sparse:
        forms = sorted({one["positions"] for one in sparse.values()})
        spec["sparse"] = {"maps": sparse, "forms": {form: FORMS[form] for form in forms}}
    if tied:
        spec["tied"] = tied
    return spec or None


def _tied(model: PreTrainedModel) -> list[list[str]]:
    by_configuration = model.get_expanded_tied_weights_keys(all_submodels=True)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in by_configuration:
            names.setdefault(id(parameter), []).append(name)
    return [together for together in names.values() if len(together) > 1]


def _linear(model: PreTrainedModel, path: str) -> nn.Linear:
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise StageError(f"structure.json names {path}, which the model does not have") from error
    if not isinstance(found, nn.Linear):
        raise StageError(f"structure.json shares {path}, which is no linear map", measured=type(found).__name__)
    return found
