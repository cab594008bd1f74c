"""Channels by the source that is hurt most, against errors of weights that are fitted anew for every choice."""

import numpy as np
import pytest
import torch

from stages.algorithms.basis import damped
from stages.algorithms.channels import FLOOR, least_important, reconstructed, removals

CHANNELS = 8


def problem(seed, outputs=3, tokens=160):
    """A map, the moments of two sources that wake other channels, and that of both, three quarters of the first."""
    draw = np.random.default_rng(seed)
    moments = []
    for wakes in (np.logspace(0, -1.5, CHANNELS), np.logspace(-1.5, 0, CHANNELS)):
        a = draw.normal(size=(tokens, CHANNELS)) @ (draw.normal(size=(CHANNELS, CHANNELS)) * wakes)
        moments.append(torch.from_numpy(a.T @ a / tokens))
    return torch.from_numpy(draw.normal(size=(outputs, CHANNELS))), moments, 0.75 * moments[0] + 0.25 * moments[1]


def errors_of(w, moments, pooled, gone, floor=0.0):
    """Of each source, by the weights that fit the pooled text without these channels; float64, no shortcut."""
    kept = torch.tensor([one for one in range(CHANNELS) if one not in set(gone)])
    extra = torch.eye(CHANNELS, dtype=torch.float64) * floor * pooled.diagonal().median()
    extra += torch.eye(CHANNELS, dtype=torch.float64) * (damped(pooled) - pooled)[0, 0]
    moment = pooled + extra
    fitted = torch.zeros_like(w)
    fitted[:, kept] = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ w.T).T
    return [float(((w - fitted) @ (one + extra) @ (w - fitted).T).trace()) for one in moments]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_each_round_takes_what_hurts_the_worst_source_least(seed, size):
    w, moments, pooled = problem(seed)
    groups = torch.arange(CHANNELS).view(-1, size).tolist()
    gone, expected = [], [0.0, 0.0]
    for _ in range(2):
        rest = [one for one in groups if one[0] not in gone]
        tried = {tuple(one): errors_of(w, moments, pooled, [*gone, *one]) for one in rest}
        rises = {one: max(a - b for a, b in zip(now, expected, strict=True)) for one, now in tried.items()}
        best = min(rises, key=rises.get)
        gone, expected = [*gone, *best], tried[best]
    found = least_important(w, pooled, 2 * size, size=size, rounds=2, sources=moments)
    assert found.tolist() == gone


@pytest.mark.parametrize(("rounds", "floor"), [(1, 0.0), (3, 0.0), (3, FLOOR)])
@pytest.mark.parametrize("size", [1, 2])
def test_the_error_told_is_that_of_the_worst_source(size, rounds, floor):
    w, moments, pooled = problem(3)
    for gone, error in removals(w, pooled, 6, size=size, rounds=rounds, floor=floor, sources=moments):
        assert error == pytest.approx(max(errors_of(w, moments, pooled, gone.tolist(), floor)), rel=1e-6)


def test_the_weights_that_stay_are_hurt_less_in_the_worst_source_than_by_the_whole_text():
    ours, theirs = [], []
    for seed in range(20):
        w, moments, pooled = problem(seed)
        alike = [one / float((w @ one @ w.T).trace()) for one in moments]
        for found, kind in ((ours, alike), (theirs, ())):
            gone = set(least_important(w, pooled, 3, sources=kind).tolist())
            kept = torch.tensor([one for one in range(CHANNELS) if one not in gone])
            new = torch.zeros_like(w)
            new[:, kept] = reconstructed(w, pooled, kept)
            found.append(max(float(((w - new) @ one @ (w - new).T).trace()) for one in alike))
    assert np.mean(ours) < 0.8 * np.mean(theirs)
    assert sum(a <= b * (1 + 1e-9) for a, b in zip(ours, theirs, strict=True)) >= 16


def test_what_one_source_alone_uses_stays_however_little_of_the_text_it_is():
    w = torch.ones(1, 4, dtype=torch.float64)
    first, second = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), torch.diag(torch.tensor([3.0, 2.0, 0.0, 1.5]))
    pooled = 0.95 * first + 0.05 * second
    assert least_important(w, pooled, 1).tolist() == [3]
    assert least_important(w, pooled, 1, sources=[first, second]).tolist() == [2]


@pytest.mark.parametrize("size", [1, 2])
def test_one_source_is_the_whole_text_to_the_bit(size):
    w, _, pooled = problem(1)
    both = [list(removals(w, pooled, 6, size=size, floor=FLOOR, sources=one)) for one in ((), [pooled])]
    for (gone, error), (other, same) in zip(*both, strict=True):
        assert gone.equal(other) and error == same


def test_sources_that_are_all_alike_choose_as_the_whole_text_does():
    w, _, pooled = problem(2)
    whole = list(removals(w, pooled, 6, rounds=6))
    alike = list(removals(w, pooled, 6, rounds=6, sources=[pooled, pooled]))
    assert [gone.tolist() for gone, _ in whole] == [gone.tolist() for gone, _ in alike]
    assert [error for _, error in whole] == pytest.approx([error for _, error in alike])
