"""A model's logits under coalitions of patches: traced, folded, split, cast, compiled and allocated once, applied many times."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from infoutil_fast.ops.patches import masked_patches
from infoutil_fast.runtime.device import autocast, evaluating
from infoutil_fast.shapley import tracing
from infoutil_fast.shapley.reuse import Split, split
from infoutil_fast.types import InputError, first_line

log = logging.getLogger(__name__)
# Forwards at once where memory allows, and bytes of activations where `max_memory` is not given. More would be no faster: on a processor
# the maps leave its cache (ResNet-18 at 224 px: 32 to 64 forwards were best, ConvNet-3 at 32 px 256).
ROWS = {"cpu": 256, "cuda": 2048}
MEMORY = {"cpu": 64 << 20, "cuda": 4 << 30}
CHECKED = 4  # coalitions of a call's first image
CHECK = {torch.float32: 2e-4, torch.bfloat16: 0.15}  # relative difference from the model one by one that rounding may make
CHECK_CUDA = {torch.float32: 1e-2, torch.bfloat16: 0.15}  # where TF32 rounds
PROBE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative difference that rounding may make


class Forwards:
    """`forwards(images, masks, fill)`: logits [B, M, K] of every image under every coalition.

    `how` says in one line what runs: reuse of early layers, or why not. Weights are those of the time when it was made, unless the model
    could not be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        patches: tuple[int, int] | Tensor,
        coalitions: int,
        dtype: torch.dtype,
        *,
        compile: bool = False,  # noqa: A002 - as torch calls it
        reuse: bool = True,
        backend: str = "auto",
        max_memory: int | None = None,
        batch: int | None = None,
    ):
        """image: one [1, C, H, W] of zeros, on the model's device. patches: a grid, or a feature mask [C or 1, H, W] int64."""
        self.model, self.image, self.patches, self.dtype, self.backend = model, image, patches, dtype, backend
        self.net: Callable[..., Any] = model
        self.front: Callable[..., Any]
        self.back: Callable[..., Any]
        self.casts = False  # whether the net is of `dtype` itself; else autocast does it
        self.buffers: dict[str, Tensor] = {}
        self.shown: tuple[Tensor, Tensor] | None = None  # the last masks, and their patterns
        self.compiled = False
        self.form = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), dtype)
        self.witness: nn.Module | None = model  # what the net must agree with, until it has been checked on real images
        self.split: Split | None
        self.split, bytes_a_row, self.how = self._prepare(coalitions, reuse)
        kind = image.device.type if image.device.type in ROWS else "cpu"
        self.rows = batch or max(1, min(ROWS[kind], (max_memory or MEMORY[kind]) // bytes_a_row))
        self.outputs = self._classes()
        if self.split is not None:
            self._verify()
        if compile:
            self._compile(coalitions)

    def _prepare(self, coalitions: int, reuse: bool) -> tuple[Split | None, int, str]:
        """Make the net ready; returns the split if there is one, the bytes of a row's activations, and `how`."""
        graph = tracing.traced(getattr(self.model, "_orig_mod", self.model))  # of torch.compile
        if isinstance(graph, str):
            return None, 64 * self.image.numel() * 4, f"plain forwards of the model itself: {graph}"
        self.witness = copy.deepcopy(getattr(self.model, "_orig_mod", self.model)).float().eval()
        graph.float()
        tracing.fold(graph)
        try:
            tracing.measure(graph, self.image)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"the model cannot take images of shape {list(self.image.shape[1:])}: {first_line(error)}") from error
        self.casts = tracing.castable(graph)
        if self.casts:
            tracing.save_memory(graph)
        found: Split | str = "reuse is off" if not reuse else "the patches are no grid"
        if reuse and not isinstance(self.patches, Tensor):
            found = split(graph, self.patches, coalitions)
            found = found if isinstance(found, str) else found.to(self.image.device)
        if self.casts:
            tracing.cast(graph, self.dtype)
        self.net = graph
        if isinstance(found, str):
            return None, tracing.widest(graph) * self.dtype.itemsize, f"plain forwards, batch norms folded: {found}"
        if self.casts:
            tracing.cast(found.back, self.dtype)
            tracing.cast(found.front, self.dtype)
        self.front, self.back = found.front, found.back
        share = f"{found.front_share:.0%} of the multiply-adds, up to {found.last}"
        how = f"early layers ({share}) on {len(found.patterns)} patterns instead of {coalitions} coalitions"
        return found, tracing.widest(found.back) * self.dtype.itemsize, how

    def _classes(self) -> int:
        """Outputs of the net, from one forward of the whole."""
        found, self.split = self.split, None
        try:
            masks = torch.ones(2, self._d(), dtype=torch.bool, device=self.image.device)
            return self(self.image, masks, 0.0).shape[2]
        except InputError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"the model cannot take images of shape {list(self.image.shape[1:])}: {first_line(error)}") from error
        finally:
            self.split = found

    def _d(self) -> int:
        return int(self.patches.max()) + 1 if isinstance(self.patches, Tensor) else math.prod(self.patches)

    def _verify(self) -> None:
        """Two coalitions of a random image by the split and by the whole net: where they differ, the whole net runs from now on."""
        own, found = torch.Generator().manual_seed(0), self.split
        image = torch.randn(self.image.shape, generator=own).to(self.image.device)
        masks = (torch.rand(2, self._d(), generator=own) < 0.5).to(image.device)
        by_split = self(image, masks, 0.0)
        self.split = None
        plain = self(image, masks, 0.0)
        error = apart(by_split, plain)
        if error < PROBE[self.dtype]:
            self.split = found
        else:
            self.how = f"plain forwards, batch norms folded: a probe of the split was off by {error:.1e}"

    def check(self, images: Tensor, fill: float | Tensor, masks: Tensor) -> Forwards:
        """Once: a few coalitions [M, d] of the first image by what runs and, one by one, by the model, which runs where they differ.

        `InputError` where the model's own logits of a coalition depend on those beside it.
        """
        if self.witness is None or not len(images) or not len(masks):
            return self
        witness, self.witness = self.witness, None
        rows = torch.linspace(0, len(masks) - 1, min(CHECKED, len(masks)), device=masks.device).long()
        image, shown = images[:1], by_image(fill, lambda given: given[:1])
        found = self(image, masks, shown)[0, rows] if self.compiled else self(image, masks[rows], shown)[0]
        asis = witness is self.model
        with evaluating(witness), torch.inference_mode(), autocast(image.device, self.dtype if asis else torch.float32):
            x = self._masked(image, masks[rows], shown).to(self.form if asis else torch.float32)
            alone = torch.cat([self._logits(witness, row[None]) for row in x]).float()
            near = (CHECK_CUDA if x.is_cuda else CHECK)[torch.bfloat16 if self.form.itemsize < 4 else self.dtype]
            if (off := apart(found, alone)) < near:
                return self
            together = self._logits(witness, x).float()
        if (mixed := apart(together, alone)) > 10 * near:
            raise InputError(
                f"the logits of an image change by {mixed:.0%} with those beside it in a call, or from call to call: "
                "the model mixes samples (statistics of the batch) or draws at random, so a coalition has no payoff of its own"
            )
        if not asis:
            self._give_up(f"what was traced was off by {off:.1e} on the first image")
        return self

    def _give_up(self, why: str) -> None:
        """Run the model itself from now on."""
        self.net, self.split, self.casts, self.compiled = self.model, None, False, False
        self.how = f"plain forwards of the model itself: {why}"
        log.warning("patch_shapley: %s", self.how)
        self.buffers.clear()

    def _logits(self, net: Callable[..., Any], *inputs: Tensor) -> Tensor:
        """[n, K] of n rows; two equal ones stand for one that alone would lose its dimension, and a number a row is one logit."""
        found, n = net(*inputs), len(inputs[0])
        if isinstance(found, Tensor) and found.ndim == 1 and n == 1:
            return self._logits(net, *(torch.cat([t, t]) for t in inputs))[:1]
        found = found[:, None] if isinstance(found, Tensor) and found.shape == (n,) else found
        if not isinstance(found, Tensor) or found.ndim != 2:
            what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise InputError(f"the model must give logits [N, classes], not {what}")
        return found

    def _compile(self, coalitions: int) -> None:
        """Compile what runs; where that fails, say so and go on without."""
        before = dict(vars(self))
        on_gpu = self.image.device.type == "cuda"
        options: dict[str, Any] = {"mode": "max-autotune"} if on_gpu else {"options": {"freezing": True}}  # the former with CUDA graphs
        self.compiled = True
        try:
            if self.split is None:
                self.net = torch.compile(self.net, dynamic=False, **options)
            else:  # no CUDA graph for the front: its maps must outlive the runs of the back
                self.front = torch.compile(self.front, dynamic=False, **({"mode": "max-autotune-no-cudagraphs"} if on_gpu else options))
                self.back = torch.compile(self.back, dynamic=False, **options)
            self(self.image, torch.ones(coalitions, self._d(), dtype=torch.bool, device=self.image.device), 0.0)
            self.how += "; compiled"
        except (RuntimeError, ImportError) as error:
            log.warning("torch.compile failed (%s); going on without it", first_line(error))
            vars(self).update(before)

    def group(self, coalitions: int) -> int:
        """Images of one call, so that they fill the net's batch with all their coalitions; at least 1."""
        return max(1, self.rows // max(1, coalitions))

    def __call__(self, images: Tensor, masks: Tensor, fill: float | Tensor) -> Tensor:
        """Logits [B, M, K] float32 of images [B, C, H, W] under masks [M, d]; halves the forwards at once when memory runs out."""
        B, M = len(images), len(masks)
        while True:
            try:
                # Compiled nets want the same shapes every time: the last images and coalitions are repeated.
                step = max(1, self.rows // max(1, self.group(M) if self.compiled else B))  # coalitions at once
                step = math.ceil(M / math.ceil(M / step)) if M else 1
                if self.compiled:
                    group = self.group(M)
                    images, fill = _repeated(images, group), by_image(fill, lambda rows: _repeated(rows, group))  # noqa: B023
                    masks = _repeated(masks, math.ceil(M / step) * step)
                own = evaluating(self.model) if self.net is self.model else nullcontext()
                with own, torch.inference_mode(), autocast(images.device, torch.float32 if self.casts else self.dtype):
                    return self._run(images, masks, fill, step)[:B, :M]
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
                self.rows //= 2
                self.buffers.clear()
                torch.cuda.empty_cache()
                log.warning("out of memory: %d forwards at once from now on", self.rows)

    def _run(self, images: Tensor, masks: Tensor, fill: float | Tensor, step: int) -> Tensor:
        B = len(images)
        logits = []
        maps = self._front(images, fill) if self.split is not None else ()
        for part in (masks if self.split is None else self._index(masks)).split(step):
            if self.split is None:
                x = self._masked(images, part, fill)
                found = self._logits(self.net, x.to(self.form) if self.net is self.model else x)
            else:
                out = [self._buffer(f"map{i}", B * len(part), shape) for i, shape in enumerate(self.split.shapes)]
                found = self._logits(self.back, *self.split.assemble(maps, B, part, out, self.backend))
            # A copy: the memory of a compiled net's output is its own (CUDA graphs), and the next run writes there.
            logits.append(found.to(torch.float32, copy=self.compiled).unflatten(0, (B, -1)))
        return torch.cat(logits, 1)

    def _index(self, masks: Tensor) -> Tensor:
        """The patterns that these masks show, kept for the next call."""
        assert self.split is not None
        if self.shown is None or self.shown[0] is not masks:
            self.shown = masks, self.split.index(masks)
        return self.shown[1]

    def _front(self, images: Tensor, fill: float | Tensor) -> tuple[Tensor, ...]:
        """The maps under the periodic masks, each [B * P, C, H, W]."""
        assert self.split is not None
        B = len(images)
        step = max(1, self.rows // B)
        parts = [self.front(self._masked(images, part, fill)) for part in self.split.patterns.split(step)]
        if len(parts) == 1:
            return tuple(parts[0])
        return tuple(torch.cat([m.unflatten(0, (B, -1)) for m in maps], 1).flatten(0, 1) for maps in zip(*parts, strict=True))

    def _masked(self, images: Tensor, masks: Tensor, fill: float | Tensor) -> Tensor:
        """[B * M, C, H, W], in a buffer."""
        out = self._buffer("images", len(images) * len(masks), tuple(images.shape[1:]))
        if not isinstance(self.patches, Tensor):
            return masked_patches(images, masks, self.patches, fill, dtype=self.dtype, out=out, backend=self.backend)
        base = fill if isinstance(fill, Tensor) else torch.tensor(fill, device=images.device)
        base = base.view(-1, 1, 1) if base.ndim == 1 else base[:, None] if base.ndim == 4 else base
        keep = masks[:, self.patches]  # [M, C or 1, H, W]
        return out.copy_(torch.where(keep, images[:, None], base).flatten(0, 1))

    def _buffer(self, name: str, n: int, shape: tuple[int, ...]) -> Tensor:
        have = self.buffers.get(name)
        if have is None or len(have) < n:
            have = torch.empty(n, *shape, dtype=self.dtype, device=self.image.device, memory_format=torch.channels_last)
            self.buffers[name] = have
        return have[:n]


def apart(a: Tensor, b: Tensor) -> float:
    """Relative difference of logits; what is infinite or no number must be so in both."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    largest = b.nan_to_num(0, 0, 0).norm().clamp(min=1e-12)
    return float((a - b).masked_fill(same, 0).nan_to_num(float("inf"), float("inf"), float("inf")).norm() / largest)


def _repeated(tensor: Tensor, n: int) -> Tensor:
    """With the last row repeated up to n rows."""
    return tensor if len(tensor) >= n else torch.cat([tensor, tensor[-1:].expand(n - len(tensor), *tensor.shape[1:])])


def by_image(fill: float | Tensor, take: Callable[[Tensor], Tensor]) -> float | Tensor:
    """A fill with `take` applied to its rows, where it has one for each image; any other fill as it is."""
    return take(fill) if isinstance(fill, Tensor) and fill.ndim == 4 else fill
