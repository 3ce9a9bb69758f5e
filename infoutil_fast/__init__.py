"""Training-free dataset distillation, and the scorers behind it."""

from infoutil_fast._version import __version__

TYPE_CHECKING = False  # for type checkers it is true; `typing` itself would make the first import ten times as long
if TYPE_CHECKING:
    from typing import Any

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

# Where each is: loaded when it is first asked for, so that the command line can be interrupted while torch is loaded.
_PLACES = {
    "data": ("open_source",),
    "gradnorm": ("el2n", "grad_norms", "grand"),
    "influence": ("grad_dots",),
    "models.teacher": ("load_teacher",),
    "pipeline.running": ("distill",),
    "sets.store": ("load",),
    "shapley": ("KernelShap", "PatchShapley", "patch_shapley"),
    "training.evaluation": ("evaluate",),
    "training.teaching": ("Recipe", "teach"),
    "types": ("InputError",),
}


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> "list[str]":
    return sorted({*globals(), *__all__})
