"""Where the images come from: image folders, arrays, CIFAR batches, scikit-learn's digits and the built-in demo set."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infoutil_fast import cifar, drawn, folders
from infoutil_fast.types import InputError

KINDS = (
    "a folder with train/ and val/ of class folders, an .npz with train_x, train_y, test_x and test_y, "
    "CIFAR-10 or CIFAR-100 python batches (folder or .tar.gz), 'digits' or 'demo'"
)
NPZ_KEYS = (("train_x", "train_y", "test_x", "test_y"), ("x_train", "y_train", "x_test", "y_test"))
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Triple = tuple[float, float, float]
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10: tuple[Triple, Triple] = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100: tuple[Triple, Triple] = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))


@dataclass(frozen=True, eq=False)
class Split:
    """N labelled images that are read one by one."""

    names: tuple[str, ...]  # unique and stable: the path relative to the source, or "train/00012"
    labels: np.ndarray  # [N] int64
    read: Callable[[int], np.ndarray]  # position -> [H, W, 3] uint8 RGB, as stored
    boxes: np.ndarray | None = None  # [N, 4] int64 top, left, bottom, right of the object, half-open (demo set only)

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, positions: Iterable[int], size: int, workers: int = 0) -> Tensor:
        """The images at `positions`, in that order, as [n, 3, size, size] uint8 (contiguous).

        The short side is resized to `size` (Pillow's bilinear filter, which antialiases; an image that has that size is not resampled),
        then the centre is cropped. `workers` threads read; 0 reads in this one. The bytes do not depend on `workers`.
        """
        rows = [int(p) for p in positions]
        out = np.empty((len(rows), 3, size, size), np.uint8)

        def fill(row: int) -> None:
            out[row] = _square(self.read(rows[row]), size).transpose(2, 0, 1)

        if workers > 0:
            with ThreadPoolExecutor(workers) as threads:
                list(threads.map(fill, range(len(rows))))
        else:
            for row in range(len(rows)):
                fill(row)
        return torch.from_numpy(out)

    def held(self, positions: Iterable[int], workers: int = 0) -> Split:
        """This split with the images at `positions` decoded once, by `workers` threads, and kept in memory; the others cannot be read."""
        rows = [int(p) for p in positions]
        with ThreadPoolExecutor(max(workers, 1)) as threads:
            kept = dict(zip(rows, threads.map(self.read, rows), strict=True))
        return replace(self, read=kept.__getitem__)

    def of_class(self, label: int) -> np.ndarray:
        """Positions of one class, ascending, [n] int64."""
        return np.flatnonzero(self.labels == label)


@dataclass(frozen=True, eq=False)
class Source:
    """A training and a validation split over the same classes."""

    name: str
    spec: str  # opens it again: an absolute path, or the word for a built-in set
    classes: tuple[str, ...]
    train: Split
    val: Split
    size: int  # default side of a net's input, in pixels
    mean: Triple  # by channel, in [0, 1] units
    std: Triple

    def pool(self, label: int, count: int, seed: int) -> np.ndarray:
        """`count` positions of a class in `train`, ascending, drawn without replacement by (seed, label); all of them if there are fewer.

        Only raw Philox words are used, whose stream numpy guarantees, so the draw is the same on every platform and version. A smaller pool
        of the same seed is a subset of a larger one.
        """
        if count < 1:
            raise InputError(f"a pool has at least 1 image, not {count}")
        positions = self.train.of_class(label)
        words = np.random.Philox(key=np.array([seed % 2**64, label], np.uint64)).random_raw(len(positions))
        return np.sort(positions[np.argsort(words, kind="stable")[:count]])


def open_source(spec: str | Path) -> Source:
    """The source that `spec` names: `KINDS` says what can be given. The words "demo" and "digits" win over files of that name ("./demo").

    Raises `InputError` when there is no such source or its files do not fit together.
    """
    if spec == "demo":
        return _demo()
    if spec == "digits":
        return _digits()
    path = Path(os.path.abspath(Path(spec).expanduser()))
    if path.is_file() and path.suffix.lower() == ".npz":
        return _npz(path)
    if path.is_file() and path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return _cifar_batches(path)
    if path.is_dir():
        batches = (path / "data_batch_1").is_file() or (path / "train").is_file()
        return _cifar_batches(path) if batches else _folder(path)
    what = "is no kind of source" if path.exists() else "does not exist"
    raise InputError(f"{str(spec)!r} {what}; a source is {KINDS}")


def _square(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] uint8 -> [size, size, 3]: short side to `size`, centre crop."""
    height, width = image.shape[:2]
    short = min(height, width)
    if short != size:
        height, width = height * size // short, width * size // short
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _default_size(short_sides: Sequence[int]) -> int:
    """224 where the median short side is 160 px or more, else the nearest of 32, 64, 96 and 128."""
    median = float(np.median(short_sides))
    return 224 if median >= 160 else min((32, 64, 96, 128), key=lambda size: abs(size - median))


def _folder(root: Path) -> Source:
    classes, train, val = folders.scan(root)
    names = train[0]
    sampled = np.linspace(0, len(names) - 1, min(16, len(names))).astype(int)
    size = _default_size([folders.short_side(root / names[i]) for i in sampled])
    train_split, val_split = (Split(names, labels, partial(folders.read, root, names)) for names, labels in (train, val))
    return Source(root.name, str(root), classes, train_split, val_split, size, *IMAGENET)


# Arrays


def _npz(path: Path) -> Source:
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no .npz file (no zip archive)")
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = next((keys for keys in NPZ_KEYS if set(keys) <= set(file.files)), None)
            if keys is None:
                wanted = " or ".join(", ".join(keys) for keys in NPZ_KEYS)
                raise InputError(f"{path} has the keys {', '.join(file.files) or '(none)'}; needed are {wanted}")
            train_x, train_y, val_x, val_y = (file[key] for key in keys)
            names = file["class_names"] if "class_names" in file.files else None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {error}") from error
    classes = None if names is None else tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names.ravel())
    return _arrays(path.stem, str(path), classes, (train_x, train_y), (val_x, val_y))


def _arrays(
    name: str,
    spec: str,
    classes: tuple[str, ...] | None,
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    boxes: tuple[np.ndarray, np.ndarray] | None = None,
    constants: tuple[Triple, Triple] | None = None,
) -> Source:
    """A source over images held in memory, whose shapes and labels are checked here."""
    train_x, train_y = _checked(spec, "training", *train)
    val_x, val_y = _checked(spec, "validation", *val)
    top = int(max(train_y.max(), val_y.max()))
    if top >= (len(train_y) if classes is None else len(classes)):
        there = f"{len(train_y)} training images" if classes is None else f"{len(classes)} class names"
        raise InputError(f"{spec} has the label {top} but only {there}")
    if classes is None:
        classes = tuple(str(label) for label in range(top + 1))
    if absent := sorted(set(range(len(classes))) - set(train_y.tolist())):
        raise InputError(f"{spec} has no training image of class {classes[absent[0]]!r} ({len(absent)} such)")
    size = _default_size([min(train_x.shape[1:3])])
    train_boxes, val_boxes = boxes or (None, None)
    mean, std = constants or _mean_std(name, classes, train_x)
    train_split, val_split = _array_split("train", train_x, train_y, train_boxes), _array_split("val", val_x, val_y, val_boxes)
    return Source(name, spec, classes, train_split, val_split, size, mean, std)


def _array_split(part: str, images: np.ndarray, labels: np.ndarray, boxes: np.ndarray | None) -> Split:
    return Split(tuple(f"{part}/{i:05d}" for i in range(len(images))), labels, partial(_read_array, images), boxes)


def _checked(spec: str, what: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images as a view [N, H, W, 3 or 1] uint8, labels [N] int64."""
    shapes = f"{what} images {list(images.shape)} {images.dtype}, labels {list(labels.shape)} {labels.dtype}"
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 3:
        images = images[..., None]
    fits = images.ndim == 4 and images.shape[3] in (1, 3) and images.dtype == np.uint8 and images.size > 0
    if not fits or labels.shape[:1] != (len(images),) or labels.size != len(images) or labels.dtype.kind not in "iu":
        raise InputError(f"{spec}: {shapes}; needed are uint8 images [N, H, W, 3], [N, 3, H, W] or [N, H, W] and integer labels [N], N > 0")
    labels = labels.reshape(-1).astype(np.int64)
    if labels.min() < 0:
        raise InputError(f"{spec}: {what} label {labels.min()} is negative")
    return images, labels


def _read_array(images: np.ndarray, position: int) -> np.ndarray:
    image = images[position]  # [H, W, 3 or 1]
    return np.array(np.broadcast_to(image, (*image.shape[:2], 3)), order="C")


def _mean_std(name: str, classes: Sequence[str], images: np.ndarray) -> tuple[Triple, Triple]:
    """The published constants for CIFAR (known by class names, or by file name and number of classes), else those of `images`."""
    if images.shape[1:] == (32, 32, 3):
        cifar = "cifar" in name.lower()
        if tuple(classes) == CIFAR10_CLASSES or (cifar and len(classes) == 10):
            return CIFAR10
        if len(classes) == 100 and (cifar or (classes[0], classes[-1]) == ("apple", "worm")):
            return CIFAR100
    counts = np.zeros((3, 256), np.int64)  # exact sums, whatever the order
    for start in range(0, len(images), 512):  # bincount makes int64 copies: a few images at a time
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 512, ..., channel % images.shape[3]].ravel(), minlength=256)
    value = np.arange(256) / 255
    mean = (counts * value).sum(1) / counts.sum(1)
    std = np.sqrt((counts * (value - mean[:, None]) ** 2).sum(1) / counts.sum(1)).clip(1 / 255)
    return (float(mean[0]), float(mean[1]), float(mean[2])), (float(std[0]), float(std[1]), float(std[2]))


def _cifar_batches(path: Path) -> Source:
    classes, train, val = cifar.read(path)
    return _arrays(f"cifar{len(classes)}", str(path), classes, train, val, constants=CIFAR10 if len(classes) == 10 else CIFAR100)


def _demo() -> Source:
    (train_x, train_y, train_boxes), (val_x, val_y, val_boxes) = drawn.draw("train"), drawn.draw("val")
    return _arrays("demo", "demo", drawn.CLASSES, (train_x, train_y), (val_x, val_y), (train_boxes, val_boxes))


def _digits() -> Source:
    """scikit-learn's 1797 digits, 8x8 -> 32x32 (Pillow's bicubic filter), a fifth of each class for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the source 'digits' needs scikit-learn (pip install scikit-learn)") from error
    bunch = load_digits()
    small = (bunch.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8], 0..16 before
    images = np.stack([np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC)) for i in small])
    words = np.random.Philox(key=0).random_raw(len(images))
    held = np.zeros(len(images), bool)
    for label in range(10):
        rows = np.flatnonzero(bunch.target == label)
        held[rows[np.argsort(words[rows], kind="stable")[: len(rows) // 5]]] = True
    return _arrays("digits", "digits", None, (images[~held], bunch.target[~held]), (images[held], bunch.target[held]))
