"""Reuse of early layers: the same bits as the whole net, as far into it as is exact, and refused with a reason elsewhere."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision_placeholders import package

from infoutil_fast.models import nets
from infoutil_fast.shapley import tracing
from infoutil_fast.shapley.forwards import Forwards
from infoutil_fast.shapley.reuse import Split, periodic, split


def lively(net: nn.Module) -> nn.Module:
    """Batch norms that do something, in eval mode."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return net.eval()


class Ugly(nn.Module):
    """Strides, dilation, groups, ceil mode, odd padding, concatenation, slices and a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (5, 3), stride=(2, 1), padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.same = nn.Conv2d(8, 8, (2, 4), padding="same")
        self.pool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        self.down = nn.Conv2d(16, 12, 3, stride=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = torch.cat([self.wide(x).relu(), x + self.same(x)], 1)
        x = F.pad(self.pool(x)[:, :, 1:, ::1], (1, 0, 0, 2))
        return self.head(self.down(x).mean((2, 3)))


CASES = [
    ("convnet3-w16", 32, (4, 4)),
    ("convnet3-w16", 33, (4, 4)),
    ("convnet4-w8", 50, (3, 5)),
    ("resnet20", 32, (4, 4)),
    ("resnet10-small", 29, (4, 4)),
    ("resnet10", 97, (4, 4)),
    ("resnet10", 120, (2, 6)),
    ("resnet50", 130, (3, 3)),
]


def forwards_of(net: nn.Module, shape: tuple[int, ...], grid: tuple[int, int], coalitions: int, **options) -> Forwards:
    return Forwards(net, torch.zeros(1, *shape), grid, coalitions, torch.float32, **options)


@pytest.mark.parametrize("fill", ["zero", "number", "image"])
@pytest.mark.parametrize(("name", "size", "grid"), CASES)
def test_the_same_bits_as_the_whole_net(name, size, grid, fill):
    net = lively(nets.build(name, 5, size))
    images = torch.randn(2, 3, size, size)
    masks = torch.rand(40, grid[0] * grid[1]) < 0.5
    base = {"zero": 0.0, "number": 0.7, "image": torch.randn(2, 3, size, size)}[fill]
    whole, parts = (forwards_of(net, (3, size, size), grid, len(masks), reuse=reuse, batch=80) for reuse in (False, True))
    assert parts.split is not None, parts.how
    assert torch.equal(parts(images, masks, base), whole(images, masks, base))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (5, 2), (1, 7)])
def test_ugly_operations(grid):
    net, images = lively(Ugly()), torch.randn(2, 3, 61, 83)
    masks = torch.rand(70, grid[0] * grid[1]) < 0.5
    whole, parts = (forwards_of(net, (3, 61, 83), grid, len(masks), reuse=reuse, batch=140) for reuse in (False, True))
    assert parts.split is not None, parts.how
    assert torch.equal(parts(images, masks, 0.4), whole(images, masks, 0.4))
    with torch.no_grad():
        rows, cols = torch.arange(61) * grid[0] // 61, torch.arange(83) * grid[1] // 83
        keep = masks[:, rows[:, None] * grid[1] + cols][:, None]  # [M, 1, H, W]
        expected = torch.stack([net(torch.where(keep, image, torch.tensor(0.4))) for image in images])
    torch.testing.assert_close(parts(images, masks, 0.4), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "size", "grid"), CASES)
def test_blocks_hold_all_that_a_gradient_sees(name, size, grid):
    """Every pixel that moves an output of the front lies in the block of patches that the analysis gives it."""
    net = lively(nets.build(name, 5, size))
    graph = tracing.traced(net)
    tracing.measure(graph, torch.zeros(1, 3, size, size))
    made = split(graph, grid, 64)
    assert not isinstance(made, str), made
    image = torch.randn(1, 3, size, size, requires_grad=True)
    for (row, col), value in zip(made.places, made.front(image), strict=True):
        for _ in range(5):
            y, x = (int(torch.randint(n, ())) for n in value.shape[2:])
            (gradient,) = torch.autograd.grad(value[0, :, y, x].abs().sum(), image, retain_graph=True)
            touched = gradient[0].abs().sum(0) > 0
            rows = touched.any(1).nonzero().flatten() * grid[0] // size
            cols = touched.any(0).nonzero().flatten() * grid[1] // size
            assert set(rows.tolist()) <= set(range(int(row[y]), int(row[y]) + made.period[0]))
            assert set(cols.tolist()) <= set(range(int(col[x]), int(col[x]) + made.period[1]))


def test_a_reach_beyond_two_patches_ends_the_front():
    """3x3 convolutions on 8-pixel patches: the fourth still sees at most two patches a side, the fifth does not."""
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(7)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = tracing.traced(net)
    tracing.measure(graph, torch.zeros(1, 3, 32, 32))
    assert split(graph, (4, 4), 64).last == "net_3"
    assert split(graph, (4, 4), 65536).last == "net_6"  # 512 masks of period 3: up to eight pixels to each side
    assert split(graph, (2, 2), 16) == "nothing to share among 16 coalitions: net_8 (Flatten) is not known to be local"


@pytest.mark.parametrize("period", [1, 2, 3])
@pytest.mark.parametrize("grid", [(4, 4), (1, 5), (5, 3), (2, 2)])
def test_patterns_hold_what_every_block_shows(grid, period):
    """Wherever a block lies, the pattern that `index` names shows it as the coalition does."""
    p, q = min(period, grid[0]), min(period, grid[1])
    graph = fx.symbolic_trace(nn.ReLU())
    made = Split(graph, graph, grid, (p, q), periodic(grid, (p, q)), places=[], shapes=[], front_share=0.5, last="")
    masks = torch.rand(50, grid[0] * grid[1]) < 0.5
    index = made.index(masks)
    assert index.shape == (50, grid[0] - p + 1, grid[1] - q + 1)
    for r in range(index.shape[1]):
        for s in range(index.shape[2]):
            shown = made.patterns[index[:, r, s].long()].view(-1, *grid)[:, r : r + p, s : s + q]
            assert torch.equal(shown, masks.view(-1, *grid)[:, r : r + p, s : s + q])


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.rest = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x):
        x = self.conv(x)
        return self.rest(x * self.gate(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.mix(x, x, x)[0].mean(1))


def test_what_looks_at_the_whole_image_is_not_shared():
    for net in (nets.build("convnet3-w16-in", 5, 32), Squeeze(), Attention()):
        images, masks = torch.randn(2, 3, 32, 32), torch.rand(64, 16) < 0.5
        net.eval()
        found = forwards_of(net, (3, 32, 32), (4, 4), 64, batch=64)
        if isinstance(net, nn.Sequential):
            assert found.split is None
            assert "GroupNorm" in found.how
            assert "not known to be local" in found.how
        if found.split is not None:
            names = {m.op for m in found.split.front.graph.nodes if m.target in ("gate", "mix")}
            assert not names
        with torch.no_grad():
            keep = masks.view(64, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
            expected = torch.stack([net(image * keep) for image in images])
        torch.testing.assert_close(found(images, masks, 0.0), expected, rtol=1e-4, atol=1e-5)


def test_a_split_that_is_wrong_is_found_out(monkeypatch):
    """If the analysis took an operation for local that is not, the probe sees it and the whole net runs."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    monkeypatch.setattr("infoutil_fast.shapley.reach.POINTWISE_MODULES", (*tracing.POINTWISE_MODULES, nn.GroupNorm))
    found = forwards_of(net.eval(), (3, 32, 32), (4, 4), 64)
    assert found.split is None
    assert "a probe of the split was off by" in found.how


def test_predicted_factor_is_that_of_the_multiply_adds():
    """DESIGN section 2: 2.57 for ConvNet-3 at 32 px, 1.36 for ResNet-18 at 224 px, 64 coalitions."""
    for name, size, factor in (("convnet3", 32, 2.57), ("resnet18-small", 32, 1.18), ("resnet18", 224, 1.36)):
        graph = tracing.traced(nets.build(name, 10, size))
        tracing.fold(graph)
        tracing.measure(graph, torch.zeros(1, 3, size, size))
        assert split(graph, (4, 4), 64).predicted(64) == pytest.approx(factor, abs=0.006)


def test_folding_changes_rounding_only():
    net = lively(nets.build("resnet10-small", 5, 16))
    graph = tracing.traced(net)
    assert isinstance(graph, fx.GraphModule)
    tracing.fold(graph)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in graph.modules())
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(graph(x), net(x), rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_what_is_done_in_place_changes_nothing():
    class Reused(nn.Module):
        """Results that something else takes, too, must stay."""

        def __init__(self):
            super().__init__()
            self.one, self.two, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

        def forward(self, x):
            a = self.one(x)
            b = self.act(a)
            c = F.relu(self.two(b))
            d = self.two(c) + b
            return (torch.relu(d) + self.two(b) + a + x[:, :1] + self.act(self.one(x) + self.two(c))).mean((2, 3))

    net, x = Reused().eval(), torch.randn(2, 3, 9, 9)
    graph, before = tracing.traced(net), x.clone()
    tracing.measure(graph, x[:1])
    tracing.save_memory(graph)
    in_place = [n for n in graph.graph.nodes if n.target in (torch.relu_, operator.iadd) or "in_place" in str(n.target)]
    assert len(in_place) >= 4
    assert torch.equal(graph(x), net(x))
    assert torch.equal(x, before)


def test_a_batch_norm_that_is_shared_or_after_two_users_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return (self.norm(y) + y + self.norm(x)).mean((2, 3))

    net, x = lively(Shared()), torch.randn(2, 3, 9, 9)
    graph = tracing.traced(net)
    tracing.fold(graph)
    torch.testing.assert_close(graph(x), net(x))


def test_bfloat16_of_a_cast_net_is_near_and_its_logits_are_not_rounded():
    net = lively(nets.build("convnet3-w16", 10, 32))
    images, masks = torch.randn(2, 3, 32, 32), torch.rand(64, 16) < 0.5
    exact = forwards_of(net, (3, 32, 32), (4, 4), 64)(images, masks, 0.0)
    short = Forwards(net, torch.zeros(1, 3, 32, 32), (4, 4), 64, torch.bfloat16)
    found = short(images, masks, 0.0)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    assert float((found - exact).norm() / exact.norm()) < 2e-2


def test_arguments_with_defaults_keep_them():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets.build("convnet2-w8", 3, 16)

        def forward(self, x, scale=None, deep=True):
            x = self.net(x) if deep else x.mean((2, 3))
            return x if scale is None else 5 * scale * x

    net, x = Optional().eval(), torch.randn(2, 3, 16, 16)
    graph = tracing.traced(net)
    assert [n.op for n in graph.graph.nodes].count("placeholder") == 1
    assert torch.equal(graph(x), net(x))


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "squeezenet1_1", "regnet_y_400mf", "densenet121", "mobilenet_v2", "convnext_tiny"]
)
def test_nets_of_torchvision(name):
    models = package("torchvision").models
    net = lively(getattr(models, name)(weights=None, num_classes=7))
    images, masks = torch.randn(1, 3, 96, 96), torch.rand(5, 16) < 0.5
    found = forwards_of(net, (3, 96, 96), (4, 4), 64)
    assert (found.split is None) == (name == "convnext_tiny")  # its stem is followed by a layer norm
    keep = masks.view(5, 1, 4, 4).repeat_interleave(24, 2).repeat_interleave(24, 3)
    with torch.no_grad():
        expected = net(images * keep)
    assert float((found(images, masks, 0.0)[0] - expected).norm() / expected.norm()) < 1e-5
