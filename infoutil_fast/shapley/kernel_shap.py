"""Captum's KernelShap for whole batches: the same arguments and the same estimate, evaluated and solved together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from infoutil_fast.shapley.sampling import by_kernel
from infoutil_fast.types import InputError

T = TypeVar("T", Tensor, tuple[Tensor, ...])
Number = int | float
END_WEIGHT = 1e6  # of the empty and the full coalition; the others have weight 1
_AT_ONCE = 1 << 24  # elements of the coalitions [N, n, M] that are drawn and solved together: 128 MiB in float64
_ROWS = {"cpu": 32}  # of a model call: 64 took 1.8x as long at 224 px (batches over 32 MiB are mapped anew each time), and no less at 32 px


class KernelShap:
    """Shapley values by weighted linear regression over sampled coalitions, a fast drop-in for `captum.attr.KernelShap`.

    forward_func: a module or function that gives [N, ...] for inputs [N, ...], one value an example once `target` is picked.
    It runs in the mode that it is in: call `eval()` first. What it is given lies in memory that the next call writes again.
    Source: Lundberg and Lee 2017, Theorem 2, as in Captum 0.9.

    Unlike Captum: rows of all the images share the model calls; the fit is in float64, without scikit-learn (Captum's is in
    float32, where rounding errors pass for a direction of their own once features are many and samples fewer); draws come
    from `generator`; an element that is left out shows its baseline even where the input is NaN; results stay on the device.
    Captum's `NoiseTunnel` takes it as it takes Captum's own.
    """

    multiplies_by_inputs = False  # asked for by NoiseTunnel, as the next is

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self.forward_func = forward_func

    def has_convergence_delta(self) -> bool:
        return False

    def attribute_future(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("KernelShap has no futures: attribute() gives the attributions themselves")

    @torch.no_grad()
    @torch.no_grad()  # twice: NoiseTunnel calls what the outer one wraps
    def attribute(
        self,
        inputs: T,
        baselines: Number | Tensor | tuple[Number | Tensor, ...] | None = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        return_input_shape: bool = True,
        show_progress: bool = False,
        *,
        generator: Generator | None = None,
    ) -> T:
        """The share of every feature in each example's output: float32 in the shape of `inputs`, or [N, M].

        inputs: [N, ...], or a tuple of them, which the model takes one after the other.
        baselines: what a feature shows when it is left out; a number or a tensor that broadcasts to the input, one for each
        input; None is 0. target: None, an index (int, or tuple for more output dimensions), or N of them (tensor or list).
        additional_forward_args: passed on; a tensor or a list with N rows goes row by row, anything else as it is.
        feature_mask: ids 0 to M - 1 that broadcast to the input, for all examples or [N, ...] for each; a tuple shares its ids.
        None: every element is a feature. n_samples: evaluations of an example, the full and the empty coalition among them.
        perturbations_per_eval: the most rows in one model call; None chooses: 32 on the CPU, 256 elsewhere. With 1, as Captum has it by
        default, the model sees one row at a time and may give one number for it: a float, or a tensor [] or [1]. A model that gives
        one number for several rows too makes one example of them all, and the result is in the shape of the feature mask, as Captum's.
        generator: of the coalitions, drawn anew for every example; None is torch's own CPU generator.

        Raises `InputError` for shapes, ids or targets that do not fit, n_samples below 3, fewer than 2 features, or a model
        that does not give one value an example (a loss over the batch), or gives NaN or infinity. An empty batch gives an empty result.
        """
        xs = _examples(inputs)
        N, device = len(xs[0]), xs[0].device
        ids, M = _features(xs, feature_mask)
        players = [_Input(*one) for one in zip(*_baselines(xs, baselines), ids, strict=True)]
        index = _target(target, N)
        extra = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
        rows = _ROWS.get(device.type, 256) if perturbations_per_eval is None else perturbations_per_eval
        if n_samples < 3 or rows < 1 or (N and M < 2):
            raise InputError(
                "KernelShap needs n_samples of 3 or more, perturbations_per_eval of 1 or more and 2 features or more, "
                f"not {n_samples}, {perturbations_per_eval} and {M}"
            )
        extra = () if additional_forward_args is None else extra
        joint = rows == 1 and N > 1 and _one_number(self.forward_func, xs, extra)
        if joint:
            players, N = [_Input(*(a[None] for a in (p.x, p.base, p.ids))) for p in players], 1
        game = _Game(self.forward_func, players, extra, index, rows, joint)
        phi = torch.zeros(N, M)
        step = max(1, _AT_ONCE // (n_samples * max(M, 1)))  # examples
        with tqdm(total=N * n_samples, desc="Kernel Shap attribution", disable=not show_progress) as bar:
            for start in range(0, N, step):
                masks = draw(min(step, N - start), n_samples, M, generator)
                phi[start : start + step] = solve(masks, game.values(masks.to(device), start, bar))
        phi = phi.to(device)
        if not return_input_shape:
            return phi  # type: ignore[return-value]
        maps = tuple(phi[0][p.ids[0]] if joint else p.spread(phi) for p in players)
        return maps if isinstance(inputs, tuple) else maps[0]


def draw(N: int, n_samples: int, M: int, generator: Generator | None = None) -> Tensor:
    """Coalitions as Captum draws them, bool [N, n_samples, M] on the generator's device: the full one, the empty one, then random ones.

    Each has a size k with p ~ (M - 1) / (k (M - k)) and is a uniform set of that size; with replacement, unpaired.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    masks = torch.zeros(N, n_samples, M, dtype=torch.bool, device=device)
    masks[:, :1] = True
    masks[:, 2:] = by_kernel(M, N * (n_samples - 2), generator).view(N, n_samples - 2, M)
    return masks


def solve(masks: Tensor, values: Tensor) -> Tensor:
    """Captum's fit for given coalitions: masks [..., n, M] bool and values [..., n] give float64 [..., M], on the CPU.

    Least squares with an intercept, empty and full coalition weighted 1e6; of many solutions the one of minimum norm.
    """
    z, v = masks.cpu().double(), values.cpu().double()[..., None]
    size = z.sum(-1, keepdim=True)
    weight = torch.ones_like(size).masked_fill_((size == 0) | (size == masks.shape[-1]), END_WEIGHT)  # [..., n, 1]
    # Weighted centring takes the intercept out of the system, and so out of the norm, as scikit-learn does.
    z, v = (a - (weight * a).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True) for a in (z, v))
    root = weight.sqrt()
    return torch.linalg.lstsq(root * z, root * v, driver="gelsd").solution[..., 0]


@dataclass(frozen=True, eq=False)
class _Input:
    """One input of the model: its elements belong to features."""

    x: Tensor  # [N, ...]
    base: Tensor  # [1 or N, ...], broadcasts to x, of the same dtype
    ids: Tensor  # [1 or N, ...] int64, broadcasts to x

    def show(self, masks: Tensor, i: int, out: Tensor) -> None:
        """Example i with the features kept that masks [m, M] keep, written to out [m, ...]."""
        torch.where(masks[:, _row(self.ids, i)], self.x[i], _row(self.base, i), out=out)

    def spread(self, phi: Tensor) -> Tensor:
        """phi [N, M] at every element's feature, in the shape of x."""
        out = torch.empty(self.x.shape, device=phi.device)
        for i, values in enumerate(phi):
            out[i] = values[_row(self.ids, i)]
        return out


@dataclass(frozen=True, eq=False)
class _Game:
    """The payoff of any coalition of any example."""

    forward_func: Callable[..., Any]
    players: Sequence[_Input]
    extra: tuple[Any, ...]
    index: Tensor | None  # [1 or N, k] int64, on the CPU
    rows: int  # of a model call
    joint: bool  # whether all rows given are one example, of which the model gives one number

    def values(self, masks: Tensor, start: int, bar: tqdm[Any]) -> Tensor:
        """float64 [b, n] on the CPU, of the examples from `start` on under masks [b, n, M]."""
        (b, n), N = masks.shape[:2], len(self.players[0].x)
        parts = []
        # One buffer for all calls: fresh memory for every batch costs more than the masking.
        buffers = [torch.empty(min(self.rows, b * n), *p.x.shape[1:], dtype=p.x.dtype, device=p.x.device) for p in self.players]
        for low in range(0, b * n, self.rows):
            high = min(low + self.rows, b * n)
            for i in range(low // n, (high - 1) // n + 1):
                first, last = max(low, i * n), min(high, (i + 1) * n)
                for player, buffer in zip(self.players, buffers, strict=True):
                    player.show(masks[i, first - i * n : last - i * n], start + i, buffer[first - low : last - low])
            example = start + torch.arange(low, high) // n
            extra = self.extra if self.joint else [_rows_of(a, example, N) for a in self.extra]
            out = self.forward_func(*(buffer[0] if self.joint else buffer[: high - low] for buffer in buffers), *extra)
            parts.append(self._payoff(out, example))
            bar.update(high - low)
        return torch.cat(parts).cpu().double().view(b, n)

    def _payoff(self, out: Tensor, example: Tensor) -> Tensor:
        """One value a row, [R], of the model's output [R, ...]."""
        R = len(example)
        if R == 1 and (isinstance(out, Number) or (isinstance(out, Tensor) and not out.ndim)):
            out = torch.as_tensor(out).reshape(1)
        if not isinstance(out, Tensor) or not out.ndim or len(out) != R:
            got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise InputError(
                f"the model must give [N, ...] for N examples, not {got} for {R}: a value for the whole batch cannot be used "
                "(with perturbations_per_eval=1 a call has one example, and one number will do)"
            )
        if self.index is not None:
            sizes = torch.tensor(out.shape[1:])
            k = self.index.shape[1]
            lowest = -sizes[:k] if len(self.index) == 1 else 0  # as in Python, for an index that is the same for all
            if k > len(sizes) or bool(((self.index < lowest) | (self.index >= sizes[:k])).any()):
                raise InputError(f"target {self.index.tolist()[:8]} does not fit an output of shape {tuple(out.shape)}")
            picked = (self.index if len(self.index) == 1 else self.index[example]).expand(R, k).to(out.device)
            at = (torch.arange(R, device=out.device), *picked.T)
            out = out[at]
        if out.numel() != R:
            left = "without a target" if self.index is None else "with this target"
            raise InputError(f"{left} the model gives shape {tuple(out.shape)} for {R} examples: one value for each is needed")
        bad = example[~out.detach().reshape(R).isfinite().cpu()].unique()
        if len(bad):
            raise InputError(f"the model gives NaN or infinity for the examples {bad.tolist()[:8]}, whole or with features left out")
        return out.reshape(R).clone()  # it may be a view of the buffer


def _one_number(forward_func: Callable[..., Any], xs: Sequence[Tensor], extra: Sequence[Any]) -> bool:
    """Whether the model gives one number for two rows."""
    two = torch.arange(2)
    try:
        out = forward_func(*(x[:2] for x in xs), *(_rows_of(a, two, len(xs[0])) for a in extra))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError):
        return False  # it takes single rows only
    return isinstance(out, Number) or (isinstance(out, Tensor) and out.numel() == 1)


def _rows_of(given: Any, example: Tensor, N: int) -> Any:
    """Of a further argument with a row, or a thing in a list, for each of N examples, those of `example`; any other as it is."""
    if isinstance(given, list) and len(given) == N:
        return [given[i] for i in example.tolist()]
    return given[example.to(given.device)] if isinstance(given, Tensor) and given.ndim and len(given) == N else given


def _row(a: Tensor, i: int) -> Tensor:
    """Row i of what is given for each example, or the one row that is given for all."""
    return a[i if len(a) > 1 else 0]


def _examples(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    xs = inputs if isinstance(inputs, tuple) else (inputs,)
    if not xs or any(not isinstance(x, Tensor) or not x.ndim or len(x) != len(xs[0]) for x in xs):
        raise InputError(f"inputs must be a tensor [N, ...] or a tuple of such tensors with the same N, not {_shapes(xs)}")
    return xs


def _baselines(xs: tuple[Tensor, ...], baselines: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and their baselines [1 or N, ...], each pair in their common dtype."""
    given = (0,) * len(xs) if baselines is None else baselines if isinstance(baselines, tuple) else (baselines,)
    fits = len(given) == len(xs) and all(
        isinstance(b, int | float) or (isinstance(b, Tensor) and _broadcasts(b, x)) for b, x in zip(given, xs, strict=True)
    )
    if not fits:
        raise InputError(f"baselines must be a number or broadcast to the input, one for each: not {_shapes(given)} for {_shapes(xs)}")
    dtypes = [torch.result_type(x, b) for x, b in zip(xs, given, strict=True)]
    bases = [torch.as_tensor(b, dtype=t, device=x.device) for x, b, t in zip(xs, given, dtypes, strict=True)]
    return [x.to(t) for x, t in zip(xs, dtypes, strict=True)], [_lifted(b, x) for b, x in zip(bases, xs, strict=True)]


def _features(xs: tuple[Tensor, ...], feature_mask: Tensor | tuple[Tensor, ...] | None) -> tuple[list[Tensor], int]:
    """The feature of every element, int64 [1 or N, ...] for each input, and how many features there are."""
    if feature_mask is None:
        ends = [0, *accumulate(x.shape[1:].numel() for x in xs)]
        every = [torch.arange(a, b, device=x.device).view(1, *x.shape[1:]) for a, b, x in zip(ends, ends[1:], xs, strict=False)]
        return every, ends[-1]
    given = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
    fits = len(given) == len(xs) and all(isinstance(m, Tensor) and _whole(m) and _broadcasts(m, x) for m, x in zip(given, xs, strict=True))
    if not fits:
        raise InputError(f"feature_mask must be integers that broadcast to the input, one for each: not {_shapes(given)} for {_shapes(xs)}")
    filled = [m for m in given if m.numel()]
    low, high = (min(int(m.min()) for m in filled), max(int(m.max()) for m in filled)) if filled else (0, -1)
    if low:
        warnings.warn(f"feature_mask starts at {low}: shifted to 0, as Captum does", stacklevel=4)
    return [_lifted(m.to(x.device, torch.int64) - low, x) for m, x in zip(given, xs, strict=True)], high - low + 1


def _target(target: Any, N: int) -> Tensor | None:
    """int64 [1, k] for all examples or [N, k], on the CPU: indices of the first k output dimensions after N."""
    if target is None or not N:
        return None
    try:
        index = torch.as_tensor(target).cpu()
    except (TypeError, ValueError):
        index = torch.full((1,), float("nan"))  # refused below, like other numbers that are no index
    shared = isinstance(target, tuple) or (index.numel() == 1 and not isinstance(target, list))
    index = index.reshape(1, -1) if shared else index.unsqueeze(-1).flatten(1)
    if not _whole(index) or len(index) != (1 if shared else N):
        raise InputError(f"target must be None, an int, a tuple of ints or {N} of them (a tensor or a list), not {_shapes((target,))}")
    return index.long()


def _whole(a: Tensor) -> bool:
    return not (a.is_floating_point() or a.is_complex() or a.dtype == torch.bool)


def _broadcasts(small: Tensor, x: Tensor) -> bool:
    pairs = zip(reversed(small.shape), reversed(x.shape), strict=False)
    return small.ndim <= x.ndim and all(a in (1, b) for a, b in pairs)


def _lifted(a: Tensor, x: Tensor) -> Tensor:
    """`a` with as many dimensions as x."""
    return a.reshape((1,) * (x.ndim - a.ndim) + a.shape)


def _shapes(values: Sequence[Any]) -> str:
    return ", ".join(f"{v.dtype} {tuple(v.shape)}".removeprefix("torch.") if isinstance(v, Tensor) else repr(v)[:60] for v in values)
