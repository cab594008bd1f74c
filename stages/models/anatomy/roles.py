"""The linear maps of a block, and what each does in it.

Maps are found by structure. Roles are found by the names that architectures give their maps and by where these stand; a
block with a map that has no role is refused by that map's name.
"""

from __future__ import annotations

from torch import nn

from stages.runtime.contract import StageError

ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("gate", "up", "down")
CROSS = "cross_"
"""Before a role: of the attention that reads the encoder."""
_LEAVES = {
    "q": ("q_proj", "q", "query", "q_lin"),
    "k": ("k_proj", "k", "key", "k_lin"),
    "v": ("v_proj", "v", "value", "v_lin"),
    "qkv": ("c_attn", "query_key_value", "qkv_proj"),
    "o": (
        "o_proj", "out_proj", "o", "out_lin", "attention.dense", "self_attention.dense", "attention.output.dense",
        "attn.c_proj",
    ),
    "gate": ("gate_proj", "wi_0"),
    "up": ("up_proj", "fc1", "wi", "wi_1", "c_fc", "dense_h_to_4h", "lin1", "intermediate.dense", "ffn"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "wo", "dense_4h_to_h", "lin2", "output.dense", "mlp.c_proj", "ffn_output"),
}  # fmt: skip
_ORDER = ("q", "k", "v", "qkv", "o")
_ORDERED = (*_ORDER, *(CROSS + role for role in _ORDER), "gate", "up", "gate_up", "down")
_OTHER_ATTENTIONS = ("encoder_attn", "EncDecAttention", "crossattention")


def is_map(module: nn.Module) -> bool:
    """Whether it is a linear map: dense, quantized, or on a basis."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def biased(module: nn.Module) -> bool:
    """Whether a linear map adds a bias."""
    return any(name == "bias" or name.endswith(".bias") for name in module.state_dict())


def maps_of(block: nn.Module, name: str) -> dict[str, nn.Module]:
    """Path inside the block -> every linear map of it, in the order of the module tree.

    Raises:
        StageError: a matrix of the block belongs to no linear map.
    """
    refuse_experts(block, name)
    maps = own_maps(block)
    inside = tuple(f"{path}." for path in maps)
    for path, tensor in block.named_parameters():
        owner = block.get_submodule(path.rpartition(".")[0])
        if tensor.dim() > 1 and not path.startswith(inside) and not isinstance(owner, nn.Embedding):
            raise StageError(f"{name}.{path} belongs to no linear map", measured=type(owner).__name__)
    return maps


def refuse_experts(block: nn.Module, name: str) -> None:
    """Raise StageError where a block holds several maps as one tensor, of which a method of single maps sees none."""
    for path, tensor in block.named_parameters():
        owner = block.get_submodule(path.rpartition(".")[0])
        if tensor.dim() == 3 and not isinstance(owner, nn.Conv1d) and not is_map(owner):
            raise StageError(
                f"{name}.{path} holds experts, which are no linear maps: they would stay as they are",
                measured=f"{len(tensor)} experts in one tensor of {type(owner).__name__}",
                limit="linear maps",
                remedy="Use `quantize` with `scheme: bf16` or `fp16`, which takes every tensor.",
            )


def own_maps(block: nn.Module) -> dict[str, nn.Module]:
    """Path inside the block -> every linear map of it, whatever other matrices it has."""
    maps: dict[str, nn.Module] = {}
    for path, module in block.named_modules(remove_duplicate=False):
        if is_map(module) and not any(path.startswith(f"{outer}.") for outer in maps):
            maps[path] = module
    return maps


def roles_of(block: nn.Module, name: str) -> dict[str, str]:
    """Role -> path inside the block, for all its linear maps.

    Raises:
        StageError: a map has no role that is known, two have the same one, or one is missing.
    """
    by_role: dict[str, str] = {}
    for where in maps_of(block, name):
        role = role_of(where)
        if role is None or role in by_role:
            raise StageError(f"{name}.{where} is not understood", measured="its role" if role is None else role)
        by_role[role] = where
    attention = {"qkv", "o"} if "qkv" in by_role else {"q", "k", "v", "o"}
    feed_forward = {"gate_up", "down"} if "gate_up" in by_role else {"up", "down"}
    needed = attention | feed_forward | ({CROSS + role for role in "qkvo"} if CROSS + "q" in by_role else set())
    if missing := sorted(needed - by_role.keys()):
        raise StageError(f"{name} has no {missing[0]}: this block is not understood", measured=", ".join(by_role))
    return {role: by_role[role] for role in _ORDERED if role in by_role}


def role_of(where: str) -> str | None:
    """The role of a map by its path inside a block, None where it is not known."""
    cross = any(name in where.split(".") for name in _OTHER_ATTENTIONS)
    known = where.replace("crossattention", "attention")
    ends = {leaf: role for role, leaves in _LEAVES.items() for leaf in leaves if f".{known}".endswith(f".{leaf}")}
    return (CROSS if cross else "") + ends[max(ends, key=len)] if ends else None
