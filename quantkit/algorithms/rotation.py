"""Rotation (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2024): multiply hidden states by an
orthogonal matrix R, which spreads outlier channels over all channels. This is the offline part,
which leaves an ordinary checkpoint.

The residual stream x, a row vector, becomes x R. A root-mean-square norm without weights commutes
with R, so the norm's weights w are multiplied into the Linears that read it:

    readers   W ← W diag(w) R        (y = norm(x) diag(w) Wᵀ, and norm(x R) = norm(x) R)
    writers   W ← Rᵀ W, b ← b R      (what they add to x is rotated as x is)
    embedding E ← E R

The model computes the same function. Values and the output projection are rotated in the same way,
each head by itself. R is a Hadamard matrix with random signs where the size has one: it spreads an
outlier evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The matrices of one model.

    stream: R of the residual stream, [hidden size, hidden size] float32; None where it isn't
        rotated.
    head: R of each head of values, [head size, head size] float32; None likewise.
    untied: name on disk of the output head's tensor → name of the embedding's, where the rotation
        unties them.
    """

    stream: Tensor | None
    head: Tensor | None
    untied: Mapping[str, str] = field(default_factory=dict)

    @property
    def stream_matrix(self) -> Tensor:
        assert self.stream is not None, "asked for only where the recipe rotates the stream"
        return self.stream

    @property
    def head_matrix(self) -> Tensor:
        assert self.head is not None, "asked for only where the recipe rotates heads"
        return self.head


def rotation_matrix(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal R, [size, size] float32.

    It is a Hadamard matrix with random signs. For a size that has none here, it is the Kronecker
    product of Sylvester's matrix and a random orthogonal matrix of the remaining odd factor.
    """
    for power in range((size & -size).bit_length() - 1, -1, -1):
        odd = _hadamard(size >> power)
        if odd is not None:
            break
    else:
        power = (size & -size).bit_length() - 1
        # Normally distributed entries prefer no direction. The signs of r's diagonal make the
        # decomposition unique.
        q, r = torch.linalg.qr(
            torch.randn(size >> power, size >> power, dtype=torch.float64, generator=generator)
        )
        odd = (q * r.diagonal().sign() * math.sqrt(size >> power)).contiguous()
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return (signs * torch.kron(_sylvester(power), odd) / math.sqrt(size)).float()


def rotated_reader(weight: Tensor, rotation: Tensor, norm: Tensor | None = None) -> Tensor:
    """W diag(w) R, [out_features, in_features] float32.

    weight: W, [out_features, in_features].
    rotation: R, [n, n]; where n < in_features, each n input channels (a head) are rotated.
    norm: w, [in_features]; None for ones.
    """
    weight = weight.float() if norm is None else weight.float() * norm
    return (weight.unflatten(1, (-1, len(rotation))) @ rotation).flatten(1)


def rotated_writer(tensor: Tensor, rotation: Tensor) -> Tensor:
    """Rᵀ W of a weight [out_features, in_features], or b R of a bias [out_features]; float32.

    rotation: R, [n, n]; where n < out_features, each n output channels (a head) are rotated.
    """
    return (rotation.T @ tensor.float().reshape(-1, len(rotation), tensor[0].numel())).reshape(
        tensor.shape
    )


def _sylvester(power: int) -> Tensor:
    """The Hadamard matrix of order 2^power."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix by Paley's constructions, [order, order]; None for other orders.

    They exist for order 1, q + 1 (q a prime, 3 modulo 4), and 2·(q + 1) (q a prime, 1 modulo 4).
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _bordered(order - 1, -1.0)
    half = order // 2
    if order % 4 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1):
        conference, one = _bordered(half - 1, 1.0), torch.eye(half, dtype=torch.float64)
        return torch.kron(
            conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
        ) + torch.kron(one, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double())
    return None


def _bordered(prime: int, sign: float) -> Tensor:
    """Paley's conference matrix, [prime + 1, prime + 1]: 1 where the difference of row and column
    is a square modulo the prime, -1 elsewhere, with a border of ones.

    sign: of the border's column.
    """
    squares = torch.zeros(prime, dtype=torch.float64) - 1
    squares[torch.arange(1, prime) ** 2 % prime] = 1
    squares[0] = 0
    places = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = squares[(places[:, None] - places) % prime]
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
