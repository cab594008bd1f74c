import math

import numpy as np
import pytest
import torch

from stages.algorithms import merging


def test_soup_is_the_weighted_mean_whatever_the_weights_sum_to():
    models = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]), torch.tensor([-2.0, 0.0])]
    assert merging.soup(models, [1, 1, 2]).tolist() == [0.0, 2.0]
    assert torch.equal(merging.soup(models, [0.25, 0.25, 0.5]), merging.soup(models, [3, 3, 6]))
    assert merging.soup([one.bfloat16() for one in models], [1, 1, 2]).dtype == torch.float32


@pytest.mark.parametrize("weights", [[1.0], [1.0, -0.1], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="2 weights are needed"):
        merging.soup([torch.ones(2), torch.ones(2)], weights)
    with pytest.raises(ValueError, match="2 weights are needed"):
        merging.elected([torch.ones(2), torch.ones(2)], weights)


def test_soup_of_convex_losses_is_never_worse_than_their_mean_on_100_cases():
    """Jensen's inequality on quadratics whose condition runs from 1 to 1e8."""
    for case in range(100):
        generator = torch.Generator().manual_seed(case)
        size = 8
        q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        hessian = q @ torch.diag(torch.logspace(0, -8 * (case % 5) / 4, size, dtype=torch.float64)) @ q.T
        models = [torch.randn(size, generator=generator) for _ in range(3)]
        weights = torch.rand(3, generator=generator).tolist()
        losses = [float(one.double() @ hessian @ one.double()) for one in models]
        made = merging.soup(models, weights).double()
        assert float(made @ hessian @ made) <= np.average(losses, weights=weights) * (1 + 1e-6)


def test_slerp_goes_along_the_arc_in_equal_angles():
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    for t in (0, 0.25, 1 / 3, 0.5, 1):
        expected = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2), 0])
        assert torch.allclose(merging.slerp(a, b, t), expected, atol=1e-6)
    c = torch.tensor([math.cos(2.0), math.sin(2.0), 0.0])  # an obtuse angle, another length
    found = merging.slerp(a, 3 * c, 0.5)
    assert torch.allclose(found, (a + 3 * c) * math.sin(1.0) / math.sin(2.0), atol=1e-6)


def test_slerp_on_one_line_is_linear():
    a = torch.tensor([1.0, 2.0])
    for b in (a, 2 * a, -3 * a, torch.zeros(2)):
        assert torch.allclose(merging.slerp(a, b, 0.25), 0.75 * a + 0.25 * b, atol=1e-5)


def test_slerp_keeps_the_length_at_least_as_well_as_the_mean_on_100_cases():
    for case in range(100):
        generator = torch.Generator().manual_seed(case)
        a = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
        b = torch.nn.functional.normalize(a + torch.randn(16, generator=generator) * 10 ** (case % 6 - 4), dim=0)
        t = float(torch.rand(1, generator=generator))
        made, line = merging.slerp(a, b, t), (1 - t) * a + t * b
        assert abs(float(made.norm()) - 1) <= abs(float(line.norm()) - 1) + 1e-6
        angle = math.acos(min(1.0, float(a.double() @ b.double())))
        assert float(made.double() @ a.double()) == pytest.approx(math.cos(t * angle), abs=1e-6)


def test_ties_by_hand_on_three_elements():
    """The largest two of three are kept; then 3 - 1 is positive, -4 against 2 negative, 0 beside 5."""
    first, second = torch.tensor([3.0, -4.0, 0.5]), torch.tensor([-1.0, 2.0, 0.25])
    third = torch.tensor([0.1, 2.0, 5.0])
    bars = [merging.threshold(lambda one=one: [one], 2 / 3) for one in (first, second, third)]
    assert bars == [3.0, 1.0, 2.0]
    kept = [merging.trim(one, bar) for one, bar in zip((first, second, third), bars, strict=True)]
    assert [one.tolist() for one in kept] == [[3, -4, 0], [-1, 2, 0], [0, 2, 5]]
    # signs: 3 - 1 > 0; -4 + 2 + 2 = 0, undecided; 5 > 0. Means of those that agree: 3, nothing, 5.
    assert merging.elected(kept, [1, 1, 1]).tolist() == [3, 0, 5]
    # the second weighs twice: 3 - 2 > 0; -4 + 4 + 2 > 0, the mean of 2, 2 and 2; 5.
    assert merging.elected(kept, [1, 2, 1]).tolist() == [3, 2, 5]
    assert merging.elected([torch.tensor([1.0]), torch.tensor([4.0])], [3, 1]).tolist() == [1.75]
    assert merging.conflicts(kept).tolist() == [True, True, False]


@pytest.mark.parametrize("keep", [1e-9, 0.01, 0.2, 0.5, 0.999, 1.0])
def test_threshold_is_that_of_a_full_sort_however_the_values_are_divided(keep):
    torch.manual_seed(0)
    parts = [
        torch.randn(1000),
        torch.randn(7, 30) * 1e-6,
        torch.zeros(50),
        torch.randn(300) * 1e6,
        torch.full((40,), 0.7),
    ]
    found = merging.threshold(lambda: parts, keep)
    values = np.sort(np.concatenate([part.abs().flatten().numpy() for part in parts]))[::-1]
    assert found == values[max(1, round(keep * len(values))) - 1]


def test_threshold_refuses_what_it_cannot_answer():
    for keep in (0, -1, 1.1):
        with pytest.raises(ValueError, match="keep is over 0"):
            merging.threshold(lambda: [torch.ones(2)], keep)
    with pytest.raises(ValueError, match="there are no values"):
        merging.threshold(lambda: [], 0.5)


def test_dare_keeps_the_expectation_and_drops_the_asked_share():
    change = torch.linspace(-2, 3, 400)
    total, zeros = torch.zeros(400), 0
    for seed in range(2000):
        made = merging.dare(change, 0.3, torch.Generator().manual_seed(seed))
        alive = made != 0
        assert torch.equal(made[alive], (change / 0.3)[alive])
        zeros += int((made == 0).sum())
        total += made
    deviation = change.abs() * math.sqrt(0.7 / 0.3 / 2000)
    assert ((total / 2000 - change).abs() <= 5 * deviation + 1e-6).all()
    assert zeros / (400 * 2000) == pytest.approx(0.7, abs=0.005)
    assert torch.equal(merging.dare(change, 1, torch.Generator()), change)
    with pytest.raises(ValueError, match="keep is over 0"):
        merging.dare(change, 0, torch.Generator())


def test_ties_of_interfering_tasks_is_nearer_to_all_of_them_than_the_mean_on_100_cases():
    """Each task changes some elements much and the rest by noise: the mean thins every change by the tasks' number."""
    for case in range(100):
        generator = torch.Generator().manual_seed(case)
        size, tasks = 200, 2 + case % 3
        truth = torch.zeros(tasks, size)
        places = torch.randperm(size, generator=generator)[: 20 * tasks].view(tasks, 20)
        scale = 10 ** (torch.rand(20, generator=generator) * (case % 4))
        for task in range(tasks):
            truth[task, places[task]] = scale * torch.randn(20, generator=generator).sign()
        changes = list(truth + 0.02 * torch.randn(tasks, size, generator=generator))
        bars = [merging.threshold(lambda one=one: [one], 0.1) for one in changes]
        kept = [merging.trim(one, bar) for one, bar in zip(changes, bars, strict=True)]
        wanted, weights = truth.sum(0), [1] * tasks
        ties = (merging.elected(kept, weights) - wanted).norm()
        assert ties <= (merging.soup(changes, weights) - wanted).norm()
