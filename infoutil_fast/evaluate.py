"""How good a distilled set is: students trained on it, several seeds, the last epoch's accuracy on the validation split."""

from __future__ import annotations

import datetime
import json
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from infoutil_fast import augment, matched, nets, store
from infoutil_fast.data import Source, open_source
from infoutil_fast.device import autocast, choose_device, choose_dtype
from infoutil_fast.teacher import Teacher, load_teacher, normalise
from infoutil_fast.train import Pixels, accuracy, weight_groups
from infoutil_fast.types import InputError, one_of
from infoutil_fast.zca import Zca

log = logging.getLogger(__name__)
LABELS = ("online", "soft", "hard")


@dataclass(frozen=True)
class StudentRecipe:
    """AdamW on shuffled patches, random resized crops, flips and CutMix (RDED, validate/train.py and its settings).

    Not taken over: its ImageNet statistics on every source, its smaller rates for some students and for CIFAR-100 with a ConvNet,
    its fixed batch of 100 on Tiny-ImageNet, and its test images (ours: short side to the input size, centre crop).
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


RECIPES = {"rded": StudentRecipe(), "fixed": StudentRecipe(schedule="cosine", bn_updates=1)}
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

    def targets(self, index: Tensor, mixed: Tensor, other: Tensor, kept: float, temperature: float) -> Tensor:
        """Class probabilities [n, C] that the student should give to `mixed` (normalised)."""
        if self.labels == "online":
            assert self.oracle is not None
            seen = augment.resize(mixed, self.oracle.facts.size)  # a label teacher may look at another size
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
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            # moving r by m towards the same batch statistics k times is moving it once by 1 - (1 - m)^k
            module.momentum = 1 - (1 - module.momentum) ** recipe.bn_updates
    optimiser = torch.optim.AdamW(weight_groups(net, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.999))
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
        images = augment.resized_crop(images, images.shape[2], (1 / bench.factor, 1.0), generator)
    images = augment.flip(images, generator)
    other, kept = torch.arange(len(images)), 1.0
    if recipe.cutmix:
        images, other, kept = augment.cutmix(images, generator)
    return normalise(images.to(bench.device), bench.mean, bench.std), other, kept


def evaluate(
    path: str | Path,
    *,
    student: str = "convnet3",
    seeds: int = 3,
    seed: int = 0,
    ipc: int | None = None,
    labels: str = "online",
    recipe: str | StudentRecipe = "rded",
    teacher: str | None = None,
    source: str | Path | Source | None = None,
    best_of_test: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    workers: int = 0,
    progress: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Train `seeds` students on the set at `path` and test each after its last epoch; the command is `infoutil evaluate`.

    seed: of the first student, the others follow. ipc: use the first so many images of each class; images are stored best
    first, so at factor 1 that is the set of that ipc. labels: "online" (the teacher labels every augmented, mixed
    batch), "soft" (stored logits), "hard". recipe: "rded", "fixed" (cosine to zero, one batch-norm update) or "matching" (learned
    step size and DSA; labels soft or hard), with `changes` of its fields (epochs=30). teacher, source: others than those the
    set was made with. best_of_test: also report the best of six late epochs, which peeks at the test set, under that name.

    Returns, and appends to the set's evaluations.jsonl, accuracies in [0, 1]: `last` by seed, their `mean` and `std` (n - 1).
    Raises `InputError` for a folder that is no finished set, unknown names, or a teacher that does not fit.
    """
    have = first_of_class(store.load(path), ipc)
    one_of("labels", labels, LABELS)
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, not {seeds}")
    chosen = complete(recipe, changes, ipc or have.meta["ipc"], len(have.meta["source"]["classes"]), len(have))
    where = choose_device(device)
    opened = source if isinstance(source, Source) else open_source(source or have.meta["source"]["spec"])
    if opened.classes != tuple(have.meta["source"]["classes"]):
        raise InputError(f"{opened.name} has other classes than the set at {path}")
    about = have.meta["label_teacher"] or have.meta["teacher"]
    whitening = Path(path) / "zca.safetensors"
    if whitening.is_file() and chosen.optimiser != "sgd":
        raise InputError(f"{path} is whitened: recipe matching keeps it so, {recipe!r} does not")
    if labels == "online" and chosen.optimiser == "sgd":
        raise InputError("recipe matching has no on-line teacher: labels soft or hard")
    if chosen.optimiser == "sgd" and not chosen.lr:
        chosen = replace(chosen, lr=matched.learned_lr(Path(path)))
    oracle = load_teacher(teacher or about["spec"], opened, where) if labels == "online" else None
    if oracle and not teacher and oracle.facts.hash != about["hash"]:
        raise InputError(f"{about['spec']} is no longer the teacher of {path} (its weights changed): name one with --teacher")
    bench = Bench(
        have.pixels(),
        have.hard,
        have.soft,
        len(opened.classes),
        have.meta["factor"],
        *((oracle.facts.mean, oracle.facts.std) if oracle else (opened.mean, opened.std)),
        oracle,
        labels,
        where,
        choose_dtype(dtype, where),
        Zca.load(whitening).to(where) if whitening.is_file() else None,
        have.floats(),
    )
    test = Pixels(opened.val, have.meta["size"], workers)
    start = time.perf_counter()
    last, best = [], []
    with tqdm(total=seeds * chosen.epochs, desc=f"evaluate {student}", unit="epoch", disable=None if progress else True) as bar:
        for own in range(seed, seed + seeds):
            watched: list[float] = []

            def watch(epoch: int, net: nn.Module, watched: list[float] = watched) -> None:
                late = {chosen.epochs - i * chosen.epochs // 30 for i in range(6)}  # RDED: 250, 260, ..., 300 of 300
                if epoch == chosen.epochs or (best_of_test and epoch in late):
                    watched.append(accuracy(lambda x: bench.predict(net, x), test.batches(np.arange(len(test.labels)), 256)))
                bar.update()

            (train_matched if chosen.optimiser == "sgd" else train_student)(bench, student, chosen, own, watch)
            last.append(watched[-1])
            best.append(max(watched))
            bar.set_postfix(accuracy=f"{last[-1]:.1%}")
    row = {
        "student": student,
        "labels": labels,
        "recipe": recipe if isinstance(recipe, str) else "own",
        "settings": asdict(chosen),
        "epochs": chosen.epochs,
        "teacher": oracle.facts.hash if oracle else None,
        "ipc": ipc or have.meta["ipc"],
        "seeds": list(range(seed, seed + seeds)),
        "last": last,
        "best": best if best_of_test else None,
        "mean": float(np.mean(last)),
        "std": float(np.std(last, ddof=1)) if seeds > 1 else None,
        "test_images": len(opened.val.labels),
        "seconds": round(time.perf_counter() - start, 1),
        "device": str(where),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }
    with open(Path(path) / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def first_of_class(whole: store.DistilledSet, ipc: int | None) -> store.DistilledSet:
    """The first `ipc` images of each class; all of them for None."""
    if ipc is None:
        return whole
    if not 1 <= ipc <= whole.meta["ipc"]:
        raise InputError(f"ipc must be 1 to {whole.meta['ipc']}, which the set at {whole.path} has, not {ipc}")
    index = torch.cat([torch.nonzero(whole.hard == label)[:ipc, 0] for label in whole.hard.unique()])
    return replace(whole, files=tuple(whole.files[i] for i in index), hard=whole.hard[index], soft=whole.soft[index])


def complete(recipe: str | StudentRecipe, changes: dict[str, Any], ipc: int, classes: int, images: int) -> StudentRecipe:
    """A recipe with its changes and, where it leaves the batch open, RDED's rule."""
    if isinstance(recipe, str):
        one_of("recipe", recipe, tuple(RECIPES))
        recipe = RECIPES[recipe]
    try:
        recipe = replace(recipe, **changes)
    except TypeError as error:
        raise InputError(f"a recipe has no {', '.join(set(changes) - set(asdict(recipe)))}; it has {', '.join(asdict(recipe))}") from error
    one_of("optimiser", recipe.optimiser, ("adamw", "sgd"))
    if recipe.optimiser == "sgd" and (recipe.schedule, recipe.cutmix) != ("step", False):
        raise InputError("optimiser sgd goes with schedule step and without cutmix: take recipe matching")
    if recipe.optimiser != "sgd" and not recipe.lr > 0:
        raise InputError(f"lr must be above 0, not {recipe.lr}")
    if recipe.epochs < 1 or (recipe.optimiser != "sgd" and recipe.schedule not in ("half_cosine", "cosine")):
        raise InputError(f"epochs must be at least 1 and schedule half_cosine or cosine, not {recipe.epochs} and {recipe.schedule!r}")
    batch = recipe.batch or (100 if ipc >= 50 else 50 if ipc >= 10 else 10) * (2 if classes >= 100 else 1)
    return replace(recipe, batch=min(batch, images))
