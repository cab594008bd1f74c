"""Choose, site by site, how a model's maps are rounded, and put the rounded maps in their places.

Shapes: O outputs, I inputs, F factors of a site, M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.basis import damped
from stages.algorithms.grids import E4M3_TOP, nearest_e4m3
from stages.algorithms.refit import output_errors, refit
from stages.algorithms.rounding import fake_round, round_rows
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.anatomy.plainness import factor, plain, token_tables, uncalled
from stages.models.anatomy.roles import refuse_experts
from stages.models.blockwise.site_moments import Seen
from stages.models.blockwise.sites import float_maps
from stages.models.blockwise.technique import Compressed
from stages.models.checkpoint.kept_zeros import is_pruned
from stages.models.layers import quantized_linear
from stages.models.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear
from stages.models.memory.pages import forget, trim
from stages.models.memory.saved_state import settle
from stages.quantize.input_ranges import Decision
from stages.quantize.movable_scales import Site, fold
from stages.quantize.stored_forms import rounded
from stages.runtime.contract import Progress
from stages.runtime.progress import Silent


@dataclass(frozen=True)
class Precision:
    """How a map is stored and read: the form of its weights, the block of a scale, the form of its inputs."""

    form: str
    block: int | None = None
    input_form: str | None = None


SILENT = Silent()
DAMPING = 0.3
"""Of the fits, a share of the mean squared input: what few bits lose is small, and a calibration text says little of
most directions. INT4 fitted on 8 windows of a book lost a sixth more KL on the rest of the book with 0.01, and a
quarter more on another text; with 0.1, a fortieth and an eighth. INT8 and FP8 care little."""
HEADROOM = 2.0
"""FP8 ranges reach so many times the largest value seen: a float is as precise there, and nothing saturates."""


def quantize_tables(model: PreTrainedModel, progress: Progress = SILENT) -> list[str]:
    """INT8 rows for the tables of tokens and the head; what is tied stays so. Returns the replaced paths.

    A table that does anything else than to scale its rows, and a head that is no plain map, stay as they are, with all
    that shares their tensor; the progress is told so.
    """
    tables, head = token_tables(model), model.get_output_embeddings()
    factors = {path: factor(table) for path, table in tables.items()}
    unplain = {path: tables[path].weight for path, found in factors.items() if found is None}
    if isinstance(head, nn.Linear) and not plain(head):
        unplain[_path(model, head)] = head.weight
    for path in unplain:
        progress.note(f"{path} stays in float: it does more than its weight says")
    kept = {id(tensor) for tensor in unplain.values()}
    replaced: list[str] = []
    codes_of: dict[int, tuple[Tensor, Tensor]] = {}
    heads = {_path(model, head): head} if isinstance(head, nn.Linear) else {}
    olds: list[tuple[str, nn.Embedding | nn.Linear]] = [*tables.items(), *heads.items()]  # held: ids are given again
    for path, old in olds:
        weight = old.weight
        if id(weight) in kept:
            continue
        if id(weight) not in codes_of:
            codes_of[id(weight)] = round_rows(weight.detach())
            forget(weight)
        codes, scales = codes_of[id(weight)]
        new: QuantizedEmbedding | QuantizedLinear
        if isinstance(old, nn.Linear):
            new = QuantizedLinear(old.in_features, old.out_features, bias=old.bias is not None)
            new.bias = old.bias
        else:
            new = QuantizedEmbedding(len(codes), codes.shape[1], factor=factors[path] or 1.0)
        new.weight, new.weight_scale = codes, scales
        quantized_linear.replace(model, path, new)
        replaced.append(path)
    return replaced


def _path(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def names(model: PreTrainedModel) -> list[str]:
    """Paths in the model of every float map of its blocks, each under every name it has there.

    Raises:
        StageError: a block holds experts, which are most of it and none of its maps.
    """
    for block in anatomy.blocks(model):
        refuse_experts(block.module, block.name)
    return [f"{block.name}.{path}" for block in anatomy.blocks(model) for path in float_maps(block)]


def replaceable(model: PreTrainedModel, progress: Progress) -> list[str]:
    """Those of `names` that a map of few bits can stand for.

    Left out, and told to the progress, is what does more than its weight says, and what the model reads without a call.
    """
    found: list[str] = names(model)
    read: set[str] = set()
    try:
        read = uncalled(model)
    # Any error: the model wants to be asked for more than a few tokens, and its maps are taken as they stand.
    except Exception as error:  # noqa: BLE001
        progress.note(f"whether every map is called could not be seen: {type(error).__name__}: {error}")
    unplain = [name for name in found if name in read or not plain(model.get_submodule(name))]
    if unplain:
        progress.note(f"{len(unplain)} maps stay in float, since they are not called as maps: {unplain[0]} ...")
    return [name for name in found if name not in unplain]


def plainly(model: PreTrainedModel, rounding: Rounding, folder: Path) -> list[dict[str, Any]]:
    """Round every map to nearest by its weights alone; they wait in `folder`. Returns a row a map."""
    rows = []
    for block in anatomy.blocks(model):
        made: dict[int, QuantizedLinear] = {}
        for path, one in float_maps(block).items():
            name = f"{block.name}.{path}"
            if name not in rounding.precision:
                continue
            w_OI, asked = one.weight.detach(), rounding.precision[name]
            rounding.apply(model, name, rounded(w_OI, asked.form, asked.block, None, search=rounding.search))
            new = model.get_submodule(name)
            assert isinstance(new, QuantizedLinear)
            missed = (new.dequantized() - w_OI).square().sum() / w_OI.square().sum().clamp_min(1e-30)
            rows.append({"layer": name, "block": block.index, "format": asked.form, "error": float(missed)})
            made[id(new)] = new
            forget(w_OI)
        if made:
            settle(folder / f"rounded-{block.index:04d}.safetensors", (one.weight for one in made.values()))
        trim()
    return rows


@dataclass
class Rounding:
    """A technique for `compress`: every map of the blocks to few bits.

    Attributes:
        precision: by path in the model.
        search: scales are searched; otherwise the format's own.
        input_scales: by path; scales that nobody decided on are found on the way.
        notes: by path, what the table and `quantization.json` say of a map.
        idle: a map that no token of the text runs through stays as it is (Longformer's global attention).
    """

    idle: ClassVar[bool] = True

    precision: Mapping[str, Precision]
    search: bool = True
    input_scales: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _speaks: dict[str, str] = field(default_factory=dict)
    _factors: list[tuple[Site, Tensor]] = field(default_factory=list)

    def take(self, decisions: Sequence[Decision]) -> None:
        """Follow what was decided for sites; their factors are folded when their block's turn comes."""
        for one in decisions:
            self._factors.append((one.site, one.factor_F))
            for name in one.site.readers.keys() & self.precision.keys():
                self.notes[name] = one.note
                if one.input_scale is not None:
                    self.input_scales[name] = one.input_scale

    def enter(self, block: Block) -> None:
        """See `Technique`. A map that one site reads with is written by another (v, up, a basis)."""
        for site, factor_F in self._factors:
            if site.block == block.index and not bool((factor_F == 1).all()):
                fold(site, factor_F)
        # A site holds its maps: what is rounded is to leave memory.
        self._factors = [one for one in self._factors if one[0].block != block.index]

    def begin(self, names: Sequence[str], peak: float) -> None:
        """Take the range of inputs that nobody decided on from the dense model's."""
        here = [name for name in names if name in self.precision]
        # What the site reads is asked by its first map, which may be one that stays as it is.
        self._speaks = {names[0]: here[0]} if here else {}
        for name in here:
            form = self.precision[name].input_form
            if form is not None and name not in self.notes:
                self.input_scales[name] = (HEADROOM * peak / E4M3_TOP if form == "fp8_e4m3" else peak / 127) or 1.0

    def read(self, name: str, z_MI: Tensor) -> Tensor:
        """The inputs as the map will read them."""
        speaks = self._speaks.get(name, "")
        scale = self.input_scales.get(speaks)
        if scale is None:
            return z_MI
        form = self.precision[speaks].input_form
        return fake_round(z_MI, scale) if form == "int8" else nearest_e4m3(z_MI / scale) * scale

    def compress(self, block: Block, found: Mapping[str, nn.Module], seen: Seen) -> dict[str, Compressed]:
        """See `Technique`. Maps that are rounded alike are rounded as one: their columns are the same.

        Zeros of sparse maps stay zeros: what takes their place are the weights that stand.
        """
        seen.damping = DAMPING
        made: dict[str, Compressed] = {}
        alike: dict[Precision, dict[str, nn.Linear]] = {}
        for path, one in found.items():
            asked = self.precision.get(f"{block.name}.{path}")
            if asked and isinstance(one, nn.Linear):  # a tensor of two sites is rounded already at the second
                alike.setdefault(asked, {})[path] = one
        for asked, together in alike.items():
            weights = {path: one.weight.detach() for path, one in together.items()}
            targets = list((seen.targets(weights) if self.search else weights).values())
            root_II = seen.root_II if self.search else None
            target_OI, stands_OI = torch.cat(targets), None
            if self.search and any(is_pruned(one.weight) for one in together.values()):
                stands_OI = torch.cat(list(weights.values())) != 0
                moment_II = damped(seen.moment_II, seen.damping).float()
                target_OI = refit(target_OI, target_OI, moment_II, stands_OI)
            tensors = rounded(target_OI, asked.form, asked.block, root_II, search=self.search, stands_OI=stands_OI)
            sizes = [len(target_OI) for target_OI in targets]
            for index, path in enumerate(together):
                own = {name: (t.split(sizes)[index] if t.ndim else t).clone() for name, t in tensors.items()}
                made[path] = self._compressed(f"{block.name}.{path}", together[path], own, targets[index], seen)
        return made

    def _compressed(
        self, name: str, old: nn.Linear, tensors: dict[str, Tensor], target_OI: Tensor, seen: Seen
    ) -> Compressed:
        if (scale := self.input_scales.get(name)) is not None:
            tensors["input_scale"] = torch.tensor(scale)
        new, asked = self._module(old, name, tensors), self.precision[name]
        plain, ours = output_errors(target_OI, [nearest(old.weight.detach(), asked), new.dequantized()], seen.moment_II)
        return Compressed(tensors, {"format": asked.form, "error_nearest": plain, "error": ours})

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See `Technique`."""
        weight = model.get_submodule(path).weight
        # Tied maps and bases that stand at several places keep one tensor.
        for name, old in list(model.named_modules()):
            if getattr(old, "weight", None) is not weight:
                continue
            own = {key: tensor if tensor.ndim else tensor.clone() for key, tensor in tensors.items()}
            if isinstance(old, QuantizedLinear):
                old.put(own)
            else:
                quantized_linear.replace(model, name, self._module(old, path, own))

    def _module(self, old: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
        assert isinstance(old, nn.Linear)
        asked = self.precision[name]
        new = QuantizedLinear(
            old.in_features,
            old.out_features,
            form=asked.form,
            block=asked.block,
            input_form=asked.input_form if "input_scale" in tensors else None,
        )
        new.bias = None if old.bias is None else old.bias.detach()
        new.put(tensors)
        return new


def nearest(w_OI: Tensor, asked: Precision, *, search: bool = False) -> Tensor:
    """The map as it is read again when its weights are rounded to nearest."""
    made = QuantizedLinear(w_OI.shape[1], w_OI.shape[0], form=asked.form, block=asked.block)
    made.put(rounded(w_OI, asked.form, asked.block, None, search=search))
    return made.dequantized()
