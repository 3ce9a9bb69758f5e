"""Fast, honest, training-free dataset distillation, and the scorers behind it."""

from infoutil_fast._version import __version__
from infoutil_fast.data import open_source
from infoutil_fast.gradnorm.norms import grad_norms
from infoutil_fast.models.teacher import load_teacher
from infoutil_fast.pipeline.running import distill
from infoutil_fast.sets.store import load
from infoutil_fast.shapley.kernel_shap import KernelShap
from infoutil_fast.shapley.maps import patch_shapley
from infoutil_fast.training.evaluation import evaluate
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
