"""Expert trajectories: a net's parameters after every epoch of plain SGD, several nets, on disk (MTT, arXiv:2203.11932)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Generator, Tensor
from tqdm import tqdm

from infoutil_fast import dsa, nets
from infoutil_fast.data import Source
from infoutil_fast.store import write_bytes
from infoutil_fast.teacher import Facts, check_classes
from infoutil_fast.train import Pixels
from infoutil_fast.trajectory import Inner, Segment
from infoutil_fast.types import InputError, one_of
from infoutil_fast.zca import View, Zca

log = logging.getLogger(__name__)
FORMATS = {"float32": torch.float32, "float16": torch.float16}
ZCA_IMAGES = 50_000  # at most so many are held in memory to fit a whitening


@dataclass(frozen=True)
class ExpertRecipe:
    """How the experts are trained: plain SGD, no momentum, no weight decay (MTT, buffer.py)."""

    net: str = "convnet3-in"  # a net without running statistics: convnet3-in (32 px), convnet4-in (64 px), convnet5-in (128 px)
    experts: int = 100  # independent nets
    epochs: int = 50  # of each; the parameters after every epoch are kept, and the initial ones
    lr: float = 0.01  # learning rate
    batch: int = 256  # images a step
    augment: str = dsa.STRATEGY  # groups of DSA joined by _, empty for none
    zca: bool = False  # whitened pixels instead of normalised channels
    size: int = 0  # side of the input in pixels; 0: the source's own
    keep: str = "float32"  # format on disk: float32, float16
    seed: int = 0  # initial weights, order and augmentation

    def __post_init__(self) -> None:
        one_of("keep", self.keep, tuple(FORMATS))
        dsa.groups(self.augment)
        for name in ("experts", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.lr > 0:
            raise InputError(f"lr must be above 0, not {self.lr}")


def disk_bytes(recipe: ExpertRecipe, classes: int, size: int) -> int:
    """What the finished experts take on disk: experts x (epochs + 1) x parameters, and two matrices [D, D] of a whitening."""
    whitening = 4 * (2 * (3 * size * size) ** 2 + 3 * size * size) if recipe.zca else 0
    return recipe.experts * (recipe.epochs + 1) * sum(inner(recipe.net, classes, size).sizes) * FORMATS[recipe.keep].itemsize + whitening


def inner(net: str, classes: int, size: int) -> Inner:
    """A net by name as a function of its parameters, without parameters of its own (no memory, no random numbers)."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return Inner(nets.build(net, classes, size))


def train_experts(
    source: Source, recipe: ExpertRecipe, out: Path, *, device: torch.device, workers: int = 0, progress: bool = True
) -> Experts:
    """Train the experts into `out`, one .safetensors file each; under `torchrun` the ranks share them.

    A run cut short goes on after the last whole epoch and ends with the same bytes (same device and threads). Raises `InputError`
    where `out` holds other experts, and where the disk has too little room, before anything is written.
    """
    size = recipe.size or source.size
    need, have = disk_bytes(recipe, len(source.classes), size), shutil.disk_usage(_existing(out)).free
    done = len(list(out.glob("expert*.safetensors")))
    log.info("%d experts take %.2f GB on disk, %.2f GB are free, %d are there", recipe.experts, need / 1e9, have / 1e9, done)
    if need * (1 - done / recipe.experts) > have:
        raise InputError(f"the experts need {need / 1e9:.1f} GB, {out} has {have / 1e9:.1f} GB free: fewer experts, or float16")
    begin(out, source, recipe, size)
    images = Pixels(source.train, size, workers)
    view = View(source.mean, source.std, whitening(out, images) if recipe.zca else None).to(device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own = [i for i in range(recipe.experts)[rank::world] if not _finished(out, i)]
    with tqdm(total=len(own) * recipe.epochs, desc=f"experts {recipe.net}", unit="epoch", disable=None if progress else True) as bar:
        for expert in own:
            for epoch, loss in _train(expert, recipe, images, len(source.classes), size, view, device, out):
                bar.set_postfix(expert=expert, epoch=epoch, loss=f"{loss:.3f}")
                bar.update()
    return Experts(out)


def begin(out: Path, source: Source, recipe: ExpertRecipe, size: int) -> None:
    """Write meta.json, or check that the one there is the same."""
    about = {"name": source.name, "spec": source.spec, "classes": source.classes, "mean": source.mean, "std": source.std}
    meta = json.loads(json.dumps({"format": 1, "recipe": asdict(recipe), "size": size, "source": about}))
    file = out / "meta.json"
    if file.exists():
        have = _read_meta(out)
        if differs := [k for k in meta["recipe"] if have["recipe"].get(k) != meta["recipe"][k]] + [
            k for k in ("size", "source") if have[k] != meta[k]
        ]:
            raise InputError(f"{out} holds experts with another {', '.join(dict.fromkeys(differs))}: choose another folder")
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} exists and holds no experts: choose a new or empty folder")
    else:
        write_bytes(file, (json.dumps(meta, indent=1) + "\n").encode())


def _train(
    expert: int, recipe: ExpertRecipe, images: Pixels, classes: int, size: int, view: View, device: torch.device, out: Path
) -> Iterator[tuple[int, float]]:
    """One expert; yields (epoch, mean loss). Whole epochs lie in a .rows file, so that each is written once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1_000_003 + expert)
        net = nets.build(recipe.net, classes, size)
    student = Inner(net)
    rows, state = out / f"{_file(expert)}.rows", out / f"{_file(expert)}.state"
    if state.exists():
        known = load_file(state)
        theta, losses = known["theta"].to(device), known["losses"].tolist()
        os.truncate(rows, (len(losses) + 1) * len(theta) * FORMATS[recipe.keep].itemsize)
    else:
        theta, losses = torch.cat([p.detach().flatten() for p in net.parameters()]).to(device), []
        _append(rows, theta, recipe.keep, fresh=True)
    for epoch in range(len(losses), recipe.epochs):
        theta, loss = one_epoch(student, theta, images, view, recipe, [recipe.seed, expert, epoch])
        losses.append(loss)
        _append(rows, theta, recipe.keep)
        write_bytes(state, save({"theta": theta.cpu(), "losses": torch.tensor(losses, dtype=torch.float64)}))
        yield epoch + 1, loss
    kept = torch.from_numpy(np.fromfile(rows, recipe.keep)).view(-1, len(theta))
    write_expert(out, expert, kept, losses)
    state.unlink(missing_ok=True)
    rows.unlink()


def one_epoch(student: Inner, theta: Tensor, images: Pixels, view: View, recipe: ExpertRecipe, seeds: list[int]) -> tuple[Tensor, float]:
    """One pass of plain SGD; everything random comes from `seeds`. The new parameters [P] and the mean loss."""
    chance = np.random.default_rng(seeds)
    generator = Generator().manual_seed(int(chance.integers(1 << 62)))
    order = chance.permutation(len(images.labels))
    total = torch.zeros((), device=theta.device)
    for pixels, labels in images.batches(order, recipe.batch):
        x = dsa.apply(view.see(pixels.to(theta.device)), dsa.draw(recipe.augment, len(pixels), generator))
        theta = theta.requires_grad_()
        loss = F.cross_entropy(student.logits(theta, x), labels.to(theta.device))
        (slope,) = torch.autograd.grad(loss, theta)
        theta = theta.detach() - recipe.lr * slope
        total += loss.detach() * len(labels)
    if not theta.isfinite().all():
        raise InputError(f"expert {seeds[1]} is not finite after epoch {seeds[2] + 1} at learning rate {recipe.lr}: try a lower lr")
    return theta, float(total) / len(order)


def _append(rows: Path, theta: Tensor, keep: str, fresh: bool = False) -> None:
    with open(rows, "wb" if fresh else "ab") as file:
        kept = theta.detach().cpu().to(FORMATS[keep])
        if not kept.isfinite().all():
            raise InputError(f"a parameter of {float(theta.abs().max()):.3g} does not fit {keep}: keep float32")
        file.write(kept.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_expert(out: Path, expert: int, rows: Tensor, losses: list[float]) -> None:
    """One expert's file: `parameters` [epochs + 1, P] in the order of `net.named_parameters()`."""
    described = {"losses": json.dumps([round(loss, 6) for loss in losses])}
    write_bytes(out / _file(expert), save({"parameters": rows.contiguous()}, metadata=described))


def whitening(out: Path, images: Pixels) -> Zca:
    """The whitening of the training images, fitted once."""
    file = out / "zca.safetensors"
    if not file.exists():
        n = len(images.labels)
        pixels, _ = images.read(np.sort(np.random.default_rng(0).permutation(n)[:ZCA_IMAGES]))
        Zca.fit(pixels.float() / 255).save(file)
    return Zca.load(file)


def _finished(out: Path, expert: int) -> bool:
    """Whether an expert's file is there; what a kill may have left beside it is removed."""
    done = (out / _file(expert)).exists()
    if done:
        for ending in ("state", "rows"):
            (out / f"{_file(expert)}.{ending}").unlink(missing_ok=True)
    return done


def _file(expert: int) -> str:
    return f"expert{expert:04d}.safetensors"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["format"] == 1 and {"recipe", "size", "source"} <= meta.keys() and "net" in meta["recipe"]:
            return dict(meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no experts ({type(error).__name__}: {error}): make them with `infoutil experts`") from error
    raise InputError(f"{path} holds no experts of format 1: make them with `infoutil experts`")


class Experts:
    """The experts in a folder of `infoutil experts`: only the rows asked for are read."""

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        self.path, self.device = Path(path), torch.device(device)
        meta = _read_meta(self.path)
        self.recipe, self.size, about = ExpertRecipe(**meta["recipe"]), int(meta["size"]), meta["source"]
        self.files = sorted(self.path.glob("expert[0-9]*.safetensors"))
        if not self.files:
            raise InputError(f"{self.path} has no finished expert yet: run the same `infoutil experts` command again")
        self.inner = inner(self.recipe.net, len(about["classes"]), self.size)
        zca = Zca.load(self.path / "zca.safetensors") if self.recipe.zca else None
        self.view = View(tuple(about["mean"]), tuple(about["std"]), zca).to(self.device)
        self.epochs = min(self.rows(i) for i in range(len(self.files))) - 1
        digest = hashlib.sha256((self.path / "meta.json").read_bytes())
        digest.update("".join(f"{file.name} {file.stat().st_size}" for file in self.files).encode())
        for row in (0, self.epochs):  # all of it would be read for hours at 100 experts of an ImageNet net
            digest.update(self.parameters(0, row).cpu().numpy().tobytes())
        spec, hashed = str(self.path.resolve()), digest.hexdigest()[:16]
        self.facts = Facts(
            self.recipe.net, self.size, self.view.mean, self.view.std, tuple(about["classes"]), self.epochs, None, spec, hashed
        )

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, expert: int) -> int:
        """Saved epochs of an expert, the initial parameters among them. Raises `InputError` for a file that does not fit the net."""
        try:
            with safe_open(self.files[expert], "pt") as file:
                shape = file.get_slice("parameters").get_shape()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.files[expert]} cannot be read ({error}): is it truncated?") from error
        if len(shape) != 2 or shape[0] < 2 or shape[1] != sum(self.inner.sizes):
            raise InputError(f"{self.files[expert]} has parameters {shape}, {self.recipe.net} needs [2 or more, {sum(self.inner.sizes)}]")
        return int(shape[0])

    def parameters(self, expert: int, epoch: int) -> Tensor:
        """[P] float32 of an expert after so many epochs."""
        with safe_open(self.files[expert], "pt") as file:
            return file.get_slice("parameters")[epoch].float().to(self.device)

    def segment(self, expert: int, start: int, epochs: int) -> Segment:
        """From `start` to `start + epochs`."""
        return Segment(self.parameters(expert, start), self.parameters(expert, start + epochs))

    def logits(self, images: Tensor, expert: int = 0, epoch: int | None = None, batch: int = 128) -> Tensor:
        """Logits [N, C] float32 of uint8 images [N, 3, S, S] by an expert after an epoch (default: the last)."""
        theta = self.parameters(expert, self.epochs if epoch is None else epoch)
        with torch.inference_mode():
            parts = [self.inner.logits(theta, self.view.see(part.to(self.device))) for part in images.split(batch)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.facts.classes), device=self.device)


def open_experts(spec: str, source: Source, device: torch.device) -> Experts:
    """The experts at `spec` for `source`; raises `InputError` where their classes differ."""
    experts = Experts(spec, device)
    check_classes(experts.facts, source)
    return experts
