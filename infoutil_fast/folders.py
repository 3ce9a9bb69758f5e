"""Image folders: the images of train/ and val/, a folder for each class, and the decoding of one file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from infoutil_fast.types import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
VAL_FOLDERS = ("val", "validation", "test")  # the first that is there

Found = tuple[tuple[str, ...], np.ndarray]  # file names relative to the root, sorted within each class; labels [N] int64


def scan(root: Path) -> tuple[tuple[str, ...], Found, Found]:
    """Class names (the sorted folders in train/), training and validation files; a class folder may have folders of its own.

    Names that begin with a dot are passed over. Raises `InputError` for a missing split, an empty class, or a validation class that train/
    lacks.
    """
    inside = sorted(entry.name for entry in root.iterdir())
    val = next((name for name in VAL_FOLDERS if (root / name).is_dir()), None)
    if val is None or not (root / "train").is_dir():
        there = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "") or "nothing"
        raise InputError(f"{root} needs train/ and val/ (or validation/, test/) with a folder for each class; it has {there}")
    classes = _class_folders(root / "train")
    if strange := sorted(set(_class_folders(root / val)) - set(classes)):
        raise InputError(f"{root / val} has class {strange[0]!r}, which train/ has not ({len(strange)} such; train/ has {len(classes)})")
    return classes, _find(root, "train", classes), _find(root, val, classes)


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        raise InputError(f"{folder} has no class folders")
    return names


def _find(root: Path, part: str, classes: Sequence[str]) -> Found:
    names: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        if not (root / part / class_name).is_dir():
            continue  # a validation split may lack classes
        found = sorted(_image_names(root, f"{part}/{class_name}"))
        if not found:
            raise InputError(f"class {class_name!r} has no image in {root / part / class_name} (known: {' '.join(EXTENSIONS)})")
        names += found
        labels += [label] * len(found)
    return tuple(names), np.array(labels, np.int64)


def _image_names(root: Path, under: str) -> Iterator[str]:
    for folder, _, files in os.walk(root / under, followlinks=True):
        relative = Path(folder).relative_to(root).as_posix()
        yield from (f"{relative}/{name}" for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith("."))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all of them on broken files
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def short_side(path: Path) -> int:
    """In px, from the file's header."""
    with _opened(path) as image:
        return min(image.size)


def read(root: Path, names: Sequence[str], position: int) -> np.ndarray:
    """One image as [H, W, 3] uint8 RGB, turned upright as its EXIF tag says; grey is repeated and alpha is dropped.

    Raises `InputError` with the file's name when it cannot be decoded.
    """
    with _opened(root / names[position]) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if "transparency" in upright.info:  # a palette with alpha
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"))
