"""Surgery that shares: linear maps on a common basis, and tensors stored once. `structure.json` describes it.

A map may also be the sum of a dense one, whose weight other blocks may share, and one of low rank of its own. The dense
one may be sparse: `values` in row-major order are all of it that is stored, beside their positions in one of two forms.

Shapes: I inputs, O outputs, r rank of the basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from stages.algorithms.positions import FORMS
from stages.models.layers.sparse_linear import SparseLinear
from stages.runtime.contract import StageError

_TIED, _ONE_TABLE = "tie_word_embeddings", "share_encoder_decoder_embeddings"
_LENDER = "shared"
"""A table that only lends its weight to an encoder's and a decoder's: where these have their own, nothing reads it."""
READ, WRITTEN = ("basis", "dense", "low.basis"), ("coefficient", "low.coefficient")
"""Where a map on a basis has the linear maps by which it reads and writes."""


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

    @property
    def weight(self) -> Tensor:
        """Of the type of what it gives, which a feed-forward asks its map for (T5); no map can be made of it."""
        weight: Tensor = self.coefficient.weight  # type: ignore[assignment]
        return weight.detach()

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

    @property
    def weight(self) -> Tensor:
        """See SharedLinear."""
        weight: Tensor = self.low.weight  # type: ignore[assignment]
        return weight

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


def switches(model: PreTrainedModel) -> list[dict[str, bool]]:
    """What a configuration can say about tables and heads that are one, the most it can say first."""
    tied = {_TIED: True}
    return [tied | {_ONE_TABLE: True}, tied] if hasattr(model.config, _ONE_TABLE) else [tied]


def tables(model: PreTrainedModel, said: Mapping[str, bool]) -> list[list[str]]:
    """Names of the model's parameters that are one tensor where its configuration says so much besides."""
    config = type(model.config).from_dict({**model.config.to_dict(), **said})
    with torch.device("meta"), no_init_weights():
        other = type(model)(config)
    groups: dict[str, list[str]] = {}
    for name, source in other.get_expanded_tied_weights_keys(all_submodels=True).items():
        groups.setdefault(source, [source]).append(name)
    have = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = [[name for name in names if name in have] for names in groups.values()]
    return [names for names in found if len(names) > 1]


def tie_tables(model: PreTrainedModel) -> None:
    """Say in the configuration what is one tensor already, as much as it can say; plain transformers ties it then."""
    for said in switches(model):
        groups = tables(model, said)
        found = [[model.get_parameter(name) for name in names] for names in groups]
        if groups and all(one.shape == own[0].shape and torch.equal(one, own[0]) for own in found for one in own):
            for names in groups:
                tie(model, names)
            for name, value in said.items():
                setattr(model.config, name, value)
            return


def averaged(model: PreTrainedModel) -> dict[str, float]:
    """Make the tables and the head that a configuration can tie equal: each becomes the mean of those that are read.

    Returns:
        Name -> relative change, of every table that was not so already.

    Raises:
        StageError: the model has none, or they differ in shape.
    """
    groups = tables(model, switches(model)[0])
    if not groups:
        raise StageError(f"{type(model).__name__} has no tables that its configuration can tie")
    changed: dict[str, float] = {}
    for names in groups:
        read = [name for name in names if name.rpartition(".")[0].rpartition(".")[2] != _LENDER] or names
        distinct = list({id(one): one for one in map(model.get_parameter, read)}.values())
        if shapes := {tuple(one.shape) for one in distinct} - {tuple(distinct[0].shape)}:
            raise StageError(
                f"{' and '.join(read)} cannot be one tensor",
                measured=shapes.pop(),
                limit=tuple(distinct[0].shape),
                remedy="Leave `tables` at `equal`.",
            )
        mean = sum(one.detach().double() for one in distinct) / len(distinct)
        assert isinstance(mean, Tensor)
        for name in names:
            own = model.get_parameter(name)
            change = float((mean - own.detach()).norm() / own.detach().norm().clamp_min(torch.finfo(own.dtype).tiny))
            if change and name in read:
                changed[name] = change
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(mean.to(own.dtype)))
    return changed


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
    # As the configuration says it now, which may be more than it said when the model was made.
    by_configuration = {name for names in tables(model, {}) for name in names[1:]}
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
