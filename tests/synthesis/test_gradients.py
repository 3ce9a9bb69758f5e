"""The gradients of trajectory matching against the full unroll, and how many inner graphs live at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from infoutil_fast.models import nets
from infoutil_fast.pixels import dsa
from infoutil_fast.synthesis.gradients import Inner, Matched, Segment, Step, recursion, unroll
from infoutil_fast.types import InputError

CLASSES = 5


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def problem(seed: int, steps: int, *, n: int = 7, batch: int = 3, size: int = 9, soft: bool = False, strategy: str = dsa.STRATEGY):
    """A small ConvNet with instance norm in float64, a segment, images, labels and steps, the last batch a short one."""
    net = nets.build("convnet2-w6-in", CLASSES, size).double()
    start = flat(net)
    segment = Segment(start, start + 0.05 * torch.randn_like(start))
    images = torch.randn(n, 3, size, size, dtype=torch.float64)
    labels = torch.randn(n, CLASSES, dtype=torch.float64) if soft else torch.randint(CLASSES, (n,))
    generator = Generator().manual_seed(seed)
    taken = []
    while len(taken) < steps:
        for index in torch.randperm(n, generator=generator).split(batch):
            taken.append(Step(index, dsa.draw(strategy, len(index), generator)))
    return Inner(net), segment, images, labels, taken[:steps]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def assert_same(a: Matched, b: Matched, tolerance: float) -> None:
    for name in ("images", "lr", "labels"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= tolerance * other.norm(), name
    assert abs(a.loss - b.loss) <= tolerance * abs(b.loss)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("steps", "lr"), [(1, 0.1), (4, 0.5), (11, 0.02)])
def test_exact_equals_the_full_unroll(steps, lr, soft, seed):
    inner, segment, images, labels, taken = problem(seed, steps, soft=soft)
    rate = torch.tensor(lr, dtype=torch.float64)
    assert_same(recursion(inner, segment, images, labels, rate, taken), unroll(inner, segment, images, labels, rate, taken), 1e-8)


def test_the_unroll_agrees_with_finite_differences(seed):
    inner, segment, images, labels, taken = problem(seed, 3, soft=True)
    for i, layer in enumerate(inner.net):
        if isinstance(layer, nn.ReLU):  # its kinks make the student's gradient, and so the loss, jump
            inner.net[i] = nn.Softplus()
    rate, h = torch.tensor(0.2, dtype=torch.float64), 1e-5
    found = unroll(inner, segment, images, labels, rate, taken)
    along = [torch.randn_like(images), torch.randn_like(labels), torch.randn_like(rate)]

    def loss(sign: int) -> float:
        moved = [value + sign * h * d for value, d in zip((images, labels, rate), along, strict=True)]
        return unroll(inner, segment, *moved, taken).loss

    slope = sum(float((g * d).sum()) for g, d in zip((found.images, found.labels, found.lr), along, strict=True))
    assert slope == pytest.approx((loss(1) - loss(-1)) / (2 * h), rel=1e-4, abs=1e-6)


def test_one_step_of_first_order_is_exact(seed):
    inner, segment, images, labels, taken = problem(seed, 1, soft=True)
    rate = torch.tensor(0.3, dtype=torch.float64)
    first = recursion(inner, segment, images, labels, rate, taken, mode="first_order")
    assert_same(first, unroll(inner, segment, images, labels, rate, taken), 1e-10)


def test_first_order_is_the_published_formula(seed):
    """dL/dx_i = 2/D [lr (target - start) + lr^2 G]' dg_i/dx_i (G: the gradients' sum), dL/dlr = -2/D (theta_T - target)' G."""
    inner, segment, images, labels, taken = problem(seed, 5, strategy="")
    lr = 0.2
    theta, slopes, batches = segment.start, [], []
    for step in taken:
        at, x = theta.detach().requires_grad_(), images[step.index].requires_grad_()
        (g,) = torch.autograd.grad(inner.loss(at, x, labels[step.index]), at, create_graph=True)
        slopes.append(g)
        batches.append(x)
        theta = theta - lr * g.detach()
    total, scale = sum(g.detach() for g in slopes), (segment.start - segment.target).square().sum()
    v = 2 / scale * (lr * (segment.target - segment.start) + lr**2 * total)
    expected = torch.zeros_like(images)
    for step, x, g in zip(taken, batches, slopes, strict=True):
        expected[step.index] += torch.autograd.grad(v @ g, x)[0]
    found = recursion(inner, segment, images, labels, torch.tensor(lr, dtype=torch.float64), taken, mode="first_order")
    torch.testing.assert_close(found.images, expected)
    torch.testing.assert_close(found.lr, -2 / scale * (theta - segment.target) @ total)
    half = recursion(inner, segment, images, labels, torch.tensor(lr, dtype=torch.float64), taken, mode="first_order", halve=True)
    assert torch.equal(half.images * 2, found.images)
    assert torch.equal(half.lr, found.lr)


def test_first_order_drifts_off_with_step_size_and_steps(seed):
    """The order of the toy table: (.01, 10) > (.01, 50) > (.05, 20) > (.1, 20) > (.1, 50), the first near 1."""
    settings = [(0.01, 10), (0.01, 50), (0.05, 20), (0.1, 20), (0.1, 50)]
    means = []
    for lr, count in settings:
        found = []
        for i in range(16):
            generator = Generator().manual_seed(seed + i)
            net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
            with torch.no_grad():
                for p in net.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
            start = flat(net)
            segment = Segment(start, start + 0.3 * torch.randn(start.shape, generator=generator, dtype=torch.float64))
            images = torch.randn(10, 3, 2, 2, generator=generator, dtype=torch.float64)
            steps = [Step(torch.arange(10))] * count
            args = (Inner(net), segment, images, torch.arange(10) % CLASSES, torch.tensor(lr, dtype=torch.float64), steps)
            found.append(cosine(recursion(*args, mode="first_order").images, unroll(*args).images))
        means.append(sum(found) / len(found))
    assert means[0] > 0.99
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.95


@contextmanager
def most_alive() -> Iterator[list[int]]:
    """The most tensors that autograd held for a later backward at any one time, of all graphs together."""
    alive, most = [0], [0]

    class Held:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor.detach()  # with its history an output would hold itself; autograd attaches the history again
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    with saved_tensors_hooks(Held, lambda held: held.tensor):
        yield most
    assert alive[0] == 0, "a graph outlives the call"


@pytest.mark.parametrize("strategy", ["", "color", "scale"])
def test_one_inner_graph_at_a_time(strategy, seed):
    def held(gradients, steps: int) -> int:
        inner, segment, images, labels, taken = problem(seed, steps, n=4, batch=4, strategy=strategy, soft=True)
        rate = torch.tensor(0.1, dtype=torch.float64)
        with most_alive() as most:
            watched = gradients(inner, segment, images, labels, rate, taken)
        assert_same(watched, gradients(inner, segment, images, labels, rate, taken), 1e-12)
        return most[0]

    for mode in ("exact", "first_order"):
        one, *more = (held(lambda *args, mode=mode: recursion(*args, mode=mode), steps) for steps in (1, 2, 7, 19))
        assert all(count == one for count in more), mode
    counts = [held(unroll, steps) for steps in (1, 2, 7)]
    assert counts[1] - counts[0] >= one // 2
    assert counts[2] - counts[1] == 5 * (counts[1] - counts[0]), "every step adds a graph"


def test_labels_that_are_one_hot_are_the_hard_ones(seed):
    inner, segment, images, labels, taken = problem(seed, 3)
    rate = torch.tensor(0.1, dtype=torch.float64)
    logits = 60 * torch.nn.functional.one_hot(labels, CLASSES).double()
    hard, soft = (recursion(inner, segment, images, y, rate, taken) for y in (labels, logits))
    torch.testing.assert_close(hard.images, soft.images)
    assert hard.labels is None
    assert soft.labels.shape == (7, CLASSES)


def test_what_cannot_be_matched_is_refused(seed):
    inner, segment, images, labels, taken = problem(seed, 2)
    rate = torch.tensor(0.1, dtype=torch.float64)
    with pytest.raises(InputError, match="same"):
        recursion(inner, Segment(segment.start, segment.start), images, labels, rate, taken)
    with pytest.raises(InputError, match="exact, first_order"):
        recursion(inner, segment, images, labels, rate, taken, mode="second_order")
    with pytest.raises(InputError, match="without batch norm"):
        Inner(nets.build("convnet1-w3", 2, 8))
