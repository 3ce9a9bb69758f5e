"""Training-free dataset distillation, and the scorers behind it."""

from infoutil_fast._version import __version__
from infoutil_fast.data import open_source
from infoutil_fast.gradnorm import el2n, grad_norms, grand
from infoutil_fast.influence import grad_dots
from infoutil_fast.models.teacher import load_teacher
from infoutil_fast.pipeline.running import distill
from infoutil_fast.sets.store import load
from infoutil_fast.shapley import KernelShap, PatchShapley, patch_shapley
from infoutil_fast.training.evaluation import evaluate
from infoutil_fast.training.teaching import Recipe, teach
from infoutil_fast.types import InputError

__all__ = [
    "InputError",
    "KernelShap",
    "PatchShapley",
    "Recipe",
    "__version__",
    "distill",
    "el2n",
    "evaluate",
    "grad_dots",
    "grad_norms",
    "grand",
    "load",
    "load_teacher",
    "open_source",
    "patch_shapley",
    "teach",
]
