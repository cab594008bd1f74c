import math

import pytest
import torch

from stages.algorithms.block_influence import influence


def test_influence_by_hand():
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    y = torch.tensor([[3.0, 0], [0, 2], [1, 1]])
    assert influence(x, y) == pytest.approx((0 + 1 + (1 - math.sqrt(0.5))) / 3)


def test_influence_a_block_that_scales_has_none_and_one_that_turns_round_has_two():
    x = torch.randn(5, 7)
    assert influence(x, 4 * x) == pytest.approx(0, abs=1e-9)
    assert influence(x, -x) == pytest.approx(2)


def test_influence_zero_or_infinite_vectors_are_refused():
    x = torch.ones(2, 3)
    for bad in (torch.zeros(2, 3), x * torch.inf, x * torch.nan):
        with pytest.raises(ValueError, match="zero or not finite"):
            influence(x, bad)
