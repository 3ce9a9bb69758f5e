"""Networks by name: sizes, names of parameters, and agreement with torchvision."""

import pytest
import torch
from torch import Tensor, nn
from torchvision_placeholders import package

from infoutil_fast.models import nets
from infoutil_fast.types import InputError


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def logits(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(images)


@pytest.mark.parametrize(
    ("name", "classes", "size", "parameters"),
    [
        ("convnet3", 10, 32, 320_010),
        ("convnet3-in", 10, 32, 320_010),
        ("convnet3-w128-bn", 10, 32, 320_010),
        ("convnet4", 200, 64, 857_160),
        ("convnet4", 1000, 64, 2_496_360),
        ("resnet18", 1000, 224, 11_689_512),
        ("resnet50", 1000, 224, 25_557_032),
        ("resnet18-small", 1000, 32, 11_689_512 - 3 * 64 * (49 - 9)),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, classes: int, size: int, parameters: int) -> None:
    assert count(nets.build(name, classes, size)) == parameters


@pytest.mark.parametrize(
    ("name", "size"),
    [("convnet1-w1", 3), ("convnet3-w5-in", 37), ("convnet5-w3", 61), ("resnet10", 1), ("resnet10-small", 17), ("resnet50-small", 5)],
)
@pytest.mark.parametrize("classes", [1, 7])
def test_one_row_of_logits_an_image_at_odd_sizes(name: str, size: int, classes: int) -> None:
    net = nets.build(name, classes, size)
    for images in (torch.randn(3, 3, size, size), torch.randn(2, 6, size, 2 * size)[:, ::2, :, ::2]):
        out = logits(net, images)
        assert out.shape == (len(images), classes)
        assert out.isfinite().all()


def test_convolution_weights_are_channels_last() -> None:
    weights = [m.weight for m in nets.build("resnet10", 3, 32).modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_instance_norm_does_not_depend_on_the_batch_in_training_and_batch_norm_does() -> None:
    images = torch.randn(5, 3, 16, 16)
    for name, alone in (("convnet2-w8-in", True), ("convnet2-w8-bn", False)):
        net = nets.build(name, 4, 16).train()
        assert torch.allclose(net(images)[:1], net(images[:1]), atol=1e-5) is alone


def test_a_net_is_reproduced_by_its_seed() -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(nets.build("convnet2-w4", 3, 8).state_dict()["0.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("conv3", "convnet3"),
        ("conv4-w16-in", "convnet4-w16-in"),
        ("resnet18_modified", "resnet18-small"),
        ("resnet50_modified", "resnet50-small"),
    ],
)
def test_names_of_other_papers_give_the_same_net(alias: str, name: str) -> None:
    shapes = [{key: value.shape for key, value in nets.build(n, 11, 32).state_dict().items()} for n in (alias, name)]
    assert shapes[0] == shapes[1]


def test_the_small_stem_keeps_the_resolution() -> None:
    net = nets.build("resnet18_modified", 2, 32)
    images = torch.randn(1, 3, 32, 32)
    assert net.maxpool(net.conv1(images)).shape == (1, 64, 32, 32)
    assert nets.build("resnet18", 2, 32).maxpool(torch.randn(1, 64, 16, 16)).shape == (1, 64, 8, 8)


@pytest.mark.parametrize(("name", "size", "least"), [("convnet3", 7, 8), ("conv5", 31, 32), ("convnet9", 511, 512)])
def test_an_image_that_halves_to_nothing_is_refused(name: str, size: int, least: int) -> None:
    with pytest.raises(InputError, match=f"{size} px is too small .at least {least}"):
        nets.build(name, 10, size)
    assert isinstance(nets.build("convnet3", 10, 8), nn.Module)


@pytest.mark.parametrize(("classes", "size"), [(0, 32), (10, 0), (-1, -1)])
def test_no_classes_or_no_pixels_are_refused(classes: int, size: int) -> None:
    for name in ("resnet10", "convnet1"):
        with pytest.raises(InputError, match="at least 1"):
            nets.build(name, classes, size)


@pytest.mark.parametrize(
    "name", ["", "resnet", "resnet33", "resnet18-tiny", "convnet", "convnet3-w0", "convnet3-ln", "Convnet3", "convnet3 "]
)
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match="known: convnet") as caught:
        nets.build(name, 10, 32)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnets_are_torchvisions(name: str) -> None:
    theirs = package("torchvision").models.get_model(name, weights=None, num_classes=13)
    ours = nets.build(name, 13, 64)
    for module in theirs.modules():  # fresh statistics would hide a batch norm in the wrong place
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 65, 67)
    want = logits(theirs, images)
    torch.testing.assert_close(logits(ours, images), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
