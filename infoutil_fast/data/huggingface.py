"""Data sets of the Hugging Face library `datasets`: by name from its hub or cache, or a folder of `save_to_disk`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from infoutil_fast.data import decode
from infoutil_fast.data.holdout import Holdout, refuse
from infoutil_fast.data.source import IMAGENET, Source, Split, default_size
from infoutil_fast.types import InputError, UnreadableError, first_line

VAL = ("validation", "valid", "val", "test")  # the first that is there
LABELS = ("label", "labels", "fine_label")  # taken first where several columns hold classes
SAVED = "dataset_dict.json"  # what save_to_disk writes for a set of several splits


def open_dataset(spec: str, holdout: Holdout | None = None) -> Source:
    """`hf:NAME`, `hf:NAME/CONFIG...` as on the hub, `hf:FOLDER`, each with `#COLUMN` for the labels where several columns could be.

    holdout: the validation images to draw, where the set has none. Images are decoded by `decode.decode`, not by the library. Raises
    `InputError` for a missing package or set, for other splits than a training and a validation one, and for columns that do not tell
    image and class.
    """
    name, _, column = spec.removeprefix("hf:").partition("#")
    found = _load(name)
    val = next((split for split in VAL if split in found), None)
    if val is not None:
        refuse(f"{spec} (split {val})", holdout)
    if "train" not in found or (val is None and holdout is None):
        how = "" if "train" not in found else f", or --split 0.1 ({spec}@split=0.1), which holds out a tenth of each class"
        raise InputError(f"{spec} has the splits {', '.join(found) or '(none)'}; needed are train and one of {', '.join(VAL)}{how}")
    image, label = _columns(spec, found["train"].features, column)
    classes = getattr(found["train"].features[label], "names", None)
    splits = [_split(spec, part, found[part], image, label) for part in ("train", val) if part]
    top = max(int(split.labels.max()) for split in splits)
    if classes is None:
        classes = [str(i) for i in range(top + 1)]
    if top >= len(classes) or (absent := sorted(set(range(len(classes))) - set(splits[0].labels.tolist()))):
        what = (
            f"the label {top} but {len(classes)} class names"
            if top >= len(classes)
            else f"no training image of class {classes[absent[0]]!r}"
        )
        raise InputError(f"{spec} has {what}")
    local = Path(name).expanduser()
    again = f"hf:{local.resolve() if local.is_dir() else name}" + (f"#{column}" if column else "") + str(holdout or "")
    names = tuple(map(str, classes))
    train, held_out = splits if holdout is None else holdout.of(splits[0], names)
    return Source(name.rsplit("/", 1)[-1], again, names, train, held_out, _size(spec, splits[0]), *IMAGENET)


def _load(name: str) -> dict[str, Any]:
    """The splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"hf:{name} needs the package datasets: pip install 'infoutil_fast[hf]'") from error
    if int(datasets.__version__.split(".")[0]) < 4:
        raise InputError(f"hf:{name} needs datasets 4 or newer, not {datasets.__version__}: older ones may run a set's own code")
    folder = Path(name).expanduser()
    try:
        if (folder / SAVED).is_file():
            return dict(datasets.load_from_disk(str(folder)))
        if folder.is_dir():
            raise InputError(f"hf:{name} is a folder without {SAVED}: give one of DatasetDict.save_to_disk, or the name of a set")
        path, _, config = name.partition(":")
        return dict(datasets.load_dataset(path, config or None))
    except InputError:
        raise
    except Exception as error:  # network, cache, arrow and the library's own; each is named
        raise InputError(f"hf:{name} cannot be opened: {first_line(error, named=True)}") from error


def _columns(spec: str, features: Any, asked: str) -> tuple[str, str]:
    """The image column, and the label column: the one asked for, or the one that can be meant."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    there = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    whole = [name for name, feature in features.items() if getattr(feature, "dtype", "").startswith(("int", "uint"))]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"] or [name for name in whole if name in LABELS]
    if asked:
        labels = [name for name in whole if name == asked]
    elif len(labels) > 1:
        labels = [name for name in LABELS if name in labels][:1]
    if len(pictures) != 1 or len(labels) != 1:
        raise InputError(f"{spec} has the columns {there}: needed are one of kind Image and one of kind ClassLabel, or {spec}#COLUMN")
    return pictures[0], labels[0]


def _split(spec: str, part: str, rows: Any, image: str, label: str) -> Split:
    import datasets

    labels = np.asarray(rows[label][:], dtype=object)
    if not len(labels) or any(not isinstance(value, int) or value < 0 for value in labels):
        raise InputError(
            f"{spec}: the split {part} has {'no images' if not len(labels) else f'labels that are no class in column {label}'}"
        )
    held = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    names = tuple(f"{part}/{i:05d}" for i in range(len(labels)))
    return Split(names, labels.astype(np.int64), partial(_read, held, image, names))


def _read(rows: Any, column: str, names: Sequence[str], position: int) -> np.ndarray:
    cell = rows[position][column] or {}
    if cell.get("bytes") is not None:
        return decode.decode(io.BytesIO(cell["bytes"]), names[position])
    if cell.get("path"):
        return decode.read(Path(cell["path"]))
    raise UnreadableError(f"{names[position]} cannot be read as an image: the set has nothing there")


def _size(spec: str, split: Split) -> int:
    sample = np.linspace(0, len(split) - 1, min(16, len(split))).astype(int)
    decoded = (image for image in map(split.attempt, [*sample.tolist(), *range(len(split))]) if image is not None)
    sides = [min(image.shape[:2]) for image in islice(decoded, len(sample))]
    if not sides:
        raise InputError(f"{spec}: none of the {len(split)} training images can be decoded")
    return default_size(sides)
