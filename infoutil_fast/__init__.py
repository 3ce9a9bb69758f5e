"""Fast, honest, training-free dataset distillation, and the scorers behind it."""

from infoutil_fast._version import __version__
from infoutil_fast.data import open_source
from infoutil_fast.evaluate import evaluate
from infoutil_fast.gradnorm import grad_norms
from infoutil_fast.kernel_shap import KernelShap
from infoutil_fast.pipeline import distill
from infoutil_fast.shapley import patch_shapley
from infoutil_fast.store import load
from infoutil_fast.teacher import load_teacher
from infoutil_fast.types import InputError

__all__ = [
    "InputError",
    "KernelShap",
    "__version__",
    "distill",
    "evaluate",
    "grad_norms",
    "load",
    "load_teacher",
    "open_source",
    "patch_shapley",
]
