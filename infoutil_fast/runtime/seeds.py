"""Generators that depend only on what they are for."""

from __future__ import annotations

import hashlib

from torch import Generator


def file_generator(seed: int, label: int, name: str) -> Generator:
    """Randomness of one file of one class: the same whatever rank, worker or restart reaches it."""
    digest = hashlib.blake2b(f"{seed}/{label}/{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
