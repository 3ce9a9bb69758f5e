"""Nets of torchvision and timm by name, with pretrained weights, their own transform, and the head cut to the classes at hand."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from infoutil_fast.models.checkpoints import fitted, outputs_of, read_state
from infoutil_fast.models.heads import BROKEN_IMPORT, class_outputs, cut_head, find_heads
from infoutil_fast.types import InputError, first_line

BROKEN_FILE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    HTTPException,
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
AUXILIARY = ("googlenet", "inception_v3")  # of torchvision: extra heads that only training uses, and an input scale of their own


@dataclass(frozen=True)
class Pretrained:
    """A net in eval mode, and the transform that its weights were measured with."""

    net: nn.Module  # [N, 3, size, size] -> logits [N, len(classes)], channels_last
    size: int  # centre crop, pixels
    mean: tuple[float, ...]  # in [0, 1] units
    std: tuple[float, ...]
    resize: int  # short side before the crop, pixels
    classes: tuple[str, ...]


def load_pretrained(
    spec: str,
    classes: Sequence[str] | None,
    *,
    weights: str | None = "DEFAULT",
    checkpoint: Path | None = None,
    class_index: Mapping[str, int] | None = None,
) -> Pretrained:
    """A net by `torchvision:NAME` or `timm:NAME` whose logits are those of `classes`, in that order.

    classes      class folders of the source; WordNet ids (n01440764) find their outputs in a 1000-way head. None keeps the whole head.
    weights      a weights name of torchvision ("IMAGENET1K_V1"), a tag of timm ("a1_in1k"), "DEFAULT", or None for random ones.
                 They are downloaded unless they are in the package's cache.
    checkpoint   a local state dict (.safetensors, .pth) instead of a download; `weights` then names the transform only.
    class_index  output of each class, where the names do not tell it.

    Raises `InputError`: package missing, name unknown, weights out of reach, a file that is damaged or not of this net,
    classes that do not fit.
    """
    package, name = _split(spec)
    state = None if checkpoint is None else read_state(checkpoint)
    found = (_torchvision if package == "torchvision" else _timm)(spec, name, weights, state)
    heads = find_heads(found.net, spec)
    width = len(heads[0].weight)
    labels = found.classes if len(found.classes) == width else tuple(map(str, range(width)))
    if classes is not None:
        index = class_outputs(spec, width, classes, class_index)
        if index != list(range(width)):
            for head in heads:
                cut_head(head, index)
        labels = tuple(classes)
    net = found.net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Pretrained(net, found.size, found.mean, found.std, found.resize, labels)


def untrained(spec: str, classes: int, size: int) -> nn.Module:
    """A freshly initialised net of `torchvision:NAME` or `timm:NAME` for [N, 3, size, size]; `InputError` when that size is not for it."""
    package, name = _split(spec)
    library = _import(package, spec)
    options: dict[str, Any]
    if package == "torchvision":
        _check_name(spec, name, library.models.list_models(module=library.models))
        build, options = library.models.get_model, {"weights": None, **_options(name, size, trained=False)}
    else:
        _check_name(spec, name, library.list_models())
        fixed = library.get_pretrained_cfg(name).fixed_input_size
        build, options = library.create_model, {"img_size": size} if fixed else {}
    try:
        net = build(name, num_classes=classes, **options)
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"{spec} does not take {size} px images: {first_line(error, named=True)}") from error
    return net.train()


def _split(spec: str) -> tuple[str, str]:
    package, _, name = spec.partition(":")
    if package not in ("torchvision", "timm"):
        raise InputError(f"{spec!r} is not torchvision:NAME or timm:NAME")
    return package, name


def _import(package: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except BROKEN_IMPORT as error:
        raise InputError(f"{spec} needs {package}: pip install 'infoutil_fast[vision]' ({first_line(error, named=True)})") from error


def _check_name(spec: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 5, 0.4)
        raise InputError(
            f"no net is called {spec}; " + (f"closest: {', '.join(close)}" if close else f"{len(known)} are known, such as resnet18")
        )


def _torchvision(spec: str, name: str, weights: str | None, state: dict[str, Tensor] | None) -> Pretrained:
    models = _import("torchvision", spec).models
    _check_name(spec, name, models.list_models(module=models))
    choices = models.get_model_weights(name)
    if weights not in (None, "DEFAULT", *choices.__members__):
        raise InputError(f"{spec} has no weights {weights!r}; possible: {', '.join(choices.__members__)}")
    entry = choices[weights or "DEFAULT"]
    if state is None and weights is not None:
        state = _download(spec, entry)
    if state is not None and name.startswith("densenet"):  # as published: names from before modules could not hold dots
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value for key, value in state.items()}
    if state is not None and name in AUXILIARY:
        state = {key: value for key, value in state.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    shape = entry.transforms()
    options = _options(name, shape.crop_size[0], trained=state is not None)
    net = _fill(
        lambda width: models.get_model(name, weights=None, num_classes=width, **options), spec, len(entry.meta["categories"]), state
    )
    return Pretrained(net, shape.crop_size[0], tuple(shape.mean), tuple(shape.std), shape.resize_size[0], tuple(entry.meta["categories"]))


def _options(name: str, size: int, trained: bool) -> dict[str, Any]:
    """What torchvision's constructors need to be told besides the number of classes."""
    if name.startswith("vit_"):
        return {"image_size": size}
    if name.startswith("maxvit_"):
        return {"input_size": (size, size)}
    return {"aux_logits": False, "transform_input": trained, "init_weights": not trained} if name in AUXILIARY else {}


def _download(spec: str, entry: Any) -> dict[str, Tensor]:
    """torchvision's weights from its cache or the net, read without executing anything."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints "Downloading", which would spoil --json
            return entry.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except BROKEN_FILE as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
        raise InputError(
            f"{spec}: no usable weights {entry.name} ({first_line(error, named=True)}): put {entry.url} at {place} "
            "(remove a damaged file there), or give checkpoint=FILE (.safetensors or .pth)"
        ) from error


def _timm(spec: str, name: str, weights: str | None, state: dict[str, Tensor] | None) -> Pretrained:
    timm = _import("timm", spec)
    base, _, tag = name.partition(".")
    _check_name(spec, base, timm.list_models())
    tag = tag if weights in (None, "DEFAULT") else str(weights)
    full = f"{base}.{tag}" if tag else base
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise InputError(f"timm:{base} has no weights {tag!r}; possible: {', '.join(tags) or 'none'}")
    entry = timm.get_pretrained_cfg(full)
    if state is None and weights is not None:
        try:
            net = timm.create_model(full, pretrained=True)
        except BROKEN_FILE as error:
            place = (
                f"https://huggingface.co/{entry.hf_hub_id} (model.safetensors)" if entry.hf_hub_id else entry.url or "nowhere: it has none"
            )
            raise InputError(
                f"{spec}: no usable weights ({first_line(error, named=True)}): they are at {place}; get them and give checkpoint=FILE"
            ) from error
    else:
        net = _fill(lambda width: timm.create_model(full, num_classes=width), spec, entry.num_classes, state)
    data = timm.data.resolve_model_data_config(net)
    size = data["input_size"][-1]
    return Pretrained(net, size, tuple(data["mean"]), tuple(data["std"]), int(size / data["crop_pct"]), ())


def _fill(build: Callable[[int], nn.Module], spec: str, width: int, state: dict[str, Tensor] | None) -> nn.Module:
    """`build(width)` with `state` loaded; the width of the head follows the state dict."""
    net = build(width)
    if state is None:
        return net
    head = find_heads(net, spec)[0]
    name = next(name for name, module in net.named_modules() if module is head)
    there = outputs_of(net, name, state)
    if there != width:
        net = build(there)
    net.load_state_dict(fitted(net, state, f"the checkpoint for {spec}"), strict=False)  # all but the counts of batches
    return net
