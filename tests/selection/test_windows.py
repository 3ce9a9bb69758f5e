"""Windows: pooling, noise, placing, cutting, ranking, stitching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from infoutil_fast import InputError
from infoutil_fast.data import Split
from infoutil_fast.data.windows import random_windows, take, whole_windows, windows_at
from infoutil_fast.runtime.seeds import file_generator
from infoutil_fast.selection.ranking import best_of_image, noisy_cells, pool_heat, rank, smallest_width, stitch


def split_of(*shapes: tuple[int, int]) -> Split:
    images = [np.random.default_rng().integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in shapes]
    return Split(tuple(str(i) for i in range(len(images))), np.zeros(len(images), np.int64), images.__getitem__)


def generators(n: int) -> list[torch.Generator]:
    return [file_generator(0, 1, str(i)) for i in range(n)]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pooled_cells_are_means_of_blocks(width):
    heat = torch.randn(3, 4, 4)
    pooled = pool_heat(heat, width)
    assert pooled.shape == (3, 5 - width, 5 - width)
    for y in range(5 - width):
        for x in range(5 - width):
            torch.testing.assert_close(pooled[:, y, x], heat[:, y : y + width, x : x + width].mean((1, 2)))


def test_the_smallest_window_that_holds_its_share_is_taken():
    heat = torch.randn(40, 4, 4)
    heat[0], heat[1], heat[2] = -1.0, 0.0, -0.5
    heat[1, 2, 1], heat[2, 0, 0], heat[2, 3, 3] = 1.0, 1.0, 1.0  # a single patch; two corners
    found = smallest_width(heat, 0.8, (2, 3, 4))
    assert found[:3].tolist() == [4, 2, 4]
    for image, width in zip(heat.clamp_min(0).double(), found.tolist(), strict=True):
        held = {w: max(float(image[y : y + w, x : x + w].sum()) for y in range(5 - w) for x in range(5 - w)) for w in (2, 3)}
        wanted = [w for w in (2, 3) if image.sum() > 0 and held[w] >= 0.8 * float(image.sum())]
        assert width == (wanted or [4])[0]


def test_last_crop_is_the_clean_one_and_no_noise_makes_all_alike():
    pooled = torch.randn(50, 3, 3)
    best = pooled.flatten(1).argmax(1)
    noisy = noisy_cells(pooled, 5, 2.0, generators(50))
    assert torch.equal(noisy[:, -1], best)
    assert (noisy[:, :-1] != best[:, None]).any()
    assert torch.equal(noisy_cells(pooled, 5, 0.0, generators(50)), best[:, None].expand(50, 5))


def test_noise_has_the_scale_of_the_pooled_map():
    """With two cells one deviation apart, sigma = 2 std, the worse one wins with probability P(N(0, 2 (2 s)^2) > 2 s)."""
    pooled = torch.tensor([[[1.0, -1.0]]]).repeat(4000, 1, 1)  # std 1, difference 2, noise of the difference sqrt(2) * 2
    wins = (noisy_cells(pooled, 2, 2.0, [file_generator(0, 0, str(torch.rand(()).item())) for _ in range(4000)])[:, 0] == 1).float().mean()
    expected = 0.5 * (1 - torch.erf(torch.tensor(2 / (2 * 2**0.5) / 2**0.5)))
    assert abs(float(wins - expected)) < 0.04


def test_distinct_crops_differ_until_cells_run_out():
    cells = noisy_cells(torch.randn(20, 2, 2), 5, 2.0, generators(20), distinct=True)
    assert all(len(set(row.tolist())) == 4 for row in cells)


def test_noise_of_a_file_does_not_depend_on_its_batch():
    pooled = torch.randn(6, 3, 3)
    together = noisy_cells(pooled, 5, 2.0, generators(6))
    alone = noisy_cells(pooled[4:5], 5, 2.0, [file_generator(0, 1, "4")])
    assert torch.equal(together[4:5], alone)


def test_windows_lie_on_the_centred_square():
    split = split_of((40, 64), (64, 40), (37, 53))
    found = windows_at(split, np.arange(3), torch.tensor([[0, 8], [0, 8], [0, 8]]), 4, 2)
    assert found.size.tolist() == [20, 20, 20, 20, 18, 18]
    assert found.top.tolist() == [0, 20, 12, 32, 0, 18]
    assert found.left.tolist() == [12, 32, 0, 20, 8, 26]
    for i, position in enumerate(found.image):
        h, w = split.read(int(position)).shape[:2]
        assert found.top[i] >= 0
        assert found.top[i] + found.size[i] <= h
        assert found.left[i] >= 0
        assert found.left[i] + found.size[i] <= w


def test_random_windows_lie_inside_and_have_the_area_asked_for():
    split = split_of((31, 57), (32, 32))
    found = random_windows(split, np.arange(2), 40, generators(2), scale=(0.25, 0.5))
    for i, position in enumerate(found.image):
        h, w = split.read(int(position)).shape[:2]
        assert found.top[i] >= 0
        assert found.left[i] >= 0
        assert found.top[i] + found.size[i] <= h
        assert found.left[i] + found.size[i] <= w
        assert 0.22 < found.size[i] ** 2 / (h * w) < 0.54


@pytest.mark.parametrize("workers", [0, 3])
def test_take_cuts_the_stored_pixels(workers):
    split = split_of((20, 30), (25, 25))
    found = windows_at(split, np.array([0, 1]), torch.tensor([[4, 0], [8, 4]]), 4, 2)
    crops = take(split, found, 7, workers)
    for i in range(len(found)):
        top, left, side = found.top[i], found.left[i], found.size[i]
        pixels = split.read(int(found.image[i]))[top : top + side, left : left + side]
        expected = np.asarray(Image.fromarray(pixels).resize((7, 7), Image.Resampling.BILINEAR))
        assert np.array_equal(crops[i].permute(1, 2, 0).numpy(), expected)


def test_whole_windows_of_the_right_size_are_not_resampled():
    split = split_of((9, 13))
    crop = take(split, whole_windows(split, np.array([0])), 9)
    assert np.array_equal(crop[0].permute(1, 2, 0).numpy(), split.read(0)[:, 2:11])


def test_rank_by_direction_with_ties_in_order():
    scores = torch.tensor([3.0, 1.0, 3.0, 2.0, 5.0])
    assert rank(scores, 3, "high").tolist() == [4, 0, 2]
    assert rank(scores, 2, "low").tolist() == [1, 3]
    assert rank(scores, 1, "medium").tolist() == [0]
    assert rank(scores, 3, "medium").tolist() == [0, 3, 2], "the middle first, then outwards"
    with pytest.raises(InputError, match="known: high, low, medium"):
        rank(scores, 1, "up")


def test_best_of_image_by_direction():
    scores = torch.tensor([1.0, 9.0, 4.0, 7.0, 7.0, 2.0])
    assert best_of_image(scores, 3, "high").tolist() == [1, 3]
    assert best_of_image(scores, 3, "low").tolist() == [0, 5]


def test_stitch_is_row_by_row():
    crops = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 2, 2)
    image = stitch(crops, 2)
    assert image.shape == (2, 3, 4, 4)
    assert image[1, 0, ::2, ::2].tolist() == [[4, 5], [6, 7]]
    assert torch.equal(stitch(crops, 1), crops)
