"""Which output of a net stands for which class, found by counting which output is largest on images of known classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SURE = 3.0  # standard deviations of a difference of counts, below which two readings are not told apart


@dataclass(frozen=True)
class Order:
    """Outputs by class, and what stays in doubt."""

    outputs: np.ndarray  # [C] int64, the output of each class
    doubtful: tuple[tuple[int, int], ...]  # pairs of classes whose outputs could be exchanged; (c, -1): another, unused output would do


def assign(gain: np.ndarray) -> np.ndarray:
    """A column for each row of gain [C, O], C <= O, no column twice, with the largest sum: [C] int64.

    The Hungarian method by shortest augmenting paths with potentials (Jonker and Volgenant 1987), O(C^2 O).
    """
    rows, columns = gain.shape
    cost = -np.asarray(gain, np.float64)
    u, v = np.zeros(rows + 1), np.zeros(columns + 1)
    owner = np.zeros(columns + 1, np.int64)  # row of each column, from 1; 0: free; column 0 is where a path begins
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least, before, done = np.full(columns + 1, np.inf), np.zeros(columns + 1, np.int64), np.zeros(columns + 1, bool)
        while owner[column]:
            done[column] = True
            slack = cost[owner[column] - 1] - u[owner[column]] - v[1:]
            better = ~done[1:] & (slack < least[1:])
            least[1:][better], before[1:][better] = slack[better], column
            following = 1 + int(np.where(done[1:], np.inf, least[1:]).argmin())
            step = least[following]
            u[owner[done]] += step
            v[done] -= step
            least[~done] -= step
            column = following
        while column:
            owner[column], column = owner[before[column]], int(before[column])
    found = np.empty(rows, np.int64)
    taken = np.flatnonzero(owner[1:])
    found[owner[1:][taken] - 1] = taken
    return found


def recover(counts: np.ndarray, given: Sequence[int] | None) -> Order:
    """The outputs of the classes from counts [C, O] of (true class, largest output), C <= O.

    `given` is the order that stands unless the counts speak clearly against it: each cycle of classes that the best assignment moves is
    taken over only where it explains `SURE` standard deviations more of the images. None: no order stands. `doubtful` are the exchanges,
    among the classes moved, that would explain nearly as much.
    """
    best = assign(counts)
    outputs, moved = (best, np.ones(len(best), bool)) if given is None else _moved(counts, np.asarray(given, np.int64), best)
    return Order(outputs, tuple(_doubtful(counts, outputs, moved)))


def _moved(counts: np.ndarray, given: np.ndarray, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`given` with the clear cycles of `best`, and the classes in them [C] bool."""
    outputs, moved = given.copy(), np.zeros(len(given), bool)
    owner = {int(output): row for row, output in enumerate(given)}
    left = set(np.flatnonzero(best != given).tolist())
    while left:
        cycle, todo = set(), [min(left)]
        while todo:  # a class, the one whose output it takes, and so on; a path ends at an output that no class has
            row = todo.pop()
            if row in left and row not in cycle:
                cycle.add(row)
                todo += [owner[int(best[row])]] if int(best[row]) in owner else []
                todo += [other for other in left if best[other] == given[row]]
        rows = np.array(sorted(cycle))
        new, old = counts[rows, best[rows]].sum(), counts[rows, given[rows]].sum()
        if new - old > SURE * np.sqrt(new + old):
            outputs[rows], moved[rows] = best[rows], True
        left -= cycle
    return outputs, moved


def _doubtful(counts: np.ndarray, outputs: np.ndarray, moved: np.ndarray) -> list[tuple[int, int]]:
    own = counts[np.arange(len(outputs)), outputs]
    cross = counts[:, outputs]  # [C, C]: class i, output of class j
    stay, swap = own[:, None] + own[None], cross + cross.T
    close = (stay - swap <= SURE * np.sqrt(stay + swap)) & (moved[:, None] | moved[None])
    pairs = [(int(i), int(j)) for i, j in np.argwhere(np.triu(close, 1))]
    unused = np.setdiff1d(np.arange(counts.shape[1]), outputs)
    if len(unused):
        other = counts[:, unused].max(1)
        pairs += [(int(i), -1) for i in np.flatnonzero(moved & (own - other <= SURE * np.sqrt(own + other)))]
    return pairs
