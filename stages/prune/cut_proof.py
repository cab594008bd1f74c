"""Proof that units of a model can go: a small copy that lost some answers as one in which nothing reads them.

The copy has one block of each stack, of the model's own modules and sizes, with random weights. How an architecture
lays its heads out, what counts them and which fields of the configuration say so need no list: what was understood
wrongly answers otherwise, or does not run.

Shapes: N windows, T tokens, H hidden, K inputs that stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import classes
from stages.models.anatomy.attention import attentions
from stages.models.anatomy.plainness import token_tables
from stages.models.checkpoint import uneven_sizes
from stages.prune import units as surgery
from stages.prune.depth import drop_blocks
from stages.prune.units import CHANNELS, Units
from stages.runtime.contract import StageError

_IDS = (3, 5, 7, 4, 6, 2, 9, 8)
_PADDED = 2
_ROWS = 16
"""Of the tables of tokens that the copy has: more than the tokens that it reads."""
_SLACK = 1e-4
"""Of the largest value: what another order of sums may change in float32 in one block."""
_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What a module raises whose sizes do not fit each other."""


@torch.no_grad()
def proven(model: PreTrainedModel, what: str, kept: Sequence[Sequence[int]], *, said: bool = True) -> dict[str, int]:
    """Prove on a copy that so many units of every block can stay.

    Args:
        model: in memory or on the meta device; it is not touched.
        what: CHANNELS or HEADS.
        kept: how many stay of each of a block's `units.of`, block by block.
        said: whether the configuration may say so; where blocks are to differ, it cannot.

    Returns:
        The fields of the configuration that say so, none where its architecture has none that can.

    Raises:
        StageError: what is left does not compute what it should.
    """
    dense, firsts = _copy(model)
    cut = deepcopy(dense, {id(one): one for one in dense.parameters()})
    changes: dict[int, int] = {}
    owners: dict[str, nn.Module] = {}
    for whole, block, first in zip(anatomy.blocks(dense), anatomy.blocks(cut), firsts, strict=True):
        for units, count in zip(surgery.of(whole, what), kept[first], strict=True):
            changes |= {number: number - (units.count - count) * one for number, one in units.numbers.items()}
            _take(whole, block, units, count)
            touched = (*units.writers, units.reader, units.owner)
            owners |= {f"{block.name}.{path}".rstrip("."): block.module.get_submodule(path) for path in touched}
    fields = _fields(cut, owners.keys(), _candidates(dense, what, changes)) if said else {}
    for owner in owners.values():
        surgery.configure(owner, fields)
    try:
        found, wanted = _run(cut), _run(dense)
    except _ERRORS as error:
        first_line = (str(error).splitlines() or ["nothing said"])[0]
        raise _refused(model, what, f"{type(error).__name__}: {first_line}") from error
    missed = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if not missed <= _SLACK:
        raise _refused(model, what, f"{missed:.2g} of the largest value away")
    return fields


def _take(whole: anatomy.Block, block: anatomy.Block, units: Units, count: int) -> None:
    """Take the first units out of one block; in the other, nothing reads them any more."""
    stay_P = torch.arange(units.count - count, units.count)
    reader = surgery.reading(whole.module.get_submodule(units.reader))
    weight_OI: Tensor = reader.weight  # type: ignore[assignment]
    kept_OK = weight_OI[:, units.columns_GS[stay_P].flatten()].clone()
    weight_OI[:, units.columns_GS[: units.count - count].flatten()] = 0
    surgery.cut(block, units, stay_P, kept_OK, {})


def _copy(model: PreTrainedModel) -> tuple[PreTrainedModel, list[int]]:
    """The model with the first block of each stack and random weights, and the places of these blocks in the model."""
    tensors = [*model.parameters(), *model.buffers()]
    on_meta = {id(one): _meta(one) for one in tensors}
    outline = deepcopy(model, on_meta)
    firsts, found = [], 0
    for layers in anatomy.stacks(model).values():
        firsts.append(found)
        found += len(layers)
    drop_blocks(outline, [place for place in range(found) if place not in firsts])
    config = outline.config
    config.architectures = [type(model).__name__]
    made = classes.empty(deepcopy(config), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for mine, theirs in zip(anatomy.blocks(outline), anatomy.blocks(made), strict=True):
        buffers = dict(theirs.module.named_buffers())
        own = mine.module.to_empty(device="cpu")
        for name, buffer in own.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])
        anatomy.replace(made, theirs.module, own)
    for table in token_tables(made).values():
        table.weight = nn.Parameter(table.weight[:_ROWS], requires_grad=False)
    for parameter in made.base_model.parameters():
        parameter.requires_grad_(False)
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + drawn / 4)
    return made.eval(), firsts


def _meta(one: Tensor) -> Tensor:
    made = one.detach().to("meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(one, nn.Parameter) else made


def _run(model: PreTrainedModel) -> Tensor:
    ids_NT = torch.tensor([_IDS])
    # With padding attentions take another path (keys are repeated for the heads that read them) than without a mask.
    mask_NT = torch.ones_like(ids_NT)
    mask_NT[:, -_PADDED:] = 0
    given: dict[str, Any] = {"input_ids": ids_NT, "attention_mask": mask_NT}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids_NT.flip(1)
    if hasattr(model.config, "use_cache"):
        given["use_cache"] = False
    out: Tensor = model.base_model(**given)[0]
    return out


def _fields(cut: PreTrainedModel, touched: Collection[str], candidates: Iterable[dict[str, int]]) -> dict[str, int]:
    """Those with which transformers itself builds the modules called `touched` in the sizes that the cut model has."""
    for fields in candidates:
        built = _built(cut, fields)
        if built is not None and uneven_sizes.describe(cut, built).keys().isdisjoint(touched):
            return fields
    return {}


def _built(model: PreTrainedModel, fields: Mapping[str, int]) -> PreTrainedModel | None:
    """The outline of the class with these fields, None where it cannot have such numbers."""
    config = deepcopy(model.config)
    try:
        for name, value in fields.items():
            setattr(config.get_text_config(), name, value)
        return classes.outline(type(model), config)
    # Any error: each architecture says so in its own way.
    except Exception:  # noqa: BLE001
        return None


def _candidates(dense: PreTrainedModel, what: str, changes: Mapping[int, int]) -> Iterator[dict[str, int]]:
    config = dense.config.get_text_config()
    if what == CHANNELS:
        values = config.to_dict()
        named = {name: changes[value] for name, value in values.items() if type(value) is int and value in changes}
        # As few as will do: other fields may have the same number by chance (bert-tiny's positions are its channels).
        for many in range(1, len(named) + 1):
            yield from (dict(chosen) for chosen in combinations(named.items(), many))
        # A width that follows from another one unless a field gives it.
        free = [name for name, value in values.items() if value is None and not name.endswith("_id")]
        yield from ({name: one} for one in changes.values() for name in free)
        return
    one = next(iter(attentions(anatomy.blocks(dense)[0]).values()))
    own = {"num_key_value_heads": changes.get(one.kv_heads, 1)} if hasattr(config, "num_key_value_heads") else {}
    yield {"num_attention_heads": changes[one.heads], "head_dim": one.head_dim, **own}


def _refused(model: PreTrainedModel, what: str, measured: str) -> StageError:
    return StageError(
        f"the {what} of {type(model).__name__} cannot go alone: without some, it does not compute what is left",
        measured=measured,
        limit=f"{_SLACK} of the largest value",
        remedy="Prune by another method: `blocks`, or zeros by `magnitude`, `wanda` or `sparsegpt`.",
    )
