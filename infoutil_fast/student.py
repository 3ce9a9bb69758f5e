"""One student of a distilled set: the recipes it may be trained by, what it sees, and the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from infoutil_fast import augment, matched, nets, quirks
from infoutil_fast.device import autocast
from infoutil_fast.teacher import Teacher, normalise
from infoutil_fast.train import weight_groups
from infoutil_fast.types import InputError, one_of
from infoutil_fast.zca import Zca


@dataclass(frozen=True)
class StudentRecipe:
    """AdamW on shuffled patches, random resized crops, flips and CutMix (RDED, validation/main.py).

    The fields from `imagenet_stats` on are what its code does besides; the recipe `rded-code` sets them all, with its rate and batch for
    the student and the data at hand. Not taken over: mixup, an option there; draws of numpy that nothing seeds (ours come from the seed);
    test images in the order in which a folder lists them.
    """

    epochs: int = 300  # passes over the distilled set
    batch: int = 0  # images a step; 0: 10, 50, 100 from ipc 1, 10, 50 on, doubled from 100 classes on
    lr: float = 1e-3  # at the start; 0 with sgd: the one that the set's method learned
    weight_decay: float = 0.01  # on weights of two and more dimensions
    schedule: str = "half_cosine"  # half_cosine ends at half the rate (RDED); cosine at zero; step: with sgd
    bn_updates: int = 2  # running statistics move this often a step (RDED runs each batch forward twice)
    temperature: float = 20.0  # of soft labels; the loss is not multiplied by its square
    cutmix: bool = True  # one box a batch
    optimiser: str = "adamw"  # adamw; sgd: the matching methods' protocol, DSA, no cutmix, decay on all weights, rate / 10 half way
    imagenet_stats: bool = False  # RDED's code: students see ImageNet's mean and deviation, whatever the source's
    float_crops: bool = False  # RDED's code: resized training crops are not rounded to bytes
    decay_named: bool = False  # RDED's code: only tensors called "weight" decay, so no position embedding does
    default_stem: bool = False  # RDED's code: the 3x3 stem of a small-image ResNet starts as torch's default, not as its other layers
    resized_test: bool = False  # RDED's code: test images have their short side at (size // 7) * 8 before the centre crop
    test_per_class: int = 0  # test images of each class, the first ones; 0: all (RDED's code: 50 from 64 px on)


RECIPES = {"rded": StudentRecipe(), "fixed": StudentRecipe(schedule="cosine", bn_updates=1)}
RDED_CODE = "rded-code"
RECIPES[RDED_CODE] = StudentRecipe(
    lr=0.0, imagenet_stats=True, float_crops=True, decay_named=True, default_stem=True, resized_test=True
)  # the rest: quirks.student_settings
# MTT's evaluate_synset: 1000 epochs and one more, at the learned step size (lr 0)
RECIPES["matching"] = StudentRecipe(1001, 256, 0.0, 5e-4, "step", 1, 1.0, False, "sgd")


@dataclass(frozen=True)
class Bench:
    """What every student of an evaluation shares."""

    pixels: Tensor  # [n, 3, S, S] uint8
    hard: Tensor  # [n] int64
    soft: Tensor  # [n, k, C] float32
    classes: int
    factor: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    oracle: Teacher | None  # the on-line teacher
    labels: str
    device: torch.device
    dtype: torch.dtype
    zca: Zca | None = None  # the students see whitened pixels
    floats: Tensor | None = None  # [n, 3, S, S] float32 as the students see them, where `pixels` are only their rounding

    def see(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] as a student sees them."""
        images = images.to(self.device)
        return normalise(images, self.mean, self.std) if self.zca is None else self.zca.apply(images.float() / 255)

    def predict(self, net: nn.Module, images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(self.device, self.dtype):
            return net(self.see(images)).float()

    def for_oracle(self, mixed: Tensor) -> Tensor:
        """What a student sees, by the on-line teacher's own mean and deviation."""
        assert self.oracle is not None
        facts = self.oracle.facts
        if (facts.mean, facts.std) == (self.mean, self.std):
            return mixed
        mean, std, own_mean, own_std = (mixed.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std, facts.mean, facts.std))
        return (mixed * std + (mean - own_mean)) / own_std

    def targets(self, index: Tensor, mixed: Tensor, other: Tensor, kept: float, temperature: float) -> Tensor:
        """Class probabilities [n, C] that the student should give to `mixed` (normalised)."""
        if self.labels == "online":
            assert self.oracle is not None
            seen = augment.resize(self.for_oracle(mixed), self.oracle.facts.size)  # a label teacher may look at another size
            with torch.no_grad(), autocast(self.device, self.dtype):
                return (self.oracle.net(seen).float() / temperature).softmax(1)
        if self.labels == "soft":
            known = (self.soft[index].to(self.device) / temperature).softmax(2).mean(1)
        else:
            known = F.one_hot(self.hard[index], self.classes).to(self.device, torch.float32)
        return kept * known + (1 - kept) * known[other.to(self.device)]


def train_student(bench: Bench, name: str, recipe: StudentRecipe, seed: int, watch: Callable[[int, nn.Module], None]) -> nn.Module:
    """One student from scratch; `watch(epoch, net)` sees it in eval mode after each epoch.

    Everything random comes from `seed`. Raises `InputError` when the loss is not finite.
    """
    torch.manual_seed(seed)
    net = nets.build(name, bench.classes, bench.pixels.shape[2]).to(bench.device).train()
    if recipe.default_stem:
        quirks.default_stem(net)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            # moving r by m towards the same batch statistics k times is moving it once by 1 - (1 - m)^k
            module.momentum = 1 - (1 - module.momentum) ** recipe.bn_updates
    optimiser = torch.optim.AdamW(weight_groups(net, recipe.weight_decay, recipe.decay_named), lr=recipe.lr, betas=(0.9, 0.999))
    generator = Generator().manual_seed(seed)
    temperature = 1.0 if bench.labels == "hard" else recipe.temperature
    for epoch in range(recipe.epochs):
        turns = 2 * recipe.epochs if recipe.schedule == "half_cosine" else recipe.epochs
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / turns))
        for index in torch.randperm(len(bench.pixels), generator=generator).split(recipe.batch):
            x, other, kept = _augmented(bench, index, recipe, generator)
            targets = bench.targets(index, x, other, kept, temperature)
            with autocast(bench.device, bench.dtype):
                logits = net(x)
            loss = F.kl_div((logits.float() / temperature).log_softmax(1), targets, reduction="batchmean")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        if not math.isfinite(float(loss.detach())):
            raise InputError(f"the loss of {name} is not finite in epoch {epoch + 1}, seed {seed}, lr {recipe.lr}: try a lower lr")
        watch(epoch + 1, net.eval())
        net.train()
    return net.eval()


def train_matched(bench: Bench, name: str, recipe: StudentRecipe, seed: int, watch: Callable[[int, nn.Module], None]) -> nn.Module:
    """One student by the matching methods' protocol, on the float images where the set has them."""
    images = bench.see(bench.pixels) if bench.floats is None else bench.floats.to(bench.device)
    every = torch.arange(len(images))
    targets = bench.targets(every, images, every, 1.0, recipe.temperature)
    protocol = matched.Protocol(recipe.epochs, recipe.batch, recipe.lr, recipe.weight_decay)
    return matched.train_student(name, images, targets, protocol, seed, bench.dtype, watch)


def _augmented(bench: Bench, index: Tensor, recipe: StudentRecipe, generator: Generator) -> tuple[Tensor, Tensor, float]:
    images = augment.shuffle_patches(bench.pixels[index], bench.factor, generator)
    if bench.factor > 1:
        images = images.float() if recipe.float_crops else images
        images = augment.resized_crop(images, images.shape[2], (1 / bench.factor, 1.0), generator)
    images = augment.flip(images, generator)
    other, kept = torch.arange(len(images)), 1.0
    if recipe.cutmix:
        images, other, kept = augment.cutmix(images, generator)
    return normalise(images.to(bench.device), bench.mean, bench.std), other, kept


def late_epochs(epochs: int) -> set[int]:
    """The epochs after which RDED's code tests: every tenth of the last fifth, and the last (250, 260, ..., 300 of 300)."""
    return {n for n in range(1, epochs + 1) if n == epochs or (n % 10 == 0 and n - 1 > 0.8 * epochs)}


def complete(recipe: str | StudentRecipe, changes: dict[str, Any], ipc: int, images: int, rded: dict[str, Any]) -> StudentRecipe:
    """A recipe with its changes and, where it leaves the batch open, RDED's rule.

    ipc, images: of the set. rded: the arguments of `quirks.student_settings` without ipc: student, teacher, classes, size.
    """
    code = recipe == RDED_CODE
    if isinstance(recipe, str):
        one_of("recipe", recipe, tuple(RECIPES))
        recipe = RECIPES[recipe]
    if unknown := sorted(set(changes) - {f.name for f in fields(StudentRecipe)}):
        raise InputError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(asdict(recipe))}")
    if code and not {"lr", "batch"} <= changes.keys():
        changes = {**quirks.student_settings(ipc=ipc, **rded), **changes}
    recipe = replace(recipe, **changes)
    one_of("optimiser", recipe.optimiser, ("adamw", "sgd"))
    if recipe.optimiser == "sgd" and (recipe.schedule, recipe.cutmix) != ("step", False):
        raise InputError("optimiser sgd goes with schedule step and without cutmix: take recipe matching")
    if recipe.optimiser != "sgd" and not recipe.lr > 0:
        raise InputError(f"lr must be above 0, not {recipe.lr}")
    if recipe.epochs < 1 or (recipe.optimiser != "sgd" and recipe.schedule not in ("half_cosine", "cosine")):
        raise InputError(f"epochs must be at least 1 and schedule half_cosine or cosine, not {recipe.epochs} and {recipe.schedule!r}")
    if recipe.test_per_class < 0:
        raise InputError(f"test_per_class must be 0 (all) or more, not {recipe.test_per_class}")
    batch = recipe.batch or (100 if ipc >= 50 else 50 if ipc >= 10 else 10) * (2 if rded["classes"] >= 100 else 1)
    return replace(recipe, batch=min(batch, images))
