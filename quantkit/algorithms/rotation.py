"""Rotation (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2024), the part that leaves an
ordinary checkpoint: no channel stays an outlier.

The residual stream x, a row vector, becomes x R with an orthogonal R. A root-mean-square norm
without weights commutes with that, so the norm's weights w go into the Linears that read it, and

    readers   W ← W diag(w) R        (y = norm(x) diag(w) Wᵀ, and norm(x R) = norm(x) R)
    writers   W ← Rᵀ W, b ← b R      (what they add to x is rotated as x is)
    embedding E ← E R

Nothing else changes: what reads and writes the stream computes what it did, on inputs in which each
channel is a sum over all former ones. Values and what reads them are rotated in the same way, each
head by itself. R is a Hadamard matrix with random signs where the size has one, which spreads an
outlier over all channels evenly.
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

    stream: R of the residual stream, [hidden size, hidden size], or None to leave it.
    head: R of each head of values, [head size, head size], or None.
    untied: name on disk of the output head's tensor → the embedding's, where the two were one
        tensor and no longer are.
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
    """A random orthogonal R [size, size] float32: signs on a Hadamard matrix, or on Sylvester's
    beside a random orthogonal one for what is left of the size.
    """
    for power in range((size & -size).bit_length() - 1, -1, -1):
        odd = _hadamard(size >> power)
        if odd is not None:
            break
    else:
        power = (size & -size).bit_length() - 1
        # Of normally distributed entries, so that no direction is preferred; the sign of R's
        # diagonal makes the decomposition unique.
        q, r = torch.linalg.qr(
            torch.randn(size >> power, size >> power, dtype=torch.float64, generator=generator)
        )
        odd = (q * r.diagonal().sign() * math.sqrt(size >> power)).contiguous()
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return (signs * torch.kron(_sylvester(power), odd) / math.sqrt(size)).float()


def rotated_reader(weight: Tensor, rotation: Tensor, norm: Tensor | None = None) -> Tensor:
    """W diag(w) R. weight: [out_features, in_features]; rotation: of the inputs, or of each part of
    them (a head) where it is smaller; norm: w, [in_features].
    """
    weight = weight.float() if norm is None else weight.float() * norm
    return (weight.unflatten(1, (-1, len(rotation))) @ rotation).flatten(1)


def rotated_writer(tensor: Tensor, rotation: Tensor) -> Tensor:
    """Rᵀ W of a weight [out_features, in_features], b R of a bias [out_features]; rotation: of the
    outputs, or of each part of them where it is smaller.
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
    """A Hadamard matrix by Paley's constructions, for an order of q + 1 (q a prime, 3 modulo 4) or
    2·(q + 1) (1 modulo 4), or of 1; None for others.
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
    """Paley's conference matrix: 1 or -1 where the difference of row and column is a square or
    none, with a border of ones. sign: of the border's column.
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
