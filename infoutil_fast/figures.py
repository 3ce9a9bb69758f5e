"""How the report looks: its style sheet, heat maps over source images, score strips, contact sheets. Drawn in memory, no display needed."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

NONE = "\N{EN DASH}"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SIDE = 320  # long side of a drawn source image, pixels
WINDOW = "#ffffff"
BOX = "#ffd400"
INK = "#5b7fb4"  # readable on white and on black
MEDIAN = "#d9822b"
EDGE = "#000000"

STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1d2127; --soft: #626b78; --line: #d9dde3; --paper: #ffffff; --card: #f5f6f8; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e7eb; --soft: #98a2b0; --line: #343b45; --paper: #14171b; --card: #1d2127; }}
}}
* {{ box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
body {{ margin: 0 auto; max-width: 1120px; padding: 32px 28px 64px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 40px 0 8px; padding-top: 12px; border-top: 2px solid var(--ink); break-after: avoid; }}
h3 {{ font-size: 13px; margin: 18px 0 6px; overflow-wrap: anywhere; break-after: avoid; }}
p {{ margin: 6px 0 12px; max-width: 88ch; }}
.note, figcaption, dt, h3 span {{ color: var(--soft); }}
.note {{ font-size: 13px; }}
dl {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 18px 0;
  background: var(--line); border: 1px solid var(--line); }}
dl div {{ background: var(--card); padding: 8px 12px; }}
dt {{ font-size: 11px; letter-spacing: .04em; text-transform: uppercase; }}
dd {{ margin: 0; font-weight: 600; overflow-wrap: anywhere; }}
dd small {{ display: block; font-weight: 400; color: var(--soft); }}
code {{ font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }}
pre {{ background: var(--card); border: 1px solid var(--line); padding: 10px 14px; white-space: pre-wrap; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; margin: 8px 0 16px; font-variant-numeric: tabular-nums; }}
td:first-child {{ min-width: 8em; }}
td:has(> code) {{ width: 17em; }}
th {{ text-align: left; font-size: 12px; color: var(--soft); border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }}
td {{ border-bottom: 1px solid var(--line); vertical-align: middle; overflow-wrap: anywhere; }}
th, td {{ padding: 4px 14px 4px 0; }}
th.n, td.n {{ text-align: right; }}
td.n {{ white-space: nowrap; }}
th:last-child, td:last-child {{ padding-right: 0; }}
tr.sum td {{ border-bottom: 0; border-top: 1.5px solid var(--ink); font-weight: 600; }}
tr, figure, .row {{ break-inside: avoid; }}
.row {{ display: grid; grid-template-columns: 9.5em 1fr; gap: 14px; align-items: center; padding: 3px 0; }}
.row > div:first-child {{ text-align: right; font-size: 13px; line-height: 1.25; overflow-wrap: anywhere; }}
.tiles {{ display: grid; gap: 4px; }}
.tiles img {{ display: block; width: 100%; aspect-ratio: 1; object-fit: cover; }}
.small {{ image-rendering: pixelated; }}
.drawn {{ display: grid; grid-template-columns: repeat(5, 1fr); gap: 12px; }}
figure {{ margin: 0; min-width: 0; }}
figure > div {{ aspect-ratio: 4 / 3; display: flex; align-items: center; justify-content: center; background: var(--card); }}
figure img {{ max-width: 100%; max-height: 100%; width: 100%; height: 100%; object-fit: contain; }}
figcaption {{ font-size: 11px; line-height: 1.35; margin-top: 3px; overflow-wrap: anywhere; }}
figcaption b {{ color: var(--ink); }}
.legend {{ display: flex; flex-wrap: wrap; gap: 6px 28px; align-items: center; font-size: 12.5px; margin: 4px 0 12px; }}
.legend span {{ display: inline-flex; align-items: center; gap: 8px; }}
.legend i {{ display: inline-block; width: 22px; height: 18px; background: #8b8b8b; }}
.legend .bar {{ width: 130px; height: 12px; background: linear-gradient(90deg, #2166ac, #92c5de, #f7f7f7, #f4a582, #b2182b); }}
.legend .window {{ border: 2px solid {WINDOW}; outline: 1px solid {EDGE}; }}
.legend .box {{ border: 2px dashed {BOX}; outline: 1px solid {EDGE}; }}
.strip {{ display: block; width: 280px; height: 34px; }}
.wide-picture {{ display: block; max-width: 100%; width: 760px; background: #ffffff; }}
.share {{ display: block; height: 13px; background: {INK}; min-width: 1px; }}
.track {{ display: block; width: 360px; max-width: 100%; }}
@media (max-width: 720px) {{ dl {{ grid-template-columns: 1fr 1fr; }}
  .drawn {{ grid-template-columns: repeat(2, 1fr); }} .row {{ grid-template-columns: 1fr; }}
  .row > div:first-child {{ text-align: left; }} }}
@media print {{ :root {{ color-scheme: light; }} body {{ font-size: 11px; padding: 0; }} .wide {{ overflow: visible; }}
  h2 {{ margin-top: 24px; }} .note {{ font-size: 11px; }} p {{ break-after: avoid; }}
  figcaption {{ font-size: 8px; }} td {{ padding: 2px 8px 2px 0; }}
  .track {{ width: 200px; }} .strip {{ width: 200px; height: 24px; }} .row {{ grid-template-columns: 7em 1fr; }} }}
"""


class Html(str):
    """Text that is markup already; any other value is escaped where it is written."""

    __slots__ = ()


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(between.join(part if isinstance(part, Html) else escape(NONE if part is None else str(part)) for part in parts))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """<name key="value">content</name>; `class_` stands for class."""
    listed = "".join(f' {key.rstrip("_")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{listed}>{join(content)}</{name}>")


def picture(data: bytes, alt: str, kind: str = "") -> Html:
    """The bytes of a PNG file as an <img> that carries them."""
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Html(f'<img src="{source}" alt="{escape(alt)}"' + f' class="{kind}"' * bool(kind) + ">")


def note(*content: object) -> Html:
    return tag("p", *content, class_="note")


def section(title: str, content: Html) -> Html:
    return Html(f"<section>\n{tag('h2', title)}\n{content}\n</section>\n")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], text: Sequence[int] = (0,), total: Sequence[object] = ()) -> Html:
    """The columns whose numbers are in `text` go to the left, the others are numbers and go to the right."""
    kinds: list[dict[str, str]] = [{} if i in text else {"class_": "n"} for i in range(len(head))]

    def line(cells: Sequence[object], cell: str = "td", **kind: str) -> Html:
        return Html(tag("tr", *(tag(cell, c, **k) for c, k in zip(cells, kinds, strict=True)), **kind) + "\n")

    body = [line(row) for row in rows] + ([line(total, class_="sum")] if total else [])
    return tag("div", tag("table", tag("thead", line(head, "th")), tag("tbody", *body)), class_="wide")


def legend(heat: bool, boxes: bool) -> Html:
    """What the colours and frames of `overlay` mean."""
    bar = tag("span", "against the class", tag("i", "", class_="bar"), "supports the class (white: no influence)")
    frames = [("window", "kept window", True), ("box", "the object's box", boxes)]
    return tag(
        "div", *[bar] * heat, *(tag("span", tag("i", "", class_=kind), name) for kind, name, there in frames if there), class_="legend"
    )


def page(title: str, sections: Iterable[Html]) -> str:
    """The whole page; its policy lets a browser load nothing from outside."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<meta name="viewport" content="width=device-width">\n'
        f"{tag('title', title)}\n<style>{STYLE}</style>\n</head>\n<body>\n{join(sections)}</body>\n</html>\n"
    )


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def overlay(
    pixels: np.ndarray,
    heat: np.ndarray | None = None,
    window: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
) -> Image.Image:
    """An image with what is known of it drawn on top, long side about `SIDE`.

    `pixels` uint8 [H, W, 3]; `heat` [rows, cols] over the centred square, drawn as blocks, scaled by its largest absolute value;
    `window` top, left, size (solid) and `box` top, left, bottom, right (dashed), both in pixels of `pixels`.
    """
    height, width = pixels.shape[:2]
    picture = _enlarged(Image.fromarray(np.ascontiguousarray(pixels)))
    scale = picture.width / width, picture.height / height
    if heat is not None:
        picture = _heated(picture, heat)
    if box is not None:
        top, left, bottom, right = box
        _rectangle(picture, scale, (left, top, right, bottom), BOX, dash=11)
    if window is not None:
        top, left, size = window
        _rectangle(picture, scale, (left, top, left + size, top + size), WINDOW)
    return picture


def _enlarged(image: Image.Image) -> Image.Image:
    """Small images times a whole number (pixels stay squares), large ones down to `SIDE`."""
    side = max(image.size)
    if side * 2 <= SIDE:
        factor = SIDE // side
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if side > SIDE:
        size = max(1, round(image.width * SIDE / side)), max(1, round(image.height * SIDE / side))
        return image.resize(size, Image.Resampling.LANCZOS)
    return image


def _heated(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """Blocks of colour over the centred square of the grey picture; the further from zero, the less of the picture shows."""
    rows, cols = heat.shape
    values = np.nan_to_num(heat.astype(np.float64), posinf=0, neginf=0)
    values = values / max(np.abs(values).max(), 1e-30)  # [rows, cols] in -1..1, zero stays zero
    colours = colormaps["RdBu_r"](0.5 + 0.4 * values)[..., :3]  # without the map's near-black ends
    side = min(picture.size)
    top, left = (picture.height - side) // 2, (picture.width - side) // 2
    y, x = np.arange(side) * rows // side, np.arange(side) * cols // side  # [side] block of each line and column
    pixels = 0.3 + 0.7 * np.asarray(picture.convert("L").convert("RGB"), dtype=np.float64) / 255  # lighter, or dark ones hide the colours
    square = pixels[top : top + side, left : left + side]
    alpha = (0.1 + 0.6 * np.abs(values))[y][:, x, None]
    pixels[top : top + side, left : left + side] = square * (1 - alpha) + colours[y][:, x] * alpha
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))


def _rectangle(picture: Image.Image, scale: tuple[float, float], corners: Sequence[float], colour: str, dash: int = 0) -> None:
    """Draws on `picture`, clipped to it, over a dark edge; `corners` left, top, right, bottom before scaling."""
    x0, x1 = (min(max(round(c * scale[0]), 0), picture.width) for c in (corners[0], corners[2]))
    y0, y1 = (min(max(round(c * scale[1]), 0), picture.height) for c in (corners[1], corners[3]))
    x1, y1 = max(x1 - 1, x0), max(y1 - 1, y0)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x0, y0, x1, y1), outline=EDGE, width=4)
    if not dash:
        if x1 - x0 > 2 and y1 - y0 > 2:
            draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=colour, width=2)
        return
    for x in range(x0, x1, 2 * dash - 4):
        for y in (y0 + 1, y1 - 2):
            draw.rectangle((x, y, min(x + dash, x1), y + 1), fill=colour)
    for y in range(y0, y1, 2 * dash - 4):
        for x in (x0 + 1, x1 - 2):
            draw.rectangle((x, y, x + 1, min(y + dash, y1)), fill=colour)


def strip(values: np.ndarray, low: float, high: float, log: bool = False) -> bytes:
    """PNG of a small histogram of `values` [n] between low and high, with no text and a clear background."""
    figure = Figure(figsize=(2.8, 0.34), dpi=200)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    if log:
        values, low, high = np.log10(values), float(np.log10(low)), float(np.log10(high))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins=32, range=(low, high))
    axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.9, align="edge", color=INK)
    middle = float(np.median(values))
    axes.plot([middle, middle], [0, max(counts.max(), 1)], color=MEDIAN, linewidth=1.4)
    axes.plot([low, high], [0, 0], color="#8a8a8a", linewidth=1.0)
    axes.set_xlim(low, high)
    axes.set_ylim(0, max(counts.max(), 1) * 1.04)
    axes.set_axis_off()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def contact_sheet(rows: Sequence[tuple[str, Sequence[Path]]], tile: int = 96) -> Image.Image:
    """One row per class: its name, then its images in tiles of `tile` pixels (small ones by whole numbers, pixels stay squares)."""
    font = ImageFont.load_default(13)
    names = [clipped(name) for name, _ in rows]
    margin = max((round(font.getlength(name)) for name in names), default=0) + 16
    columns = max((len(files) for _, files in rows), default=0)
    sheet = Image.new("RGB", (margin + columns * (tile + 3), max(1, len(rows) * (tile + 3))), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, (_, files)) in enumerate(zip(names, rows, strict=True)):
        draw.text((margin - 8, r * (tile + 3) + tile // 2), name, fill="#222222", font=font, anchor="rm")
        for c, file in enumerate(files):
            with Image.open(file) as opened:
                image = opened.convert("RGB")
            small = max(image.size) <= tile
            image = image.resize((tile, tile), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
            sheet.paste(image, (margin + c * (tile + 3), r * (tile + 3)))
    return sheet


def clipped(name: str, length: int = 24) -> str:
    """On one line, cut where it is longer."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"
