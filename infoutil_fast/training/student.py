"""One student of a distilled set: the recipes it may be trained by, what it sees, and the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from infoutil_fast.models import nets
from infoutil_fast.models.teacher import Teacher
from infoutil_fast.pixels import augment
from infoutil_fast.pixels.views import Zca, normalise
from infoutil_fast.runtime.device import autocast
from infoutil_fast.training import matching_student, rded_students
from infoutil_fast.training.recipes import RDED_CODE, RECIPES, StudentRecipe
from infoutil_fast.training.teaching import weight_groups
from infoutil_fast.types import InputError

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
        rded_students.default_stem(net)
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
    protocol = matching_student.Protocol(recipe.epochs, recipe.batch, recipe.lr, recipe.weight_decay)
    return matching_student.train_student(name, images, targets, protocol, seed, bench.dtype, watch)


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
