"""Which output is which class: the assignment, and what it takes to believe it."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from infoutil_fast.models.class_order import assign, recover


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (3, 3), (4, 6), (6, 6)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_assignment_is_the_best_of_all(rows: int, columns: int, ties: bool, rng: np.random.Generator) -> None:
    for _ in range(5):
        gain = rng.integers(0, 3, (rows, columns)).astype(float) if ties else rng.normal(size=(rows, columns))
        best = max(gain[np.arange(rows), list(chosen)].sum() for chosen in permutations(range(columns), rows))
        found = assign(gain)
        assert len(set(found.tolist())) == rows
        assert gain[np.arange(rows), found].sum() == pytest.approx(best)


def test_a_large_assignment_agrees_with_scipy(rng: np.random.Generator) -> None:
    scipy = pytest.importorskip("scipy.optimize")
    gain = rng.poisson(0.7, (83, 97)).astype(float)
    assert gain[np.arange(83), assign(gain)].sum() == gain[scipy.linear_sum_assignment(gain, maximize=True)].sum()


def confusion(outputs: np.ndarray, width: int, images: int, accuracy: float, rng: np.random.Generator) -> np.ndarray:
    """Counts of a net that says output `outputs[c]` of class c, else anything."""
    counts = np.zeros((len(outputs), width), np.int64)
    for label, output in enumerate(outputs):
        said = np.where(rng.random(images) < accuracy, output, rng.integers(0, width, images))
        np.add.at(counts, (label, said), 1)
    return counts


@pytest.mark.parametrize("width", [10, 13])
@pytest.mark.parametrize("given", [True, False])
def test_a_permuted_net_is_put_in_order(width: int, given: bool, rng: np.random.Generator) -> None:
    outputs = rng.permutation(width)[:10]
    order = recover(confusion(outputs, width, 60, 0.7, rng), range(10) if given else None)
    assert order.outputs.tolist() == outputs.tolist()
    assert order.doubtful == ()


def test_two_swapped_classes_are_found_and_the_rest_stays_as_given(rng: np.random.Generator) -> None:
    outputs = np.arange(12)
    outputs[[3, 8]] = [8, 3]
    counts = confusion(outputs, 12, 60, 0.8, rng)
    counts[5, [5, 6]], counts[6, [5, 6]] = [20, 24], [23, 20]  # twins that the net cannot tell apart
    order = recover(counts, range(12))
    assert order.outputs.tolist() == outputs.tolist()
    assert order.doubtful == ()


def test_twins_in_an_unknown_order_are_in_doubt(rng: np.random.Generator) -> None:
    counts = confusion(np.arange(7), 7, 60, 0.8, rng)
    counts[5, [5, 6]], counts[6, [5, 6]] = [24, 22], [21, 23]
    assert recover(counts, None).doubtful == ((5, 6),)


def test_outputs_that_never_speak_are_in_doubt(rng: np.random.Generator) -> None:
    counts = confusion(np.arange(6), 6, 50, 0.9, rng)
    counts[2:4], counts[:, 2:4] = 0, 0
    counts[2:4, 0] = 50
    assert (2, 3) in recover(counts, None).doubtful
    order = recover(confusion(np.arange(5), 8, 50, 1.0, rng) * (np.arange(5) != 4)[:, None], None)
    assert (4, -1) in order.doubtful


def test_noise_does_not_move_a_given_order(rng: np.random.Generator) -> None:
    counts = confusion(np.arange(30), 30, 9, 0.25, rng)
    order = recover(counts, range(30))
    assert order.outputs.tolist() == list(range(30))
    assert order.doubtful == ()
