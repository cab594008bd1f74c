import torch

from stages.algorithms.tie import equal_groups


def test_equal_groups_finds_equal_bytes_of_one_shape_and_type():
    a = torch.arange(6.0).view(2, 3)
    named = [
        ("a", a), ("b", a + 1), ("c", a.clone()), ("view", a.view(3, 2)), ("half", a.half()),
        ("b2", a + 1), ("strided", a.T.contiguous().T), ("bf", a.bfloat16()), ("bf2", a.bfloat16()),
    ]  # fmt: skip
    assert equal_groups(named) == [["a", "c", "strided"], ["b", "b2"], ["bf", "bf2"]]


def test_equal_groups_one_bit_is_a_difference():
    a = torch.zeros(4)
    b = a.clone()
    b[3] = 1e-45
    assert equal_groups([("a", a), ("b", b)]) == []
