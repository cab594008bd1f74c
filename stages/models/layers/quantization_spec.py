"""What `quantization.json` says of a model's quantized modules: written from them, and followed to make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stages.models.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear, quantized_modules, replace

_NOTES = "quantization_notes"


def install(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Put empty quantized modules where `spec` says; the caller loads their tensors.

    A module that stands at several places (the basis of a group) is replaced at all of them by one instance. Tensors
    that the spec calls tied are one tensor afterwards.

    Raises:
        ValueError: the spec names a module that the model has not, or a shape that no map has.
    """
    places = dict(model.named_modules(remove_duplicate=False))
    for name, entry in spec["layers"].items():
        if name not in places:
            raise ValueError(f"quantization names {name}, which the model has not")
        replace(model, name, _empty(places[name], entry))
    modules = quantized_modules(model)
    for name, entry in spec["layers"].items():
        if "tied_to" in entry:
            modules[name].weight = modules[entry["tied_to"]].weight
            modules[name].weight_scale = modules[entry["tied_to"]].weight_scale
    notes = {key: value for key, value in spec.items() if key != "layers"}
    why = {name: entry["note"] for name, entry in spec["layers"].items() if "note" in entry}
    annotate(model, notes, why)


def annotate(model: nn.Module, notes: Mapping[str, Any], of_layers: Mapping[str, Any]) -> None:
    """Keep what cannot be read from the modules (scheme, reasons) for `describe`."""
    setattr(model, _NOTES, (dict(notes), dict(of_layers)))


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The spec with which `install` makes this model's modules; None when nothing is quantized.

    A note of a rounded cache belongs to it; `rounded_cache.install` makes that one's places.
    """
    modules = quantized_modules(model)
    kept: tuple[dict[str, Any], dict[str, Any]] = getattr(model, _NOTES, ({}, {}))
    notes, of_layers = kept
    if not modules and "kv_cache" not in notes:
        return None
    first: dict[int, str] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        entry = _entry(module)
        owner = first.setdefault(id(module.weight), name)
        if owner != name:
            entry["tied_to"] = owner
        if name in of_layers:
            entry["note"] = of_layers[name]
        layers[name] = entry
    return {**notes, "layers": layers}


def _empty(old: nn.Module, entry: Mapping[str, Any]) -> QuantizedLinear | QuantizedEmbedding:
    if min(entry["shape"]) < 1:
        raise ValueError(f"a map of shape {entry['shape']}")
    if entry["kind"] == "embedding":
        rows, hidden = entry["shape"]
        return QuantizedEmbedding(rows, hidden, factor=float(entry.get("factor", 1.0)))
    outputs, inputs = entry["shape"]
    bias = getattr(old, "bias", None)
    new = QuantizedLinear(
        inputs,
        outputs,
        form=entry["format"],
        block=entry["block"],
        input_form=None if entry["input"] == "float" else entry["input"],
        bias=bias is not None,
    )
    if bias is not None:
        # The same tensor: another module may have it, too, and a file holds it once.
        new.bias = bias.requires_grad_(False)
    return new


def _entry(module: QuantizedLinear | QuantizedEmbedding) -> dict[str, Any]:
    if isinstance(module, QuantizedEmbedding):
        shape = [module.num_embeddings, module.embedding_dim]
        factor = {} if module.factor == 1 else {"factor": module.factor}
        return {"kind": "embedding", "shape": shape, "format": "int8", "bits": 8, "granularity": "row"} | factor
    return {
        "kind": "linear",
        "shape": [module.out_features, module.in_features],
        "format": module.form.name,
        "bits": module.bits,
        "granularity": "channel" if module.block is None else "block",
        "block": module.block,
        "scales": list(module.weight_scale.shape),
        "input": module.input_form or "float",
    }
