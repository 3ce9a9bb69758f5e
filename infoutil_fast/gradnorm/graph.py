"""What the graph of a forward tells: how often each parameter is used, its shape, and where samples may change their rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infoutil_fast.gradnorm.hooks import Record

# Operations that place rows by data: anything, or along one dimension. Rows that go by a fixed rule are found by their norms.
ANYWHERE = {"MaskedSelect", "MaskedScatter", "Take", "Put", "PackPaddedSequence", "Embedding", "EmbeddingBag"}
ALONG = {"IndexSelect", "Gather", "Sort", "Topk", "IndexAdd", "IndexCopy", "Scatter", "ScatterAdd", "ScatterReduce"}


@dataclass(frozen=True)
class Graph:
    """Of one forward of n samples."""

    uses: Counter[Tensor]  # how often each parameter is met, plus how often in the recorded calls: 2 where one call is its only use
    met: frozenset[int]  # ids of the parameters met
    key: Any  # equal for graphs of one shape
    exposed: frozenset[int]  # positions of recorded calls behind which data decide which row a sample is


def read(logits: Tensor, record: Record, n: int) -> Graph:
    """From the logits down."""
    kinds, met, movers = Counter[str](), Counter[Tensor](), []
    for node in _below([logits.grad_fn]):
        if hasattr(node, "variable"):
            continue
        name = re.sub(r"Backward\d*$", "", node.name())
        kinds[name] += 1
        met.update(after.variable for after, _ in node.next_functions if hasattr(after, "variable"))
        if _moves(name, node, n):
            movers.append(node)
    uses = met + Counter(p for c in record.calls if c.out is None for p in c.layer.parameters(recurse=False))
    behind = set(_below(after for node in movers for after, _ in node.next_functions)) if movers else set()
    exposed = frozenset(i for i, node in enumerate(record.nodes) if node in behind)
    calls = tuple((c.name, None if c.x is None else (c.x.shape[1:], len(c.x) == n)) for c in record.calls)
    return Graph(uses, frozenset(map(id, met)), (frozenset(kinds.items()), calls, exposed), exposed)


def _below(roots: Iterable[Any]) -> Iterable[Any]:
    """Every node that the gradient reaches from `roots`, these included, once."""
    todo = [node for node in roots if node is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                todo.append(after)


def _moves(name: str, node: Any, n: int) -> bool:
    """Whether an operation may place the rows of samples by data."""
    if name in ("Index", "IndexPut", "IndexPutImpl"):
        first = (node._saved_indices or (None,))[0]
        constant = name != "Index" and node.next_functions[-1][0] is None  # what is put there comes from no sample
        return first is not None and not constant and not _in_order(first, n)
    if name in ALONG:
        index = next((getattr(node, k) for k in ("_saved_index", "_saved_indices") if hasattr(node, k)), None)
        dim = getattr(node, "_saved_dim", 0)
        dim -= (1 << 64) * (dim >> 63)  # saved without its sign
        return not isinstance(index, Tensor) or dim % max(1, index.ndim) == 0
    return name in ANYWHERE


def _in_order(index: Tensor, n: int) -> bool:
    """Whether the i-th row of an index takes from sample i, as in x[arange(n), positions]."""
    rows = torch.arange(n, device=index.device)[:, None]
    return index.dtype == torch.int64 and index.shape[:1] == (n,) and bool((index.reshape(n, -1) == rows).all())
