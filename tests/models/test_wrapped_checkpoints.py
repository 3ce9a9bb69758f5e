"""Checkpoints as trainers leave them: below other names, averaged, behind a normalisation; read, or the keys that are there are named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from infoutil_fast.models import nets
from infoutil_fast.models.checkpoints import fitted, normalisation_in, outputs_of, read_state
from infoutil_fast.types import InputError

State = dict[str, Tensor]
NETS = ("resnet10-small", "convnet3-w8", "convnet2-w8-in", "resnet20", "vgg11-bn")


def under(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: value for key, value in state.items()}


def head_apart(state: State) -> State:
    """mmpretrain's names: the last layer beside the backbone."""
    last = list(state)[-1].rpartition(".")[0]
    return {("head." if key.startswith(f"{last}.") else "backbone.") + key: value for key, value in state.items()}


FORMS: dict[str, Callable[[State], object]] = {
    "timm's average": lambda state: {"state_dict_ema": state, "epoch": 3},
    "checkpoint": lambda state: {"checkpoint": state, "arch": "x"},
    "params": lambda state: {"params": state},
    "nested": lambda state: {"epoch": 3, "model": {"state_dict": under("module.")(state)}},
    "mmpretrain": lambda state: {"meta": {}, "state_dict": head_apart(state)},
    "[normalise, net]": lambda state: {**under("1.")(state), "0.mean": torch.rand(3), "0.std": torch.rand(3) + 0.1},
    "robust": lambda state: {**under("model.")(state), "normalizer.mean": torch.rand(1, 3, 1, 1), "normalizer.std": torch.ones(1, 3, 1, 1)},
    "torch's average": lambda state: {"n_averaged": torch.tensor(3), **under("module.")(state)},
    "lightning": lambda state: {"state_dict": under("model.net.")(state), "pytorch-lightning_version": "2"},
    "deep": lambda state: under("trainer.student.encoder.")(state),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("form", list(FORMS))
def test_wrapped_weights_are_found(net: str, form: str, tmp_path: Path) -> None:
    trained, other = nets.build(net, 7, 32), nets.build(net, 10, 32)
    torch.save(FORMS[form](trained.state_dict()), tmp_path / "x.pth")
    state = read_state(tmp_path / "x.pth")
    head = next(name for name, module in reversed(list(other.named_modules())) if isinstance(module, nn.Linear))
    assert outputs_of(other, head, state) == 7
    again = nets.build(net, 7, 32)
    again.load_state_dict(fitted(again, state, "it"), strict=False)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    for key, value in trained.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, again.state_dict()[key])


def test_a_net_beside_its_average_is_refused(tmp_path: Path) -> None:
    net = nets.build("resnet10-small", 3, 32)
    both = {**under("online_model.")(net.state_dict()), **under("ema_model.")(net.state_dict())}
    with pytest.raises(InputError, match=r"does not fit: .*it has online_model\..*ema_model\."):
        fitted(net, both, "it")


def test_of_several_states_the_plain_one_is_taken_and_all_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, average = nets.build("convnet2-w8", 3, 16).state_dict(), nets.build("convnet2-w8", 3, 16).state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": average}, tmp_path / "x.pth")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(read_state(tmp_path / "x.pth")["0.weight"], plain["0.weight"])
    assert "has state_dict, state_dict_ema: taken is state_dict" in caplog.text


def test_keys_that_are_there_are_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "generator": {"a": torch.ones(2)}, "optimizer": {}}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"no state dict: .*; it has epoch, generator, optimizer"):
        read_state(tmp_path / "x.pth")


def test_the_normalisation_in_front_of_a_net() -> None:
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    for state in ({"0.mean": mean, "0.std": std}, {"normalize.mu": mean[None, :, None, None], "normalize.sigma": std}):
        found = normalisation_in({**state, "1.conv.weight": torch.ones(2)})
        torch.testing.assert_close(torch.tensor(found), torch.stack([mean, std]))
    torch.testing.assert_close(torch.tensor(normalisation_in({"mean": mean * 255, "std": std * 255})), torch.stack([mean, std]))
    assert normalisation_in({"0.mean": torch.tensor(0.5), "0.std": torch.tensor(0.25)}) == ((0.5,) * 3, (0.25,) * 3)
    for odd in ({}, {"0.mean": mean}, {"0.mean": mean, "0.std": torch.zeros(3)}, {"0.mean": torch.ones(4), "0.std": torch.ones(4)}):
        assert normalisation_in(odd) is None
