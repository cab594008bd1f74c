from itertools import combinations

import pytest
import torch

from stages.algorithms.alignment import increasing


def test_choice_costs_what_the_best_of_all_choices_costs_on_100_random_cases():
    generator = torch.Generator().manual_seed(0)
    for case in range(100):
        rows, columns = 1 + case % 4, 4 + case % 3
        cost_SB = torch.rand(rows, columns, generator=generator).double()
        best = min(combinations(range(columns), rows), key=lambda c: float(sum(cost_SB[n, c[n]] for n in range(rows))))
        assert tuple(increasing(cost_SB)) == best


def test_nearest_columns_out_of_order_are_not_taken():
    assert increasing(torch.tensor([[1.0, 9.0, 0.0], [0.0, 9.0, 2.0]])) == [0, 2]


def test_fewer_columns_than_rows_are_refused():
    with pytest.raises(ValueError, match="3 things cannot keep their order among 2"):
        increasing(torch.zeros(3, 2))
