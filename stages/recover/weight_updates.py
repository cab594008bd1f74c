"""How weights learn: all of them, by low-rank products that are merged at the end, or only where they are not zero.

Two copies of a model stand side by side: the float32 weights that are saved, and those in a short float that compute.

Shapes: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.lora import Factors, begun, merged, slopes
from stages.algorithms.sparsity import SPARSE
from stages.models.anatomy import classes
from stages.models.checkpoint.kept_zeros import is_pruned
from stages.recover.headless import embedded_names
from stages.runtime.contract import StageError

Kind = Literal["full", "lora", "sparse"]


@dataclass
class Updates:
    """Tensors that the optimizer moves, and how they become weights.

    Attributes:
        saved: name -> float32 weight as it will be saved; a tied weight once.
        computing: name -> the parameter that computes, in a short float.
        moved: what the optimizer moves: the saved weights themselves, or `<name>.up` and `<name>.down`.
        masks: name -> where a sparse weight is not zero.
    """

    saved: Mapping[str, Tensor]
    computing: Mapping[str, nn.Parameter]
    moved: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def take_gradient(self, name: str) -> None:
        """Add a computing parameter's gradient to what is moved, and free it."""
        parameter = self.computing[name]
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        if name in self.masks:
            gradient *= self.masks[name]
        if name in self.moved:
            _add(self.moved[name], gradient)
            return
        found = slopes(gradient, self._factors(name))
        _add(self.moved[f"{name}.up"], found.up_Or)
        _add(self.moved[f"{name}.down"], found.down_rI)

    @torch.no_grad()
    def put(self) -> None:
        """Give the computing parameters what the moved tensors make of the saved weights."""
        for name, parameter in self.computing.items():
            parameter.copy_(self._made(name))

    @torch.no_grad()
    def finish(self) -> None:
        """Merge what was learned into the saved weights; nothing can be learned after."""
        for name, weight in self.saved.items():
            weight.copy_(self._made(name))

    def check(self, names: list[str]) -> None:
        """Assert that the zeros of these weights are zeros.

        Raises:
            StageError: one is not.
        """
        for name in names:
            wrong = int((self.saved[name][~self.masks[name]] != 0).sum())
            if wrong:
                raise StageError(
                    f"an update put weights where {name} has zeros",
                    measured=wrong,
                    limit=0,
                    remedy="This is a defect: please report it with the recipe.",
                )

    def check_one(self, step: int) -> None:
        """Assert it of one weight, another at each step: all of them would take as long as a forward pass."""
        if self.masks:
            self.check([list(self.masks)[step % len(self.masks)]])

    def _made(self, name: str) -> Tensor:
        return self.saved[name] if name in self.moved else merged(self.saved[name], self._factors(name))

    def _factors(self, name: str) -> Factors:
        return Factors(self.moved[f"{name}.up"], self.moved[f"{name}.down"])


def updates(kind: Kind, saved: PreTrainedModel, computing: PreTrainedModel, *, rank: int, seed: int) -> Updates:
    """Prepare how the weights of a model learn. Embedding and head stay as they are.

    Args:
        kind: `full`: every weight; `lora`: every matrix by a product of this rank; `sparse`: every weight, but zeros of
            matrices with many stay zeros.
        saved: the model in float32.
        computing: the same in a short float, apart from its head.
        rank: of `lora`; at most that of a matrix.
        seed: of `lora`'s first factors.

    Raises:
        StageError: `sparse` finds no matrix with zeros.
    """
    # What a model computes from its configuration (places as sines) is not saved, and so does not learn; nor does what
    # its class does not learn: a loaded tensor no longer says which.
    stays = embedded_names(saved) | set(getattr(saved, "_keys_to_ignore_on_save", None) or ())
    stays |= {name for name, one in classes.plain(saved).named_parameters() if not one.requires_grad}
    weights = {name: tensor.detach() for name, tensor in saved.named_parameters() if name not in stays}
    if kind == "lora":
        weights = {name: tensor for name, tensor in weights.items() if tensor.dim() == 2}
    parameters = dict(computing.named_parameters())
    computes = {name: parameters[name] for name in weights}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in weights)
    masks = _masks(saved, weights) if kind == "sparse" else {}
    return Updates(weights, computes, begin(kind, weights, rank, seed), masks)


def begin(kind: Kind, weights: Mapping[str, Tensor], rank: int, seed: int) -> dict[str, Tensor]:
    """What the optimizer moves, before its first step."""
    if kind != "lora":
        return dict(weights)
    generator = torch.Generator().manual_seed(seed)
    moved: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        outputs, inputs = tensor.shape
        first = begun((outputs, inputs), min(rank, outputs, inputs), generator)
        moved |= {f"{name}.up": first.up_Or, f"{name}.down": first.down_rI}
    return moved


def listen(made: Updates) -> None:
    """Have each gradient taken as soon as it is whole, so that no two matrices' stand in memory."""
    for name, parameter in made.computing.items():
        parameter.register_post_accumulate_grad_hook(_taker(made, name))


def _taker(made: Updates, name: str) -> Callable[[Tensor], None]:
    return lambda _parameter: made.take_gradient(name)


def _masks(saved: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    masks = {name: weights[name] != 0 for name, one in saved.named_parameters() if name in weights and is_pruned(one)}
    if not masks:
        raise StageError(
            "no matrix of the checkpoint has zeros to keep",
            limit=f"a share of {SPARSE}",
            remedy="Give `update: full`, or prune single weights first.",
        )
    return masks


def _add(tensor: Tensor, gradient: Tensor) -> None:
    tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
