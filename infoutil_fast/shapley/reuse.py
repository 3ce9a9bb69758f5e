"""Exact reuse of early layers: where every location still depends on a small block of patches, few masks give all that any mask can.

A location of an early feature map depends on the pixels of its receptive field only. While these lie in a block of at most p x p patches,
the value under a coalition depends on p^2 bits, and the 2^(p^2) masks that repeat with period p hold every value that can occur (16 for
p = 2). So a net is split there: the front runs once on these masks, `ops.assemble_patterns` gathers each coalition's map, and the back
runs on that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from infoutil_fast.ops.patches import assemble_patterns
from infoutil_fast.shapley.reach import Reach, reaches
from infoutil_fast.shapley.tracing import multiply_adds, shape_of

PERIODS = (1, 2, 3)
TRAFFIC = 16  # multiply-adds that take as long as moving one element, on a processor: only to compare splits
WORTH = 0.97  # of the plain cost: a split that saves less is not made


@dataclass(frozen=True)
class Split:
    """A net in two: `front` on the periodic masks gives the `maps`, `back` takes them, assembled for each coalition, to the logits."""

    front: fx.GraphModule
    back: fx.GraphModule
    grid: tuple[int, int]
    period: tuple[int, int]
    patterns: Tensor  # [P, d] bool, the periodic masks
    places: list[tuple[Tensor, Tensor]]  # of each map: block row of its rows [H], block column of its columns [W], int32
    shapes: list[tuple[int, ...]]  # [C, H, W] of each map
    front_share: float  # of the multiply-adds of the net
    last: str  # what the front ends with

    def to(self, device: torch.device) -> Split:
        places = [(row.to(device), col.to(device)) for row, col in self.places]
        return replace(self, patterns=self.patterns.to(device), places=places)

    def predicted(self, coalitions: int) -> float:
        """Multiply-adds of the whole net on every coalition over those of the split."""
        return 1 / (self.front_share * len(self.patterns) / coalitions + 1 - self.front_share)

    def index(self, masks: Tensor) -> Tensor:
        """Which pattern shows in each block of patches: [M, R, S] int32 of masks [M, d]."""
        (rows, cols), (p, q) = self.grid, self.period
        keep = masks.view(-1, rows, cols).int()
        found = torch.zeros(len(masks), rows - p + 1, cols - q + 1, dtype=torch.int32, device=masks.device)
        r, s = (torch.arange(n, device=masks.device) for n in found.shape[1:])
        for i in range(p):
            for j in range(q):
                bit = ((r + i) % p * q)[:, None] + ((s + j) % q)[None]
                found += keep[:, i : rows - p + 1 + i, j : cols - q + 1 + j] << bit
        return found

    def assemble(self, maps: tuple[Tensor, ...], images: int, index: Tensor, out: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        """The maps of every coalition [images * M, C, H, W], from those of the patterns [images * P, C, H, W]."""
        return [
            assemble_patterns(m, index, row, col, images=images, out=to, backend=backend)
            for m, (row, col), to in zip(maps, self.places, out, strict=True)
        ]


def split(graph: fx.GraphModule, grid: tuple[int, int], coalitions: int) -> Split | str:
    """Split a measured graph (`graphs.measure`) where it costs least for so many coalitions; or why that is not worth it, in one line."""
    reach, stops = reaches(graph)
    nodes = list(graph.graph.nodes)
    cost = {node: multiply_adds(graph, node) + TRAFFIC * math.prod(shape_of(node) or (0,)) for node in nodes}
    whole = sum(cost.values()) * coalitions
    best, least = None, WORTH * whole
    for p in PERIODS:
        period = (min(p, grid[0]), min(p, grid[1]))
        count = 1 << math.prod(period)
        local: set[fx.Node] = set()
        for node in nodes:  # a map may be local though what it is computed from is not, with a stride: then the cut comes before both
            known = node in reach and all(n in local or n.op == "get_attr" for n in node.all_input_nodes)
            if known and _within(reach[node], _pixels(graph), grid, period):
                local.add(node)
        ends = _ends(local)
        if not ends or count >= coalitions:
            continue
        moved = sum(2 * TRAFFIC * math.prod(shape_of(node) or ()) for node in ends)
        front = sum(cost[node] for node in _needed(ends))
        found = front * count + (sum(cost.values()) - front + moved) * coalitions
        if found < least:
            best, least = (period, ends), found
    if best is None:
        return f"nothing to share among {coalitions} coalitions{': ' + stops[0] if stops else ''}"
    return _cut(graph, grid, *best, reach)


def _pixels(graph: fx.GraphModule) -> tuple[int, int]:
    (shape,) = (shape_of(node) for node in graph.graph.nodes if node.op == "placeholder")
    assert shape is not None
    return shape[2], shape[3]


def _patches(reach: np.ndarray, patches: int, pixels: int) -> np.ndarray:
    """First and last patch [n, 2] of the pixels [n, 2]; where none, lo > hi."""
    return np.where(reach[:, :1] <= reach[:, 1:], reach * patches // pixels, [[patches, -1]])


def _within(reach: Reach, pixels: tuple[int, int], grid: tuple[int, int], period: tuple[int, int]) -> bool:
    """Whether every location depends on a block of at most `period` patches."""
    spans = [_patches(axis, patches, size) for axis, patches, size in zip((reach.rows, reach.cols), grid, pixels, strict=True)]
    return all(int((span[:, 1] - span[:, 0]).max()) < p for span, p in zip(spans, period, strict=True))


def _ends(local: set[fx.Node]) -> list[fx.Node]:
    """The local maps that something else takes, in the order of the graph; the images themselves are no end."""
    ends = [node for node in local if node.op != "placeholder" and any(user not in local for user in node.users)]
    if any(node.op == "placeholder" and any(user not in local for user in node.users) for node in local):
        return []
    position = {node: i for i, node in enumerate(next(iter(local)).graph.nodes)} if local else {}
    return sorted(ends, key=lambda node: position[node])


def _needed(ends: list[fx.Node]) -> set[fx.Node]:
    """The ends and everything that they are computed from."""
    found: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _cut(graph: fx.GraphModule, grid: tuple[int, int], period: tuple[int, int], ends: list[fx.Node], reach: dict[fx.Node, Reach]) -> Split:
    before = _needed(ends)
    front, back = fx.Graph(), fx.Graph()
    to_front: dict[fx.Node, fx.Node] = {}
    to_back = {node: back.placeholder(f"map{i}") for i, node in enumerate(ends)}
    for node in graph.graph.nodes:
        if node in before:
            to_front[node] = front.node_copy(node, lambda n: to_front[n])
        if node not in to_back and (node not in before or node.op == "get_attr"):
            to_back[node] = back.node_copy(node, lambda n: to_back[n])
    front.output(tuple(to_front[node] for node in ends))
    halves = [fx.GraphModule(graph, part) for part in (front, back)]
    for half in halves:
        half.graph.eliminate_dead_code()
        half.graph.lint()
        half.recompile()
    done = sum(multiply_adds(graph, node) for node in before)
    pixels = _pixels(graph)
    return Split(
        front=halves[0],
        back=halves[1],
        grid=grid,
        period=period,
        patterns=periodic(grid, period),
        places=[
            (_blocks(reach[n].rows, grid[0], period[0], pixels[0]), _blocks(reach[n].cols, grid[1], period[1], pixels[1])) for n in ends
        ],
        shapes=[tuple((shape_of(node) or ())[1:]) for node in ends],
        front_share=done / max(1, sum(multiply_adds(graph, node) for node in graph.graph.nodes)),
        last=", ".join(node.name for node in ends),
    )


def periodic(grid: tuple[int, int], period: tuple[int, int]) -> Tensor:
    """The masks [P, d] that repeat with the period: bit (i % p) q + j % q of the pattern's number says whether patch (i, j) is kept."""
    (rows, cols), (p, q) = grid, period
    bit = (torch.arange(rows) % p * q)[:, None] + torch.arange(cols) % q
    return (torch.arange(1 << (p * q))[:, None] >> bit.flatten() & 1) > 0


def _blocks(reach: np.ndarray, patches: int, period: int, pixels: int) -> Tensor:
    """The block of patches, named by its first one, that each row (or column) depends on: [n] int32."""
    first = _patches(reach, patches, pixels)[:, 0]
    return torch.from_numpy(first.clip(0, patches - period).astype(np.int32))
