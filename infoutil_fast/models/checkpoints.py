"""State dicts of other projects' checkpoint files, read without executing anything, and their parameter names as ours."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from infoutil_fast.types import InputError

WRAPPERS = ("model", "state_dict", "net", "model_state_dict")  # keys under which training scripts keep the weights
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile, in any order
SLACK = 1 << 20  # bytes of a zip's directory and pickle
# What training scripts leave beside the weights, and what reading it gives: nothing.
INERT = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
)


class Inert:
    """Stands for an object of `INERT`: takes any arguments and any state, keeps none."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors file or of a pickle (.pth, .pt, .pth.tar); bare or under one of `WRAPPERS`, without `PREFIXES`.

    Executes nothing: a pickle that asks for anything but tensors, plain values and the `INERT` objects is refused, with the name of what
    it asks for. Raises `InputError` for that, for a damaged file, and for one that holds something else than tensors by name.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            state: Any = load_file(path)
        except Exception as error:  # the reader of a damaged file; named
            raise InputError(f"checkpoint {path} cannot be read, is it truncated? ({one_line(error)})") from error
    else:
        state = load_pickle(path, "checkpoint")
    while isinstance(state, dict) and (inner := next((state[k] for k in WRAPPERS if isinstance(state.get(k), dict)), None)) is not None:
        state = inner
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"checkpoint {path} is no state dict: expected tensors by name, or these under {', '.join(WRAPPERS)}")
    odd = next((k for k, v in state.items() if v.layout != torch.strided or v.is_quantized or v.is_complex() or v.is_meta), None)
    if odd is not None:
        raise InputError(f"checkpoint {path}: {odd} is no dense tensor of real numbers")
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_pickle(path: Path, what: str) -> Any:
    """What `torch.save` wrote, with `weights_only`; `InputError` naming what is refused, or that the file is damaged."""
    _refuse_bomb(path, what)
    try:
        with _inert():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every kind on damaged files; each is named
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise InputError(
                f"{what} {path} holds Python objects, which are refused: it asks for {refused[1]}; save `net.state_dict()` alone"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise InputError(
                f"{what} {path} is damaged or holds Python objects, which are refused: save `net.state_dict()` alone"
            ) from error
        raise InputError(f"{what} {path} cannot be read, is it truncated? ({one_line(error)})") from error


def _refuse_bomb(path: Path, what: str) -> None:
    """torch stores its records as they are: one that unpacks to more than the file is not from it."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # as above
        raise InputError(f"{what} {path} cannot be read, is it truncated? ({one_line(error)})") from error
    if unpacked > path.stat().st_size + SLACK:
        raise InputError(f"{what} {path} of {path.stat().st_size:,} bytes unpacks to {unpacked:,}: torch writes no compressed files")


def _inert() -> AbstractContextManager[Any]:
    """Lets the `INERT` names be read as `Inert`; older versions of torch cannot, and refuse them."""
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 7):
        return nullcontext()
    allowed: Any = [(Inert, name) for name in INERT]
    return torch.serialization.safe_globals(allowed)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


# Names


def _rded_convnet(key: str) -> str:
    """RDED's `layers.conv.D`, `layers.norm.D` as places in our Sequential."""
    return re.sub(r"^layers\.(conv|norm)\.(\d+)\.", lambda m: f"{4 * int(m[2]) + (m[1] == 'norm')}.", key)


def _dc_convnet(key: str) -> str:
    """`features.N` of DC, MTT and DD-Ranking: the same places."""
    return key.removeprefix("features.")


def _cifar_resnet(key: str) -> str:
    """`shortcut` and `linear` of kuangliu's nets, `classifier` of DD-Ranking's."""
    return re.sub(r"^(linear|classifier)\.", "fc.", key.replace(".shortcut.", ".downsample."))


def _inner(key: str) -> str:
    """The net as an attribute of a trainer's module."""
    return re.sub(r"^(model|net|backbone|encoder)\.", "", key)


DIALECTS: tuple[Callable[[str], str], ...] = (str, _rded_convnet, _dc_convnet, _cifar_resnet, _inner)


def fitted(net: nn.Module, state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """`state` under the parameter names of `net`: as it is, or by one of the known dialects.

    Raises `InputError` with the names and shapes that differ.
    """
    wanted = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    head = list(wanted)[-1].rpartition(".")[0]
    for dialect in DIALECTS:
        named = {_to_head(dialect(key), wanted, head): value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        if named.keys() == wanted.keys():
            if wrong := [key for key in wanted if named[key].shape != wanted[key].shape]:
                shapes = f"{wrong[0]} is {list(named[wrong[0]].shape)}, the net has {list(wanted[wrong[0]].shape)}"
                raise InputError(f"{what} does not fit in {len(wrong)} of {len(wanted)} tensors: {shapes}")
            return named
    raise InputError(f"{what} does not fit: {_difference(wanted, state)}")


def outputs_of(net: nn.Module, head: str, state: dict[str, Tensor]) -> int:
    """Rows of the weight that `fitted` would give to the layer called `head`; those of the net where the file has no such weight."""
    wanted = net.state_dict()
    for dialect in DIALECTS:
        for key, value in state.items():
            if value.dim() and _to_head(dialect(key), wanted, head) == f"{head}.weight":
                return len(value)
    return len(wanted[f"{head}.weight"])


def _to_head(key: str, wanted: Iterable[str], head: str) -> str:
    """`classifier.weight` is the last layer of our Sequential, whatever its place."""
    return key if key in wanted else re.sub(r"^classifier\.", f"{head}.", key)


def _difference(wanted: dict[str, Any], state: dict[str, Any]) -> str:
    lacks, extra = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
    told = [f"{what} {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}" for what, keys in (("it lacks", lacks), ("it has", extra)) if keys]
    return f"the net has {len(wanted)} tensors, the file {len(state)}; {'; '.join(told)}"
