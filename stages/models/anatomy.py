"""The parts of a Llama-type decoder: blocks, projections, norms, embedding, head. Only this module finds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.runtime.contract import StageError

LLAMA_TYPE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks read x + attention(norm(x)), then x + down(act(gate(norm(x))) * up(norm(x)))."""

ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("gate", "up", "down")
ROLES = ATTENTION + FEED_FORWARD
READS_NORM = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}
"""Which projections read the output of each norm, and nothing else does."""

_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}


@dataclass(frozen=True)
class Block:
    """One decoder block; `name` is its path in the model."""

    index: int
    name: str
    module: nn.Module


def check_type(model_type: str) -> None:
    """Raise StageError unless models of this type are understood."""
    if model_type not in LLAMA_TYPE:
        raise StageError(
            f"the architecture {model_type!r} is not understood",
            limit=", ".join(LLAMA_TYPE),
            remedy="Give a checkpoint of one of these types.",
        )


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that holds embedding, blocks and the last norm.

    Raises:
        StageError: the architecture is not understood.
    """
    check_type(model.config.model_type)
    inner: nn.Module = model.base_model
    return inner


def blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks in order.

    Raises:
        StageError: the architecture is not understood.
    """
    inner = decoder(model)
    prefix = f"{model.base_model_prefix}." if inner is not model else ""
    layers = inner.get_submodule("layers")
    return [Block(index, f"{prefix}layers.{index}", module) for index, module in enumerate(layers.children())]


def path(role: str) -> str:
    """Where a projection lies inside its block: `q` -> `self_attn.q_proj`."""
    return f"{'self_attn' if role in ATTENTION else 'mlp'}.{role}_proj"


def projections(block: Block) -> dict[str, nn.Module]:
    """The block's linear maps by role, among q k v o gate up down.

    Raises:
        StageError: one is missing.
    """
    return {role: _part(block, path(role)) for role in ROLES}


def norms(block: Block) -> dict[str, nn.Module]:
    """The block's norms: `attention` feeds q, k and v; `mlp` feeds gate and up."""
    return {role: _part(block, name) for role, name in _NORMS.items()}


def _part(block: Block, name: str) -> nn.Module:
    try:
        return block.module.get_submodule(name)
    except AttributeError as error:
        raise StageError(f"{block.name} has no {name}: this block is not understood") from error


def last_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the head."""
    return decoder(model).get_submodule("norm")


def embedding(model: PreTrainedModel) -> nn.Module:
    """The table that turns tokens into vectors."""
    return decoder(model).get_submodule("embed_tokens")


def head(model: PreTrainedModel) -> nn.Module:
    """The linear map from vectors to logits.

    Raises:
        StageError: the model has none.
    """
    found: nn.Module | None = model.get_output_embeddings()
    if found is None:
        raise StageError(f"{type(model).__name__} has no output head", remedy="Give a causal language model.")
    return found


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands. An instance that several modules hold (a shared basis) is replaced in all."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every stored buffer under each of its names: a shared tensor comes once a name."""
    stored = module.state_dict(keep_vars=True)
    yield from stored.items()


def block_parameters(model: PreTrainedModel) -> int:
    """Parameters inside the blocks, each distinct tensor counted once.

    Quantized weights count as the weights they stand for (two in a byte of packed 4-bit values); scales are not
    parameters.
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
                seen[id(tensor)] = tensor.numel() * (2 if packed else 1)
    return sum(seen.values())
