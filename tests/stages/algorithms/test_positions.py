import numpy as np
import pytest
import torch

from stages.algorithms.positions import COLUMNS, MASK, affordable, decoded, encoded, least


def nbytes(mask, form):
    return sum(one.numpy().nbytes for one in encoded(mask, form).values())


@pytest.mark.parametrize("form", [MASK, COLUMNS])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.6, 1.0])
def test_positions_come_back_and_are_numpys(form, share):
    mask = torch.from_numpy(np.random.default_rng(0).random((7, 21)) < share)
    made = encoded(mask, form)
    assert torch.equal(decoded(made, 7, 21), mask)
    if form == MASK:
        assert np.array_equal(made["mask"].numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    else:
        assert np.array_equal(made["columns"].numpy(), np.nonzero(mask.numpy())[1])
        assert np.array_equal(made["counts"].numpy(), mask.numpy().sum(1))


def test_least_is_the_smaller_form_and_its_true_bytes():
    chosen = set()
    for share in np.linspace(0, 0.3, 40):
        mask = torch.from_numpy(np.random.default_rng(1).random((24, 72)) < share)
        form, size = least(24, 72, int(mask.sum()))
        assert size == nbytes(mask, form) == min(nbytes(mask, MASK), nbytes(mask, COLUMNS))
        chosen.add(form)
    assert chosen == {MASK, COLUMNS}
    assert least(2, 40_000, 1)[0] == MASK  # no int16 reaches the last column


def test_affordable_is_the_most_that_fits_with_its_positions():
    for budget in range(0, 800, 7):
        # The tensors' bytes are rounded up to whole numbers of four, each on its own: two numbers are set aside.
        fits = [n for n in range(16 * 40 + 1) if 4 * n + least(16, 40, n)[1] <= 4 * (budget - 2)]
        assert affordable(16, 40, budget) == max(fits, default=0)


@pytest.mark.parametrize(
    ("columns", "counts", "message"),
    [
        ([0, 5], [1, 1], "outside"),
        ([0, -1], [1, 1], "outside"),
        ([0, 1], [1, 2], "outside"),
        ([1, 0], [2, 0], "ascend"),
    ],
)
def test_positions_that_are_damaged_are_refused(columns, counts, message):
    damaged = {name: torch.tensor(one, dtype=torch.int16) for name, one in (("columns", columns), ("counts", counts))}
    with pytest.raises(ValueError, match=message):
        decoded(damaged, 2, 5)
