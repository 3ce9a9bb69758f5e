"""Nets and images for benchmarks, the same in every process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infoutil_fast.models import nets

CLASSES = 10


def case(name: str, size: int, images: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A net with random weights and batch norms in eval mode, images [N, 3, size, size] and targets [N], on the device."""
    torch.manual_seed(0)
    model = nets.build(name, CLASSES, size).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after training: folding them must do something
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
    shown = torch.randn(images, 3, size, size).contiguous(memory_format=torch.channels_last)
    return model.to(device), shown.to(device), torch.randint(0, CLASSES, (images,)).to(device)
