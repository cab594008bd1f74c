"""What a busy neighbour costs a stage: a block of `quantize`, alone and beside a loop on one of its two cores.

Each by the product's own launcher, once as its threads wait now and once as OpenMP lets them spin by itself.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import psutil

from flows.reporting.terminal import TerminalProgress
from flows.running.child_process import Launcher
from flows.running.order import Order
from stages import stage
from stages.adapters.connect import pins
from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError
from stages.runtime.execute import execute, work_of
from stages.runtime.fingerprint import fingerprint
from stages.runtime.progress import Silent
from tests.benchmarks.bench import SPLITS
from tests.benchmarks.results import Row

NAME = "beside"
THREADS, BLOCKS, WIDTH, REPEATS = 2, 3, 576, 3
SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""What libgomp does where nobody tells it anything."""
_LOOP = """\
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:  # it outlives no bench that is killed
    for _ in range(10_000_000):
        pass
"""


class _Clock(Silent):
    """Seconds of each block but the first, which loads libraries and the text."""

    def __init__(self) -> None:
        self._at: list[float] = []

    def advanced(self, done: float, total: float) -> None:
        """See Progress."""
        self._at.append(time.monotonic())

    @property
    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self._at, self._at[1:], strict=False)]


def measured(
    store: Store,
    terminal: TerminalProgress,
    *,
    text: str,
    width: int = WIDTH,
    blocks: int = BLOCKS,
    repeats: int = REPEATS,
) -> Row:
    """The row: medians over all blocks of all repeats, the four ways in turn, so that a slow minute strikes each."""
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    if len(cores) < THREADS:
        return Row(NAME, error=f"needs {THREADS} cores, has {len(cores)}")
    terminal.started(NAME)
    began, listener = time.monotonic(), terminal.for_step(NAME)
    folder = store.scratch / "bench" / NAME
    order = _order(store, _model(folder / f"model-{width}-{blocks}", width, blocks), text)
    launcher = Launcher(store, "process", THREADS, folder)
    found: dict[tuple[bool, bool], list[float]] = {}
    others: list[float] = []
    ways = [(spinning, beside) for _ in range(repeats) for spinning in (True, False) for beside in (False, True)]
    for done, (spinning, beside) in enumerate(ways):
        listener.advanced(done, len(ways))
        clock = _Clock()
        try:
            with _only(cores), _foreign(cores) as share, ExitStack() as around:
                around.enter_context(_variables(SPINNING if spinning else {}))
                if beside:
                    around.enter_context(_neighbour(cores[-1]))
                launcher.run(order, clock)
        except StageError as error:
            terminal.failed(NAME, str(error))
            return Row(NAME, error=str(error))
        found.setdefault((spinning, beside), []).extend(clock.seconds)
        others += share
    terminal.finished(NAME, time.monotonic() - began, cached=False)
    return _row({way: median(seconds) for way, seconds in found.items()}, median(others), blocks)


def _row(took: dict[tuple[bool, bool], float], others: float, blocks: int) -> Row:
    ratio, ratio_spinning = took[False, True] / took[False, False], took[True, True] / took[True, False]
    figures = {
        "seconds": took[False, False],
        "spinning_seconds": took[True, False],
        "beside_seconds": took[False, True],
        "beside_spinning_seconds": took[True, True],
        "beside_ratio": ratio,
        "beside_spinning_ratio": ratio_spinning,
    }
    about = (
        f"one of {blocks} blocks in INT4 on {THREADS} cores: {took[False, False]:.2f} s, beside a loop on one of them "
        f"{took[False, True]:.2f} s, {ratio:.2f} times; where threads spin {took[True, False]:.2f} s, "
        f"{took[True, True]:.2f} s, {ratio_spinning:.2f} times; other work had {others:.0%} of the cores"
    )
    return Row(NAME, figures=figures, about=about)


def _model(folder: Path, width: int, blocks: int) -> Path:
    """A Llama with drawn weights: what a block takes does not depend on what it says."""
    if folder.is_dir():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import VOCABULARY, reference_text, tiny_tokenizer

    torch.manual_seed(0)
    made = folder.with_suffix(f".{os.getpid()}")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(made)
    tiny_tokenizer(reference_text()).save_pretrained(made)
    made.rename(folder)
    return folder


def _order(store: Store, model: Path, text: str) -> Order:
    identities = {}
    asked = {
        "model": ("fetch", {"source": model.as_uri()}),
        "text": ("corpus", {"source": text, "splits": SPLITS["text"]}),
    }
    for role, (verb, params) in asked.items():
        definition = stage(verb)
        given = definition.params.model_validate(params)
        if definition.pin:
            given = definition.pin(given, pins(store), Silent())
        identities[role] = execute(
            definition, given, work_of(definition, given, {}), store, Silent(), step=role
        ).identity
    quantize = stage("quantize")
    made = quantize.params.model_validate({"scheme": "int4_weight_only", "embedding": "keep"})
    work = work_of(quantize, made, identities)
    return Order(step=f"{NAME}-{fingerprint(work)[:8]}", stage="quantize", params=made, work=work, force=True)


@contextmanager
def _only(cores: list[int]) -> Iterator[None]:
    """Have what this thread starts run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    policies = ("OMP_WAIT_POLICY", *SPINNING)
    before = {name: os.environ.pop(name) for name in policies if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _neighbour(core: int) -> Iterator[None]:
    loop = subprocess.Popen([sys.executable, "-c", _LOOP, str(core)], start_new_session=True)
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


@contextmanager
def _foreign(cores: list[int]) -> Iterator[list[float]]:
    """The share of the cores that went to processes which this one did not start, once the block has ended."""
    share: list[float] = []
    busy, own, began = _busy(cores), _own(), time.monotonic()
    yield share
    span = (time.monotonic() - began) * len(cores)
    share.append(max(0.0, (_busy(cores) - busy - (_own() - own)) / span))


def _busy(cores: list[int]) -> float:
    times = psutil.cpu_times(percpu=True)
    return sum(sum(times[core]) - times[core].idle - getattr(times[core], "iowait", 0.0) for core in cores)


def _own() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
