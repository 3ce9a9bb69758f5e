"""Shapley values as they are defined, the reference of more than one test."""

from __future__ import annotations

import itertools
import math

import torch


def by_definition(values: dict[tuple[int, ...], float], d: int) -> torch.Tensor:
    """Equation 4 of the paper, one marginal contribution after the other."""
    phi = torch.zeros(d, dtype=torch.float64)
    for i in range(d):
        others = [j for j in range(d) if j != i]
        for k in range(d):
            for s in itertools.combinations(others, k):
                phi[i] += (values[tuple(sorted((*s, i)))] - values[s]) / (d * math.comb(d - 1, k))
    return phi
