"""The report of a distilled set: one HTML page with everything inside it, no scripts and no outside files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infoutil_fast.data import Source, Split, open_source
from infoutil_fast.drawing import histograms, html, overlay
from infoutil_fast.drawing.html import Html, join, note, picture, section, table, tag
from infoutil_fast.runtime.files import write_bytes
from infoutil_fast.runtime.rows import readable
from infoutil_fast.sets.partial import Found, flat, hits, is_image, read, spaced
from infoutil_fast.sets.pictures import score_histogram, write_album
from infoutil_fast.sets.store import FORMAT
from infoutil_fast.types import InputError

DRAWN = 5  # source images drawn for each class


def write_report(
    path: Path, out: Path | None = None, *, source: Source | None = None, limit_classes: int = 10, per_class: int = 10
) -> Path:
    """Write the report of the distilled set in folder `path` to `out` (`path`/report.html where not given) and return where it is.

    Beside the page lie its pictures as files: <page>-gallery.png, and where there is something to draw -scores.png and -windows.png.

    At most `limit_classes` classes are drawn (evenly spaced) with at most `per_class` images each. Without `source`, the one that
    meta.json names is opened. The same files give the same bytes. Raises `InputError` when `path` holds no distilled set.
    """
    if limit_classes < 1 or per_class < 1:
        raise InputError(f"a report shows at least 1 class and 1 image of each, not {limit_classes} and {per_class}")
    out = Path(path) / "report.html" if out is None else Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder; the report is one file")
    found = read(Path(path), limit_classes)
    source, trouble = (source, "") if source else _reopen(found)
    sections = [
        _head(found),
        section("Results", _results(found)),
        section("Gallery", _gallery(found, per_class)),
        section("Where the windows come from", _origins(found, source, trouble, min(DRAWN, per_class))),
        section("Scores", _scores(found)),
        section("Timings", _timings(found)),
        section("Settings and files", _settings(found)),
    ]
    page = html.page(f"{found.meta['method']} on {found.meta['source'].get('name')}", sections)
    write_bytes(out, page.encode("utf-8", "replace"))
    write_album(found, source.train if source else None, out, per_class)
    return out


def montage(path: Path, classes: int | Sequence[int], per_class: int) -> Image.Image:
    """A contact sheet: a row for each class (labels, or how many evenly spaced ones) with its first `per_class` images."""
    found = read(Path(path), classes if isinstance(classes, int) else len(classes))
    labels = found.shown if isinstance(classes, int) else tuple(classes)
    if not labels:
        raise InputError(f"{path} has no images yet")
    if absent := sorted(set(labels) - set(found.done)):
        raise InputError(f"{path} has no images of class {absent[0]}; it has those of {len(found.done)} of {len(found.classes)} classes")
    return overlay.contact_sheet([(found.classes[label], found.images(label)[:per_class]) for label in labels])


def _reopen(found: Found) -> tuple[Source | None, str]:
    spec = found.meta["source"].get("spec")
    if not isinstance(spec, str):
        return None, "meta.json does not say how to open the source."
    try:
        return open_source(spec), ""
    except (InputError, OSError, ImportError) as error:
        return None, f"The source cannot be opened here, so its images are not drawn: {error}"


# Sections, in the page's order


def _head(found: Found) -> Html:
    meta, factor = found.meta, found.meta.get("factor")
    facts: list[tuple[str, object, str]] = [
        ("Source", meta["source"].get("name"), f"{len(found.classes)} classes"),
        ("Images per class", meta.get("ipc"), f"{len(found.done)} of {len(found.classes)} classes finished"),
        ("Factor", factor, f"{factor * factor} window{'s' * (factor > 1)} an image" if isinstance(factor, int) else ""),
        ("Size", f"{meta.get('size', html.NONE)} px", f"seed {meta.get('seed', html.NONE)}"),
        ("Teacher", *_teacher(meta.get("teacher"))),
        ("Soft labels from", *(_teacher(meta["label_teacher"]) if meta.get("label_teacher") else ("the teacher", ""))),
        ("Method", meta["method"], ""),
        ("Written by", f"infoutil_fast {meta.get('version', html.NONE)}", f"format {FORMAT}"),
    ]
    cards = (tag("div", tag("dt", name), tag("dd", value, tag("small", small))) for name, value, small in facts)
    title = tag("h1", f"{meta['method']}: a distilled set of {meta['source'].get('name')}")
    missing = len(found.classes) - len(found.done)
    state = f"Not finished: {missing} of {len(found.classes)} classes are missing." if missing else "All classes are finished."
    return tag("header", title, note(state), tag("dl", *cards))


def _teacher(facts: object) -> tuple[object, str]:
    if not isinstance(facts, dict):
        return facts, ""
    accuracy, epochs = facts.get("accuracy"), facts.get("epochs")
    told = "accuracy not measured" if accuracy is None else f"{_percent(accuracy)} % accuracy"
    return facts.get("name"), told if epochs is None else f"{told}, {epochs} epochs"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _results(found: Found) -> Html:
    rows, remark = readable(found.path / "evaluations.jsonl")
    if not rows:
        return note("No evaluation yet. ", remark)
    peeked = any(row.get("best") for row in rows)
    head = ["Student", "Labels", "Recipe", "Images per class", "Epochs", "Accuracy (%)", "Single seeds (%)"] + [
        "Best of test (peeks at the test set)"
    ] * peeked
    told = "Accuracy of the last epoch on the validation split: mean ± standard deviation over seeds."
    return join([note(told, " ", remark), table(head, [_result(row, peeked) for row in rows], text=(0, 1, 2, 6, 7))])


def _result(row: dict[str, Any], peeked: bool) -> list[object]:
    last, seeds = row.get("last") or [], row.get("seeds") or []
    mean, std = row.get("mean"), row.get("std")
    if last and mean is None:
        mean, std = float(np.mean(last)), float(np.std(last))
    spread = f" ± {_percent(std)}" if std is not None and len(last) != 1 else ""
    names = [f"{seed}: " for seed in seeds] if len(seeds) == len(last) else [""] * len(last)
    single = ", ".join(name + _percent(value) for name, value in zip(names, last, strict=True))
    best = [", ".join(map(_percent, row.get("best") or [])) or None] if peeked else []
    bold = None if mean is None else tag("b", f"{_percent(mean)}{spread}")
    return [row.get("student"), row.get("labels"), row.get("recipe"), row.get("ipc"), row.get("epochs"), bold, single or None, *best]


def _gallery(found: Found, per_class: int) -> Html:
    if not found.done:
        return note("No class is finished yet.")
    small = "small" if isinstance(found.meta.get("size"), int) and found.meta["size"] <= 96 else ""
    columns = min(per_class, 10, max(len(found.images(label)) for label in found.shown))
    rows = []
    for label in found.shown:
        files = found.images(label)
        tiles = (picture(file.read_bytes(), f"{found.classes[label]}, image {file.stem}", small) for file in files[:per_class])
        name = tag("div", found.classes[label], Html("<br>"), tag("small", f"{min(per_class, len(files))} of {len(files)}", class_="note"))
        style = f"grid-template-columns: repeat({columns}, 1fr)"
        rows.append(tag("div", name, tag("div", *tiles, class_="tiles", style=style), class_="row"))
    return join([note(f"The distilled images as they are on disk; {_which(found)}."), *rows], "\n")


def _which(found: Found) -> str:
    if len(found.shown) == len(found.done):
        return f"all {len(found.done)} finished classes"
    return f"{len(found.shown)} of {len(found.done)} finished classes, evenly spaced"


def _origins(found: Found, source: Source | None, trouble: str, count: int) -> Html:
    kept = [label for label in found.shown if found.scores(label, "image")]
    if not kept:
        return note("No scores on disk: either no class is finished or this method keeps no windows of real images.")
    if source is None:
        return note(trouble)
    rows = [Html(f"{tag('h3', found.classes[label])}\n{_drawn(found, source.train, label, count)}") for label in kept]
    heat, boxes = any(found.scores(label, "heat") for label in kept), source.train.boxes is not None
    share = hits(found.path, source)
    told = ["Source images from which windows were kept: in each class from the highest to the lowest score, evenly spaced by rank."]
    told += ["The map covers the centred square, each scaled by its own largest absolute value (max |φ|)."] * heat
    told += [f"The centre of the window lies in the object's box for {_percent(share)} % of all kept windows."] if share is not None else []
    return join([note(" ".join(told)), html.legend(heat, boxes), *rows], "\n")


def _drawn(found: Found, split: Split, label: int, count: int) -> Html:
    arrays = found.scores(label, "image", "name", "top", "left", "size", "score")
    if arrays is None or not len(arrays[0]):
        return note("The scores of this class cannot be read.")
    image, name, top, left, size, score = arrays
    maps = found.scores(label, "heat")
    drawn = []
    for i in np.argsort(-score, kind="stable")[spaced(len(score), count)]:
        heat = None if maps is None else maps[0][i]  # [g, g]
        drawn.append(_origin(split, (int(image[i]), str(name[i])), (top[i], left[i], size[i]), float(score[i]), heat))
    return tag("div", *drawn, class_="drawn")


def _origin(split: Split, image: tuple[int, str], window: tuple[int, int, int], score: float, heat: np.ndarray | None) -> Html:
    """One source image with its heat map, window and box, and a caption."""
    position, name = image
    told = [tag("b", name.rsplit("/", 1)[-1]), f"score {score:.4g}"] + ([f"max |φ| {np.abs(heat).max():.3g}"] if heat is not None else [])
    frame: Html | str = "not in the source"
    if is_image(split, position, name):
        try:
            drawn = overlay.overlay(split.read(position), heat, window, None if split.boxes is None else split.boxes[position])
            frame = picture(overlay.png(drawn), f"{name} with its window")
        except (InputError, OSError) as error:
            frame = f"cannot be read: {error}"
    return tag("figure", tag("div", frame), tag("figcaption", join(told, Html("<br>"))))


def _scores(found: Found) -> Html:
    by_class = {label: arrays[0] for label in found.done if (arrays := found.scores(label, "score"))}
    whole = score_histogram(found)
    finite = {label: score[np.isfinite(score)] for label, score in by_class.items()}
    every = np.concatenate([np.zeros(0), *finite.values()])
    if not len(every):
        return note("No scores on disk.")
    low, high = float(every.min()), float(every.max())
    log = low > 0 and high > 100 * low

    def row(name: str, score: np.ndarray) -> list[object]:
        if not len(score):
            return [name, None, None, None, None, None]
        numbers = [f"{value:.4g}" for value in (score.min(), np.median(score), score.max())]
        return [name, picture(histograms.strip(score, low, high, log), f"histogram of {name}", "strip"), len(score), *numbers]

    axis = f"{low:.3g} to {high:.3g}{', log scale' if log else ''}"
    rows = [row(found.classes[label], finite[label]) for label in found.shown if label in finite]
    head = ["Class", f"Kept windows by score ({axis})", "Kept", "Min", "Median", "Max"]
    told = f"The method's own score of each kept window; {_which(found)}. Bars: windows, each row to its own height; orange: median."
    pool = [] if whole is None else [picture(whole, "scores of the pool and of the chosen windows", "wide-picture")]
    return join([*pool, note(told), table(head, rows, (0, 1), row(f"All {len(finite)} classes", every))])


def _timings(found: Found) -> Html:
    rows, remark = readable(found.path / "timings.jsonl")
    timed = list({row.get("label"): row for row in rows if isinstance(row.get("seconds"), dict)}.values())  # a redone class counts once
    if not timed:
        return note("No timings on disk. ", remark)
    stages = list(dict.fromkeys(stage for row in timed for part in ("seconds", "peak_bytes") for stage in row.get(part) or {}))
    seconds = {stage: sum(row["seconds"].get(stage, 0.0) for row in timed) for stage in stages}
    peaks = {stage: max((row.get("peak_bytes") or {}).get(stage, 0) for row in timed) / 2**20 for stage in stages}
    total = sum(seconds.values())
    body: list[list[object]] = []
    for stage in stages:
        share = seconds[stage] / total if total else 0.0
        bar = tag("span", tag("span", class_="share", style=f"width: {100 * share:.1f}%"), class_="track")
        peak = f"{peaks[stage]:,.0f}" if peaks[stage] else None
        body.append([stage, bar, f"{seconds[stage]:.2f}", f"{seconds[stage] / len(timed):.3f}", _percent(share), peak])
    head = ["Stage", "", "Seconds", "per class", "Share (%)", "Peak MiB"]
    foot = ["Total", "", f"{total:.2f}", f"{total / len(timed):.3f}", "100.0", f"{max(peaks.values(), default=0):,.0f}"]
    ranks = len({row.get("rank", 0) for row in timed})
    told = f"Summed over {len(timed)} class{'es' * (len(timed) > 1)} on {ranks} rank{'s' * (ranks > 1)}; peaks: the largest of any class. "
    return join([note(told, remark), table(head, body, (0, 1), foot)])


def _settings(found: Found) -> Html:
    provenance = [(tag("code", key), value) for key, value in flat({k: v for k, v in found.meta.items() if k != "config"})]
    config = [(tag("code", key), value) for key, value in flat(found.meta.get("config") or {})]
    sizes = {label: found.sizes(label) for label in found.done}
    rows = [[found.classes[label], len(found.images(label)), *map(_kib, sizes[label])] for label in found.shown]
    sums = [sum(column) for column in zip(*sizes.values(), strict=True)] or [0, 0]
    files = sum(len(found.images(label)) for label in found.done)
    total = [f"All {len(found.done)} classes", files, *map(_kib, sums)]
    parts = [
        tag("h3", "Make it again"),
        tag("pre", tag("code", "infoutil distill OUT --config meta.json")),
        tag("h3", "Settings"),
        table(["Name", "Value"], config, (0, 1)) if config else note("meta.json has no configuration."),
        tag("h3", "Provenance"),
        table(["Name", "Value"], provenance, (0, 1)),
        tag("h3", "Bytes on disk"),
        note(f"Shown: {_which(found)}." if found.done else "No class is finished yet."),
        table(["Class", "Images", "Images (KiB)", "Labels (KiB)"], rows, (0,), total),
    ]
    return join(parts, "\n")


def _kib(size: int) -> str | None:
    return f"{size / 1024:,.1f}" if size else None
