"""Shapley values of the patches of an image: a reusable plan, and its one-line form."""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from infoutil_fast.runtime.device import native_bfloat16
from infoutil_fast.runtime.statistics import keeps_apart
from infoutil_fast.shapley.designs import border_hadamard, plan
from infoutil_fast.shapley.forwards import PROBE, Forwards, by_image
from infoutil_fast.shapley.hadamard import order
from infoutil_fast.types import Coalitions, InputError, one_of

log = logging.getLogger(__name__)

# logits [n, K] float64, classes [n, 1] -> payoff [n, 1]; one logit (K = 1) is that of a yes or no, against a no at 0
PAYOFFS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit": lambda z, t: z.gather(1, t),
    "log_probability": lambda z, t: z.gather(1, t) - z.logsumexp(1, keepdim=True),
    "probability": lambda z, t: (z.gather(1, t) - z.logsumexp(1, keepdim=True)).exp(),
    "log_odds": lambda z, t: z.gather(1, t) - z.scatter(1, t, float("-inf")).logsumexp(1, keepdim=True),
}
MOST_BLOCKS = 16  # of Hadamard that `target_error` spends on one image
PROBE_FROM = 8  # images of a call: fewer run in float32 sooner than the first one in both formats


class PatchShapley:
    """Shapley values of patches, planned once for a model and an image shape: `plan(images, targets)` -> float32 [N, rows, cols].

    It traces, folds, splits, casts, compiles and allocates when it is made. It works on a copy of the weights and follows later changes
    only after `update()`; a model that torch.fx cannot trace, or with forward hooks, runs itself. `print(plan)` says what it does. One call
    at a time: a second one from another thread is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        *,
        grid: int | tuple[int, int] = 4,
        design: str | Coalitions = "border_hadamard",
        evaluations: int | None = None,
        payoff: str = "logit",
        fill: float | Tensor = 0.0,
        feature_mask: Tensor | None = None,
        align: int | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,  # noqa: A002 - as torch calls it
        reuse: bool = True,
        backend: str = "auto",
        max_memory: int | None = None,
        batch: int | None = None,
        generator: Generator | None = None,
    ):
        """shape: (C, H, W) of an image. reuse: compute early layers once where that is exact. The other arguments: `patch_shapley`."""
        one_of("payoff", payoff, tuple(PAYOFFS))
        if dtype not in (None, *PROBE):
            raise InputError(f"dtype must be torch.float32, torch.bfloat16 or None, not {dtype}")
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"shape must be (channels, height, width) of an image, not {tuple(shape)}")
        if batch is not None and batch < 1:
            raise InputError(f"batch must be at least 1 forward, not {batch}")
        keeps_apart(model)
        self.model, self.shape, self.payoff, self.fill, self.generator = model, tuple(shape), payoff, fill, generator
        self.device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.patches, self.result = _players(self.shape, grid, feature_mask, _token(model) if align is None else align)
        self.coalitions = plan(design, self._d, evaluations, generator).to(self.device)
        self.redrawn = design == "captum"  # as Captum does: anew for every image
        M, d = self.coalitions.masks.shape
        self.grows = design == "border_hadamard" and (1 << d == M or (M - 2 - 2 * d) % (2 * (order(d) - 1)) == 0)  # by whole blocks
        self.dtype = dtype
        if dtype is None and not (native_bfloat16(self.device) and self.coalitions.spread is not None and len(self.coalitions.spread)):
            self.dtype = torch.float32  # nothing is faster, or the design has no error that would hide its rounding
        self.spent = torch.empty(0, dtype=torch.int64)  # evaluations of each image in the last call
        self._options = {"compile": compile, "reuse": reuse, "backend": backend, "max_memory": max_memory, "batch": batch}
        self._lock = threading.Lock()
        self.update()

    @property
    def _d(self) -> int:
        return self.result[0] * self.result[1] if len(self.result) == 2 else self.result[0]

    def update(self) -> None:
        """Take over the model's present weights; plans anew."""
        self._forwards: dict[torch.dtype, Forwards] = {}
        self._with(self.dtype or torch.float32)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype else "bfloat16 if the first image shows that it may"
        found = self._with(self.dtype or torch.float32)
        return f"PatchShapley({self.coalitions.name}; {found.how}; {found.rows} forwards at once; {dtype}; {self.device})"

    def _with(self, dtype: torch.dtype) -> Forwards:
        if dtype not in self._forwards:
            image = torch.zeros(1, *self.shape, device=self.device)
            options: dict[str, Any] = self._options
            patches = self.patches.to(self.device) if isinstance(self.patches, Tensor) else self.patches
            self._forwards[dtype] = Forwards(self.model, image, patches, len(self.coalitions.masks), dtype, **options)
        return self._forwards[dtype]

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        fill: float | Tensor | None = None,
        generator: Generator | None = None,
        return_error: bool = False,
        target_error: float | None = None,
        progress: bool = False,
    ) -> Any:
        """Maps float32 [N, rows, cols] ([N, d] with a feature mask), and with `return_error` a pair with the errors [N]."""
        self._check(images, targets, return_error, target_error)
        fill = _fill(self.fill if fill is None else fill, images)
        with self._alone(), tqdm(total=len(images), desc="shapley", disable=None if progress else True) as bar:
            forwards = self._with(self._choose(images, targets, fill))
            forwards.check(images, fill, self.coalitions.masks)
            maps, errors, spent = [], [], []
            at_once = 1 if self.redrawn else forwards.group(len(self.coalitions.masks))
            for i in range(0, len(images), at_once):
                part = slice(i, i + at_once)
                coalitions = self.coalitions
                if self.redrawn:
                    coalitions = plan("captum", self._d, len(coalitions.masks), generator or self.generator).to(self.device)
                phi, error, used = self._maps(
                    forwards, images[part], targets[part], by_image(fill, operator.itemgetter(part)), coalitions, target_error
                )
                maps.append(phi)
                errors.append(error)
                spent.append(used)
                bar.update(len(phi))
        self.spent = torch.cat(spent) if spent else torch.empty(0, dtype=torch.int64)
        found = torch.cat(maps).view(-1, *self.result).float() if maps else torch.empty(0, *self.result, device=images.device)
        if not return_error:
            return found
        return found, torch.cat(errors).float() if errors else torch.empty(0, device=images.device)

    def logits(self, images: Tensor, masks: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the maps are made of: logits [N, M, K] float32 of images [N, C, H, W] under masks [M, d], by default the plan's own."""
        masks = self.coalitions.masks if masks is None else masks.to(self.device)
        with self._alone():
            forwards, fill = self._with(dtype), _fill(self.fill, images)
            forwards.check(images, fill, masks)
            size = forwards.group(len(masks))
            starts = range(0, len(images), size)
            parts = [forwards(images[i : i + size], masks, by_image(fill, operator.itemgetter(slice(i, i + size)))) for i in starts]
        return torch.cat(parts)

    def _maps(
        self, forwards: Forwards, images: Tensor, targets: Tensor, fill: float | Tensor, coalitions: Coalitions, target: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps [b, d] float64, relative squared errors [b], evaluations spent [b]; further blocks for images above the target."""

        def values(which: Tensor, masks: Tensor) -> Tensor:
            z = forwards(images[which], masks, by_image(fill, operator.itemgetter(which))).double()  # [b, M, K]
            t = targets[which].repeat_interleave(z.shape[1])[:, None]
            if z.shape[2] == 1 and self.payoff != "logit":
                z = torch.cat([z, torch.zeros_like(z)], 2)  # the softmax of (z, 0) is the sigmoid of z
            return PAYOFFS[self.payoff](z.flatten(0, 1), t).view(len(z), -1)

        every = torch.arange(len(images), device=images.device)
        known = values(every, coalitions.masks)  # [b, M]
        phi, error = read_out(known, coalitions)
        spent = torch.full((len(images),), len(coalitions.masks))
        open_ = every
        block = 2 * (order(self._d) - 1)
        while target is not None and len(coalitions.masks) < 2 + 2 * self._d + block * MOST_BLOCKS:
            still = error[open_] > target
            if not still.any():
                break
            open_, known = open_[still], known[still]
            before = coalitions.masks
            coalitions = border_hadamard(self._d, len(before) + block).to(self.device)
            same = torch.equal(coalitions.masks[: len(before)], before)  # not when it has become the enumeration of a small grid
            known = torch.cat([known, values(open_, coalitions.masks[len(before) :])], 1) if same else values(open_, coalitions.masks)
            phi[open_], error[open_] = read_out(known, coalitions)
            spent[open_.cpu()] = len(coalitions.masks)
        return phi, error, spent

    def _choose(self, images: Tensor, targets: Tensor, fill: float | Tensor) -> torch.dtype:
        """The plan's dtype; undecided, bfloat16 if it moves the first map by less than the design's own error."""
        if self.dtype is not None:
            return self.dtype
        if len(images) < PROBE_FROM:
            return torch.float32
        shown = by_image(fill, operator.itemgetter(slice(1)))
        exact, short = (
            self._maps(self._with(dtype).check(images, fill, self.coalitions.masks), images[:1], targets[:1], shown, self.coalitions, None)
            for dtype in (torch.float32, torch.bfloat16)
        )
        moved = (short[0] - exact[0]).square().sum(1) / (exact[0] - exact[0].mean(1, keepdim=True)).square().sum(1).clamp(min=1e-300)
        self.dtype = torch.bfloat16 if bool((moved < exact[1]).all()) else torch.float32
        log.info(
            "patch_shapley runs in %s: bfloat16 moved the first map by %.1e (relative squared), the design's own error is %.1e",
            str(self.dtype).removeprefix("torch."), float(moved.max()), float(exact[1].min()),
        )  # fmt: skip
        return self.dtype

    def _check(self, images: Tensor, targets: Tensor, return_error: bool, target_error: float | None) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise InputError(f"images must be [N, {', '.join(map(str, self.shape))}], not {list(images.shape)}")
        if targets.shape != images.shape[:1] or targets.dtype != torch.int64:
            raise InputError(f"{len(images)} images need as many targets, int64 class numbers, not {list(targets.shape)} {targets.dtype}")
        if images.device != self.device or targets.device != self.device:
            raise InputError(f"images on {images.device} and targets on {targets.device}: the model is on {self.device}")
        outputs = self._with(self.dtype or torch.float32).outputs
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < outputs:
            raise InputError(f"targets must be class numbers from 0 to {outputs - 1}, not {int(targets.min())} to {int(targets.max())}")
        if (return_error or target_error is not None) and self.coalitions.spread is None:
            raise InputError(f"the design {self.coalitions.name!r} has no estimate of its error: return_error and target_error need one")
        if target_error is not None:
            if not target_error > 0:
                raise InputError(f"target_error must be above 0, a relative squared error such as 0.05, not {target_error}")
            if not self.grows:
                step = f"{2 + 2 * self._d} + {2 * (order(self._d) - 1)} k evaluations"
                raise InputError(f"target_error adds blocks to design='border_hadamard' with {step}, not to {self.coalitions.name}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise InputError("this plan is at work in another call: make one plan for each thread")
        try:
            yield
        finally:
            self._lock.release()


def read_out(values: Tensor, coalitions: Coalitions) -> tuple[Tensor, Tensor]:
    """Shapley values [b, d] of payoffs [b, M] float64, and each one's estimated error [b], NaN where the design has none.

    The error is relative and squared, |phi - truth|^2 / |truth - mean|^2, between 0 and 1: at 1 the map is no better than its noise.
    """
    phi = values @ coalitions.solve.T
    if coalitions.spread is None:
        return phi, torch.full_like(phi[:, 0], float("nan"))
    squared = torch.einsum("bm,kdm->bkd", values, coalitions.spread).square().sum((1, 2))
    seen = (phi - phi.mean(1, keepdim=True)).square().sum(1)  # what is there, and the error
    return phi, squared / torch.maximum(seen - squared, squared).clamp(min=1e-300)


def _fill(fill: float | Tensor, images: Tensor) -> float | Tensor:
    """A number, [C], [C, H, W], or a row for each image [N, C, H, W]; one row [1, C, H, W] is for all of them, as Captum's baselines."""
    if not isinstance(fill, Tensor) or not fill.ndim:
        return float(fill)
    C, H, W = images.shape[1:]
    fill = fill[0] if fill.ndim == 4 and len(fill) == 1 else fill
    if tuple(fill.shape) not in ((C,), (C, H, W), tuple(images.shape)):
        raise InputError(f"fill must be a number, [{C}], {[C, H, W]} or {list(images.shape)}, not {list(fill.shape)}")
    return fill.to(images.device)


def _players(
    shape: tuple[int, ...], grid: int | tuple[int, int], feature_mask: Tensor | None, align: int
) -> tuple[tuple[int, int] | Tensor, tuple[int, ...]]:
    """The patches, as a grid or as a feature mask [C or 1, H, W], and the shape of one result."""
    if feature_mask is None:
        rows, cols = (grid, grid) if isinstance(grid, int) else grid
        if not (1 <= rows <= shape[1] and 1 <= cols <= shape[2]):
            raise InputError(f"a {shape[1]}x{shape[2]} image has no {rows}x{cols} grid: every patch needs a pixel")
        borders = [_borders(size, patches, align) for size, patches in zip(shape[1:], (rows, cols), strict=True)]
        plain = [_borders(size, patches, 1) for size, patches in zip(shape[1:], (rows, cols), strict=True)]
        if all(torch.equal(a, b) for a, b in zip(borders, plain, strict=True)):
            return (rows, cols), (rows, cols)
        return (borders[0][:, None] * cols + borders[1])[None], (rows, cols)
    mask = feature_mask[None] if feature_mask.ndim == 2 else feature_mask
    if mask.is_floating_point() or mask.shape[1:] != shape[1:] or mask.shape[0] not in (1, shape[0]):
        raise InputError(f"feature_mask must be whole numbers [{shape[1]}, {shape[2]}] or {list(shape)}, not {list(feature_mask.shape)}")
    ids = mask.unique()
    if ids.tolist() != list(range(len(ids))):
        raise InputError(f"feature_mask must number the patches 0, 1, 2, ... without a gap, not {ids.tolist()[:8]}")
    return mask.long(), (len(ids),)


def _borders(size: int, patches: int, align: int) -> Tensor:
    """Patch of each row (or column) of pixels [size], its borders at multiples of `align` pixels."""
    tokens = size // align
    if align < 1 or tokens < patches:
        raise InputError(f"{patches} patches aligned to {align} pixels need at least {patches * max(1, align)} pixels, not {size}")
    return (torch.arange(size) // align).clamp(max=tokens - 1) * patches // tokens


def _token(model: nn.Module) -> int:
    """Side of a vision transformer's tokens in pixels: of the first convolution, if its windows do not overlap and are large; else 1."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    side = first.stride[0] if first is not None and first.stride == first.kernel_size else 1
    return side if side >= 8 and first is not None and first.stride[0] == first.stride[1] else 1


def patch_shapley(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    grid: int | tuple[int, int] = 4,
    design: str | Coalitions = "border_hadamard",
    evaluations: int | None = None,
    payoff: str = "logit",
    fill: float | Tensor = 0.0,
    feature_mask: Tensor | None = None,
    align: int | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,  # noqa: A002 - as torch calls it
    reuse: bool = True,
    target_error: float | None = None,
    return_error: bool = False,
    backend: str = "auto",
    max_memory: int | None = None,
    batch: int | None = None,
    generator: Generator | None = None,
    progress: bool = False,
) -> Any:
    """Shapley value of every patch of a grid for the payoff of each image's target class (Shapley 1953; InfoUtil, ICLR 2026, Eq. 4).

    Args:
        model: gives logits [N, classes]. It runs in eval mode, on a copy where it can be traced, and is left as it was. What was traced
            and split is checked against it on the first image of the call: where they differ, it runs as it is, with a message.
        images: [N, C, H, W] float32 or bfloat16, normalised as the model wants them, on its device.
        targets: [N] int64 class numbers.
        grid: patches a side, or (rows, columns). Pixel (y, x) lies in patch (y * rows // H, x * columns // W).
        design: "border_hadamard" (fixed coalitions, most accurate for its cost), "leverage", "kernel", "permutation", "captum" (its
            sampling and solve, drawn for every image), "exact" (all 2^d), or `Coalitions` of your own.
        evaluations: forwards an image, at most; None is the design's own number, 64 for 16 patches.
        payoff: "logit" of the target, "log_probability", "probability" or "log_odds". Of a model with one logit (target 0) the probability
            is its sigmoid.
        fill: what an absent patch shows: a number, [C], [C, H, W], [1, C, H, W] or [N, C, H, W]; 0 is the mean colour of normalised images.
        feature_mask: instead of a grid, the patch number of each pixel, [H, W] or [C, H, W], 0 to d - 1; the result is [N, d].
        align: pixels whose multiples the borders of the grid keep to, so that no token is half masked; None: the token's side of a vision
            transformer (first convolution with stride = kernel >= 8), else 1.
        dtype: of the forwards, torch.float32 or torch.bfloat16. None takes bfloat16 where the device has it and the first of eight or more
            images shows that it moves maps by less than the design's own error, and logs which it took; else float32. Payoffs are read out
            in float64 always.
        compile: torch.compile the net (a minute once; worth it for thousands of images). Goes on without it, with a message, if that fails.
        reuse: compute early layers for 16 masks instead of all coalitions where that gives the same values (`locality`).
        target_error: relative squared error: images whose estimated error is above it get further blocks of evaluations.
        return_error: also give each map's estimated error [N], |phi - truth|^2 / |truth - mean|^2, at most 1.
        backend: of the masking and assembling ops: "auto", "torch", "triton", "cpp".
        max_memory: bytes of activations at once; None: 64 MiB on a processor, 4 GiB on CUDA.
        batch: forwards at once, instead of the choice by memory.
        generator: of the sampled designs.
        progress: show a bar.

    Returns:
        float32 [N, rows, columns] on the images' device; with `return_error` a pair.

    Raises:
        InputError: anything given does not fit: it says what was given and what is possible.
    """
    if images.ndim != 4:
        raise InputError(f"images must be [N, C, H, W], not {list(images.shape)}")
    made = PatchShapley(
        model,
        (images.shape[1], images.shape[2], images.shape[3]),
        grid=grid,
        design=design,
        evaluations=evaluations,
        payoff=payoff,
        fill=fill,
        feature_mask=feature_mask,
        align=align,
        dtype=dtype,
        compile=compile,
        reuse=reuse,
        backend=backend,
        max_memory=max_memory,
        batch=batch,
        generator=generator,
    )
    return made(images, targets, return_error=return_error, target_error=target_error, progress=progress)
