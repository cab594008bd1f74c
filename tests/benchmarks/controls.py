"""What the techniques are compared with: a copy with folded norms, plain fine-tuning, SVD at one rank a shape.

Each is called like a stage's `run`. Shapes: O outputs, I inputs, R rank, N windows, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy.blocks import READS_NORM, blocks, norms, projections
from stages.models.checkpoint.loading import load_model, save_model
from stages.runtime.contract import Metrics, Progress

STEP_TOKENS, WARMUP_STEPS, RATE = 1024, 8, 4e-4


def fold_norms(params: Mapping[str, Any], inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """The same function with every norm's weight multiplied into the maps that read it. The last norm is left."""
    model = load_model(inputs["model"])
    with torch.no_grad():
        for block in blocks(model):
            maps, found = projections(block), norms(block)
            for norm, roles in READS_NORM.items():
                weight_I = found[norm].get_parameter("weight")
                for role in roles:
                    maps[role].get_parameter("weight").mul_(weight_I)
                weight_I.fill_(1.0)
    save_model(model, output, like=inputs["model"])
    return {}


def fine_tune(params: Mapping[str, Any], inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Next-token cross-entropy on all weights for `seconds`, AdamW with a cosine over the time."""
    model, seconds = load_model(inputs["model"]), float(params["seconds"])
    ids_NT = load_file(inputs["windows"])["train"]
    batch = max(1, STEP_TOKENS // ids_NT.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    began, steps = time.monotonic(), 0
    while (spent := (time.monotonic() - began) / seconds) < 1:
        rate = RATE * min(1.0, (steps + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * spent)) / 2
        optimizer.param_groups[0]["lr"] = rate
        part_NT = ids_NT[torch.randperm(len(ids_NT), generator=generator)[:batch]]
        model(input_ids=part_NT, labels=part_NT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        progress.advanced(min(spent * seconds, seconds), seconds)
    save_model(model, output, like=inputs["model"])
    return {"steps": float(steps), "tokens": float(steps * batch * ids_NT.shape[1])}


def uniform_svd(params: Mapping[str, Any], inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Every map of the blocks cut to the rank that keeps `keep` of its parameters, whitened by its inputs' moment.

    The checkpoint holds the products, dense: its size on disk says nothing.

    Source: Wang et al. 2024, SVD-LLM, section 3.1.
    """
    model = load_model(inputs["model"])
    maps = {block.name + role: one for block in blocks(model) for role, one in projections(block).items()}
    moments = _moments(model, maps, load_file(inputs["windows"])["calibrate"][: params["windows"]])
    kept = before = 0
    for done, (name, one) in enumerate(maps.items(), start=1):
        w_OI = one.get_parameter("weight")
        rank = int(params["keep"] * w_OI.numel() / sum(w_OI.shape))
        with torch.no_grad():
            w_OI.copy_(cut(w_OI, moments[name], rank))
        kept, before = kept + rank * sum(w_OI.shape), before + w_OI.numel()
        progress.advanced(done, len(maps))
    save_model(model, output, like=inputs["model"])
    return {"block_parameters": float(kept), "block_parameters_before": float(before)}


def cut(w_OI: Tensor, moment_II: Tensor, rank: int) -> Tensor:
    """The matrix of that rank whose outputs on inputs of that moment are nearest to those of `w_OI`."""
    damping = 1e-5 * float(moment_II.diagonal().mean())
    root_II = torch.linalg.cholesky(moment_II + damping * torch.eye(len(moment_II)))
    u_OR, s_R, vt_RI = torch.linalg.svd(w_OI.detach() @ root_II, full_matrices=False)
    low_OI = (u_OR[:, :rank] * s_R[:rank]) @ vt_RI[:rank]
    cut_OI: Tensor = torch.linalg.solve_triangular(root_II, low_OI, upper=False, left=False)
    return cut_OI


def _moments(model: PreTrainedModel, maps: Mapping[str, nn.Module], ids_NT: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def hear(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x_TI = given[0].reshape(-1, given[0].shape[-1])
        found[name] = found.get(name, 0.0) + x_TI.t() @ x_TI

    hooks = [one.register_forward_pre_hook(partial(hear, name)) for name, one in maps.items()]
    with torch.no_grad():
        for ids_T in ids_NT:
            model(input_ids=ids_T[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: moment_II / ids_NT.numel() for name, moment_II in found.items()}
