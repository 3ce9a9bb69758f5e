"""Teachers and students by torchvision:NAME and timm:NAME. No test downloads: state dicts are random and local."""

import pickle
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision_placeholders import package

from infoutil_fast.models import checkpoints, nets, pretrained
from infoutil_fast.types import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of weights, and no way to the network."""

    def no_network(url: str, *_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def torchvision_net(name: str, **options: Any) -> nn.Module:
    return package("torchvision").models.get_model(name, weights=None, **options).eval()


def saved(net: nn.Module, path: Path) -> Path:
    torch.save(net.state_dict(), path)
    return path


def logits(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(images)


# The head, cut to classes


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("torchvision:resnet18", 33),
        ("torchvision:mobilenet_v3_small", 33),
        ("torchvision:squeezenet1_1", 33),  # its head is a convolution
        ("torchvision:swin_t", 37),
        ("timm:test_vit", 160),
        ("timm:test_efficientnet.r160_in1k", 65),
        ("timm:dla46x_c", 64),  # a convolution
        ("timm:deit_tiny_distilled_patch16_224", 224),  # the mean of two heads
    ],
)
def test_a_cut_head_gives_the_full_heads_logits_at_these_outputs(spec: str, size: int, tmp_path: Path) -> None:
    package(spec.partition(":")[0])
    full = pretrained.load_pretrained(spec, None, weights=None)
    path = saved(full.net, tmp_path / "random.pth")
    wanted = {"last": 999, "first": 0, "one": 613}
    cut = pretrained.load_pretrained(spec, list(wanted), checkpoint=path, class_index={**wanted, "elsewhere": 5})
    images = torch.randn(2, 3, size, size)
    everything, some = logits(full.net, images), logits(cut.net, images)
    assert everything.shape == (2, 1000)
    assert everything.std() > 0
    assert len(full.classes) == 1000
    assert cut.classes == tuple(wanted)
    assert not cut.net.training
    torch.testing.assert_close(some, everything[:, list(wanted.values())], rtol=1e-4, atol=1e-5 * float(everything.abs().max()))


def test_imagenette_folders_find_their_outputs_in_a_thousand(tmp_path: Path) -> None:
    net = torchvision_net("resnet18")
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.copy_(torch.arange(1000.0))
    found = pretrained.load_pretrained(
        "torchvision:resnet18", ["n03888257", "n01440764", "n02096294"], checkpoint=saved(net, tmp_path / "a.pth")
    )
    assert logits(found.net, torch.zeros(1, 3, 8, 8)).tolist() == [[701, 0, 193]]


def test_a_net_without_a_head_is_refused() -> None:
    package("timm")
    with pytest.raises(InputError, match="no classification head"):
        pretrained.load_pretrained("timm:vit_tiny_patch16_dinov3_qkvb", None, weights=None)


# Weights and transforms


@pytest.mark.parametrize(
    ("spec", "weights", "size", "resize", "mean"),
    [
        ("torchvision:resnet18", "DEFAULT", 224, 256, 0.485),
        ("torchvision:resnet50", "DEFAULT", 224, 232, 0.485),
        ("torchvision:resnet50", "IMAGENET1K_V1", 224, 256, 0.485),
        ("torchvision:inception_v3", "DEFAULT", 299, 342, 0.485),
        ("timm:test_vit", "DEFAULT", 160, 168, 0.5),
        ("timm:resnet18", "tv_in1k", 224, 256, 0.485),
        ("timm:resnet18.a1_in1k", "DEFAULT", 224, 235, 0.485),
    ],
)
def test_the_transform_is_the_one_of_the_weights(spec: str, weights: str, size: int, resize: int, mean: float, tmp_path: Path) -> None:
    package(spec.partition(":")[0])
    path = saved(pretrained.load_pretrained(spec, None, weights=None).net, tmp_path / "random.pth")
    found = pretrained.load_pretrained(spec, None, weights=weights, checkpoint=path)
    assert (found.size, found.resize, found.mean[0], len(found.mean), len(found.std)) == (size, resize, mean, 3, 3)


def test_a_cached_download_is_loaded_with_its_category_names(cache: Path) -> None:
    net = torchvision_net("resnet18")
    saved(net, cache / "resnet18-f37072fd.pth")
    found = pretrained.load_pretrained("torchvision:resnet18", None)
    assert found.classes[0] == "tench"
    images = torch.randn(1, 3, 50, 50)
    torch.testing.assert_close(logits(found.net, images), logits(net, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", ["absent", "truncated", "hostile"])
def test_weights_out_of_reach_are_named_with_the_place_to_put_them(cache: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = torchvision_net("mobilenet_v3_small")
    place = cache / "mobilenet_v3_small-047dcff4.pth"
    if damage == "truncated":
        saved(net, place)
        place.write_bytes(place.read_bytes()[:-1000])
    elif damage == "hostile":
        place.write_bytes(pickle.dumps(Hostile(cache / "ran"), protocol=2))
    with pytest.raises(InputError, match=r"https://download\.pytorch\.org/models/mobilenet_v3_small-047dcff4\.pth") as caught:
        pretrained.load_pretrained("torchvision:mobilenet_v3_small", None)
    assert str(place) in str(caught.value)
    assert "checkpoint=" in str(caught.value)
    assert capsys.readouterr().out == ""
    assert not (cache / "ran").exists()


def test_timms_failed_download_says_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = package("timm")

    def no_network(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("offline")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(InputError, match=r"offline.*huggingface\.co/timm/resnet18\.a1_in1k.*checkpoint="):
        pretrained.load_pretrained("timm:resnet18", None)


def test_published_densenet_and_googlenet_files_fit(tmp_path: Path) -> None:
    images = torch.randn(1, 3, 64, 64)
    net = torchvision_net("densenet121")
    old = {key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value for key, value in net.state_dict().items()}
    assert "features.denseblock1.denselayer1.conv.2.weight" in old
    torch.save(old, tmp_path / "dense.pth")
    found = pretrained.load_pretrained("torchvision:densenet121", None, checkpoint=tmp_path / "dense.pth")
    torch.testing.assert_close(logits(found.net, images), logits(net, images), rtol=1e-3, atol=1e-4)
    net = torchvision_net("googlenet", aux_logits=True, init_weights=False, transform_input=True)
    found = pretrained.load_pretrained("torchvision:googlenet", None, checkpoint=saved(net, tmp_path / "google.pth"))
    torch.testing.assert_close(logits(found.net, images), logits(net, images), rtol=1e-3, atol=1e-4)
    assert not any(key.startswith("aux") for key in found.net.state_dict())
    assert found.net.transform_input  # its weights were made for inputs scaled to mean and deviation 0.5


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}]
)
def test_a_checkpoint_of_another_width_makes_the_net_that_wide(wrap: Any, tmp_path: Path) -> None:
    net = torchvision_net("resnet18", num_classes=3)
    torch.save(wrap(net.state_dict()), tmp_path / "own.pth")
    found = pretrained.load_pretrained("torchvision:resnet18", ["b", "a", "c"], checkpoint=tmp_path / "own.pth")
    images = torch.randn(2, 3, 40, 40)
    assert found.classes == ("b", "a", "c")
    torch.testing.assert_close(logits(found.net, images), logits(net, images), rtol=1e-4, atol=1e-4)
    assert pretrained.load_pretrained("torchvision:resnet18", None, checkpoint=tmp_path / "own.pth").classes == ("0", "1", "2")
    with pytest.raises(InputError, match="has 3 outputs, the source has 2 classes"):
        pretrained.load_pretrained("torchvision:resnet18", ["a", "b"], checkpoint=tmp_path / "own.pth")


# Files


class Hostile:
    """Creates a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [lambda x, p: torch.save({"weight": x}, p), lambda x, p: p.write_bytes(pickle.dumps(x, protocol=2))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(write: Any, tmp_path: Path) -> None:
    write(Hostile(tmp_path / "ran"), tmp_path / "a.pth")
    with pytest.raises(InputError, match="Python objects, which are refused"):
        checkpoints.read_state(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 7, 0.5, 0.99])
def test_a_truncated_file_is_refused(suffix: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    state = {"weight": torch.randn(31, 17)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert torch.equal(checkpoints.read_state(path)["weight"], state["weight"])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=f"checkpoint .*a{suffix} (cannot be read|is damaged)"):
        checkpoints.read_state(path)


@pytest.mark.parametrize("value", [{}, [torch.zeros(2)], torch.zeros(2), {"model": {}}, {"weight": torch.zeros(2), "epoch": 3}])
def test_a_file_without_a_state_dict_is_refused(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(InputError, match="no state dict"):
        checkpoints.read_state(tmp_path / "a.pth")


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    package("torchvision")
    with pytest.raises(InputError, match=r"no checkpoint at .*none\.pth"):
        pretrained.load_pretrained("torchvision:resnet18", None, checkpoint=tmp_path / "none.pth")
    path = saved(nn.Linear(2, 3), tmp_path / "linear.pth")
    with pytest.raises(
        InputError, match=r"for torchvision:resnet18 does not fit: the net has 102 tensors, the file 2; it lacks conv1"
    ) as caught:
        pretrained.load_pretrained("torchvision:resnet18", None, checkpoint=path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# Names, and nets for students


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("torchvision:resnet19", "closest: .*resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no net is called torchvision:fasterrcnn"),  # detection
        ("torchvision:", "no net is called"),
        ("timm:resnet_18", "closest: .*resnet18"),
        ("timm:resnet18.nonsense", "no weights 'nonsense'; possible: a1_in1k"),
        ("keras:resnet18", "not torchvision:NAME or timm:NAME"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(spec: str, says: str) -> None:
    package("timm")
    with pytest.raises(InputError, match=says):
        pretrained.load_pretrained(spec, None, weights=None)


def test_unknown_weights_are_answered_with_the_known_ones() -> None:
    package("timm")
    with pytest.raises(InputError, match="'V3'; possible: IMAGENET1K_V1, IMAGENET1K_V2"):
        pretrained.load_pretrained("torchvision:resnet50", None, weights="V3")
    with pytest.raises(InputError, match=r"'V3'; possible: .*tv_in1k"):
        pretrained.load_pretrained("timm:resnet50", None, weights="V3")


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_missing_package_is_answered_with_the_extra_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: pretrained.load_pretrained(f"{name}:resnet18", None), lambda: nets.build(f"{name}:resnet18", 10, 32)):
        with pytest.raises(InputError, match=rf"needs {name}: pip install 'infoutil_fast\[vision\]'"):
            call()


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("torchvision:resnet18", 31),
        ("torchvision:vit_b_32", 64),
        ("torchvision:googlenet", 33),
        ("timm:test_vit", 48),
        ("timm:test_resnet", 33),
    ],
)
def test_students_are_built_for_their_classes_and_size(spec: str, size: int) -> None:
    package(spec.partition(":")[0])
    net = nets.build(spec, 7, size)
    assert net.training
    out = net(torch.randn(2, 3, size, size))
    assert out.shape == (2, 7)
    out.sum().backward()


@pytest.mark.parametrize(
    ("spec", "size"), [("torchvision:alexnet", 32), ("torchvision:vit_b_32", 33), ("torchvision:maxvit_t", 32), ("timm:test_vit", 3)]
)
def test_a_size_that_the_net_does_not_take_is_refused(spec: str, size: int) -> None:
    package(spec.partition(":")[0])
    with pytest.raises(InputError, match=f"{spec} does not take {size} px images"):
        nets.build(spec, 7, size)
