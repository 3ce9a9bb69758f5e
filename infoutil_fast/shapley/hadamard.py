"""Hadamard matrices of every order that Sylvester's doubling and Paley's two constructions give."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def order(d: int) -> int:
    """The least order n >= max(d, 2) that `hadamard` can build."""
    n = max(d, 2)
    while _build(n) is None:
        n += 1
    return n


def hadamard(n: int) -> Tensor:
    """[n, n] of +-1 int64 with orthogonal rows, the first row all ones."""
    found = _build(n)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    return found


@lru_cache(maxsize=64)
def _build(n: int) -> Tensor | None:
    if n in (1, 2):
        return torch.tensor([[1]]) if n == 1 else torch.tensor([[1, 1], [1, -1]])
    if n % 4:
        return None
    half = _build(n // 2)
    if half is not None:  # Sylvester
        return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    found = None
    if _prime(n - 1):  # Paley I: n - 1 = 3 mod 4
        core = _border(n - 1, -1)
        found = core + torch.eye(n, dtype=torch.int64)
    elif _prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:  # Paley II
        core, eye = _border(n // 2 - 1, 1), torch.eye(n // 2, dtype=torch.int64)
        found = torch.kron(core, torch.tensor([[1, 1], [1, -1]])) + torch.kron(eye, torch.tensor([[1, -1], [-1, -1]]))
    return None if found is None else found * found[:1]


def _border(q: int, sign: int) -> Tensor:
    """The Jacobsthal matrix of the prime q, bordered by ones and `sign`: [q + 1, q + 1], zero on the diagonal."""
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0] + [1 if x in squares else -1 for x in range(1, q)])
    index = (torch.arange(q)[None] - torch.arange(q)[:, None]) % q
    found = torch.ones(q + 1, q + 1, dtype=torch.int64)
    found[0, 0] = 0
    found[1:, 0] = sign
    found[1:, 1:] = character[index]
    return found


def _prime(q: int) -> bool:
    return q > 2 and all(q % k for k in range(2, int(q**0.5) + 1))
