"""The demo set: small pictures that the package draws itself, each with one textured object on a cluttered background.

The class is the object's shape and texture; background, clutter, colours, place, scale and tilt are drawn without knowing it. Only Philox
words and IEEE +, -, *, / and square roots of single elements are used, no sine and no matrix product, so the bytes are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, reduce

import numpy as np

CLASSES = ("striped disc", "dotted square", "checked triangle", "ring", "cross", "star", "crescent", "heart")
COUNTS = {"train": 250, "val": 50}  # images of each class
SIZE = 64  # side of an image, px
TILE = 32  # side of the tile that the object is drawn on, px
FINE = 4  # samples per pixel and axis in a tile
STREAMS = {("train", "background"): 1, ("train", "object"): 2, ("val", "background"): 3, ("val", "object"): 4}


@lru_cache(maxsize=2)
def draw(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The whole split: images [N, 64, 64, 3] uint8, labels [N] int64 (0, 1, ... 7, 0, 1, ...), boxes [N, 4] int64. Cached and read-only."""
    labels = np.arange(COUNTS[split] * len(CLASSES)) % len(CLASSES)
    images = np.empty((len(labels), SIZE, SIZE, 3), np.uint8)
    boxes = np.empty((len(labels), 4), np.int64)
    for index, label in enumerate(labels):
        images[index], boxes[index] = paint(split, index, int(label))
    for array in (images, labels, boxes):
        array.flags.writeable = False
    return images, labels, boxes


def paint(split: str, index: int, label: int, bare: bool = False) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """One picture [64, 64, 3] uint8 and the box of its object: top, left, bottom, right in px, half-open, as tight as it can be.

    `bare` leaves the object out: the same picture outside the box.
    """
    words = _Words(STREAMS[split, "background"], index)
    lines, blobs, noise = words(3)
    canvas = _field(words(3 * 16 + 2))
    for _ in range(int(7 * lines)):
        _line(canvas, words(8))
    for _ in range(int(12 * blobs)):
        _blob(canvas, words(8))
    words = _Words(STREAMS[split, "object"], index)
    cover, colours = _object(label, words(11))
    touched = cover[0] + cover[1] + cover[2] > 0
    rows, columns = np.flatnonzero(touched.any(1)), np.flatnonzero(touched.any(0))
    cover = cover[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # [3, h, w]
    height, width = cover.shape[1:]
    top, left = (int(u * (SIZE - side + 1)) for u, side in zip(words(2), (height, width), strict=True))
    if not bare:
        _place(canvas[top : top + height, left : left + width], cover, colours)
    four = words.bytes(4 * canvas.size).astype(np.int16).reshape(4, *canvas.shape)
    grain = four[0] + four[1] + four[2] + four[3] - 510  # bell-shaped, standard deviation 148
    return (canvas * 255 + grain * (0.06 * noise) + 0.5).clip(0, 255).astype(np.uint8), (top, left, top + height, left + width)


class _Words:
    """Uniform numbers in [0, 1) from raw Philox words: the stream of (stream, index)."""

    def __init__(self, stream: int, index: int):
        self.philox = np.random.Philox(key=np.array([stream, index], np.uint64))

    def __call__(self, count: int) -> np.ndarray:
        return (self.philox.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def bytes(self, count: int) -> np.ndarray:
        return self.philox.random_raw(count // 8).astype("<u8").view(np.uint8)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[...] each in [0, 1] -> [..., 3] in [0, 1]; hues wrap."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6
    return value[..., None] * (1 - saturation[..., None] * np.minimum(np.minimum(k, 4 - k), 1).clip(0))


def _added(terms: Iterable[np.ndarray]) -> np.ndarray:
    """The sum, first to last: the order is fixed, as it is not in `np.sum`."""
    return reduce(np.add, terms)


# The background


def _ramp() -> np.ndarray:
    """[4, 64]: how much each of four control points weighs at each pixel (smoothstep between neighbours)."""
    at = (np.arange(SIZE) + 0.5) / SIZE * 3
    near = (1 - np.abs(at - np.arange(4.0)[:, None])).clip(0)
    return near * near * (3 - 2 * near)


RAMP = _ramp()
Y, X = np.mgrid[0:SIZE, 0:SIZE] + 0.5  # pixel centres, [64, 64] each


def _field(u: np.ndarray) -> np.ndarray:
    """A colour field [64, 64, 3] from 4 x 4 random colours of one family, anything from plain to patchy."""
    hue, saturation, value = u[1] * u[2:].reshape(3, 4, 4) + (1 - u[1]) * u[2::16, None, None]
    points = _rgb(u[0] + 0.3 * hue, 0.1 + 0.4 * saturation, 0.25 + 0.5 * value)  # [4, 4, 3]
    across = _added(RAMP[k, :, None, None] * points[k] for k in range(4))  # [64, 4, 3]
    return _added(RAMP[k, None, :, None] * across[:, None, k] for k in range(4))


def _blend(canvas: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    canvas += cover[..., None] * (colour - canvas)


def _line(canvas: np.ndarray, u: np.ndarray) -> None:
    """An antialiased straight line right across the canvas."""
    (y, x), (dy, dx) = u[:2] * SIZE, u[2:4] - 0.5
    distance = np.abs((Y - y) * dx - (X - x) * dy) / np.sqrt(dx * dx + dy * dy + 1e-6)
    colour = _rgb(u[4], 0.1 + 0.5 * u[5], 0.15 + 0.65 * u[6])
    _blend(canvas, 0.75 * (0.9 + 0.8 * u[7] - distance).clip(0, 1), colour)


def _blob(canvas: np.ndarray, u: np.ndarray) -> None:
    """A small antialiased diamond, disc or square-ish blob."""
    y, x, radius = u[0] * SIZE, u[1] * SIZE, 1.5 + 2.5 * u[2]
    near = np.s_[max(0, int(y) - 5) : int(y) + 6, max(0, int(x) - 5) : int(x) + 6]  # the largest one reaches 4.5 px
    dy, dx = np.abs(Y[near] - y), np.abs(X[near] - x)
    distance = (dy + dx, np.sqrt(dy * dy + dx * dx), np.maximum(dy, dx))[int(3 * u[3])]
    colour = _rgb(u[4], 0.2 + 0.7 * u[5], 0.2 + 0.65 * u[6])
    _blend(canvas[near], (0.6 + 0.4 * u[7]) * (radius + 0.5 - distance).clip(0, 1), colour)


# The objects: (inside, second colour) on unit coordinates, y down

SAMPLES = (np.mgrid[0 : TILE * FINE, 0 : TILE * FINE] + 0.5) / FINE - TILE / 2  # [2, 128, 128], px from the tile's centre


def _odd(x: np.ndarray) -> np.ndarray:
    return np.floor(x) % 2 == 1


def _dots(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (y - np.floor(y) - 0.5) ** 2 + (x - np.floor(x) - 0.5) ** 2 < 0.1


def _star(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Five-pointed: inside at least four of the five half-planes of the pentagram's lines."""
    normals = ((1.0, 0.0), (0.30901699, 0.95105652), (-0.80901699, 0.58778525), (-0.80901699, -0.58778525), (0.30901699, -0.95105652))
    return np.stack([y * a + x * b < 0.36 for a, b in normals]).sum(0) >= 4


def _heart(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    y, x = 0.15 - 1.15 * y, 1.15 * x
    ring = x * x + y * y - 1
    return ring * ring * ring < x * x * y * y * y


Shape = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
SHAPES: tuple[Shape, ...] = (
    lambda y, x: (y * y + x * x < 1, _odd(2.5 * y + 0.25)),
    lambda y, x: (np.maximum(np.abs(y), np.abs(x)) < 0.85, _dots(1.76 * y + 0.5, 1.76 * x + 0.5)),
    lambda y, x: ((y < 0.75) & (2 * np.abs(x) < y + 1.15), _odd(2.2 * y) ^ _odd(2.2 * x + 0.5)),
    lambda y, x: ((y * y + x * x < 1) & (y * y + x * x > 0.25), np.zeros_like(y, bool)),
    lambda y, x: (
        (np.minimum(np.abs(y), np.abs(x)) < 0.32) & (np.maximum(np.abs(y), np.abs(x)) < 0.98),
        np.minimum(np.abs(y), np.abs(x)) < 0.11,
    ),
    lambda y, x: (_star(y, x), y * y + x * x < 0.1),
    lambda y, x: ((y * y + x * x < 1) & (y * y + (x - 0.5) * (x - 0.5) > 0.55), np.zeros_like(y, bool)),
    lambda y, x: (_heart(y, x), (y + 0.3) * (y + 0.3) + (x + 0.45) * (x + 0.45) < 0.06),
)


def _object(label: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel of the tile is rim, first and second colour, [3, 32, 32] in [0, 1]; and these three colours [3, 3]."""
    radius, tilt = 6.8 + 2.8 * u[0], 0.3 * (u[1] - 0.5)
    cosine, sine = (1 - tilt * tilt) / (1 + tilt * tilt), 2 * tilt / (1 + tilt * tilt)
    y, x = (SAMPLES + (u[2:4] - 0.5)[:, None, None]) / radius
    inside, second = SHAPES[label](cosine * y - sine * x, sine * y + cosine * x)
    rim = inside
    for step in range(5):  # grows the shape by five samples, 1.25 px, into an octagon
        grown = rim.copy()
        grown[1:] |= rim[:-1]
        grown[:-1] |= rim[1:]
        wide = grown if step % 2 else rim
        grown[:, 1:] |= wide[:, :-1]
        grown[:, :-1] |= wide[:, 1:]
        rim = grown
    parts = np.stack([rim & ~inside, inside & ~second, inside & second]).astype(np.uint8)
    parts = _added(parts[:, k::FINE] for k in range(FINE))
    cover = _added(parts[:, :, k::FINE] for k in range(FINE)) / FINE**2  # [3, 32, 32]
    hue = np.array([u[4], u[5], u[5] + 0.25 + 0.5 * u[6]])
    saturation = np.array([0.06, 0.6 + 0.4 * u[7], 0.4 + 0.5 * u[8]])
    value = np.array([1, 0.75 + 0.25 * u[9], 0.15 + 0.25 * u[10]])  # light rim, bright first and dark second colour
    return cover, _rgb(hue, saturation, value)


def _place(canvas: np.ndarray, cover: np.ndarray, colours: np.ndarray) -> None:
    """Blends the object of cover [3, h, w] into a view [h, w, 3] of the canvas, a little brighter at its top."""
    shade = 1.1 - 0.25 * np.arange(len(canvas))[:, None, None] / len(canvas)
    canvas *= 1 - (cover[0] + cover[1] + cover[2])[..., None]
    for k in range(3):
        canvas += cover[k, ..., None] * np.minimum(colours[k] * shade, 1)
