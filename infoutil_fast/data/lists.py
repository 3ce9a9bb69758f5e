"""Lists of labels for images that lie in one folder: Tiny-ImageNet's, ILSVRC's and the like, a line for each image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from infoutil_fast.types import InputError

ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet: file name, class, box
KAGGLE = "LOC_val_solution.csv"  # of Kaggle's ILSVRC, which lies beside the folder of the data
ENDS = (".txt", ".csv", ".tsv")
LARGEST = 64 << 20  # bytes of a list

Labels = dict[str, str]  # image -> class


def labels(root: Path, part: str, images: Sequence[str], classes: Sequence[str]) -> tuple[Labels, Path] | None:
    """The class of each of `images` (file names), and the list that says so: the first that can be one; None where there is none.

    Raises `InputError` for a line of a list that names another image or class.
    """
    for file in _candidates(root, part):
        lines = [line for line in file.read_text("utf-8", "replace").splitlines() if line.strip()]
        if found := _by_name(file, lines, images, classes) or _in_order(lines, images, classes):
            return found, file
    return None


def _candidates(root: Path, part: str) -> Iterator[Path]:
    """Tiny-ImageNet's, others in the folder of the images, and such as say in their name which part they are of, beside it."""
    folder = root / part
    own = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDS and not file.name.startswith("."))
    beside = sorted(file for file in root.iterdir() if file.suffix.lower() in ENDS and part.lower() in file.name.lower())
    above = [place / KAGGLE for place in (root, root.parent, root.parent.parent, root.parent.parent.parent)]
    for file in dict.fromkeys([folder / ANNOTATIONS, *own, *beside, *above]):
        if file.is_file() and file.stat().st_size <= LARGEST:
            yield file


def _by_name(file: Path, lines: Sequence[str], images: Sequence[str], classes: Sequence[str]) -> Labels:
    """From lines of an image (with or without its ending) and its class, or the number of a WordNet id; {}: no such list."""
    rows = [_row(line) for line in lines]
    key = {Path(name).stem: name for name in images} | {name: name for name in images}
    if sum(name in key for name, _ in rows) * 2 < len(rows) or not rows:  # not a list of these images
        return {}
    if rows[0][0] not in key and rows[0][0].lower() in ("image", "imageid", "file", "filename", "file_name", "name", "path", "id"):
        rows = rows[1:]  # a heading
    known = _numbered(rows, classes) or {name: name for name in classes}
    found = {}
    for name, told in rows:
        own = next((known[word] for word in (told, told.split("\t")[0], told.split(",")[0], told.split(" ")[0]) if word in known), None)
        if name not in key or own is None:
            line = f"{name} {told}"[:80]
            raise InputError(f"{file} has the line {line!r}: needed are a file of {file.parent / 'images'} and a class of train/")
        found[key[name]] = own
    return found


def _row(line: str) -> tuple[str, str]:
    """An image's name without its folders, and what follows it."""
    name, _, told = line.strip().replace(";", ",").partition("\t" if "\t" in line else "," if "," in line else " ")
    return name.strip().rpartition("/")[2], told.strip()


def _numbered(rows: Sequence[tuple[str, str]], classes: Sequence[str]) -> dict[str, str]:
    """Numbers from 0 as Caffe and torchvision count ILSVRC's classes: in the order of their ids; {} where the rows say otherwise."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes) or not all(told.isdecimal() for _, told in rows):
        return {}
    numbers = {int(told) for _, told in rows}
    return {str(i): name for i, name in enumerate(sorted(classes))} if numbers == set(range(len(classes))) else {}


def _in_order(lines: Sequence[str], images: Sequence[str], classes: Sequence[str]) -> Labels:
    """From a class a line, for the images by name; {} where the lines are no such list."""
    told, known = [line.strip() for line in lines], set(classes)
    return dict(zip(sorted(images), told, strict=True)) if len(told) == len(images) and set(told) <= known else {}
