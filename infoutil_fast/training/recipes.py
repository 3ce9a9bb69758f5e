"""How a student is trained: the recipes by name, and what they leave open."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from infoutil_fast.ranges import Count, NotNegative, Positive, Whole, checked
from infoutil_fast.training import rded_students
from infoutil_fast.types import InputError, one_of


@checked
@dataclass(frozen=True)
class StudentRecipe:
    """AdamW on shuffled patches, random resized crops, flips and CutMix (RDED, validation/main.py).

    The fields from `imagenet_stats` on are what its code does besides; the recipe `rded-code` sets them all, with its rate and batch for
    the student and the data at hand. Not taken over: mixup, an option there; draws of numpy that nothing seeds (ours come from the seed);
    test images in the order in which a folder lists them.
    """

    epochs: Count = 300  # passes over the distilled set
    batch: Whole = 0  # images a step; 0: 10, 50, 100 from ipc 1, 10, 50 on, doubled from 100 classes on
    lr: NotNegative = 1e-3  # at the start; 0 with sgd: the one that the set's method learned
    weight_decay: NotNegative = 0.01  # on weights of two and more dimensions
    schedule: str = "half_cosine"  # half_cosine ends at half the rate (RDED); cosine at zero; step: with sgd
    bn_updates: Count = 2  # running statistics move this often a step (RDED runs each batch forward twice)
    temperature: Positive = 20.0  # of soft labels; the loss is not multiplied by its square
    cutmix: bool = True  # one box a batch
    optimiser: str = "adamw"  # adamw; sgd: the matching methods' protocol, DSA, no cutmix, decay on all weights, rate / 10 half way
    imagenet_stats: bool = False  # RDED's code: students see ImageNet's mean and deviation, whatever the source's
    float_crops: bool = False  # RDED's code: resized training crops are not rounded to bytes
    decay_named: bool = False  # RDED's code: only tensors called "weight" decay, so no position embedding does
    default_stem: bool = False  # RDED's code: the 3x3 stem of a small-image ResNet starts as torch's default, not as its other layers
    resized_test: bool = False  # RDED's code: test images have their short side at (size // 7) * 8 before the centre crop
    test_per_class: Whole = 0  # test images of each class, the first ones; 0: all (RDED's code: 50 from 64 px on)


RECIPES = {"rded": StudentRecipe(), "fixed": StudentRecipe(schedule="cosine", bn_updates=1)}


RDED_CODE = "rded-code"


def complete(recipe: str | StudentRecipe, changes: dict[str, Any], ipc: int, images: int, rded: dict[str, Any]) -> StudentRecipe:
    """A recipe with its changes and, where it leaves the batch open, RDED's rule.

    ipc, images: of the set. rded: the arguments of `quirks.student_settings` without ipc: student, teacher, classes, size.
    """
    code = recipe == RDED_CODE
    if isinstance(recipe, str):
        one_of("recipe", recipe, tuple(RECIPES))
        recipe = RECIPES[recipe]
    if unknown := sorted(set(changes) - {f.name for f in fields(StudentRecipe)}):
        raise InputError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(asdict(recipe))}")
    if code and not {"lr", "batch"} <= changes.keys():
        changes = {**rded_students.student_settings(ipc=ipc, **rded), **changes}
    recipe = replace(recipe, **changes)
    one_of("optimiser", recipe.optimiser, ("adamw", "sgd"))
    if recipe.optimiser == "sgd" and (recipe.schedule, recipe.cutmix) != ("step", False):
        raise InputError("optimiser sgd goes with schedule step and without cutmix: take recipe matching")
    if recipe.optimiser != "sgd" and not recipe.lr > 0:
        raise InputError(f"lr must be above 0, not {recipe.lr}")
    if recipe.epochs < 1 or (recipe.optimiser != "sgd" and recipe.schedule not in ("half_cosine", "cosine")):
        raise InputError(f"epochs must be at least 1 and schedule half_cosine or cosine, not {recipe.epochs} and {recipe.schedule!r}")
    if recipe.test_per_class < 0:
        raise InputError(f"test_per_class must be 0 (all) or more, not {recipe.test_per_class}")
    batch = recipe.batch or (100 if ipc >= 50 else 50 if ipc >= 10 else 10) * (2 if rded["classes"] >= 100 else 1)
    return replace(recipe, batch=min(batch, images))
