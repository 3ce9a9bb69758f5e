"""The command line: teach, experts, distill, evaluate, report, calibrate, info, demo."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from infoutil_fast import methods
from infoutil_fast._version import __version__
from infoutil_fast.evaluate import LABELS, RECIPES, StudentRecipe, evaluate
from infoutil_fast.experts import ExpertRecipe
from infoutil_fast.foreign import NORMALISATIONS, import_teacher
from infoutil_fast.memory import keep_freed_memory
from infoutil_fast.pipeline import estimate, execute, prepare
from infoutil_fast.train import EARLY, Recipe
from infoutil_fast.types import InputError

Show = Callable[[Any, str], None]  # a value for --json, and its text for people


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after one line on standard error when the input cannot be used."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = _parser(words).parse_args(words)
        logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
        keep_freed_memory()
        args.run(args, lambda value, text: print(json.dumps(value) if args.json else text))
    except InputError as error:
        print(f"infoutil: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"infoutil: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "infoutil: interrupted; teach and experts go on from their last epoch, distill from its last class, "
            "calibrate from its last image",
            file=sys.stderr,
        )
        return 130
    return 0


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="infoutil", description="Training-free dataset distillation.")
    parser.add_argument("--version", action="version", version=f"infoutil_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print figures as one JSON object")
    common.add_argument("--quiet", action="store_true", help="no progress bars, warnings only")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    running.add_argument("--dtype", default="auto", help="of the forwards: auto, float32, bfloat16")
    running.add_argument("--workers", type=int, default=2, help="threads that read images")

    teach = commands.add_parser(
        "teach", parents=[common, running], help="train a teacher", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    teach.add_argument("source", help="folder, .npz, CIFAR batches, digits or demo")
    teach.add_argument("out", type=Path, help="folder of the checkpoints")
    teach.add_argument("--from-checkpoint", type=Path, help="take the weights of --net from this file of another project; train nothing")
    teach.add_argument("--normalisation", default="auto", choices=NORMALISATIONS, help="that the checkpoint was trained with")
    teach.add_argument("--class-order", type=Path, help="the class of each output of the checkpoint, a line each; else it is found out")
    teach.add_argument("--early", action="store_true", help=f"the paper's early teacher: {EARLY}")
    _fields(teach, Recipe)
    teach.set_defaults(run=_teach)

    experts = commands.add_parser("experts", parents=[common, running], help="train expert trajectories (mtt, tesla, datm)")
    experts.add_argument("source", help="folder, .npz, CIFAR batches, digits or demo")
    experts.add_argument("out", type=Path, help="folder of the experts")
    experts.add_argument("--from-buffers", type=Path, help="take them from the replay_buffer_*.pt in this folder instead of training")
    experts.add_argument("--to-buffers", type=Path, help="afterwards write them as replay_buffer_*.pt into this folder")
    experts.add_argument("--dry-run", action="store_true", help="say what the experts take on disk; write nothing")
    _fields(experts, ExpertRecipe)
    experts.set_defaults(run=_experts)

    distill = commands.add_parser("distill", parents=[common, running], help="make a distilled set", conflict_handler="resolve")
    distill.add_argument("source", nargs="?", help="folder, .npz, CIFAR batches, digits or demo")
    distill.add_argument("out", type=Path, help="folder of the set")
    distill.add_argument("--teacher", help="checkpoint or its folder, torchvision:NAME, timm:NAME; mtt, tesla, datm: folder of experts")
    distill.add_argument("--label-teacher", help="another teacher for the soft labels (the paper's early one)")
    distill.add_argument("--method", default=_method(words), choices=methods.available())
    known = ", ".join(methods.presets(methods.load(_method(words)))) or "this method has none"
    distill.add_argument("--preset", help=f"the method's published settings: {known}")
    distill.add_argument("--config", type=Path, help="meta.json of a set: make it again")
    distill.add_argument("--batch", type=int, default=0, help="forwards at once; 0: 64 on the CPU, 512 on CUDA")
    distill.add_argument("--overwrite", action="store_true", help="replace the set at OUT")
    distill.add_argument("--dry-run", action="store_true", help="check everything, say what would be done; write nothing")
    _fields(distill, methods.load(_method(words)).Config)
    distill.set_defaults(run=_distill)

    judge = commands.add_parser("evaluate", parents=[common, running], help="train students on a set")
    judge.add_argument("set", type=Path)
    judge.add_argument("--student", default="convnet3", help="net, see `infoutil info`")
    judge.add_argument("--seeds", type=int, default=3, help="students")
    judge.add_argument("--seed", type=int, default=0, help="of the first student; the others follow")
    judge.add_argument("--ipc", type=int, help="only the first images of each class")
    judge.add_argument("--labels", default="online", choices=LABELS, help="the teacher on every batch, stored logits, or class numbers")
    judge.add_argument("--recipe", default="rded", choices=list(RECIPES))
    judge.add_argument("--teacher", help="on-line teacher, if not the set's own")
    judge.add_argument("--source", help="where the validation images are, if not where the set came from")
    judge.add_argument("--best-of-test", action="store_true", help="also report the best late epoch, which peeks at the test set")
    _fields(judge, StudentRecipe)
    judge.set_defaults(run=_evaluate)

    report = commands.add_parser("report", parents=[common], help="write a set's HTML page")
    report.add_argument("set", type=Path)
    report.add_argument("--out", type=Path, help="default: SET/report.html")
    report.set_defaults(run=_report)

    calibrate = commands.add_parser(
        "calibrate",
        parents=[common, running],
        help="judge the Shapley designs by exact values on a teacher",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    calibrate.add_argument("source", help="folder, .npz, CIFAR batches, digits or demo")
    calibrate.add_argument(
        "--teacher", required=True, default=argparse.SUPPRESS, help="checkpoint or its folder, torchvision:NAME, timm:NAME"
    )
    calibrate.add_argument("--out", type=Path, default=Path("infoutil-calibration"), help="folder of games, rows and curves")
    calibrate.add_argument("--images", type=int, default=64, help="validation images, each with 2^(grid^2) forwards")
    calibrate.add_argument("--grid", type=int, default=4, help="patches a side, 2 to 4")
    calibrate.add_argument("--draws", type=int, default=10, help="of each sampled design")
    calibrate.add_argument("--seed", type=int, default=0, help="of the images and the draws")
    calibrate.add_argument("--formats", action="store_true", help="also what bfloat16 changes against float32")
    calibrate.add_argument("--batch", type=int, default=0, help="forwards at once; 0: by memory")
    calibrate.set_defaults(run=_calibrate)

    info = commands.add_parser("info", parents=[common], help="what runs here, and why the rest does not")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", parents=[common, running], help="the whole job on images that the package draws itself")
    demo.add_argument("out", type=Path, nargs="?", default=Path("infoutil-demo"), help="folder (default: infoutil-demo)")
    demo.add_argument("--seeds", type=int, default=3, help="students of each set")
    demo.set_defaults(run=_demo)
    return parser


def _method(words: Sequence[str]) -> str:
    """The method asked for, before parsing: its options are part of the parser."""
    for i, word in enumerate(words):
        if word.startswith("--method="):
            return _known(word.split("=", 1)[1])
        if word == "--method" and i + 1 < len(words):
            return _known(words[i + 1])
    return "infoutil"


def _known(name: str) -> str:
    methods.load(name)
    return name


def _fields(parser: argparse.ArgumentParser, config: type) -> None:
    """An option for each field of a dataclass, its comment as help; only those given end up among the parsed arguments."""
    for f in fields(config):
        default = f.default if f.default is not MISSING else None
        kind: Any = type(default)
        option: dict[str, Any] = {"dest": f"field_{f.name}", "default": argparse.SUPPRESS}
        if kind is bool:
            option["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            option.update(type=lambda text: tuple(int(v) for v in text.split(",")), metavar="N,N")
        else:
            option.update(type=kind, metavar=kind.__name__.upper())
        help_text = f"{methods.comments(config)[f.name]} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=help_text, **option)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {key.removeprefix("field_"): value for key, value in vars(args).items() if key.startswith("field_")}


def _teach(args: argparse.Namespace, show: Show) -> None:
    from infoutil_fast.data import open_source
    from infoutil_fast.device import choose_device, choose_dtype
    from infoutil_fast.train import teach

    if args.from_checkpoint is not None:
        _import(args, show)
        return
    if args.class_order is not None or args.normalisation != "auto":
        raise InputError("--class-order and --normalisation belong to --from-checkpoint")
    device = choose_device(args.device)
    recipe = Recipe(**{**(EARLY if args.early else {}), **_given(args)})
    last = teach(
        open_source(args.source),
        recipe,
        args.out,
        device=device,
        dtype=choose_dtype(args.dtype, device),
        workers=args.workers,
        progress=not args.quiet,
    )
    show(
        last, f"{args.out / 'last.safetensors'}: {last['accuracy']:.2%} of {last['images']} validation images after {last['epoch']} epochs"
    )


def _import(args: argparse.Namespace, show: Show) -> None:
    from infoutil_fast.data import open_source
    from infoutil_fast.device import choose_device

    given = _given(args)
    if wrong := sorted(set(given) - {"net", "size"}) + ["early"] * args.early:
        raise InputError(f"--from-checkpoint trains nothing: leave out {', '.join(wrong)}")
    about = import_teacher(
        open_source(args.source),
        args.from_checkpoint,
        args.out,
        **{"net": Recipe.net, **given},
        normalisation=args.normalisation,
        class_order=args.class_order,
        device=choose_device(args.device),
        workers=args.workers,
    )
    order = f"class order {about['class_order']}, {about['normalisation']} normalisation"
    show(about, f"{args.out / 'last.safetensors'}: {about['accuracy']:.2%} of {about['images']} validation images; {order}")


def _experts(args: argparse.Namespace, show: Show) -> None:
    from infoutil_fast.buffers import export_buffers, import_buffers
    from infoutil_fast.data import open_source
    from infoutil_fast.device import choose_device
    from infoutil_fast.experts import disk_bytes, train_experts

    source, recipe = open_source(args.source), ExpertRecipe(**_given(args))
    size = disk_bytes(recipe, len(source.classes), recipe.size or source.size)
    if args.dry_run:
        show({"disk_bytes": size}, f"{recipe.experts} experts of {recipe.epochs} epochs: {size / 1e9:.2f} GB; nothing was written")
        return
    if args.from_buffers:
        made = import_buffers(args.from_buffers, source, recipe, args.out)
    else:
        device = choose_device(args.device)
        made = train_experts(source, recipe, args.out, device=device, workers=args.workers, progress=not args.quiet)
    if args.to_buffers:
        export_buffers(made, args.to_buffers)
    show({"experts": len(made), "epochs": made.epochs}, f"{args.out}: {len(made)} experts of {made.epochs} epochs")


def _distill(args: argparse.Namespace, show: Show) -> None:
    if args.config and args.preset:
        raise InputError("--config already holds all settings: leave out --preset")
    asked = _again(args.config) if args.config else {"options": {}}
    source, teacher = args.source or asked.get("source"), args.teacher or asked.get("teacher")
    if not source or not teacher:
        raise InputError("distill needs SOURCE, OUT and --teacher, or OUT and --config meta.json")
    plan = prepare(
        source,
        teacher,
        method=asked.get("method", args.method),
        preset=args.preset,
        label_teacher=args.label_teacher or asked.get("label_teacher"),
        device=args.device,
        dtype=asked.get("dtype", args.dtype) if args.dtype == "auto" else args.dtype,
        workers=args.workers,
        batch=args.batch,
        **{**asked["options"], **_given(args)},
    )
    if args.dry_run:
        cost = estimate(plan)
        text = "\n".join(f"{key.replace('_', ' '):>14}  {value}" for key, value in cost.items())
        show({"would": plan.meta, "estimate": cost}, f"{json.dumps(plan.meta, indent=1)}\n{text}\nnothing was written")
        return
    execute(plan, args.out, overwrite=args.overwrite, progress=not args.quiet)
    show(
        {"set": str(args.out), "meta": plan.meta},
        f"{args.out}: {plan.meta['ipc'] * len(plan.source.classes)} images of {len(plan.source.classes)} classes",
    )


def _again(path: Path) -> dict[str, Any]:
    """What a set's meta.json says of how it was made."""
    from infoutil_fast.store import read_meta

    meta = read_meta(path.parent if path.name == "meta.json" else path)
    early = meta["label_teacher"]
    return {
        "source": meta["source"]["spec"],
        "teacher": meta["teacher"]["spec"],
        "label_teacher": early and early["spec"],
        "method": meta["method"],
        "dtype": meta["dtype"],
        "options": meta["config"],
    }


def _evaluate(args: argparse.Namespace, show: Show) -> None:
    row = evaluate(
        args.set,
        student=args.student,
        seeds=args.seeds,
        seed=args.seed,
        ipc=args.ipc,
        labels=args.labels,
        recipe=args.recipe,
        teacher=args.teacher,
        source=args.source,
        best_of_test=args.best_of_test,
        device=args.device,
        dtype=args.dtype,
        workers=args.workers,
        progress=not args.quiet,
        **_given(args),
    )
    spread = "" if row["std"] is None else f" +- {100 * row['std']:.1f}"
    how = f"{args.student}, {args.labels} labels, last epoch, {args.seeds} seeds"
    text = f"{100 * row['mean']:.1f}{spread} % of {row['test_images']} images ({how})"
    if row["best"]:
        text += f"; best of test, which peeks: {100 * sum(row['best']) / len(row['best']):.1f} %"
    show(row, text)


def _report(args: argparse.Namespace, show: Show) -> None:
    from infoutil_fast.report import write_report

    page = write_report(args.set, args.out)
    show({"report": str(page)}, str(page))


def _calibrate(args: argparse.Namespace, show: Show) -> None:
    from infoutil_fast.calibrate import calibrate
    from infoutil_fast.charts import as_text

    rows = calibrate(
        args.source,
        args.teacher,
        args.out,
        images=args.images,
        grid=args.grid,
        seed=args.seed,
        draws=args.draws,
        formats=args.formats,
        device=args.device,
        dtype=args.dtype,
        workers=args.workers,
        batch=args.batch,
        progress=not args.quiet,
    )
    show(rows, f"{as_text(rows)}\n\n{args.out / 'calibration.jsonl'}, {args.out / 'calibration.png'}")


def _info(args: argparse.Namespace, show: Show) -> None:
    from infoutil_fast.info import as_text, collect

    found = collect()
    show(found, as_text(found))


def _demo(args: argparse.Namespace, show: Show) -> None:
    from infoutil_fast.demo import as_text, demo

    rows = demo(args.out, seeds=args.seeds, device=args.device, dtype=args.dtype, workers=args.workers, progress=not args.quiet)
    show(rows, as_text(rows))


if __name__ == "__main__":
    sys.exit(main())
