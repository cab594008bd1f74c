"""One drawn checkpoint through the product, held against transformers' own forward.

Admission is asked first. What it refuses is refused; after it nothing may raise. The dense checkpoint must answer as
transformers does; the quantized one as transformers does with the dequantized integers in the place of its weights,
each of which must be the nearest to what it stands for: what is left is the order of float sums.

Shapes: N windows, T tokens, R scored rows, V what a row is over.
"""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages import stage
from stages.admission import Asked, admitted
from stages.runtime.progress import Silent
from stages.serving.eager import eager
from tests.fuzz.draw import Case, case

SLACK = 1e-4
"""Of the largest value that is answered: float32 sums in another order."""
WINDOWS = 2


class WrongError(AssertionError):
    """The product took a checkpoint and answers something else than transformers."""


def tried(family: str, seed: int, root: Path) -> str:
    """Draw a checkpoint, and take it through fetch, quantize and validate.

    Args:
        family: model type.
        seed: of the draw.
        root: an empty folder.

    Returns:
        Why it was refused at admission, empty where all went well.

    Raises:
        WrongError: an answer or a number is another than transformers' own.
        Exception: whatever the product raised after it had admitted the checkpoint; a note tells what was drawn.
    """
    given = case(family, seed, root / "given")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _taken(given, root)
    except Exception as error:
        error.add_note(given.told())
        raise


def _taken(given: Case, root: Path) -> str:
    steps = {"fetch": {"source": str(root / "given")}, "quantize": {"scheme": "int8_weight_only"}}
    steps["validate"] = {"window_tokens": given.tokens, "windows": WINDOWS}
    inputs = {"fetch": {}, "quantize": {"model": "fetch"}, "validate": {"model": "quantize", "baseline": "fetch"}}
    asked = [Asked(name=name, stage=name, params=steps[name], inputs=inputs[name]) for name in steps]
    refused: dict[str, str] = {}
    for answer in admitted(asked):
        if answer.unknown:
            raise WrongError(f"admission of {answer.step} broke: {answer.unknown}")
        if answer.refusal:
            refused[answer.step] = f"{answer.step}: {answer.refusal['what']}"
    if "fetch" in refused:
        return refused["fetch"]
    made = {"text": _text(given, root / "text")}
    dense = made["fetch"] = _run("fetch", steps, {}, root)
    theirs = given.made.from_pretrained(root / "given", dtype=torch.float32).eval()
    ids_NT = _ids(given)
    _check_same("the dense checkpoint", dense, theirs, ids_NT, given)
    if refused:
        return next(iter(refused.values()))
    made["quantize"] = _run("quantize", steps, {"model": dense}, root)
    rounded = given.made.from_pretrained(root / "given", dtype=torch.float32).eval()
    _dequantize(rounded, load_file(made["quantize"] / "model.safetensors"))
    _check_same("the quantized checkpoint", made["quantize"], rounded, ids_NT, given)
    report = (
        _run("validate", steps, {"model": made["quantize"], "baseline": dense, "text": made["text"]}, root)
        / "report.json"
    )
    _check_measures(json.loads(report.read_text()), theirs, rounded, given, root)
    return ""


def _run(name: str, steps: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Path], root: Path) -> Path:
    definition, folder = stage(name), root / name
    folder.mkdir()
    definition.run(definition.params.model_validate(dict(steps[name])), inputs, folder, Silent())
    return folder


def _text(given: Case, folder: Path) -> Path:
    """A corpus whose every character is a token."""
    folder.mkdir()
    special = {*given.tokenizer["special"].values()}
    words = [chr(33 + one) for one in range(given.tokenizer["rows"]) if one not in special]
    text = "".join(words[(7 * one + one // 5) % len(words)] for one in range((WINDOWS + 1) * given.tokens))
    (folder / "test.jsonl").write_text(json.dumps({"id": "0", "text": text}) + "\n", encoding="utf-8")
    return folder


def _ids(given: Case) -> Tensor:
    """Two rows of any tokens but special ones; the last of a row ends it."""
    special = given.tokenizer["special"]
    usual = torch.tensor([one for one in range(given.config.vocab_size) if one not in special.values()])
    ids_NT = usual[torch.arange(WINDOWS * given.tokens).view(WINDOWS, -1) * 7 % len(usual)]
    ids_NT[:, -1] = special["eos"]
    return ids_NT


def _check_same(whose: str, folder: Path, theirs: PreTrainedModel, ids_NT: Tensor, given: Case) -> None:
    """The product's answers to whole windows, and to one that stands padded beside a longer one, are transformers'."""
    opened = eager(folder)
    expected = _answers(theirs, ids_NT, opened.task)
    _check_close(f"{whose} answers", _forward(opened, ids_NT, torch.ones_like(ids_NT)), expected)
    left = opened.task == "generate" and given.tokenizer["side"] == "left"
    if opened.task not in ("generate", "fill", "tag") or not _apart(theirs, left=left):
        return
    short = given.tokens // 2
    gap = given.tokens - short
    padded_NT, mask_NT = ids_NT.clone(), torch.ones_like(ids_NT)
    kept = slice(gap, None) if left else slice(0, short)
    padded_NT[1], mask_NT[1] = given.tokenizer["special"]["pad"], 0
    padded_NT[1, kept], mask_NT[1, kept] = ids_NT[1, :short], 1
    found = _forward(opened, padded_NT, mask_NT)
    alone = _answers(theirs, ids_NT[1:, :short], opened.task)
    _check_close(f"{whose} beside padding answers", found[1:, kept], alone)
    _check_close(f"{whose} above padding answers", found[:1], expected[:1])


def _apart(theirs: PreTrainedModel, *, left: bool) -> bool:
    """Whether transformers itself answers a row beside a longer one as it does the row alone.

    Two ways to turn look at the longest row of all, and where positions cannot be told they count from the padding on.
    """
    rope = str(getattr(theirs.config, "rope_parameters", None))
    placed = "position_ids" in inspect.signature(theirs.forward).parameters
    return "dynamic" not in rope and "longrope" not in rope and (placed or not left)


def _forward(opened: Any, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
    return torch.from_numpy(opened.forward(ids_NT.numpy(), mask_NT.numpy()))


@torch.no_grad()
def _answers(theirs: PreTrainedModel, ids_NT: Tensor, task: str) -> Tensor:
    """What transformers answers, asked as its documentation asks: a translation is that of the window itself."""
    given: dict[str, Tensor] = {"input_ids": ids_NT}
    if task == "translate":
        return theirs(**given, labels=ids_NT).logits
    if theirs.config.is_encoder_decoder and task == "embed":
        start = torch.full_like(ids_NT[:, :1], theirs.config.decoder_start_token_id)
        given["decoder_input_ids"] = torch.cat([start, ids_NT[:, :-1]], dim=1)
        if hasattr(theirs, "prepare_decoder_input_ids_from_labels"):
            given["decoder_input_ids"] = theirs.prepare_decoder_input_ids_from_labels(labels=ids_NT)
    out = theirs(**given, attention_mask=torch.ones_like(ids_NT), return_dict=True)
    if task == "answer":
        return torch.stack([out.start_logits, out.end_logits], dim=1)
    return out.last_hidden_state if task == "embed" else out.logits


def _check_close(what: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise WrongError(f"{what} in another shape: {tuple(found.shape)}, transformers {tuple(expected.shape)}")
    missed = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not missed <= SLACK:
        raise WrongError(f"{what} otherwise than transformers: {missed:.2g} of the largest value, limit {SLACK}")


@torch.no_grad()
def _dequantize(theirs: PreTrainedModel, stored: Mapping[str, Tensor]) -> None:
    """Put the integers times their scales into transformers' own model; every one is the nearest."""
    maps = [name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")]
    known = {name: (name, one) for name, one in theirs.state_dict(keep_vars=True).items()}
    if (head := theirs.get_output_embeddings()) is not None:  # a file may call it otherwise (GPT-NeoX)
        path = next(path for path, one in theirs.named_modules() if one is head)
        known["embed_out.weight"] = (f"{path}.weight", head.weight)
    if not maps:
        raise WrongError("nothing is quantized")
    for name in maps:
        scale_O = stored[f"{name}_scale"].float()
        values_OI = stored[name].float() * scale_O[:, None]
        path, weight_OI = known[name]
        if isinstance(theirs.get_submodule(path.rpartition(".")[0]), Conv1D):
            weight_OI = weight_OI.t()
        if not bool(((values_OI - weight_OI).abs() <= scale_O[:, None] * 0.5001 + 1e-12).all()):
            raise WrongError(f"{name} is not rounded to the nearest of its row's steps")
        if not torch.allclose(scale_O * 127, weight_OI.abs().amax(1), rtol=1e-3):
            raise WrongError(f"the steps of {name} are not 127 up to a row's largest")
        weight_OI.copy_(values_OI)


def _check_measures(
    report: Mapping[str, Any], dense: PreTrainedModel, made: PreTrainedModel, given: Case, root: Path
) -> None:
    """Perplexity, divergence and distance in the report are those of transformers' answers, computed here."""
    task, special = report["task"], given.tokenizer["special"]
    windows, before, after = _windows(given, root)
    expected: dict[str, list[Tensor]] = {}
    for ids_T in windows:
        p_RV, target_R = _rows(dense, ids_T, task, before, after, special["mask"])
        q_RV, _ = _rows(made, ids_T, task, before, after, special["mask"])
        for name, values_R in _measured(task, p_RV.double(), q_RV.double(), target_R).items():
            expected.setdefault(name, []).append(values_R)
    for name, values in expected.items():
        mean = float(torch.cat(values).mean())
        wanted = math.exp(mean) if name.endswith("perplexity") else mean
        if not math.isclose(report["measures"][name], wanted, rel_tol=2e-3, abs_tol=1e-5):
            raise WrongError(f"{name} is {report['measures'][name]}, by transformers' answers {wanted}")


def _windows(given: Case, root: Path) -> tuple[list[Tensor], int, int]:
    """The text cut by hand, in tokens as transformers reads them; how many come before a text, and how many behind."""
    text = json.loads((root / "text" / "test.jsonl").read_text(encoding="utf-8"))["text"]
    read = AutoTokenizer.from_pretrained(root / "given")  # of some types a class that reads the file in its own way
    bare, whole = read(text, add_special_tokens=False)["input_ids"], read(text)["input_ids"]
    before = next(one for one in range(len(whole)) if whole[one : one + len(bare)] == bare)
    first, last = whole[:before], whole[before + len(bare) :]
    room = given.tokens - len(first) - len(last)
    cut = [torch.tensor([*first, *bare[one : one + room], *last]) for one in range(0, WINDOWS * room, room)]
    return cut, len(first), len(last)


def _measured(task: str, p_RV: Tensor, q_RV: Tensor, target_R: Tensor) -> dict[str, Tensor]:
    if task in ("embed", "score"):
        return {"relative_error": (q_RV - p_RV).norm(dim=-1) / p_RV.norm(dim=-1)}
    kl_RV = functional.kl_div(q_RV.log_softmax(-1), p_RV.log_softmax(-1), reduction="none", log_target=True)
    found = {"kl_divergence": kl_RV.sum(-1)}
    if task in ("generate", "translate", "fill"):
        name = "pseudo_perplexity" if task == "fill" else "perplexity"
        found[name] = functional.cross_entropy(q_RV, target_R, reduction="none")
    return found


def _rows(
    theirs: PreTrainedModel, ids_T: Tensor, task: str, before: int, after: int, mask: int
) -> tuple[Tensor, Tensor]:
    """What is predicted of a window, and what came."""
    asked = torch.arange(before if task == "fill" else max(1, before), len(ids_T) - after)
    if task == "fill":
        hidden_NT = ids_T.repeat(len(asked), 1)
        hidden_NT[torch.arange(len(asked)), asked] = mask
        return _answers(theirs, hidden_NT, task)[torch.arange(len(asked)), asked], ids_T[asked]
    rows_TV = _answers(theirs, ids_T[None], task)[0]
    if task == "generate":
        return rows_TV[asked - 1], ids_T[asked]
    return rows_TV.view(-1, rows_TV.shape[-1]), ids_T
