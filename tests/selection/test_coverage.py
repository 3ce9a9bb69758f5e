"""Choices that cover a class: against enumeration, plain greedy sums, and features taken by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from infoutil_fast import InputError
from infoutil_fast.models import nets
from infoutil_fast.selection.coverage import facility_location, features, herding


@pytest.fixture
def found(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.normal(size=(11, 4))).float()


def covered(found: Tensor, chosen: tuple[int, ...], demand: Tensor) -> float:
    unit = found.double() / found.double().norm(dim=1, keepdim=True)
    return float(((1 + (unit @ unit[list(chosen)].T).amax(1)) / 2 * demand).sum())


def test_greedy_covers_within_its_bound_of_the_best_choice(found: Tensor, rng: np.random.Generator) -> None:
    demand = torch.from_numpy(rng.uniform(0, 3, 11))
    candidates = torch.from_numpy(rng.permutation(11)[:7].copy())
    chosen = facility_location(found, candidates, 3, demand)
    value = covered(found, tuple(chosen.tolist()), demand)
    best = max(covered(found, some, demand) for some in combinations(candidates.tolist(), 3))
    assert (1 - 1 / np.e) * best <= value <= best + 1e-9
    assert len(set(chosen.tolist())) == 3
    assert set(chosen.tolist()) <= set(candidates.tolist())
    first = max(candidates.tolist(), key=lambda j: covered(found, (j,), demand))
    assert covered(found, (int(chosen[0]),), demand) == pytest.approx(covered(found, (first,), demand))


def test_a_shorter_choice_is_the_beginning_of_a_longer_one(found: Tensor) -> None:
    every = torch.arange(11)
    for choose in (facility_location, herding):
        assert torch.equal(choose(found, every, 11)[:4], choose(found, every, 4))
        assert sorted(choose(found, every, 11).tolist()) == list(range(11))


def test_copies_of_one_image_are_taken_one_by_one() -> None:
    same = torch.ones(5, 3)
    for choose in (facility_location, herding):
        assert choose(same, torch.tensor([4, 1, 2]), 3).tolist() == [4, 1, 2]


def test_demand_decides_what_is_covered() -> None:
    found = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1]])
    for i in range(3):
        assert facility_location(found, torch.arange(3), 1, torch.eye(3)[i]).tolist() == [i]


def test_herding_follows_the_mean(found: Tensor) -> None:
    unit = found.double() / found.double().norm(dim=1, keepdim=True)
    chosen: list[int] = []
    for step in range(1, 5):
        left = [j for j in range(11) if j not in chosen]
        chosen.append(min(left, key=lambda j: float((unit[[*chosen, j]].sum(0) / step - unit.mean(0)).norm())))
    assert herding(found, torch.arange(11), 4).tolist() == chosen


@pytest.mark.parametrize("name", ["convnet2-w5", "resnet10-small"])
def test_features_are_what_the_last_layer_sees(name: str) -> None:
    net = nets.build(name, 3, 16).eval()
    x = torch.randn(5, 3, 16, 16)
    seen = features(net, x, batch=2)
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        torch.testing.assert_close(head(seen), net(x), rtol=1e-4, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_what_cannot_be_chosen_is_refused(found: Tensor) -> None:
    for choose in (facility_location, herding):
        with pytest.raises(InputError, match="12 images cannot be chosen among 11"):
            choose(found, torch.arange(11), 12)
    with pytest.raises(InputError, match="no last linear layer"):
        features(nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 4, 4))
