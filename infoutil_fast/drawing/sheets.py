"""Pictures of scores: Shapley maps over images, the images of lowest and highest score, histograms. Drawn in memory, no display needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from infoutil_fast.drawing.overlay import INK, MEDIAN, clipped, overlay, png
from infoutil_fast.drawing.text import font, plain_ticks

Read = Callable[[int], np.ndarray]  # position -> [H, W, 3] uint8
TILE, GAP, LINE = 128, 6, 15  # pixels
CLASSES, ACROSS = 10, 8  # most rows and columns of a sheet
PALE = "#b9c6da"  # of the pool
Tile = tuple[Image.Image, str]


def draw(kind: str, rows: dict[str, np.ndarray], classes: Sequence[str], read: Read) -> dict[str, bytes]:
    """PNG files by name. rows: score [n], label [n], position [n] for `read`, and for shapley heat [n, g, g]."""
    labels = np.unique(rows["label"])
    shown = labels[np.unique(np.linspace(0, len(labels) - 1, min(len(labels), CLASSES)).round().astype(int))]
    if kind == "shapley":
        note = "each map by its own largest value: red for the class, blue against it; under it the sum of the map"
        pictures = {
            "maps.png": _sheet(
                rows, shown, classes, spread, read, f"Shapley maps, of each class from the highest sum to the lowest; {note}"
            )
        }
    else:
        pictures = {
            f"{end}.png": _sheet(rows, shown, classes, pick, read, f"Images of {end} gradient norm in each class, with the norm")
            for end, pick in (("lowest", lowest), ("highest", highest))
        }
    title = {"shapley": "Sum of the Shapley map", "gradnorm": "Gradient norm"}[kind]
    return {**pictures, "histogram.png": histogram(rows["score"], rows["label"], shown, classes, title)}


def lowest(score: np.ndarray) -> np.ndarray:
    return np.argsort(score, kind="stable")[:ACROSS]


def highest(score: np.ndarray) -> np.ndarray:
    return np.argsort(-score, kind="stable")[:ACROSS]


def spread(score: np.ndarray) -> np.ndarray:
    """Evenly spaced by rank, the highest first."""
    return np.argsort(-score, kind="stable")[np.unique(np.linspace(0, len(score) - 1, min(len(score), ACROSS)).round().astype(int))]


def _sheet(
    rows: dict[str, np.ndarray], shown: np.ndarray, classes: Sequence[str], pick: Callable[[np.ndarray], np.ndarray], read: Read, title: str
) -> bytes:
    lines: list[tuple[str, list[Tile]]] = []
    for label in shown.tolist():
        own = np.flatnonzero(rows["label"] == label)
        chosen = own[pick(rows["score"][own])]
        heat = rows.get("heat")
        tiles = [
            (overlay(read(int(rows["position"][i])), None if heat is None else heat[i]), f"{rows['score'][i]:.3g}") for i in chosen.tolist()
        ]
        lines.append((classes[label], tiles))
    return png(sheet(lines, title))


def sheet(lines: Sequence[tuple[str, Sequence[Tile]]], title: str) -> Image.Image:
    """A row for each line: its name, then its pictures on tiles, each with its caption below; the title on top."""
    names_font, head = font(12), font(13)
    names = [clipped(name) for name, _ in lines]
    margin = max((round(names_font.getlength(name)) for name in names), default=0) + 16
    across = max((len(tiles) for _, tiles in lines), default=0)
    width = max(margin + across * (TILE + GAP), 640)
    told = _wrapped(title, head, width - 16)
    top, height = 10 + 18 * len(told), TILE + LINE + GAP
    picture = Image.new("RGB", (width, top + height * len(lines)), "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(told):
        draw.text((8, 4 + 18 * i), line, fill="#222222", font=head)
    for r, (name, (_, tiles)) in enumerate(zip(names, lines, strict=True)):
        y = top + r * height
        draw.text((margin - 8, y + TILE // 2), name, fill="#222222", font=names_font, anchor="rm")
        for c, (image, caption) in enumerate(tiles):
            x = margin + c * (TILE + GAP)
            picture.paste(_fitted(image), (x, y))
            draw.text((x + TILE // 2, y + TILE + LINE // 2), caption, fill="#555555", font=font(10), anchor="mm")
    return picture


def _fitted(image: Image.Image) -> Image.Image:
    """Within a tile, centred; drawn images are at least as large, but for one of an odd shape."""
    scale = TILE / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (TILE, TILE), "#f0f0f0")
    tile.paste(small, ((TILE - small.width) // 2, (TILE - small.height) // 2))
    return tile


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def histogram(score: np.ndarray, label: np.ndarray, shown: np.ndarray, classes: Sequence[str], title: str) -> bytes:
    """PNG: all scores above, below a row for each class shown: its quartiles, its median, and its extremes."""
    finite = np.isfinite(score)
    score, label = score[finite], label[finite]
    figure = Figure(figsize=(8, 2.6 + 0.3 * len(shown)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    whole, by_class = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.3 * len(shown) + 0.2))
    log, score, scale = _scaled(score)
    _bars(whole, score, log)
    whole.set_ylabel("images")
    whole.set_title(f"{title}, {len(score)} images; orange: median", loc="left", fontsize=11)
    for row, one in enumerate(shown.tolist()):
        own = score[label == one]
        if len(own):
            low, quarter, middle, upper, high = np.quantile(own, (0, 0.25, 0.5, 0.75, 1))
            by_class.plot([low, high], [row, row], color=INK, linewidth=1)
            by_class.plot([quarter, upper], [row, row], color=INK, linewidth=7, solid_capstyle="butt")
            by_class.plot([middle], [row], color=MEDIAN, marker="|", markersize=11, markeredgewidth=2.2)
    by_class.set(yticks=range(len(shown)), yticklabels=[clipped(classes[one]) for one in shown.tolist()], ylim=(len(shown) - 0.5, -0.5))
    plain_ticks(by_class)
    by_class.set_xlabel(title[0].lower() + title[1:] + scale)
    return _saved(figure, (whole, by_class))


Pair = tuple[str, np.ndarray, np.ndarray]  # a class: its name, the scores of its pool and those of its chosen windows


def pool_histogram(lines: Sequence[Pair], title: str) -> bytes:
    """PNG: the scores of the pool and of the windows chosen; above all classes, below a row for each: the pool's quartiles, chosen dots."""
    pools, picks = (
        np.concatenate([values[np.isfinite(values)] for values in column]) for column in zip(*((p, c) for _, p, c in lines), strict=True)
    )
    both = np.concatenate([pools, picks])
    figure = Figure(figsize=(8, 2.6 + 0.3 * len(lines)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    whole, by_class = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.3 * len(lines) + 0.2))
    log, both, scale = _scaled(both)
    floor = both.min() if log else -np.inf
    pools, picks = np.maximum(pools, floor), np.maximum(picks, floor)
    if len(both):
        bins = _bins(both, log)
        whole.hist(pools, bins=bins, color=PALE, label=f"pool, {len(pools)} images by their best window")
        whole.hist(picks, bins=bins, color=MEDIAN, label=f"chosen, {len(picks)} windows")
        whole.legend(frameon=False, fontsize=9)
    whole.set_ylabel("number")
    whole.set_title(title, loc="left", fontsize=11)
    for row, (_, pool, chosen) in enumerate(lines):
        if len(own := np.maximum(pool[np.isfinite(pool)], floor)):
            low, quarter, upper, high = np.quantile(own, (0, 0.25, 0.75, 1))
            by_class.plot([low, high], [row, row], color=PALE, linewidth=1.2)
            by_class.plot([quarter, upper], [row, row], color=PALE, linewidth=8, solid_capstyle="butt")
        by_class.plot(np.maximum(chosen, floor), np.full(len(chosen), row), color=MEDIAN, marker="o", markersize=3.5, linestyle="")
    by_class.set(yticks=range(len(lines)), yticklabels=[clipped(name) for name, *_ in lines], ylim=(len(lines) - 0.5, -0.5))
    plain_ticks(by_class)
    by_class.set_xlabel("score" + scale)
    if log:
        whole.set_xscale("log")
    return _saved(figure, (whole, by_class))


def _scaled(score: np.ndarray) -> tuple[bool, np.ndarray, str]:
    """Whether a log scale tells more of finite scores [n], the scores as it draws them (zeros at its left end), and what to say."""
    positive = score[score > 0]
    if not len(positive) or score.min() < 0 or positive.max() <= 100 * positive.min():
        return False, score, ""
    return True, np.maximum(score, positive.min()), ", log scale" + "; 0 is drawn at the left end" * bool((score == 0).any())


def _saved(figure: Figure, panels: Sequence[Axes]) -> bytes:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bins(score: np.ndarray, log: bool) -> list[float]:
    low, high = float(score.min()), float(score.max())
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return (np.geomspace(low, high, 49) if log else np.linspace(low, high, 49)).tolist()


def _bars(axes: Axes, score: np.ndarray, log: bool) -> None:
    if not len(score):
        return
    axes.hist(score, bins=_bins(score, log), color=INK)
    axes.axvline(float(np.median(score)), color=MEDIAN, linewidth=1.6)
    if log:
        axes.set_xscale("log")
