"""Archives as they are downloaded: CIFAR's are read as they are, of others it is said how to unpack them."""

from __future__ import annotations

import tarfile
from collections.abc import Collection
from itertools import islice
from pathlib import Path

from infoutil_fast.types import InputError, first_line

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
UNPACK = {".tar.zst": "tar --zstd -C FOLDER -xf", ".zst": "zstd -d", ".zip": "unzip -d FOLDER", ".7z": "7z x -oFOLDER", ".rar": "unrar x"}
UNPACK |= {".gz": "gunzip", ".xz": "unxz", ".bz2": "bunzip2"}
LOOKED_AT = 32  # entries of an archive of batches, which has about ten


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith((*TARS, *UNPACK))


def refuse_unless(path: Path, wanted: Collection[str]) -> None:
    """Raise `InputError` saying how to unpack an archive, but for a .tar (.gz, ...) that holds one of the files `wanted`."""
    name = path.name.lower()
    if name.endswith(TARS):
        try:
            with tarfile.open(path) as archive:
                members = list(islice(archive, LOOKED_AT))
        except Exception as error:  # tarfile, gzip and zlib raise many kinds on damaged archives; each is named
            raise InputError(f"{path} cannot be read: {first_line(error)}") from error
        if not members or any(member.isfile() and member.name.rpartition("/")[2] in wanted for member in members):
            return
        how, holds = "tar -C FOLDER -xf", f" of {members[0].name} and more"
    else:
        how, holds = next(command for end, command in UNPACK.items() if name.endswith(end)), ""
    raise InputError(f"{path} is an archive{holds}: unpack it ({how} {path.name}) and give the folder")
