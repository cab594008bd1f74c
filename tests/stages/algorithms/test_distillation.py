import pytest
import torch
from torch.nn import functional

from stages.algorithms.distillation import CHUNK, Head, Targets, compared, distill, likeliest

VOCABULARY = 50


@pytest.fixture
def states():
    torch.manual_seed(0)
    count, hidden, teacher_hidden = 2 * CHUNK + 17, 12, 10
    student, teacher = Head(torch.randn(VOCABULARY, hidden)), Head(torch.randn(VOCABULARY, teacher_hidden))
    labels_N = torch.randint(0, VOCABULARY, (count,))
    labels_N[-1] = labels_N[40] = -1
    return student, teacher, torch.randn(count, hidden), torch.randn(count, teacher_hidden), labels_N


def oracle(student, teacher, student_NH, teacher_NK, labels_N, k, kl_weight, temperature):
    """k + 1 outcomes, the k likeliest and the others together, by autograd in float64."""
    s = student_NH.double() @ student.weight_VH.double().t()
    t = teacher_NK.double() @ teacher.weight_VH.double().t()
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    order = p.argsort(1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    kl = (p[:, :k] * (p[:, :k] / q[:, :k]).log()).sum()
    if k < VOCABULARY:
        rest_p, rest_q = p[:, k:].sum(1), q[:, k:].sum(1)
        kl = kl + (rest_p * (rest_p / rest_q).log()).sum()
    entropy = functional.cross_entropy(s, labels_N, ignore_index=-1, reduction="sum")
    return (kl_weight * temperature**2 * kl + (1 - kl_weight) * entropy) / len(s)


@pytest.mark.parametrize("k", [VOCABULARY, 7, 1])
@pytest.mark.parametrize(("kl_weight", "temperature"), [(1.0, 1.0), (1.0, 2.5), (0.6, 1.0), (0.3, 2.0), (0.0, 1.0)])
def test_loss_and_gradient_equal_autograd_in_float64(states, kl_weight, temperature, k):
    student, teacher, student_NH, teacher_NK, labels_N = states
    mine = student_NH.clone().requires_grad_()
    targets = likeliest(teacher, teacher_NK, k, temperature)
    loss = distill(student, mine, targets, labels_N, kl_weight=kl_weight, temperature=temperature)
    (3 * loss).backward()
    theirs = student_NH.double().requires_grad_()
    expected = oracle(student, teacher, theirs, teacher_NK, labels_N, k, kl_weight, temperature)
    (3 * expected).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-6, rtol=1e-3)


def test_more_tokens_bound_the_whole_divergence_from_below_ever_closer_on_100_random_cases():
    generator = torch.Generator().manual_seed(0)
    for case in range(100):
        scale = (0.1, 1, 2)[case % 3]  # flat, middling and peaked distributions
        student, teacher = (Head(scale * torch.randn(30, 8, generator=generator)) for _ in range(2))
        s_NH, t_NH = torch.randn(20, 8, generator=generator), torch.randn(20, 8, generator=generator)
        nothing_N = torch.full((20,), -1)
        bounds = [float(distill(student, s_NH, likeliest(teacher, t_NH, k), nothing_N)) for k in (1, 3, 10, 30)]
        whole = float(compared(student, teacher, s_NH, t_NH, nothing_N)[0].mean())
        assert bounds == sorted(bounds) or bounds[0] == pytest.approx(bounds[-1], rel=1e-3)
        assert bounds[-1] == pytest.approx(whole, rel=2e-3, abs=1e-5)


def test_likeliest_tokens_are_numpys_in_order_with_their_log_probabilities(states):
    _, teacher, _, teacher_NK, _ = states
    logits = (teacher_NK.double() @ teacher.weight_VH.double().t() / 1.7).numpy()
    order = (-logits).argsort(1)[:, :5]
    found = likeliest(teacher, teacher_NK, 5, 1.7)
    assert (found.tokens_Nk.numpy() == order).all()
    expected = torch.tensor(logits).log_softmax(1).gather(1, torch.tensor(order))
    torch.testing.assert_close(found.log_p_Nk.double(), expected, atol=1e-5, rtol=1e-5)


def test_compared_equals_kl_div_and_cross_entropies_in_float64_at_every_position(states):
    student, teacher, student_NH, teacher_NK, labels_N = states
    biased = Head(teacher.weight_VH, torch.randn(VOCABULARY))
    s = (student_NH.double() @ student.weight_VH.double().t()).log_softmax(1)
    t = (teacher_NK.double() @ teacher.weight_VH.double().t() + biased.bias_V).log_softmax(1)
    expected = functional.kl_div(s, t, log_target=True, reduction="none").sum(1)
    kl_N, excess_N = compared(student, biased, student_NH, teacher_NK, labels_N)
    torch.testing.assert_close(kl_N.double(), expected, atol=1e-5, rtol=1e-4)
    assert (labels_N == -1).any()
    losses = [functional.nll_loss(one, labels_N, ignore_index=-1, reduction="none") for one in (s, t)]
    torch.testing.assert_close(excess_N.double(), losses[0] - losses[1], atol=1e-5, rtol=1e-4)


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(states):
    student, _, student_NH, _, labels_N = states
    mine = student_NH.clone().requires_grad_()
    loss = distill(student, mine, likeliest(student, student_NH, 9), labels_N)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert mine.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("kl_weight", "temperature"), [(1.0, 1.0), (0.4, 2.0)])
def test_capped_logits_give_autograds_loss_and_gradient(states, kl_weight, temperature):
    student, teacher, student_NH, teacher_NK, labels_N = states
    student, teacher = Head(student.weight_VH, torch.randn(VOCABULARY), cap=4.0), Head(teacher.weight_VH, cap=5.0)
    mine, theirs = student_NH.clone().requires_grad_(), student_NH.double().requires_grad_()
    targets = likeliest(teacher, teacher_NK, VOCABULARY, temperature)
    loss = distill(student, mine, targets, labels_N, kl_weight=kl_weight, temperature=temperature)
    s = 4 * torch.tanh((theirs @ student.weight_VH.double().t() + student.bias_V) / 4)
    t = 5 * torch.tanh(teacher_NK.double() @ teacher.weight_VH.double().t() / 5)
    p, q = (t / temperature).log_softmax(1), (s / temperature).log_softmax(1)
    kl = functional.kl_div(q, p, log_target=True, reduction="sum") * temperature**2
    entropy = functional.cross_entropy(s, labels_N, ignore_index=-1, reduction="sum")
    expected = (kl_weight * kl + (1 - kl_weight) * entropy) / len(s)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-6, rtol=1e-3)


def test_numbers_are_compared_as_the_means_of_normal_distributions():
    one = Head(torch.eye(1), spread=0.5)
    student_N1, teacher_N1 = torch.tensor([[1.0], [3.0]], requires_grad=True), torch.tensor([[1.5], [2.0]])
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(teacher_N1[:, 0], 0.5), normal(student_N1[:, 0], 0.5))
    kl_N, excess_N = compared(one, one, student_N1.detach(), teacher_N1, torch.full((2,), -1))
    torch.testing.assert_close(kl_N, divergence.detach())
    assert not excess_N.any()
    loss = distill(one, student_N1, likeliest(one, teacher_N1, 1), torch.full((2,), -1))
    torch.testing.assert_close(loss, divergence.mean())
    loss.backward()
    torch.testing.assert_close(student_N1.grad, torch.tensor([[-1.0], [2.0]]))  # gap / spread^2, over two


def test_bfloat16_head_keeps_the_rest_of_a_confident_teacher():
    """Where the top holds 0.999, one minus a bfloat16 top would be 0: the rest must still be told apart."""
    torch.manual_seed(0)
    weight_VH = torch.randn(VOCABULARY, 12)
    weight_VH[3, 0] = 9.0
    s_NH = torch.randn(64, 12)
    s_NH[:, 0] = 1.5
    t_NH = s_NH + 0.05 * torch.randn(64, 12)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        head, mine = Head(weight_VH.to(dtype)), s_NH.to(dtype).requires_grad_()
        targets = likeliest(Head(weight_VH), t_NH, 1)
        loss = distill(head, mine, Targets(targets.tokens_Nk, targets.log_p_Nk), torch.full((64,), -1))
        loss.backward()
        found.append(mine.grad.double().flatten())
    assert functional.cosine_similarity(found[0], found[1], dim=0) > 0.98


@pytest.mark.parametrize(("kl_weight", "temperature"), [(1.1, 1.0), (-0.1, 1.0), (0.5, 0.0)])
def test_weights_outside_their_range_are_refused(states, kl_weight, temperature):
    student, teacher, student_NH, teacher_NK, labels_N = states
    targets = likeliest(teacher, teacher_NK, 4)
    with pytest.raises(ValueError, match="must lie in"):
        distill(student, student_NH, targets, labels_N, kl_weight=kl_weight, temperature=temperature)
