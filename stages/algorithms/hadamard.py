"""Orthogonal matrices that spread every coordinate over all others: Hadamard where one is known, else random.

Shapes: N order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def hadamard(order: int) -> Tensor | None:
    """A matrix of +1 and -1 whose rows are orthogonal: H H^T = N I.

    Sylvester's doubling, Paley's two constructions over the integers modulo a prime, and Kronecker products of these.
    Up to 256 that leaves out 52, 92, 100, 116, 156, 172, 184, 188, 232, 236 and 244 of the orders that 4 divides.

    Args:
        order: N, at least 1.

    Returns:
        h_NN, float64, or None where these constructions give none.

    Source: Paley 1933, On orthogonal matrices.
    """
    if order <= 2:
        return _TWO[:order, :order]
    if order % 4:
        return None
    half = hadamard(order // 2)
    if half is not None:
        return torch.kron(_TWO, half)
    if _prime(order - 1):
        return _paley(order - 1)
    if order % 8 == 4 and _prime(order // 2 - 1):
        return _paley_doubled(order // 2 - 1)
    for factor in range(4, order // 4 + 1, 4):
        if order % factor == 0:
            left, right = hadamard(factor), hadamard(order // factor)
            if left is not None and right is not None:
                return torch.kron(left, right)
    return None


def rotation(order: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix: a Hadamard matrix over the root of N, its rows' signs drawn; without one, a random matrix.

    Args:
        order: N.
        seed: of the draw.

    Returns:
        r_NN, float64: r_NN^T r_NN = I.

    Source: Ashkboos et al. 2024, QuaRot, section 3; without a Hadamard matrix the Q of a Gaussian one, its columns'
        signs those of R's diagonal, which makes it uniform (Mezzadri 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    h_NN = hadamard(order)
    if h_NN is None:
        q_NN, r_NN = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator))
        return q_NN * r_NN.diagonal().sign()
    sign_N = torch.randint(2, (order,), generator=generator).double() * 2 - 1
    return sign_N[:, None] * h_NN / order**0.5


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _residues(prime: int) -> Tensor:
    """q_PP, the quadratic character of i - j modulo the prime: +1 for a square, -1 for none, 0 on the diagonal."""
    square_P = torch.full((prime,), -1.0, dtype=torch.float64)
    square_P[torch.arange(prime).square() % prime] = 1.0
    square_P[0] = 0.0
    index_P = torch.arange(prime)
    return square_P[(index_P[:, None] - index_P) % prime]


def _bordered(prime: int, below: float) -> Tensor:
    s_NN = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    s_NN[0, 1:], s_NN[1:, 0], s_NN[1:, 1:] = 1.0, below, _residues(prime)
    return s_NN


def _paley(prime: int) -> Tensor:
    """I + S of order prime + 1, S skew-symmetric: the prime leaves 3 divided by 4."""
    return torch.eye(prime + 1, dtype=torch.float64) + _bordered(prime, -1.0)


def _paley_doubled(prime: int) -> Tensor:
    """Of order 2 (prime + 1) from a symmetric S: the prime leaves 1 divided by 4."""
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    s_NN = _bordered(prime, 1.0)
    return torch.kron(s_NN, _TWO) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), zero)
