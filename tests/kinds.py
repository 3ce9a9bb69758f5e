"""Image files of every kind, drawn here, each with what must come of it: pixels, or why it is left out."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

Pixels = np.ndarray  # [H, W, 3] uint8
SIDE = (37, 53)  # height, width of what is drawn: no two sides alike, none a multiple of 8


@dataclass(frozen=True)
class Kind:
    name: str
    suffix: str
    write: Callable[[Path, np.random.Generator], Pixels | None]  # gives what must be read; None where nothing can be
    outcome: str = "read"  # or a part of why it is left out
    said: str = ""  # how it is read, for the table
    exact: bool = True  # lossy formats only need the decoder's own pixels


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def smooth(rng: np.random.Generator) -> Image.Image:
    """What lossy formats can hold: noise, enlarged."""
    return Image.fromarray(noise(rng, 5, 7, 3)).resize((SIDE[1], SIDE[0]), Image.Resampling.BICUBIC)


def saved(mode: str, **options: Any) -> Callable[[Path, np.random.Generator], Pixels]:
    def write(path: Path, rng: np.random.Generator) -> Pixels:
        picture = Image.fromarray(noise(rng, *SIDE, 3)).convert(mode)
        picture.save(path, **options)
        return np.asarray(picture.convert("RGB"))

    return write


def lossy(mode: str = "RGB", **options: Any) -> Callable[[Path, np.random.Generator], Pixels]:
    def write(path: Path, rng: np.random.Generator) -> Pixels:
        smooth(rng).convert(mode).save(path, **options)
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    return write


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG put together by hand, whatever its header claims."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def grey16(path: Path, rng: np.random.Generator) -> Pixels:
    values = rng.integers(0, 65536, SIDE, dtype=np.uint16)
    Image.fromarray(values).save(path)
    return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, -1)


def colour16(path: Path, rng: np.random.Generator) -> Pixels:
    values = rng.integers(0, 65536, (*SIDE, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(png(SIDE[1], SIDE[0], 16, 2, rows))
    return (values >> 8).astype(np.uint8)


def palette_with_alpha(path: Path, rng: np.random.Generator) -> Pixels:
    picture = Image.fromarray(noise(rng, *SIDE, 3)).quantize(7)
    picture.save(path, transparency=bytes(range(0, 70, 10)))
    return np.asarray(picture.convert("RGB"))


def turned(path: Path, rng: np.random.Generator) -> Pixels:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    image = noise(rng, *SIDE, 3)
    Image.fromarray(image).save(path, exif=exif)
    return np.rot90(image, -1)


def broken_exif(path: Path, rng: np.random.Generator) -> Pixels:
    picture = smooth(rng)
    picture.save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + rng.bytes(40))
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def animated(path: Path, rng: np.random.Generator) -> Pixels:
    first, *others = [Image.fromarray(noise(rng, *SIDE, 3)).quantize(16) for _ in range(3)]
    if path.suffix == ".webp":
        first, *others = [picture.convert("RGB") for picture in (first, *others)]
    first.save(path, save_all=True, append_images=others, **({"lossless": True} if path.suffix == ".webp" else {}))
    return np.asarray(first.convert("RGB"))


def from_array(values: Callable[[np.random.Generator], np.ndarray]) -> Callable[[Path, np.random.Generator], None]:
    def write(path: Path, rng: np.random.Generator) -> None:
        Image.fromarray(values(rng)).save(path)

    return write


def content(data: bytes | Callable[[np.random.Generator], bytes]) -> Callable[[Path, np.random.Generator], None]:
    def write(path: Path, rng: np.random.Generator) -> None:
        path.write_bytes(data if isinstance(data, bytes) else data(rng))

    return write


def cut(suffix: str, share: float) -> Callable[[Path, np.random.Generator], None]:
    def write(path: Path, rng: np.random.Generator) -> None:
        whole = path.with_name(f"whole{suffix}.part")
        Image.fromarray(noise(rng, *SIDE, 3)).save(whole, format={".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[suffix])
        data = whole.read_bytes()
        whole.unlink()
        path.write_bytes(data[: int(share * len(data))])

    return write


def renamed(suffix: str, **options: Any) -> Callable[[Path, np.random.Generator], Pixels]:
    def write(path: Path, rng: np.random.Generator) -> Pixels:
        image = noise(rng, *SIDE, 3)
        Image.fromarray(image).save(path, format=suffix, **options)
        return image

    return write


def wide(path: Path, rng: np.random.Generator) -> Pixels:
    image = noise(rng, 40, 20_000, 3)
    Image.fromarray(image).save(path)
    return image


def sliver(path: Path, rng: np.random.Generator) -> Pixels:
    image = noise(rng, 1, 20_000, 3)
    Image.fromarray(image).save(path)
    return image


def dangling(path: Path, rng: np.random.Generator) -> None:
    path.symlink_to(path.with_name("nowhere.png"))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(ran) (w) file closefile\nshowpage\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><rect width="9" height="9"/></svg>'

KINDS = [
    Kind("JPEG", ".jpg", lossy(), exact=False),
    Kind("JPEG, progressive", ".JPEG", lossy(progressive=True), exact=False),
    Kind("JPEG, grey", ".jpg", lossy("L"), said="grey repeated", exact=False),
    Kind("JPEG, CMYK (Adobe)", ".jpg", lossy("CMYK"), said="as RGB", exact=False),
    Kind("PNG", ".png", saved("RGB")),
    Kind("PNG, grey", ".png", saved("L"), said="grey repeated"),
    Kind("PNG, 1 bit", ".png", saved("1"), said="black and white"),
    Kind("PNG, palette", ".png", saved("P"), said="as RGB"),
    Kind("PNG, palette with alpha", ".png", palette_with_alpha, said="alpha dropped"),
    Kind("PNG, RGBA", ".png", saved("RGBA"), said="alpha dropped"),
    Kind("PNG, grey with alpha", ".png", saved("LA"), said="alpha dropped"),
    Kind("PNG, 16-bit grey", ".png", grey16, said="upper 8 bits"),
    Kind("PNG, 16-bit RGB", ".png", colour16, said="upper 8 bits"),
    Kind("TIFF", ".tif", saved("RGB")),
    Kind("TIFF, CMYK", ".tiff", saved("CMYK"), said="as RGB"),
    Kind("TIFF, 16-bit grey", ".tif", grey16, said="upper 8 bits"),
    Kind("TIFF, 32-bit integers", ".tif", from_array(lambda r: r.integers(-9, 99999, SIDE, dtype=np.int32)), "no known range"),
    Kind("TIFF, 32-bit floats", ".tif", from_array(lambda r: r.random(SIDE, np.float32)), "no known range"),
    Kind("WebP, lossy", ".webp", lossy(), exact=False),
    Kind("WebP, lossless, with alpha", ".webp", saved("RGBA", lossless=True, exact=True), said="alpha dropped"),
    Kind("WebP, animated", ".webp", animated, said="first picture"),
    Kind("GIF, animated", ".gif", animated, said="first picture"),
    *([Kind("AVIF", ".avif", lossy(), exact=False)] if features.check("avif") else []),
    *([Kind("JPEG 2000", ".jp2", lossy(), exact=False)] if features.check("jpg_2000") else []),
    Kind("BMP", ".bmp", saved("RGB")),
    Kind("PPM", ".ppm", saved("RGB")),
    Kind("TGA", ".tga", saved("RGB")),
    Kind("EXIF orientation 6", ".png", turned, said="turned upright"),
    Kind("EXIF data damaged", ".jpg", broken_exif, said="as stored", exact=False),
    Kind("PNG named .jpg", ".jpg", renamed("PNG"), said="by content"),
    Kind("20,000 px wide", ".png", wide),
    Kind("20,000 x 1 px", ".png", sliver),
    Kind("text named .jpg", ".jpg", content(b"not an image\n" * 9), "no known image format"),
    Kind("SVG named .png", ".png", content(SVG), "no known image format"),
    Kind("EPS named .jpg", ".jpg", content(EPS), "no known image format"),
    Kind("zero bytes", ".png", content(b""), "no known image format"),
    Kind("random bytes", ".jpg", content(lambda rng: rng.bytes(4000)), ""),
    Kind("JPEG cut short", ".jpg", cut(".jpg", 0.6), "truncated"),
    Kind("PNG cut short", ".png", cut(".png", 0.6), "truncated"),
    Kind("WebP cut short", ".webp", cut(".webp", 0.6), ""),
    Kind("header alone", ".jpg", cut(".jpg", 0.02), ""),
    Kind("decompression bomb (PNG, 900 MP)", ".png", content(png(30_000, 30_000, 1, 0, bytes(3751 * 30))), "pixels"),
    Kind("dangling link", ".png", dangling, "no such file"),
    Kind("named pipe", ".png", lambda path, rng: os.mkfifo(path), "no regular file"),
]
