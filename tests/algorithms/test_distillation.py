import pytest
import torch
from torch.nn import functional

from stages.algorithms.distillation import CHUNK, Heads, distill, divergence


@pytest.fixture
def states():
    torch.manual_seed(0)
    count, hidden, teacher_hidden, vocabulary = 2 * CHUNK + 17, 12, 10, 50
    heads = Heads(torch.randn(vocabulary, hidden), torch.randn(vocabulary, teacher_hidden))
    labels_N = torch.randint(0, vocabulary, (count,))
    labels_N[-1] = labels_N[40] = -1
    return heads, torch.randn(count, hidden), torch.randn(count, teacher_hidden), labels_N


def oracle(heads, student_NH, teacher_NK, labels_N, kl_weight, temperature):
    s = student_NH.double() @ heads.student_VH.double().t()
    t = teacher_NK.double() @ heads.teacher_VK.double().t()
    count = len(s)
    kl = functional.kl_div(
        (s / temperature).log_softmax(1), (t / temperature).log_softmax(1), log_target=True, reduction="sum"
    )
    entropy = functional.cross_entropy(s, labels_N, ignore_index=-1, reduction="sum")
    return (kl_weight * temperature**2 * kl + (1 - kl_weight) * entropy) / count


@pytest.mark.parametrize(("kl_weight", "temperature"), [(1.0, 1.0), (1.0, 2.5), (0.6, 1.0), (0.3, 2.0), (0.0, 1.0)])
def test_loss_and_gradient_equal_autograd_in_float64(states, kl_weight, temperature):
    heads, student_NH, teacher_NK, labels_N = states
    mine = student_NH.clone().requires_grad_()
    loss = distill(heads, mine, teacher_NK, labels_N, kl_weight=kl_weight, temperature=temperature)
    (3 * loss).backward()
    theirs = student_NH.double().requires_grad_()
    expected = oracle(heads, theirs, teacher_NK, labels_N, kl_weight, temperature)
    (3 * expected).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-6, rtol=1e-4)


def test_divergence_equals_kl_div_in_float64_at_every_position(states):
    heads, student_NH, teacher_NK, _labels = states
    s = (student_NH.double() @ heads.student_VH.double().t()).log_softmax(1)
    t = (teacher_NK.double() @ heads.teacher_VK.double().t()).log_softmax(1)
    expected = functional.kl_div(s, t, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(divergence(heads, student_NH, teacher_NK).double(), expected, atol=1e-5, rtol=1e-4)


def test_divergence_of_a_model_from_itself_is_zero(states):
    heads, student_NH, _teacher, _labels = states
    same = Heads(heads.student_VH, heads.student_VH)
    assert divergence(same, student_NH, student_NH).abs().max() < 1e-5


@pytest.mark.parametrize(("kl_weight", "temperature"), [(1.5, 1.0), (-0.1, 1.0), (0.5, 0.0)])
def test_weights_out_of_range_are_refused(states, kl_weight, temperature):
    heads, student_NH, teacher_NK, labels_N = states
    with pytest.raises(ValueError, match="must lie"):
        distill(heads, student_NH, teacher_NK, labels_N, kl_weight=kl_weight, temperature=temperature)
