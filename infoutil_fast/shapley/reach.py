"""Which input pixels each location of a feature map depends on, layer by layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from infoutil_fast.shapley.tracing import POINTWISE_FUNCTIONS, POINTWISE_METHODS, POINTWISE_MODULES, shape_of


@dataclass(frozen=True)
class Reach:
    """Which pixels each row and each column of a feature map may depend on, inclusive; lo > hi where none."""

    rows: np.ndarray  # [H, 2] int64
    cols: np.ndarray  # [W, 2] int64


def reaches(graph: fx.GraphModule) -> tuple[dict[fx.Node, Reach], list[str]]:
    """What each feature map may depend on, as far as the operations are known to be local; and the first operations that are not."""
    modules = dict(graph.named_modules())
    found: dict[fx.Node, Reach] = {}
    stops = []
    for node in graph.graph.nodes:
        shape = shape_of(node)
        if node.op == "placeholder" and shape is not None and len(shape) == 4:
            h, w = (np.arange(n)[:, None].repeat(2, 1) for n in shape[2:])
            found[node] = Reach(h, w)
        elif node.op.startswith("call") and any(n in found for n in node.all_input_nodes):
            reach = _of(node, modules, found, shape) if shape is not None and len(shape) == 4 else None
            if reach is not None:
                found[node] = reach
            else:
                what = type(modules[node.target]).__name__ if node.op == "call_module" else getattr(node.target, "__name__", node.target)
                stops.append(f"{node.name} ({what}) is not known to be local")
    return found, stops


def _of(node: fx.Node, modules: dict[str, nn.Module], found: dict[fx.Node, Reach], shape: tuple[int, ...]) -> Reach | None:
    """Reach of one operation's output [1, C, H, W]; None where it is not known to be local."""
    inputs = [n for n in node.all_input_nodes if shape_of(n) is not None]
    dynamic = [n for n in inputs if n.op != "get_attr"]
    if not all(n in found for n in dynamic) or len(dynamic) < len([n for n in node.all_input_nodes if n.op != "get_attr"]):
        return None
    first = found[dynamic[0]]
    if node.op == "call_module":
        layer = modules[str(node.target)]
        if type(layer) in POINTWISE_MODULES:
            return first
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
            return _windows(first, shape, layer.kernel_size, layer.stride, _padding(layer), layer.dilation)
        if type(layer) in (nn.MaxPool2d, nn.AvgPool2d) and not getattr(layer, "return_indices", False):
            stride = layer.stride if layer.stride is not None else layer.kernel_size
            return _windows(first, shape, layer.kernel_size, stride, layer.padding, getattr(layer, "dilation", 1))
        if type(layer) in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d):
            return Reach(_bins(first.rows, shape[2]), _bins(first.cols, shape[3]))
        return None
    pointwise = (node.op == "call_function" and node.target in POINTWISE_FUNCTIONS) or node.target in POINTWISE_METHODS
    same = all((shape_of(n) or ())[2:] == shape[2:] for n in dynamic)
    if same and (pointwise or (node.target is torch.cat and (node.kwargs.get("dim", (*node.args, 0)[1]) in (1, -3)))):
        return _union([found[n] for n in dynamic])
    if node.target is F.pad:
        return _padded(node, first, shape)
    if node.target is operator.getitem:
        return _sliced(node, first)
    return None


def _padding(layer: nn.Conv2d) -> Any:
    """Zeros before the first row and column."""
    if isinstance(layer.padding, str):
        return 0 if layer.padding == "valid" else tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding


def _windows(reach: Reach, shape: tuple[int, ...], kernel: Any, stride: Any, padding: Any, dilation: Any) -> Reach:
    """Of windows that slide: a convolution or a pooling."""
    k, s, p, d = ((v, v) if isinstance(v, int) else tuple(v) for v in (kernel, stride, padding, dilation))
    axes = []
    for i, before in enumerate((reach.rows, reach.cols)):
        at = np.arange(shape[2 + i])[:, None] * s[i] - p[i] + np.arange(k[i]) * d[i]  # [out, k] positions of the input
        axes.append(_gathered(before, at))
    return Reach(*axes)


def _gathered(before: np.ndarray, at: np.ndarray) -> np.ndarray:
    """[out, 2] from positions [out, k] of an input [in, 2]; positions outside are padding and depend on nothing."""
    inside = (at >= 0) & (at < len(before))
    safe = at.clip(0, len(before) - 1)
    lo = np.where(inside, before[safe, 0], np.iinfo(np.int64).max).min(1)
    hi = np.where(inside, before[safe, 1], -1).max(1)
    return np.stack([lo, hi], 1)


def _bins(before: np.ndarray, out: int) -> np.ndarray:
    """Of adaptive pooling: bin i covers floor(i n / out) to ceil((i + 1) n / out)."""
    n = len(before)
    return np.stack([_gathered(before, np.arange(i * n // out, -(-(i + 1) * n // out))[None])[0] for i in range(out)])


def _union(parts: list[Reach]) -> Reach:
    lo = [np.stack([getattr(r, axis)[:, 0] for r in parts]).min(0) for axis in ("rows", "cols")]
    hi = [np.stack([getattr(r, axis)[:, 1] for r in parts]).max(0) for axis in ("rows", "cols")]
    return Reach(*(np.stack([a, b], 1) for a, b in zip(lo, hi, strict=True)))


def _padded(node: fx.Node, reach: Reach, shape: tuple[int, ...]) -> Reach | None:
    """F.pad with a constant: new rows and columns depend on nothing."""
    pad = list(node.args[1]) if len(node.args) > 1 else list(node.kwargs["pad"])  # type: ignore
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    if mode != "constant" or not all(isinstance(n, int) for n in pad):
        return None
    left, top = (pad + [0, 0])[0], (pad + [0, 0, 0])[2]
    return Reach(_gathered(reach.rows, np.arange(shape[2])[:, None] - top), _gathered(reach.cols, np.arange(shape[3])[:, None] - left))


def _sliced(node: fx.Node, reach: Reach) -> Reach | None:
    """x[:, :, a:b:c, d:e:f] with plain numbers."""
    where = node.args[1]
    plain = isinstance(where, tuple) and all(
        isinstance(s, slice) and all(n is None or isinstance(n, int) for n in (s.start, s.stop, s.step)) for s in where
    )
    if not plain or where[:1] != (slice(None),):  # type: ignore[index]
        return None
    rows, cols = (*where, slice(None), slice(None), slice(None))[2:4]  # type: ignore[misc]
    return Reach(reach.rows[rows], reach.cols[cols])
