"""Image folders: the images of train/ and val/, a folder for each class, and Tiny-ImageNet's list of validation labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from infoutil_fast.data import decode
from infoutil_fast.data.imagenet_subsets import subset
from infoutil_fast.data.source import IMAGENET, Source, Split, default_size
from infoutil_fast.types import InputError, UnreadableError

VAL_FOLDERS = ("val", "validation", "test")  # the first that is there
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet: a line for each file of val/images/, its name and its class first

Found = tuple[tuple[str, ...], np.ndarray]  # file names relative to the root, sorted within each class; labels [N] int64


def open_folder(root: Path, name: str | None = None) -> Source:
    """The source in a folder; `name` one of the lists of `subsets`: only its classes, in the order of their ids.

    Raises `InputError` when the folder is no source or lacks a class of the list, or when none of its images can be decoded.
    """
    full, wanted = subset(name) if name else (None, None)
    classes, train, val = scan(root, wanted)
    splits = [Split(names, labels, partial(read, root, names)) for names, labels in (train, val)]
    if full is None:
        return Source(root.name, str(root), classes, splits[0], splits[1], _default_size(root, train[0]), *IMAGENET)
    spec = f"{root}@{full}"
    return Source(f"{root.name}@{full}", spec, classes, splits[0], splits[1], _default_size(root, train[0]), *IMAGENET)


def read(root: Path, names: Sequence[str], position: int) -> np.ndarray:
    """One image as [H, W, 3] uint8 RGB, see `images.read`."""
    return decode.read(root / names[position])


def _default_size(root: Path, names: Sequence[str]) -> int:
    """By the short sides of up to 16 images whose header can be read; of any one where all 16 are broken."""
    sample = [names[i] for i in np.linspace(0, len(names) - 1, min(16, len(names))).astype(int)]
    sides = list(_short_sides(root, sample)) or list(islice(_short_sides(root, names), 1))
    if not sides:
        raise InputError(f"none of the {len(names)} training images in {root} can be decoded, such as {names[0]}")
    return default_size(sides)


def _short_sides(root: Path, names: Sequence[str]) -> Iterator[int]:
    for name in names:
        with suppress(UnreadableError):
            yield decode.short_side(root / name)


def scan(root: Path, wanted: Sequence[str] | None = None) -> tuple[tuple[str, ...], Found, Found]:
    """Class names (the sorted folders in train/, or `wanted`), training and validation files; a class folder may have folders of its own.

    Names that begin with a dot are passed over. Raises `InputError` for a missing split, an empty class, or a validation class that train/
    lacks.
    """
    inside = sorted(entry.name for entry in root.iterdir())
    val = next((name for name in VAL_FOLDERS if (root / name).is_dir()), None)
    if val is None or not (root / "train").is_dir():
        there = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "") or "nothing"
        raise InputError(f"{root} needs train/ and val/ (or validation/, test/) with a folder for each class; it has {there}")
    classes = _class_folders(root / "train")
    if wanted is not None and (absent := sorted(set(wanted) - set(classes))):
        raise InputError(f"{root / 'train'} lacks {len(absent)} of the {len(wanted)} classes of the list: {', '.join(absent[:3])}, ...")
    if (root / val / ANNOTATIONS).is_file():
        held_out = _annotated(root, val, classes, wanted or classes)
    else:
        if strange := sorted(set(_class_folders(root / val)) - set(classes)):
            raise InputError(
                f"{root / val} has class {strange[0]!r}, which train/ has not ({len(strange)} such; train/ has {len(classes)})"
            )
        held_out = _find(root, val, wanted or classes)
    if not len(held_out[0]):
        raise InputError(f"{root / val} has no image of these {len(wanted or classes)} classes")
    return tuple(wanted or classes), _find(root, "train", wanted or classes), held_out


def _annotated(root: Path, val: str, classes: Sequence[str], wanted: Sequence[str]) -> Found:
    """Files of val/images/ by the class that `ANNOTATIONS` gives them."""
    rows = [line.split("\t")[:2] for line in (root / val / ANNOTATIONS).read_text("utf-8", "replace").splitlines() if line.strip()]
    folder = root / val / "images"
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if bad := next((row for row in rows if len(row) < 2 or row[1] not in classes or row[0] not in there), None):
        raise InputError(
            f"{root / val / ANNOTATIONS} has the line {' '.join(bad)[:80]!r}: needed are a file of {folder} and a class of train/"
        )
    label = {name: i for i, name in enumerate(wanted)}
    found = sorted((label[name], f"{val}/images/{file}") for file, name in rows if name in label)
    return tuple(file for _, file in found), np.array([place for place, _ in found], np.int64)


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
            raise InputError(f"class {class_name!r} has no image in {root / part / class_name} (known: {' '.join(decode.EXTENSIONS)})")
        names += found
        labels += [label] * len(found)
    return tuple(names), np.array(labels, np.int64)


def _image_names(root: Path, under: str) -> Iterator[str]:
    seen = set()  # a link to a folder above would have no end
    for folder, inner, files in os.walk(root / under, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        relative = Path(folder).relative_to(root).as_posix()
        yield from (f"{relative}/{name}" for name in files if name.lower().endswith(decode.EXTENSIONS) and not name.startswith("."))
