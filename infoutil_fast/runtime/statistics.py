"""Nets whose batch norms have no statistics of their own."""

from __future__ import annotations

from torch import nn

from infoutil_fast.types import InputError


def keeps_apart(model: nn.Module) -> None:
    """Raise `InputError` where a batch norm would take its statistics from the batch even in eval mode."""
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
            raise InputError(
                f"batch norm {name!r} has no running statistics, so it mixes the samples of a call: nothing of one sample alone exists"
            )
