"""What a Transformer is made of: stacks of blocks, linear maps and their roles, norms, embedding, head.

Blocks are found by structure; `stages.models.anatomy.roles` says how their maps are.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import tasks
from stages.models.anatomy.roles import ATTENTION, FEED_FORWARD, is_map, maps_of, own_maps, roles_of
from stages.runtime.contract import StageError

LLAMA_TYPE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks read x + attention(norm(x)), then x + down(act(gate(norm(x))) * up(norm(x)))."""

ROLES = ATTENTION + FEED_FORWARD
"""The roles in a Llama-type block."""
READS_NORM = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}
"""Which projections read the output of each norm, and nothing else does."""

_PRE_NORMS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("ln_1", "ln_2"),
    ("self_attn_layer_norm", "final_layer_norm"),
    ("layer.0.layer_norm", "layer.1.layer_norm"),
)
_LAST_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "decoder.final_layer_norm")


@dataclass(frozen=True)
class Block:
    """One block of a stack.

    Attributes:
        index: its place among all blocks of the model.
        name: its path in the model.
        module: the block.
        stack: `decoder` where what comes later is not seen, else `encoder`.
    """

    index: int
    name: str
    module: nn.Module
    stack: str = "decoder"


class Projections(dict[str, nn.Module]):
    """Role -> map of one block; a role that the block does not have is refused by name."""

    def __init__(self, block: Block, found: dict[str, nn.Module]) -> None:
        super().__init__(found)
        self._block = block

    def __missing__(self, role: str) -> nn.Module:
        raise StageError(
            f"{self._block.name} has no map for {role!r}",
            measured=f"{type(self._block.module).__name__} with {', '.join(self)}",
            remedy="Use a method that takes this architecture.",
        )


def check_type(model_type: str) -> None:
    """Raise StageError unless models of this type are decoders of the Llama type."""
    if model_type not in LLAMA_TYPE:
        raise StageError(
            f"the architecture {model_type!r} is not understood here",
            limit=", ".join(LLAMA_TYPE),
            remedy="Give a checkpoint of one of these types.",
        )


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that holds embedding, blocks and the last norm.

    Raises:
        StageError: the model has an encoder and a decoder.
    """
    if model.config.is_encoder_decoder:
        raise StageError(f"{type(model).__name__} has two stacks", limit=1, remedy="Give a model with one.")
    inner: nn.Module = model.base_model
    return inner


def stacks(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Path -> list of the blocks of each stack: lists of modules of one class with several linear maps each.

    Raises:
        StageError: there is none, or the blocks of one are of several classes.
    """
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in lists):
            continue
        if len(module) and all(sum(map(is_map, one.modules())) > 1 for one in module):
            if len({type(one) for one in module}) > 1:
                kinds = ", ".join(sorted({type(one).__name__ for one in module}))
                raise StageError(f"the blocks of {path} are not of one kind", measured=kinds, limit=1)
            lists[path] = module
    if not lists:
        raise StageError(f"{type(model).__name__} has no stack of blocks that is understood")
    return lists


def blocks(model: PreTrainedModel) -> list[Block]:
    """The blocks of every stack in order, an encoder's before a decoder's.

    Raises:
        StageError: the architecture is not understood.
    """
    found: list[Block] = []
    continues = tasks.task_of(model) == "generate"
    for path, layers in stacks(model).items():
        causal = continues or any(getattr(module, "is_causal", False) for module in layers.modules())
        stack = "decoder" if causal or "decoder" in path.split(".") else "encoder"
        found += [Block(len(found) + i, f"{path}.{i}", module, stack) for i, module in enumerate(layers)]
    return found


def maps(block: Block) -> dict[str, nn.Module]:
    """Path inside the block -> every linear map of it, in the order of the module tree.

    Raises:
        StageError: a matrix of the block belongs to no linear map.
    """
    return maps_of(block.module, block.name)


def linear_maps(block: Block) -> dict[str, nn.Module]:
    """As `maps`, whatever other matrices the block has: experts that are one tensor, a router."""
    return own_maps(block.module)


def path(role: str, block: Block | None = None) -> str:
    """Where a projection lies inside a block, by default one of the Llama type: `q` -> `self_attn.q_proj`."""
    if block is not None:
        return roles(block)[role]
    return f"{'self_attn' if role in ATTENTION else 'mlp'}.{role}_proj"


def roles(block: Block) -> dict[str, str]:
    """Role -> path inside the block, for all its linear maps.

    Roles are q, k, v or a fused qkv, and o; the same with `cross_` where a second attention reads an encoder; gate in
    gated blocks, up and down.

    Raises:
        StageError: a map has no role that is known, two have the same one, or one is missing.
    """
    return roles_of(block.module, block.name)


def projections(block: Block) -> Projections:
    """The block's linear maps by role, see `roles`.

    Raises:
        StageError: the block is not understood.
    """
    return Projections(block, {role: block.module.get_submodule(where) for role, where in roles(block).items()})


def norms(block: Block) -> dict[str, nn.Module]:
    """The norms before the maps: `attention` feeds q, k and v; `mlp` feeds gate and up.

    Raises:
        StageError: the block's norms come after its maps, or do not scale by their weight alone.
    """
    children = dict(block.module.named_modules())
    own = [name for name in children if _is_norm(name) and not name.startswith(("self_attn.", "attention."))]
    for names in _PRE_NORMS:
        if set(own) == set(names) and getattr(block.module, "do_layer_norm_before", names[0] != "self_attn_layer_norm"):
            found = dict(zip(READS_NORM, (children[name] for name in names), strict=True))
            if all(_scales(norm) for norm in found.values()):
                return found
    raise StageError(f"the norms of {block.name} are not understood", measured=", ".join(own) or "none")


def _is_norm(name: str) -> bool:
    return any(part in name.rpartition(".")[2].lower() for part in ("norm", "ln_"))


def _scales(norm: nn.Module) -> bool:
    """Whether its output is its weight times what it normalizes, plus its bias."""
    probe = deepcopy(norm).to_empty(device="cpu")  # the model may stand on the meta device
    for parameter in probe.parameters():
        nn.init.zeros_(parameter)
    weight = probe.get_parameter("weight")
    return not probe(torch.arange(1, 1 + weight.numel(), dtype=weight.dtype)).any()


def last_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the head.

    Raises:
        StageError: the model has none.
    """
    inner = decoder(model)
    for name in _LAST_NORMS:
        owner, _, attribute = name.rpartition(".")
        if isinstance(getattr(getattr(inner, owner, None) if owner else inner, attribute, None), nn.Module):
            return inner.get_submodule(name)
    raise StageError(f"{type(model).__name__} has no norm after its last block")


def embedding(model: PreTrainedModel) -> nn.Module:
    """The table that turns tokens into vectors.

    Raises:
        StageError: the model has none, or several (CANINE).
    """
    try:
        found: nn.Module = model.get_input_embeddings()
    except NotImplementedError as error:
        raise StageError(f"{type(model).__name__} has no table of tokens that is understood") from error
    return found


def head(model: PreTrainedModel) -> nn.Module:
    """The linear map from vectors to logits.

    Raises:
        StageError: the model has none.
    """
    found: nn.Module | None = model.get_output_embeddings()
    if found is None:
        raise StageError(f"{type(model).__name__} has no output head", remedy="Give a model that predicts tokens.")
    return found


def predicts(model: PreTrainedModel, task: str) -> bool:
    """Whether a model's answer is the next token of a text that is true."""
    return task == "generate" and all(block.stack == "decoder" for block in blocks(model))


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> list[tuple[nn.Module, str]]:
    """Put `new` wherever `old` stands. An instance that several modules hold (a shared basis) is replaced in all.

    Returns:
        Each place: the module that holds it, and under which name.
    """
    places = [(one, name) for one in model.modules() for name, child in one._modules.items() if child is old]
    for parent, name in places:
        setattr(parent, name, new)
    return places


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every stored buffer under each of its names: a shared tensor comes once a name."""
    stored = module.state_dict(keep_vars=True)
    yield from stored.items()


def distinct_tensors(module: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Every such tensor once, with all of its names; the first is the same in every process."""
    named: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in named_tensors(module):  # a state_dict keeps the order in which its modules were made
        named.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from named.values()


def block_parameters(model: PreTrainedModel) -> int:
    """Parameters inside the blocks, each distinct tensor counted once.

    Quantized weights count as the weights they stand for (two in a byte of packed 4-bit values); scales are not
    parameters. Short whole numbers beside float weights say where these stand: they count by their bytes, four a
    parameter.
    """
    seen: dict[int, int] = {}
    for block in blocks(model):
        for module in block.module.modules():
            quantized = hasattr(module, "weight_scale")
            own = {**module._parameters, **module._buffers}
            for name, tensor in own.items():
                if tensor is None or name in module._non_persistent_buffers_set or name.endswith("_scale"):
                    continue
                packed = quantized and name == "weight" and getattr(module, "bits", 8) == 4
                whole = tensor.dtype in (torch.uint8, torch.int16) and not quantized
                seen[id(tensor)] = -(-tensor.nbytes // 4) if whole else tensor.numel() * (2 if packed else 1)
    return sum(seen.values())
