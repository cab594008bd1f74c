"""Whether a module computes what its weight alone says: found by running it, since neither its name nor its class says.

A table may scale its rows (Gemma), a map may clip or norm what it gives, and a model may read a map's weight and never
call it (Mamba). What takes such a module's place by its weight alone would ruin the model.

Shapes: V vocabulary, H hidden, O outputs, I inputs, N rows looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.roles import is_map
from stages.models.memory.pages import forget

_LOOKED_AT = 64
"""Rows of a table."""
_SLACK = 1e-5
"""Of the largest value: what another order of sums may change in float32."""
_PROBE_IDS = (3, 5, 7, 4)
_FIRST, _LAST = ("decoder_start_token_id", "bos_token_id", "cls_token_id"), ("sep_token_id", "eos_token_id")


@torch.no_grad()
def factor(table: nn.Module) -> float | None:
    """By what a table multiplies its rows: 1 for a plain one, None for one that does anything else."""
    weight_VH: Tensor = table.weight  # type: ignore[assignment]
    ids_N = torch.linspace(0, len(weight_VH) - 1, min(_LOOKED_AT, len(weight_VH))).long()
    rows_NH = functional.embedding(ids_N, weight_VH)
    given = _given(table, ids_N)
    if given is None or given.shape != rows_NH.shape:
        return None
    if torch.equal(given, rows_NH):
        return 1.0
    rows, values = rows_NH.double(), given.double()
    found = float((rows * values).sum() / rows.square().sum().clamp_min(1e-300))
    return found if _close(values, rows * found) else None


@torch.no_grad()
def plain(one: nn.Linear) -> bool:
    """Whether a map gives what `functional.linear` gives of its weight and bias, for inputs small and large."""
    if type(one).forward is nn.Linear.forward:
        return True
    x_NI = torch.randn(4, one.in_features, generator=torch.Generator().manual_seed(0)).to(one.weight)
    x_NI *= torch.tensor([1e-2, 1.0, 10.0, 1e3]).to(x_NI)[:, None]
    given = _given(one, x_NI)
    wanted = functional.linear(x_NI, one.weight, one.bias)
    return given is not None and given.shape == wanted.shape and all(map(_close, given, wanted))


@torch.no_grad()
def uncalled(model: PreTrainedModel) -> set[str]:
    """Paths of the blocks' maps that a model reads without calling them.

    A map counts as read so where its owner runs and it does not; experts to which no token goes do not run either.
    """
    owners: dict[str, nn.Module] = {}
    maps: dict[str, nn.Module] = {}
    for block in anatomy.blocks(model):
        for path, one in block.module.named_modules():
            if path and is_map(one):
                maps[f"{block.name}.{path}"] = one
                owners[f"{block.name}.{path}"] = block.module.get_submodule(path.rpartition(".")[0])
    ran: set[int] = set()

    def noted(module: nn.Module, *_: Any) -> None:
        ran.add(id(module))
        for tensor in module.parameters(recurse=False):
            forget(tensor)  # else all pages of a large model's file would be in memory at once

    head = model.get_output_embeddings()
    watched = (*maps.values(), *owners.values(), *([head] if head is not None else []))
    with ExitStack() as hooks:
        for module in {id(one): one for one in watched}.values():
            hooks.callback(module.register_forward_hook(noted).remove)
        ask(model)
    return {name for name, one in maps.items() if id(owners[name]) in ran and id(one) not in ran}


def ask(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors, by name, that a model of text answers to a row of tokens and to a shorter one that is padded.

    The special tokens that the configuration names stand where a tokenizer would put them. A model without a head for
    tokens that knows no padding reads the first row alone: it could not find the last token of the other.
    """
    config = model.config.get_text_config()
    first, last, padding = (_special(config, names) for names in (_FIRST, _LAST, ("pad_token_id",)))
    words = _words(int(config.vocab_size), {*first, *last, *padding})
    long, short = [*first, *words, *last], [*first, words[0], *last]
    gap = len(long) - len(short)
    rows, masks = [long, [*short, *(padding or [0]) * gap]], [[1] * len(long), [1] * len(short) + [0] * gap]
    if not padding and model.get_output_embeddings() is None:
        rows, masks = rows[:1], masks[:1]
    given = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"].flip(1)
    return {name: one for name, one in model(**given, return_dict=True).items() if isinstance(one, Tensor)}


def _words(rows: int, special: Set[int]) -> list[int]:
    """The probe's tokens within a vocabulary: a special one among them would end a text in its middle."""
    usual = [one for one in range(rows) if one not in special] or [*range(rows)]
    return [usual[one % len(usual)] if one >= rows or one in special else one for one in _PROBE_IDS]


def _special(config: PreTrainedConfig, names: Sequence[str]) -> list[int]:
    """The tokens that the configuration calls by these names; of several one is enough."""
    found = [one for name in names for one in [getattr(config, name, None)] if one is not None]
    each = [one[0] if isinstance(one, list) else one for one in found if one != []]
    return [one for one in dict.fromkeys(each) if 0 <= one < int(config.vocab_size)]


def token_tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Path -> every table that holds the vectors of tokens, also those that a stack has of its own.

    A model's own answer may be one that nothing reads (BART's `shared`): the tables that are one tensor with it or with
    the head are the ones that count.
    """
    wanted = {id(one.weight) for one in _asked(model) if hasattr(one, "weight")}
    return {
        path: one for path, one in model.named_modules() if isinstance(one, nn.Embedding) and id(one.weight) in wanted
    }


def _asked(model: PreTrainedModel) -> Iterator[nn.Module]:
    yield anatomy.embedding(model)
    if (head := model.get_output_embeddings()) is not None:
        yield head


def _given(module: nn.Module, value: Tensor) -> Tensor | None:
    try:
        given = module(value)
    # Any error: it wants something else than a plain one would, so that it is not plain.
    except Exception:  # noqa: BLE001
        return None
    return given if isinstance(given, Tensor) else None


def _close(given: Tensor, wanted: Tensor) -> bool:
    return bool((given - wanted).abs().max() <= _SLACK * wanted.abs().max().clamp_min(1e-30))
