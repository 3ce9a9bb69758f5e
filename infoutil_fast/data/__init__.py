"""Where the images come from: one word or path opens any kind of source."""

from __future__ import annotations

import os
from pathlib import Path

from infoutil_fast.data import archives, arrays, folders, svhn
from infoutil_fast.data.arrays import CIFAR10, CIFAR10_CLASSES, CIFAR100
from infoutil_fast.data.holdout import Holdout, cut, refuse
from infoutil_fast.data.huggingface import SAVED, open_dataset
from infoutil_fast.data.source import IMAGENET, Source, Split, Triple
from infoutil_fast.types import InputError

__all__ = ["CIFAR10", "CIFAR10_CLASSES", "CIFAR100", "IMAGENET", "KINDS", "Source", "Split", "Triple", "is_source", "open_source", "reopen"]

KINDS = (
    "a folder with train/ and val/ of class folders (FOLDER@imagenette: only the classes of a published list; FOLDER@split=0.1: validation "
    "images are drawn), Tiny-ImageNet's folder, an .npz with train_x, train_y, test_x and test_y (or MedMNIST's names), CIFAR-10 or "
    "CIFAR-100 python batches (folder or .tar.gz), SVHN's two .mat files, hf:NAME or hf:FOLDER of the package datasets, 'digits' or 'demo'"
)


def open_source(spec: str | Path, split: float | None = None) -> Source:
    """The source that `spec` names: `KINDS` says what can be given. The words "demo" and "digits" win over files of that name ("./demo").

    split: the share of each class that is held out for validation, where the data come without a validation split; the draw is seeded and
    becomes part of the source's own `spec` (`FOLDER@split=0.1,seed=0`; give that with another seed for another draw).

    Raises `InputError` when there is no such source or its files do not fit together.
    """
    text, holdout = (str(spec), None) if os.path.lexists(spec) else cut(str(spec))
    if split is not None:
        if holdout is not None:
            raise InputError(f"{spec} and --split {split:g} both say what is held out: leave out one")
        holdout = Holdout(split)
    if text.startswith("hf:"):
        return open_dataset(text, holdout)
    if text in ("demo", "digits"):
        refuse(text, holdout)
        return arrays.demo() if text == "demo" else arrays.digits()
    path = Path(os.path.abspath(Path(text).expanduser()))
    folder, _, subset = str(path).rpartition("@")
    try:
        if folder and subset and not path.exists() and Path(folder).is_dir():
            return folders.open_folder(Path(folder), subset, holdout)
        return _open(path, text, holdout)
    except OSError as error:
        raise InputError(f"{spec} cannot be read: {error}") from error


def is_source(folder: Path) -> bool:
    """Whether `open_source` takes a folder for training and validation images, rather than for images alone."""
    return (folder / SAVED).is_file() or svhn.is_svhn(folder) or _is_batches(folder) or folders.has_splits(folder)


def reopen(spec: str, how: str = "with --source (source=)") -> Source:
    """The source that a set or teacher was made from; where it has moved, the error says which option tells its new place."""
    try:
        return open_source(spec)
    except InputError as error:
        raise InputError(f"{error}; if it has moved, say {how} where it is") from error


def _open(path: Path, spec: str, holdout: Holdout | None) -> Source:
    if path.is_dir() and not (path / SAVED).is_file() and not svhn.is_svhn(path) and not _is_batches(path):
        return folders.open_folder(path, None, holdout)
    if path.is_dir() and (path / SAVED).is_file():
        return open_dataset(f"hf:{path}", holdout)
    if path.is_file() and path.suffix.lower() == ".npz":
        return arrays.npz(path, holdout)
    refuse(spec, holdout)
    if path.is_dir() and _is_batches(path):
        return arrays.cifar_batches(path)
    if path.is_file() and archives.is_archive(path):
        archives.refuse_unless(path, arrays.BATCHES)
        return arrays.cifar_batches(path)
    if svhn.is_svhn(path):
        return arrays.svhn_digits(path)
    what = "is no kind of source" if path.exists() else "does not exist"
    raise InputError(f"{spec!r} {what}; a source is {KINDS}")


def _is_batches(path: Path) -> bool:
    return (path / "data_batch_1").is_file() or (path / "train").is_file()
