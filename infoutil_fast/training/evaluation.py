"""How good a distilled set is: students trained on it, several seeds, the last epoch's accuracy on the validation split."""

from __future__ import annotations

import datetime
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from infoutil_fast.data import IMAGENET, Source, open_source, reopen
from infoutil_fast.data.feed import Pixels
from infoutil_fast.models.teacher import load_teacher, reload_teacher
from infoutil_fast.pixels.views import Zca
from infoutil_fast.runtime.device import choose_device, choose_dtype
from infoutil_fast.runtime.files import append_row
from infoutil_fast.sets import store
from infoutil_fast.training import matching_student, rded_students
from infoutil_fast.training.recipes import RDED_CODE, StudentRecipe, complete
from infoutil_fast.training.student import Bench, late_epochs, train_matched, train_student
from infoutil_fast.training.teaching import accuracy
from infoutil_fast.types import InputError, one_of

LABELS = ("online", "soft", "hard")


def evaluate(
    path: str | Path,
    *,
    student: str = "convnet3",
    seeds: int = 3,
    seed: int = 0,
    ipc: int | None = None,
    labels: str = "online",
    recipe: str | StudentRecipe = "rded",
    teacher: str | None = None,
    source: str | Path | Source | None = None,
    best_of_test: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    workers: int = 0,
    progress: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Train `seeds` students on the set at `path` and test each after its last epoch; the command is `infoutil evaluate`.

    seed: of the first student, the others follow. ipc: use the first so many images of each class; images are stored best
    first, so at factor 1 that is the set of that ipc. labels: "online" (the teacher labels every augmented, mixed
    batch), "soft" (stored logits), "hard". recipe: "rded", "fixed" (cosine to zero, one batch-norm update), "rded-code" (all that
    RDED's public code does besides, in float32, and the best of test) or "matching" (learned step size and DSA; labels soft or
    hard), with `changes` of its fields (epochs=30). teacher, source: others than those the set was made with. best_of_test: also
    report the best of RDED's late epochs (every tenth of the last fifth), which peeks at the test set, under that name.

    Returns, and appends to the set's evaluations.jsonl, accuracies in [0, 1]: `last` by seed, their `mean` and `std` (n - 1).
    Raises `InputError` for a folder that is no finished set, unknown names, or a teacher that does not fit.
    """
    have = first_of_class(store.load(path), ipc)
    one_of("labels", labels, LABELS)
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, not {seeds}")
    about = have.meta["label_teacher"] or have.meta["teacher"]
    code = recipe == RDED_CODE
    rded = {"student": student, "teacher": about["name"], "classes": len(have.meta["source"]["classes"]), "size": have.meta["size"]}
    chosen = complete(recipe, changes, ipc or have.meta["ipc"], len(have), rded)
    where = choose_device(device)
    opened = source if isinstance(source, Source) else open_source(source) if source else reopen(have.meta["source"]["spec"])
    if opened.classes != tuple(have.meta["source"]["classes"]):
        raise InputError(f"{opened.name} has other classes than the set at {path}")
    whitening = Path(path) / "zca.safetensors"
    if whitening.is_file() and chosen.optimiser != "sgd":
        raise InputError(f"{path} is whitened: recipe matching keeps it so, {recipe!r} does not")
    if labels == "online" and chosen.optimiser == "sgd":
        raise InputError("recipe matching has no on-line teacher: labels soft or hard")
    if chosen.optimiser == "sgd" and not chosen.lr:
        chosen = replace(chosen, lr=matching_student.learned_lr(Path(path)))
    again = load_teacher if teacher else reload_teacher
    oracle = again(teacher or about["spec"], opened, where) if labels == "online" else None
    if oracle and not teacher and oracle.facts.hash != about["hash"]:
        raise InputError(f"{about['spec']} is no longer the teacher of {path} (its weights changed): name one with --teacher")
    constants = IMAGENET if chosen.imagenet_stats else (oracle.facts.mean, oracle.facts.std) if oracle else (opened.mean, opened.std)
    bench = Bench(
        have.pixels(),
        have.hard,
        have.soft,
        len(opened.classes),
        have.meta["factor"],
        *constants,
        oracle,
        labels,
        where,
        choose_dtype("float32" if code and dtype == "auto" else dtype, where),
        Zca.load(whitening).to(where) if whitening.is_file() else None,
        have.floats(),
    )
    val = rded_students.first_of_each(opened.val, chosen.test_per_class) if chosen.test_per_class else opened.val
    test = Pixels(rded_students.resized_test(val, have.meta["size"]) if chosen.resized_test else val, have.meta["size"], workers)
    tested = late_epochs(chosen.epochs) if best_of_test or code else {chosen.epochs}
    start = time.perf_counter()
    last, best = [], []
    with tqdm(total=seeds * chosen.epochs, desc=f"evaluate {student}", unit="epoch", disable=None if progress else True) as bar:
        for own in range(seed, seed + seeds):
            watched: list[float] = []

            def watch(epoch: int, net: nn.Module, watched: list[float] = watched) -> None:
                if epoch in tested:
                    watched.append(accuracy(lambda x: bench.predict(net, x), test.batches(np.arange(len(test.labels)), 256)))
                bar.update()

            (train_matched if chosen.optimiser == "sgd" else train_student)(bench, student, chosen, own, watch)
            last.append(watched[-1])
            best.append(max(watched))
            bar.set_postfix(accuracy=f"{last[-1]:.1%}")
    row = {
        "student": student,
        "labels": labels,
        "recipe": recipe if isinstance(recipe, str) else "own",
        "settings": asdict(chosen),
        "epochs": chosen.epochs,
        "teacher": oracle.facts.hash if oracle else None,
        "ipc": ipc or have.meta["ipc"],
        "seeds": list(range(seed, seed + seeds)),
        "last": last,
        "best": best if best_of_test or code else None,
        "mean": float(np.mean(last)),
        "std": float(np.std(last, ddof=1)) if seeds > 1 else None,
        "test_images": len(test.labels),
        "seconds": round(time.perf_counter() - start, 1),
        "device": str(where),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }
    append_row(Path(path) / "evaluations.jsonl", row, f"{row['mean']:.1%}")
    return row


def first_of_class(whole: store.DistilledSet, ipc: int | None) -> store.DistilledSet:
    """The first `ipc` images of each class; all of them for None."""
    if ipc is None:
        return whole
    if not 1 <= ipc <= whole.meta["ipc"]:
        raise InputError(f"ipc must be 1 to {whole.meta['ipc']}, which the set at {whole.path} has, not {ipc}")
    index = torch.cat([torch.nonzero(whole.hard == label)[:ipc, 0] for label in whole.hard.unique()])
    return replace(whole, files=tuple(whole.files[i] for i in index), hard=whole.hard[index], soft=whole.soft[index])
