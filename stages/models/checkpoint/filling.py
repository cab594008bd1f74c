"""Put every tensor of a file in its place in a model, or say which cannot: missing, misshapen, left over, unequal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import classes
from stages.models.checkpoint import conversions
from stages.models.checkpoint.json_files import read_json
from stages.models.checkpoint.layout import ZEROS
from stages.models.memory import pages
from stages.runtime.contract import StageError

_SHOWN = 3
PRUNED = "zeros_were_put"
"""Of a weight: its checkpoint says that its zeros are to stay."""


def fill(model: PreTrainedModel, stored: Mapping[str, Tensor], dtype: torch.dtype | None, folder: Path) -> list[str]:
    """Give a model its tensors, in `dtype` where they are parameters.

    On the meta device names and shapes alone are compared.

    Args:
        model: as its configuration, surgery and quantization make it.
        stored: the file's tensors by their names there; views of it.
        dtype: of the parameters, None for their own.
        folder: the checkpoint, for errors.

    Returns:
        The stored names that this architecture does not read; transformers leaves them out, too.

    Raises:
        StageError: a tensor is missing, misshapen, not finite, left over or unlike the one that it is tied to.
    """
    found = conversions.matched(model, stored)
    placed = _placed(model, dict(found.tensors), folder)
    _refuse_missing(
        model, stored, [names[0] for names, old in anatomy.distinct_tensors(model) if id(old) not in placed], folder
    )
    _refuse_learned(model, found, folder)
    new = {}
    for names, old in list(anatomy.distinct_tensors(model)):
        one = placed[id(old)]
        if one.shape != old.shape:
            raise StageError(
                f"{names[0]} of {folder} is misshapen",
                measured=tuple(one.shape),
                limit=tuple(old.shape),
                remedy=f"Correct the sizes in {folder / 'config.json'}: they are of another model.",
            )
        new[id(old)] = _as(one, old, dtype, names[0])
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own |= {name: new[id(old)] for name, old in own.items() if id(old) in new}
    _mark(model, folder)
    return sorted(found.left)


def _mark(model: PreTrainedModel, folder: Path) -> None:
    if put := read_json(folder / ZEROS, optional=True):
        tensors = dict(anatomy.named_tensors(model))
        wrong = sorted(name for name, count in put.items() if name not in tensors or type(count) is not int)
        if wrong:
            raise StageError(
                f"{folder / ZEROS} is damaged, or of another model",
                measured=f"{_few(wrong)}, which is no weight of it, or has no whole number",
                limit="names of weights of this model, each with its zeros",
                remedy="Put the file back that was written with the checkpoint, or delete it.",
            )
        for name in put:
            setattr(tensors[name], PRUNED, True)


def refuse_unequal(model: PreTrainedModel, stored: Mapping[str, Tensor], folder: Path) -> None:
    """Raise StageError where a file holds copies that differ of what the configuration says is one tensor."""
    called = {new: old for old, new in conversions.named_as(model, stored).items()}
    for names, _ in anatomy.distinct_tensors(model):
        _one(names, [stored[called[name]] for name in names if name in called], folder)


def _placed(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> dict[int, Tensor]:
    """The model's tensor, by its id -> what the file has for it, of the shape that the model's module has."""
    turned = classes.transposed(model, classes.plain(model))
    placed: dict[int, Tensor] = {}
    for names, old in anatomy.distinct_tensors(model):
        one = _one(names, [tensors[name] for name in names if name in tensors], folder)
        one = classes.computed(model, names[0]) if one is None else one
        if one is not None:
            placed[id(old)] = one.t() if names[0] in turned and one.dim() == 2 else one
    return placed


def _one(names: list[str], found: list[Tensor], folder: Path) -> Tensor | None:
    """The tensor that stands under one or several names, None where it stands under none."""
    if any(not one.is_meta and not torch.equal(found[0], one) for one in found[1:]):
        raise StageError(
            f"{' and '.join(names)} are tied by the configuration but differ in the file",
            remedy=f'Set "tie_word_embeddings": false in {folder / "config.json"}.',
        )
    return found[0] if found else None


def _refuse_missing(model: PreTrainedModel, stored: Mapping[str, Tensor], missing: list[str], folder: Path) -> None:
    if not missing:
        return
    config = folder / "config.json"
    fitting = " or ".join(f'["{name}"]' for name in _fitting(model, stored))
    raise StageError(
        f"{folder} lacks tensors of {type(model).__name__}",
        measured=f"{len(missing)} missing: {_few(missing)}",
        limit="all of them: a weight that is not there would be a random one",
        remedy=f'Set "architectures" in {config} to {fitting}, whose tensors are all there.'
        if fitting
        else f"Correct the sizes in {config}, or save it by the class it is used as: model.save_pretrained(...).",
    )


def _refuse_learned(model: PreTrainedModel, found: conversions.Matched, folder: Path) -> None:
    learned = conversions.learned(model, found.left)
    if learned:
        raise StageError(
            f"{folder} holds weights for which {type(model).__name__} has no place",
            measured=f"{len(learned)} left over: {_few(learned)}",
            limit="none in a block, or in a module that it has: without them it would be another model",
            remedy=f'Correct "model_type", "architectures" and the sizes in {folder / "config.json"}.',
        )


def _fitting(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> list[str]:
    """The other classes of the model type whose tensors the file has, first those that leave least of it unread."""
    found = {}
    outlines = {name: one.to("meta") for name, one in stored.items()}
    for one in classes.known_classes(model.config):
        if one is not type(model):
            other = classes.outline(one, model.config)
            match = conversions.matched(other, outlines)
            lost = [names[0] for names, _ in anatomy.distinct_tensors(other) if match.tensors.keys().isdisjoint(names)]
            if all(classes.computed(other, name) is not None for name in lost) and not conversions.learned(
                other, match.left
            ):
                found[one.__name__] = len(match.left)
    return sorted(found, key=lambda name: found[name])


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _as(found: Tensor, old: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if found.is_floating_point() and found.numel() and not found.is_meta:
        # A NaN or an infinity shows in the extremes; float8 has no kernel for them.
        wide = found.float() if found.element_size() == 1 else found
        if not torch.stack(torch.aminmax(wide)).isfinite().all():
            raise StageError(f"{name} holds a NaN or an infinity", remedy="Give a checkpoint whose weights are finite.")
    made: Tensor = nn.Parameter(found.to(dtype or found.dtype).contiguous()) if isinstance(old, nn.Parameter) else found
    pages.forget(found)
    return made
