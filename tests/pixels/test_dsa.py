"""DSA and whitening: each group against its definition, gradients, and draws that touch no other randomness."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from infoutil_fast.pixels import dsa
from infoutil_fast.pixels.views import View, Zca
from infoutil_fast.types import InputError

SHAPES = [(1, 3, 7, 7), (5, 3, 16, 16), (3, 1, 9, 14), (4, 3, 1, 1), (0, 3, 8, 8)]


def images(shape: tuple[int, ...]) -> Tensor:
    """Sliced, so not contiguous."""
    n, c, h, w = shape
    return torch.randn(n, c, h + 2, w + 3, dtype=torch.float64)[:, :, 1:-1, :w]


def colour(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    x = x + (u[0] - 0.5)
    x = (x - x.mean(0)) * 2 * u[1] + x.mean(0)
    return (x - x.mean()) * (u[2] + 0.5) + x.mean()


def crop(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    (_, h, w), out = x.shape, np.zeros_like(x)
    dy, dx = (int(u[i] * (2 * int(s / 8 + 0.5) + 1)) - int(s / 8 + 0.5) for i, s in enumerate((h, w)))
    for y in range(h):
        for z in range(w):
            if 0 <= y + dy < h and 0 <= z + dx < w:
                out[:, y, z] = x[:, y + dy, z + dx]
    return out


def bilinear(x: np.ndarray, y: float, z: float) -> np.ndarray:
    total = np.zeros(len(x))
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(z), math.floor(z) + 1):
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                total += x[:, row, column] * (1 - abs(y - row)) * (1 - abs(z - column))
    return total


def warp(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    _, h, w = x.shape
    out = np.zeros_like(x)
    for row in range(h):
        for column in range(w):
            across, down = matrix @ [(2 * column + 1) / w - 1, (2 * row + 1) / h - 1]
            out[:, row, column] = bilinear(x, ((down + 1) * h - 1) / 2, ((across + 1) * w - 1) / 2)
    return out


def scale(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    return warp(x, np.diag(1 / 1.2 + u[:2] * (1.2 - 1 / 1.2)))


def rotate(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    a = math.radians(15) * (2 * u[0] - 1)
    return warp(x, np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]))


def flip(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    return x[:, :, ::-1] if u[0] < 0.5 else x


DEFINITIONS = {"color": colour, "crop": crop, "flip": flip, "scale": scale, "rotate": rotate}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", DEFINITIONS)
def test_group_is_its_definition(group, shape, seed):
    x = images(shape)
    drawn = dsa.draw(group, len(x), Generator().manual_seed(seed))
    out = dsa.apply(x, drawn)
    assert out.shape == x.shape
    for own, u, got in zip(x.numpy(), drawn.u.numpy(), out.numpy(), strict=True):
        np.testing.assert_allclose(got, DEFINITIONS[group](own, u), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_cutout_zeroes_one_box_of_at_most_half_the_side(shape, seed):
    x = images(shape).abs() + 1
    out = dsa.apply(x, dsa.draw("cutout", len(x), Generator().manual_seed(seed)))
    for own, got in zip(x, out, strict=True):
        rows, columns = torch.nonzero(got[0] == 0, as_tuple=True)
        assert len(rows) > 0
        (top, left), (bottom, right) = (rows.min(), columns.min()), (rows.max(), columns.max())
        expected = own.clone()
        expected[:, top : bottom + 1, left : right + 1] = 0
        assert torch.equal(got, expected)
        assert bottom - top < int(shape[2] / 2 + 0.5)
        assert right - left < int(shape[3] / 2 + 0.5)


@pytest.mark.parametrize("group", dsa.GROUPS)
def test_groups_are_differentiable_twice(group, seed):
    x = images((2, 3, 5, 6)).requires_grad_()
    drawn = dsa.draw(group, 2, Generator().manual_seed(seed))
    torch.autograd.gradcheck(lambda v: dsa.apply(v, drawn), x)
    torch.autograd.gradgradcheck(lambda v: dsa.apply(v, drawn).square(), x)


def test_draws_come_from_the_generator_alone(seed):
    x = images((6, 3, 8, 8))
    before = torch.get_rng_state()
    runs = []
    for _ in range(2):
        generator = Generator().manual_seed(seed)
        runs.append([dsa.apply(x, dsa.draw(dsa.STRATEGY, 6, generator)) for _ in range(20)])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_all_groups_are_equally_likely(seed):
    generator = Generator().manual_seed(seed)
    seen = Counter(dsa.draw(dsa.STRATEGY, 1, generator).group for _ in range(3000))
    assert set(seen) == set(dsa.GROUPS)
    assert all(380 < count < 620 for count in seen.values()), "500 expected, deviation 20"


def test_siamese_images_share_one_draw(seed):
    one = images((1, 3, 12, 12))
    generator = Generator().manual_seed(seed)
    for group in dsa.GROUPS:
        out = dsa.apply(one.expand(4, -1, -1, -1), dsa.draw(group, 4, generator, siamese=True))
        assert all(torch.equal(out[0], other) for other in out[1:])


def test_no_strategy_changes_nothing_and_unknown_ones_are_refused(seed):
    x = images((2, 3, 4, 4))
    assert dsa.apply(x, dsa.draw("", 2, Generator().manual_seed(seed))) is x
    with pytest.raises(InputError, match="color, crop"):
        dsa.groups("color_blur")
    with pytest.raises(InputError, match="for 3 images, there are 2"):
        dsa.apply(x, dsa.draw("flip", 3, Generator()))


def test_whitening_makes_the_covariance_what_it_should_be_and_comes_back(tmp_path):
    mixing = torch.randn(27, 27, dtype=torch.float64)
    x = (torch.randn(500, 27, dtype=torch.float64) @ mixing).view(500, 3, 3, 3).float()
    zca = Zca.fit(x, eps=0.1)
    white = zca.apply(x).double()
    variance = torch.linalg.eigvalsh(x.flatten(1).double().T.cov())
    expected = (variance / (variance + 0.1)).sort()[0]
    torch.testing.assert_close(torch.linalg.eigvalsh(white.flatten(1).T.cov()), expected, rtol=1e-3, atol=1e-3)
    assert white.mean((0,)).abs().max() < 1e-4
    torch.testing.assert_close(zca.matrix, zca.matrix.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(zca.invert(white.float()), x, rtol=1e-3, atol=1e-3)
    zca.save(tmp_path / "zca.safetensors")
    assert torch.equal(Zca.load(tmp_path / "zca.safetensors").inverse, zca.inverse)
    with pytest.raises(InputError, match="at least 2 images"):
        Zca.fit(x[:1])


@pytest.mark.parametrize("whitened", [False, True])
def test_a_view_gives_back_the_pixels(whitened):
    pixels = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8)
    view = View((0.401, 0.501, 0.601), (0.2, 0.3, 0.1), Zca.fit(pixels / 255) if whitened else None)
    assert torch.equal(view.unsee(view.see(pixels)), pixels)
    far = view.unsee(view.see(pixels) * 1e4)  # clipped, but for the one whitened value in some thousands that is next to nothing
    assert ((far != 0) & (far != 255)).sum() < 0.01 * far.numel()
