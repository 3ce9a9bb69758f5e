"""Where the images come from: one word or path opens any kind of source."""

from __future__ import annotations

import os
from pathlib import Path

from infoutil_fast.data import arrays, folders, svhn
from infoutil_fast.data.arrays import CIFAR10, CIFAR10_CLASSES, CIFAR100
from infoutil_fast.data.huggingface import SAVED, open_dataset
from infoutil_fast.data.source import IMAGENET, Source, Split, Triple
from infoutil_fast.types import InputError

__all__ = ["CIFAR10", "CIFAR10_CLASSES", "CIFAR100", "IMAGENET", "KINDS", "Source", "Split", "Triple", "open_source"]

KINDS = (
    "a folder with train/ and val/ of class folders (FOLDER@imagenette: only the classes of a published list), Tiny-ImageNet's folder, "
    "an .npz with train_x, train_y, test_x and test_y, CIFAR-10 or CIFAR-100 python batches (folder or .tar.gz), SVHN's two .mat files, "
    "hf:NAME or hf:FOLDER of the package datasets, 'digits' or 'demo'"
)


def open_source(spec: str | Path) -> Source:
    """The source that `spec` names: `KINDS` says what can be given. The words "demo" and "digits" win over files of that name ("./demo").

    Raises `InputError` when there is no such source or its files do not fit together.
    """
    if spec == "demo":
        return arrays.demo()
    if spec == "digits":
        return arrays.digits()
    if str(spec).startswith("hf:"):
        return open_dataset(str(spec))
    path = Path(os.path.abspath(Path(spec).expanduser()))
    folder, _, subset = str(path).rpartition("@")
    try:
        if folder and subset and not path.exists() and Path(folder).is_dir():
            return folders.open_folder(Path(folder), subset)
        return _open(path, str(spec))
    except OSError as error:
        raise InputError(f"{spec} cannot be read: {error}") from error


def _open(path: Path, spec: str) -> Source:
    if path.is_file() and path.suffix.lower() == ".npz":
        return arrays.npz(path)
    if path.is_file() and path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return arrays.cifar_batches(path)
    if svhn.is_svhn(path):
        return arrays.svhn_digits(path)
    if path.is_dir():
        if (path / SAVED).is_file():
            return open_dataset(f"hf:{path}")
        batches = (path / "data_batch_1").is_file() or (path / "train").is_file()
        return arrays.cifar_batches(path) if batches else folders.open_folder(path)
    what = "is no kind of source" if path.exists() else "does not exist"
    raise InputError(f"{spec!r} {what}; a source is {KINDS}")
