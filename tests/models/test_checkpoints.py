"""Checkpoints of other projects: every form that is read, every name that is known, and nothing that is executed."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from infoutil_fast.models import nets
from infoutil_fast.models.checkpoints import WRAPPERS, fitted, read_state
from infoutil_fast.types import InputError

State = dict[str, Tensor]


def weights() -> State:
    return {"a.weight": torch.randn(5, 3), "a.bias": torch.randn(5), "n": torch.tensor(7)}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: value for key, value in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "OrderedDict": OrderedDict,
    **{f'under "{key}"': lambda s, key=key: {key: s, "epoch": 3} for key in WRAPPERS},
    "module. of DataParallel": prefixed("module."),
    "_orig_mod. of torch.compile": prefixed("_orig_mod."),
    "both": lambda s: {"state_dict": prefixed("module._orig_mod.")(s)},
    "both, the other way": lambda s: {"net": prefixed("_orig_mod.module.")(s), "acc": 91.5},
    "torchvision's references": lambda s: {
        "model": s,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 2,
        "args": argparse.Namespace(lr=0.1, data=Path("here")),
    },
    "numpy scalars beside it": lambda s: {"state_dict": s, "best": np.float64(91.5), "epoch": np.int64(3)},
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_state_dict(form: str, suffix: str, tmp_path: Path) -> None:
    state = weights()
    path = tmp_path / f"a{suffix if suffix != 'legacy' else '.pth'}"
    torch.save(FORMS[form](state), path, _use_new_zipfile_serialization=suffix != "legacy")
    found = read_state(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("form", ["bare", "module. of DataParallel", "_orig_mod. of torch.compile"])
def test_safetensors_too(form: str, tmp_path: Path) -> None:
    state = weights()
    save_file(FORMS[form](state), tmp_path / "a.safetensors")
    assert all(torch.equal(read_state(tmp_path / "a.safetensors")[key], state[key]) for key in state)


class Hostile:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, call: Any, *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


def zipped(value: Any, path: Path) -> None:
    torch.save(value, path)


def legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def plain(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [zipped, legacy, plain])
@pytest.mark.parametrize("place", ["weight", "model", "args", "inner", "alone"])
@pytest.mark.parametrize("how", ["os.system", "eval", "Path.touch", "getattr"])
def test_a_hostile_file_is_refused_by_name_and_runs_nothing(
    how: str, place: str, write: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    payload = {
        "os.system": Hostile(os.system, f"echo > {mark}"),
        "eval": Hostile(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
        "Path.touch": Hostile(Path.touch, mark),
        "getattr": Hostile(getattr, mark, "touch"),
    }[how]
    if how != "getattr":
        pickle.loads(pickle.dumps(payload, protocol=2))  # it does bite where pickles are trusted
        assert mark.exists()
        mark.unlink()
    value: Any = {
        "weight": {"a": payload},
        "model": {"model": payload},
        "args": {"model": weights(), "args": payload},
        "inner": {"model": weights(), "args": argparse.Namespace(lr=payload)},
        "alone": payload,
    }[place]
    write(value, tmp_path / "a.pth")
    with pytest.raises(
        InputError, match=r"holds Python objects, which are refused: it asks for [\w.]*(system|eval|touch|getattr|_load_from_bytes)"
    ):
        read_state(tmp_path / "a.pth")
    assert not mark.exists()


def test_a_whole_net_is_refused_with_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"it asks for torch\.nn\.modules\.linear\.Linear; save `net\.state_dict\(\)` alone"):
        read_state(tmp_path / "a.pth")


def test_a_zip_that_unpacks_to_more_than_itself_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in whole.infolist():
            packed.writestr(member.filename, whole.read(member))
    assert (tmp_path / "a.pth").stat().st_size < 100_000
    with pytest.raises(InputError, match=r"unpacks to 16,0\d\d,\d{3}: torch writes no compressed files"):
        read_state(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.zeros(3).to_sparse()},
        {"a": torch.zeros(3, dtype=torch.complex64)},
        {"a": torch.zeros(3, device="meta")},
        {3: torch.zeros(3)},
        {"model": {"state_dict": {}}},
        "text",
    ],
)
def test_what_is_no_state_dict_is_refused(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"no state dict|no dense tensor of real numbers|cannot be read"):
        read_state(tmp_path / "a.pth")


# Names


def renamed(state: State, rules: Callable[[str], str]) -> State:
    return {rules(key): value for key, value in reversed(list(state.items()))}  # and in another order


def rded(key: str) -> str:
    place, _, rest = key.partition(".")
    return f"classifier.{rest}" if place == "13" else f"layers.{'norm' if int(place) % 4 else 'conv'}.{int(place) // 4}.{rest}"


def dc(key: str) -> str:
    return f"classifier.{key.partition('.')[2]}" if key.startswith("13.") else f"features.{key}"


def kuangliu(key: str) -> str:
    return key.replace(".downsample.", ".shortcut.").replace("fc.", "linear.")


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("conv3", rded),
        ("ConvNet-3-BN", dc),
        ("ConvNet", dc),
        ("resnet18_modified", str),
        ("resnet18_modified", kuangliu),
        ("ResNet-18", lambda key: key.replace(".downsample.", ".shortcut.").replace("fc.", "classifier.")),
        ("resnet50-small", lambda key: f"model.{key}"),
        ("VGG-11-BN", str),
    ],
)
def test_other_projects_names_are_found(name: str, rules: Callable[[str], str]) -> None:
    net = nets.build(name, 7, 32).eval()
    state = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in net.state_dict().items()}
    found = fitted(net, renamed(state, rules), "it")
    assert all(torch.equal(found[key], state[key]) for key in found)
    assert len(found) == sum(not key.endswith("num_batches_tracked") for key in state)


def test_a_state_dict_of_another_net_is_answered_with_what_differs() -> None:
    state = nets.build("resnet18", 10, 32).state_dict()
    with pytest.raises(
        InputError, match=r"^it does not fit: the net has 20 tensors, the file \d+; it lacks 0\.weight, 0\.bias, .*; it has conv1"
    ):
        fitted(nets.build("convnet3", 10, 32), state, "it")
    with pytest.raises(InputError, match=r"does not fit in 1 of 20 tensors: 13\.weight is \[10, 8192\], the net has \[10, 2048\]"):
        fitted(nets.build("convnet3", 10, 32), nets.build("convnet3", 10, 64).state_dict(), "it")


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("conv4", "convnet4"),
        ("ConvNet", "convnet3-in"),
        ("ConvNetD4", "convnet4-in"),
        ("ConvNetW256BN", "convnet3-w256"),
        ("ConvNet-3", "convnet3-in"),
        ("ConvNet-4-BN", "convnet4"),
        ("ResNet-18-BN", "resnet18-small"),
        ("ResNet-50", "resnet50-small-in"),
        ("VGG-11", "vgg11-in"),
        ("VGG-11-BN", "vgg11-bn"),
        ("resnet101_modified", "resnet101-small"),
        ("swin_v2_t", "torchvision:swin_v2_t"),
        ("convnet3-w16-in", "convnet3-w16-in"),
        ("resnet18", "resnet18"),
    ],
)
def test_names_of_other_projects_are_ours(name: str, ours: str) -> None:
    assert nets.canonical(name) == ours
    assert nets.canonical(ours) == ours
