"""The report's page: its style sheet and its tags."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from infoutil_fast.drawing.overlay import BOX, EDGE, WINDOW
from infoutil_fast.drawing.plots import INK

NONE = "\N{EN DASH}"


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


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


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


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
