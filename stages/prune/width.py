"""Hidden width: dimensions of the residual stream that go from every map, norm and table at once.

The pruned model's stream is to be what is kept of the dense one's. During the pass over the blocks the dimensions that
go are held at zero: maps that read the stream are fitted so that the kept ones stand in for those that are missing, and
maps that write to it so that they make up for what it has drifted. Afterwards the zeros are cut out.

Shapes: N windows, T tokens, M tokens at once, H hidden, K kept, O outputs, I inputs, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.basis import damped
from stages.algorithms.channels import least_important, output_error, reconstructed
from stages.algorithms.gains import fitted_gains
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.compress import compress
from stages.models.blockwise.site_moments import Seen
from stages.models.blockwise.streams import Ends
from stages.models.blockwise.technique import Compressed, OnWeights, put
from stages.models.memory.saved_state import read_record, save_state
from stages.prune import stream
from stages.prune.target import Asked, Rows, cannot
from stages.runtime.contract import Progress, StageError
from stages.runtime.progress import Pass

READERS = ("q", "k", "v", "gate", "up")
TOKENS_AT_ONCE = 4096


def width(model: PreTrainedModel, ids_NT: Tensor, asked: Asked, progress: Progress) -> Rows:
    """Take dimensions out of the residual stream, those that its readers miss least; every map is fitted again.

    Raises:
        StageError: so much cannot go, a map is not dense or is tied to another, or an activation is not finite.
    """
    hidden, kept = int(model.config.hidden_size), kept_width(model, asked)
    chosen = _chosen(model, ids_NT, kept, asked, progress)
    kept_K = torch.tensor(chosen.pop("kept"))
    stays_H = torch.zeros(hidden, dtype=torch.bool).index_fill(0, kept_K, True)
    rows = compress(
        model,
        ids_NT,
        OnWeights(Held(stays_H)),
        asked.partial,
        Pass(progress, 1, 2),
        ends=Ends(lambda x_NTH: x_NTH * stays_H, lambda x_NTH, z_NTH: _fit_head(model, x_NTH, z_NTH, kept_K)),
    )
    cut(model, kept_K, asked.partial)
    return [{"layer": "hidden_size", "dimensions_before": hidden, "dimensions": kept, **chosen}, *rows]


def kept_width(model: PreTrainedModel, asked: Asked) -> int:
    """How many dimensions of the stream stay.

    Raises:
        StageError: so much cannot go, or a map is not dense or is tied to another.
    """
    anatomy.check_type(model.config.model_type)
    _check_free(model)
    hidden, total = int(model.config.hidden_size), anatomy.block_parameters(model)
    each = sum(map(_of_one_dimension, anatomy.blocks(model)))
    kept = (hidden - -(-(total - asked.limit) // each)) // asked.multiple * asked.multiple
    if kept < 1:
        raise cannot("the hidden width", total - each * (hidden - asked.multiple), total, asked)
    return kept


def _of_one_dimension(block: Block) -> int:
    """Parameters of one dimension of the stream in a block."""
    count = len(anatomy.norms(block))
    for role, one in _linears(block).items():
        count += one.out_features if role in READERS else one.in_features + (one.bias is not None)
    return count


def _linears(block: Block) -> dict[str, nn.Linear]:
    return {role: one for role, one in anatomy.projections(block).items() if isinstance(one, nn.Linear)}


def _check_free(model: PreTrainedModel) -> None:
    owners: dict[int, str] = {}
    for block in anatomy.blocks(model):
        linears = _linears(block)
        for role in anatomy.projections(block):
            name = f"{block.name}.{anatomy.path(role)}"
            if role not in linears:
                raise not_dense(name)
            other = owners.setdefault(id(linears[role].weight), name)
            if other != name:
                raise StageError(f"{name} is tied to {other}; it cannot be fitted alone", remedy="Prune before tying.")


def not_dense(path: str) -> StageError:
    """Why the stream is not narrowed where a map stands on a basis."""
    return StageError(f"{path} is no dense map", remedy="Prune the width first; share and factorize after.")


def _chosen(model: PreTrainedModel, ids_NT: Tensor, kept: int, asked: Asked, progress: Progress) -> dict[str, Any]:
    """Which dimensions stay, ascending, and what share of what is read of the stream goes with the others.

    Kept beside the state of the fit.
    """
    file = asked.partial / "chosen.safetensors"
    if (record := read_record(file)) is None:
        moment_HH = stream.moment(model, ids_NT, Pass(progress, 0, 2).advanced)
        root_HH = torch.linalg.cholesky(damped(stream.readers(model))).T
        # One a round: of two dimensions that stand in for each other, one round could take both.
        count = len(root_HH) - kept
        gone = least_important(root_HH, moment_HH, count, rounds=count)
        kept_K = torch.ones(len(root_HH), dtype=torch.bool).index_fill(0, gone, False).nonzero().flatten()
        record = {
            "kept": kept_K.tolist(),
            "output_error_ratio_cut": output_error(root_HH, moment_HH, kept_K, root_HH[:, kept_K]),
            "output_error_ratio": output_error(root_HH, moment_HH, kept_K, reconstructed(root_HH, moment_HH, kept_K)),
        }
        save_state(file, {}, record)
    return record


@dataclass(frozen=True)
class Held:
    """Maps fitted while the dimensions of the stream that do not stay are held at zero."""

    stays_H: Tensor

    def compress(self, block: Block, maps: Mapping[str, nn.Linear], seen: Seen) -> dict[str, Compressed]:
        """See Technique."""
        made, reads = {}, {anatomy.path(role) for role in READERS}
        kept = {"dimensions_before": len(self.stays_H), "dimensions": int(self.stays_H.sum())}
        for path, w_OI in seen.targets({path: one.weight.detach() for path, one in maps.items()}).items():
            old, bias = maps[path].weight.detach(), maps[path].bias
            row = {**kept, "relative_change": float((w_OI - old).norm() / old.norm())}
            held_OI = w_OI * (self.stays_H if path in reads else self.stays_H[:, None])
            tensors = {"weight": held_OI}
            if bias is not None and path not in reads:
                tensors["bias"] = bias.detach() * self.stays_H
            made[path] = Compressed(tensors, row)
        return made

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See Technique."""
        put(model, path, tensors["weight"])
        if "bias" in tensors:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            linear.bias = _frozen(tensors["bias"])


def _fit_head(model: PreTrainedModel, x_NTH: Tensor, z_NTH: Tensor, kept_K: Tensor) -> None:
    """Fit the logits to the dense model's: by the head, or by the last norm's gains where the head is the embedding.

    `x_NTH` is the dense model's stream after the last block, `z_NTH` the pruned one's with its zeros.
    """
    norm, head, hidden = anatomy.last_norm(model), anatomy.head(model), x_NTH.shape[-1]
    moment_KK = torch.zeros(len(kept_K), len(kept_K), dtype=torch.float64)
    cross_HK = torch.zeros(hidden, len(kept_K), dtype=torch.float64)
    streams = (one.flatten(0, 1).split(TOKENS_AT_ONCE) for one in (x_NTH, z_NTH))
    for x_MH, z_MH in zip(*streams, strict=True):
        z_MK = norm(z_MH)[:, kept_K]
        moment_KK += z_MK.T @ z_MK
        cross_HK += norm(x_MH).T @ z_MK
    w_VH, gain_H = head.get_parameter("weight"), norm.get_parameter("weight").detach().clone()
    if w_VH is anatomy.embedding(model).weight:
        gain_H[kept_K] *= fitted_gains(w_VH.detach().float(), moment_KK, cross_HK, kept_K).to(gain_H.dtype)
        norm.weight = _frozen(gain_H)
    else:
        # Of the difference, so that the ridge draws to the weights as they are.
        left_HK = cross_HK.index_add(0, kept_K, moment_KK, alpha=-1)
        fitted_VH = w_VH.detach().clone()
        fitted_VH[:, kept_K] += w_VH @ torch.linalg.solve(damped(moment_KK), left_HK.T).T.to(w_VH.dtype)
        head.weight = _frozen(fitted_VH)


def cut(model: PreTrainedModel, kept_K: Tensor, state: Path) -> None:
    """Leave only these dimensions of the stream in every tensor, with files in `state`; the configuration follows."""
    config, blocks, kept = model.config, anatomy.blocks(model), len(kept_K)
    # The mean square over fewer numbers is larger by this; gains and epsilon make up for it.
    ratio = int(config.hidden_size) / kept
    config.head_dim = _linears(blocks[0])["q"].out_features // int(config.num_attention_heads)
    config.hidden_size, config.rms_norm_eps = kept, config.rms_norm_eps * ratio
    norms = [norm for block in blocks for norm in anatomy.norms(block).values()]
    for norm in (*norms, anatomy.last_norm(model)):
        norm.weight = _frozen(norm.get_parameter("weight").detach()[kept_K] * math.sqrt(ratio))
    for block in blocks:
        _cut_block(block, kept_K, state)
    table, head = anatomy.embedding(model), anatomy.head(model)
    tied = head.weight is table.weight
    table.weight = _frozen(table.get_parameter("weight").detach()[:, kept_K])
    head.weight = table.weight if tied else _frozen(head.get_parameter("weight").detach()[:, kept_K])
    table.embedding_dim = head.in_features = kept  # type: ignore[assignment]
    for module in model.modules():
        for name, value in (("hidden_size", kept), ("variance_epsilon", config.rms_norm_eps)):
            if name in vars(module):
                setattr(module, name, value)


def _cut_block(block: Block, kept_K: Tensor, state: Path) -> None:
    """What is cut goes to a file and comes back as views of it, which take memory when they are read."""
    linears, file = _linears(block), state / f"cut-{block.index:04d}.safetensors"
    rows = {role: one.weight.detach() for role, one in linears.items()}
    made = {role: w[:, kept_K] if role in READERS else w[kept_K] for role, w in rows.items()}
    save_state(file, {role: w.contiguous() for role, w in made.items()}, {})
    for role, w_OI in load_file(file).items():
        one = linears[role]
        one.weight, (one.out_features, one.in_features) = _frozen(w_OI), w_OI.shape
        if one.bias is not None and role not in READERS:
            one.bias = _frozen(one.bias.detach()[kept_K])


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
