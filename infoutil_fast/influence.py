"""How much a step along one direction of the parameters changes each sample's loss, by one forward-mode pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from infoutil_fast.gradnorm.first_look import look
from infoutil_fast.gradnorm.losses import Loss, loss_gradients
from infoutil_fast.gradnorm.norms import ready, scan
from infoutil_fast.types import InputError


def grad_dots(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    direction: Mapping[str, Tensor],
    *,
    loss: Loss | None = None,
    max_memory: int | None = None,
) -> Tensor:
    """Dot product of each sample's loss gradient with `direction`, the model in eval mode: float32 [N].

    `direction` maps parameter names to tensors of their shapes; what it leaves out counts as zero. With a gradient of other samples as the
    direction this is their (first-order) influence: TracIn (arXiv:2002.08484), eq. 1. No gradient is formed: the directional derivative of
    the logits [n, C] comes from one forward-mode pass, the loss gradient is taken in float64. `loss`, `max_memory` and errors as in
    `grad_norms`; `InputError` too for names and shapes that are not the model's.
    """
    params = dict(model.named_parameters())
    for name, tensor in direction.items():
        if name not in params:
            raise InputError(f"the model has no parameter {name!r}; it has {', '.join(list(params)[:5])}, ...")
        if tensor.shape != params[name].shape:
            raise InputError(f"direction {name!r} is {list(tensor.shape)} and the parameter {list(params[name].shape)}")
    at = {name: params[name].detach() for name in direction}
    along = {name: tensor.detach().to(at[name]) for name, tensor in direction.items()}

    def dots(x: Tensor, y: Tensor, start: int) -> dict[str, Tensor]:
        def forward(values: dict[str, Tensor]) -> Any:
            return functional_call(model, values, (x,))

        with torch.no_grad():
            logits, change, *_ = jvp(forward, (at,), (along,)) if at else (model(x), x.new_zeros(()))
        return {"": (loss_gradients(logits, y, loss, start) * change.double()).sum(1)}

    with ready(model, images, targets, None, max_memory, loss):
        found = scan(dots, images, targets, loss, look(model, images, None), max_memory)
    return found[""].float() if found else images.new_zeros(0, dtype=torch.float32)
