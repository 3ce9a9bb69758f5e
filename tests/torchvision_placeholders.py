"""torchvision of the registry beside a CPU build of torch: its compiled ops do not load, and its import fails.

Two ops without a body are enough to import it; models, transforms and data sets run as usual, detection does not.
"""

import importlib
import warnings
from types import ModuleType

import pytest
import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # the ops live as long as this


def package(name: str) -> ModuleType:
    """torchvision or timm, with placeholder ops where torchvision needs them; skips the test where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except ModuleNotFoundError:
            pytest.skip(f"{name} is not tested here: torchvision is not installed")
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            for op in ("nms", "qnms"):
                LIBRARY.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            pytest.skip(f"{name} is not installed")
