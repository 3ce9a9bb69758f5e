"""Which output of a head belongs to which class folder, and heads cut down to these outputs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from infoutil_fast.data.imagenet_subsets import NETTE, WOOF
from infoutil_fast.types import InputError

BROKEN_IMPORT = (ImportError, RuntimeError, AttributeError, OSError)  # RuntimeError: torchvision built for another torch
# Places of Imagenette's classes, then of Imagewoof's, as `imagenet_subsets` lists them, among the sorted ids of ImageNet-1K.
PLACES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701, 193, 182, 258, 162, 155, 167, 159, 273, 207, 229)
KNOWN_WNIDS = dict(zip(f"{NETTE} {WOOF}".split(), PLACES, strict=True))


def class_outputs(spec: str, width: int, classes: Sequence[str], class_index: Mapping[str, int] | None = None) -> list[int]:
    """Output of each class among `width`; `InputError` when it cannot be known. Sources: `class_index`, WordNet ids, equal numbers."""
    wordnet = all(re.fullmatch(r"n\d{8}", c) for c in classes)
    given = f"{spec} has {width} outputs, the source has {len(classes)} classes ({', '.join(classes[:3])}{', ...' * (len(classes) > 3)})"
    table: Mapping[str, int]
    if class_index is not None:
        table = class_index
    elif len(classes) == width:
        table = {c: i for i, c in enumerate(sorted(classes) if wordnet else classes)}
    elif wordnet and classes:
        table = _wordnet_outputs(width)
    else:
        raise InputError(
            f"{given}: possible are {width} classes, folders named by WordNet id (n01440764), or class_index={{class: output}}"
        )
    lost = [c for c in classes if c not in table]
    if lost:
        raise InputError(
            f"{given}: no output is known for {len(lost)} of them ({', '.join(lost[:3])}); "
            "known are the ids of ImageNette and ImageWoof, with timm (pip install 'infoutil_fast[vision]') all ids of ImageNet; "
            "else give all folders, or class_index={class: output}"
        )
    index = [int(table[c]) for c in classes]
    if len(set(index)) < len(index) or not all(0 <= i < width for i in index):
        raise InputError(f"{given}: each class needs an output of its own in 0..{width - 1}, not {index[:8]}")
    return index


def _wordnet_outputs(width: int) -> Mapping[str, int]:
    """Output of every WordNet id in a head of `width`, from timm's lists where it is installed."""
    try:
        data = importlib.import_module("timm.data")
    except BROKEN_IMPORT:
        return KNOWN_WNIDS if width == 1000 else {}
    subset = data.infer_imagenet_subset({"num_classes": width})
    return {wnid: i for i, wnid in enumerate(data.ImageNetInfo(subset).label_names())} if subset else {}


def find_heads(net: Any, spec: str) -> list[Any]:
    """The linear layers or 1x1 convolutions that give the logits: more than one where the net averages several (DeiT distilled)."""
    if hasattr(net, "get_classifier"):
        top = net.get_classifier()
        inside = [m for part in (top if isinstance(top, tuple) else (top,)) for m in part.modules()]
        heads = [m for m in inside if isinstance(m, nn.Linear | nn.Conv2d) and len(m.weight) == net.num_classes]
    else:
        heads = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
    if not heads:
        raise InputError(f"{spec} has no classification head: a teacher needs logits")
    return heads


def cut_head(head: Any, index: list[int]) -> None:
    """Keep the outputs `index` of a linear layer or 1x1 convolution, in that order."""
    head.weight = nn.Parameter(head.weight.detach()[index])  # [O, K] or [O, K, 1, 1]
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[index])
    setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(index))
