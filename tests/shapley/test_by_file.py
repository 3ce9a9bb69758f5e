"""Maps of files: a redrawn design gives a file the same map whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, nn

from infoutil_fast.shapley.by_file import maps_by_file
from infoutil_fast.shapley.maps import PatchShapley


def generators(seeds: list[int]) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("design", ["captum", "leverage", "border_hadamard"])
def test_a_map_does_not_depend_on_what_stands_beside_it(design):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
    images, targets = torch.randn(5, 3, 9, 7), torch.randint(0, 4, (5,))
    plan = PatchShapley(net, (3, 9, 7), grid=2, design=design, evaluations=None if design != "captum" else 7, dtype=torch.float32)
    whole = maps_by_file(plan, images, targets, generators([3, 1, 4, 1, 5]))
    order = torch.tensor([4, 2, 0])
    some = maps_by_file(plan, images[order], targets[order], generators([5, 4, 3]))
    torch.testing.assert_close(some, whole[order], atol=0 if design == "captum" else 1e-6, rtol=0)
    if design == "captum":
        alone = plan(images[1:2], targets[1:2], generator=Generator().manual_seed(1))
        assert torch.equal(alone, whole[1:2])
        assert not torch.equal(maps_by_file(plan, images, targets, generators([0, 0, 0, 0, 0])), whole)


@pytest.mark.parametrize("design", ["captum", "exact"])
def test_no_images_give_no_maps(design):
    plan = PatchShapley(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval(), (3, 4, 4), grid=2, design=design, dtype=torch.float32)
    found = maps_by_file(plan, torch.empty(0, 3, 4, 4), torch.empty(0, dtype=torch.int64), [])
    assert found.shape == (0, 2, 2)
