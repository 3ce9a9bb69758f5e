"""KernelShap: equal to Captum's for the same coalitions, and drawn from the same distribution."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from captum.attr import KernelShap as Captum
from captum.attr import NoiseTunnel
from scipy.stats import chi2
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn

from infoutil_fast import InputError, KernelShap
from infoutil_fast.shapley import kernel_shap
from infoutil_fast.shapley.kernel_shap import draw, solve


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_captum(model: Callable[..., Tensor], masks: Tensor, inputs: Any, **arguments: Any) -> Any:
    """Captum's own attributions, with masks [N, n, M] in place of its draws."""
    examples = iter(masks)

    def given(self: Captum, original: Any, **others: Any) -> Iterator[Tensor]:
        for row in next(examples):
            yield row[None].long()

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it takes long
        patch.setattr(Captum, "kernel_shap_perturb_generator", given)
        return Captum(model).attribute(inputs, n_samples=masks.shape[1], **arguments)


def assert_captum_agrees(model: Callable[..., Tensor], inputs: Any, M: int, n: int, **arguments: Any) -> None:
    N = len(inputs[0] if isinstance(inputs, tuple) else inputs)
    masks = draw(N, n, M, seeded(11))
    for flat in (False, True):
        ours = KernelShap(model).attribute(inputs, n_samples=n, return_input_shape=not flat, generator=seeded(11), **arguments)
        theirs = by_captum(model, masks, inputs, return_input_shape=not flat, **arguments)
        assert type(ours) is type(theirs)
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        for a, b in pairs:
            # Captum fits in float32, on sums with weights of 1e6: its own error is a few 1e-6 of the largest value.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))
            assert a.dtype == torch.float32
            assert b.abs().max() > 1e-3


def net(*shape: int, outputs: int = 5) -> nn.Module:
    """Two nonlinear layers, on inputs of any shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 16), nn.Tanh(), nn.Linear(16, outputs))


def patches(height: int, width: int, grid: int) -> Tensor:
    rows, columns = torch.arange(height) * grid // height, torch.arange(width) * grid // width
    return rows[:, None] * grid + columns


def irregular(*shape: int, M: int) -> Tensor:
    """Every id from 0 to M - 1 at least once, in no order."""
    ids = torch.cat([torch.arange(M), torch.randint(0, M, (math.prod(shape) - M,))])
    return ids[torch.randperm(len(ids))].view(shape)


IMAGES: dict[str, tuple[tuple[int, ...], int, int, Callable[[], dict[str, Any]]]] = {  # shape, M, n_samples, the other arguments
    "grid": ((2, 3, 16, 16), 16, 25, lambda: {"feature_mask": patches(16, 16, 4)[None, None], "target": 2}),
    "uneven grid, one image": ((1, 3, 17, 13), 9, 40, lambda: {"feature_mask": patches(17, 13, 3), "target": torch.tensor([4])}),
    "irregular": (
        (3, 3, 7, 5),
        6,
        64,
        lambda: {"feature_mask": irregular(7, 5, M=6), "target": torch.tensor([4, 0, 2]), "baselines": torch.randn(3, 3, 7, 5)},
    ),
    "of each image": (
        (3, 2, 6, 6),
        7,
        30,
        lambda: {
            "feature_mask": torch.stack([irregular(1, 6, 6, M=m) for m in (7, 4, 5)]),
            "target": [1, 2, 3],
            "baselines": torch.randn(1, 2, 6, 6),
            "perturbations_per_eval": 7,
        },
    ),
    "by channel": ((2, 3, 4, 4), 3, 10, lambda: {"feature_mask": torch.arange(3)[None, :, None, None], "target": -1, "baselines": 0.5}),
    "an id of no element": ((1, 8), 5, 12, lambda: {"feature_mask": torch.tensor([[0, 1, 1, 3, 4, 4, 0, 3]]), "target": 0}),
    "every element, fewer samples than elements": ((2, 3, 4, 4), 48, 25, lambda: {"target": [0, 4], "baselines": -1}),
    "three samples": ((2, 9), 9, 3, lambda: {"target": 1}),
}


@pytest.mark.parametrize("case", IMAGES)
def test_equal_to_captum(case):
    shape, M, n, arguments = IMAGES[case]
    assert_captum_agrees(net(*shape[1:]), torch.randn(shape), M, n, **arguments())


@pytest.mark.parametrize("target", [(1, 2), [(0, 0), (2, 3), (1, 1)]])
def test_equal_to_captum_with_two_output_dimensions(target):
    model = nn.Sequential(net(2, 5, outputs=12), nn.Unflatten(1, (3, 4)))
    assert_captum_agrees(model, torch.randn(3, 2, 5), 10, 40, target=target)


def test_equal_to_captum_with_one_output():
    assert_captum_agrees(net(7, outputs=1), torch.randn(3, 7), 7, 20)
    assert_captum_agrees(lambda x: x.prod(1), torch.rand(2, 4) + 0.5, 4, 20)


def test_equal_to_captum_for_two_inputs_and_further_arguments():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = net(2, 3), net(4)

        def forward(self, x: Tensor, y: Tensor, scale: Tensor, power: float) -> Tensor:
            return (self.a(x) * self.b(y)).exp().pow(power) * scale[:, None]

    inputs = (torch.randn(3, 2, 3), torch.randn(3, 4))
    arguments = {"target": torch.tensor([3, 1, 0]), "additional_forward_args": (torch.tensor([1.0, 2.0, -3.0]), 1.5)}
    assert_captum_agrees(Both(), inputs, 10, 30, baselines=(torch.randn(3, 2, 3), 0.25), **arguments)
    masks = (torch.tensor([[[0, 0, 1], [2, 2, 1]]]), torch.tensor([[1, 3, 3, 0]]))  # ids 0 and 1 in both
    assert_captum_agrees(Both(), inputs, 4, 12, feature_mask=masks, **arguments)


def test_equal_to_captum_for_integer_inputs():
    embedded = nn.Sequential(nn.Embedding(11, 3), net(5, 3))
    assert_captum_agrees(embedded, torch.randint(0, 11, (2, 5)), 5, 20, target=1)
    assert_captum_agrees(lambda x: x.cos().sum(1), torch.randint(1, 11, (2, 5)), 5, 20, baselines=0.5)


def test_ids_are_shifted_to_start_at_zero_as_captum_does():
    model, x, ids = net(6), torch.randn(1, 6), torch.tensor([[5, 3, 3, 4, 5, 5]])
    with pytest.warns(UserWarning, match="starts at 3"):
        ours = KernelShap(model).attribute(x, feature_mask=ids, target=0, generator=seeded(1))
    torch.testing.assert_close(ours, KernelShap(model).attribute(x, feature_mask=ids - 3, target=0, generator=seeded(1)))


@pytest.mark.parametrize(("n", "M"), [(25, 16), (3, 5), (200, 4), (25, 49), (100, 192), (40, 784)])
def test_solve_is_the_regression_of_scikit_learn(n, M):
    """In float64: at hundreds of features Captum's float32 fit keeps a direction of rounding errors."""
    masks, values = draw(3, n, M), torch.randn(3, n, dtype=torch.float64)
    ends = (masks.sum(2) % M == 0).double()
    for row, v, end, phi in zip(masks, values, ends, solve(masks, values), strict=True):
        fitted = LinearRegression().fit(row.double().numpy(), v.numpy(), sample_weight=(1 + (1e6 - 1) * end).numpy())
        torch.testing.assert_close(phi, torch.from_numpy(fitted.coef_), rtol=0, atol=1e-9 * float(phi.abs().max()))
        assert abs(float(phi.sum() - (v[0] - v[1]))) < 1e-4  # empty and full in rows 1 and 0


def test_solve_of_all_coalitions_by_their_weights_is_the_shapley_value():
    """Theorem 2 of Lundberg and Lee: here each coalition repeated in proportion to the Shapley kernel, 3 / (k (4 - k) C(4, k))."""
    rows = [s for s in itertools.product((0, 1), repeat=4) for _ in range({1: 4, 2: 2, 3: 4}.get(sum(s), 1))]
    masks = torch.tensor(rows, dtype=torch.bool)
    single, pair = torch.randn(4, dtype=torch.float64), float(torch.randn(()))
    values = masks.double() @ single + pair * (masks[:, 0] & masks[:, 2])
    expected = single + torch.tensor([pair / 2, 0, pair / 2, 0])
    torch.testing.assert_close(solve(masks, values), expected, rtol=0, atol=1e-4)


def test_draws_have_captum_s_distribution():
    """Chi-square over all 30 coalitions of 5 features that are not an end, ours and Captum's own, at p = 1e-6."""
    M = 5
    k = torch.arange(1, M, dtype=torch.float64)
    of_size = torch.cat([torch.zeros(1), (M - 1) / (k * (M - k))])
    of_size /= of_size.sum()
    categories = torch.distributions.Categorical(of_size)
    captum = Captum(net(M)).kernel_shap_perturb_generator(torch.zeros(1, M), num_select_distribution=categories, num_interp_features=M)
    theirs = torch.cat(list(itertools.islice(captum, 4002))).bool()
    ours = draw(8, 20002, M)
    assert ours[:, 0].all()
    assert not ours[:, 1].any()
    code = 1 << torch.arange(M)
    size = (torch.arange(1, (1 << M) - 1)[:, None] & code > 0).sum(1)
    expected = of_size[size] / torch.tensor([math.comb(M, int(k)) for k in size])
    for rows in (ours[:, 2:].flatten(0, 1), theirs[2:]):
        found = torch.bincount((rows * code).sum(1), minlength=1 << M)[1:-1]
        assert int(found.sum()) == len(rows)  # no end among them
        assert float(((found - len(rows) * expected) ** 2 / (len(rows) * expected)).sum()) < chi2.isf(1e-6, len(size) - 1)


def test_mean_attribution_is_captum_s():
    """300 repetitions on a model of single and pair terms, 8 evaluations each: within 6 standard errors of the difference."""
    single, pairs = torch.randn(5), torch.randn(5, 5)

    def game(x: Tensor) -> Tensor:
        return x @ single + ((x @ pairs) * x).sum(1)

    x, times = torch.rand(1, 5) + 0.5, 300
    ours = KernelShap(game).attribute(x.expand(times, 5), n_samples=8).double()
    captum = Captum(game)
    theirs = torch.cat([captum.attribute(x, n_samples=8) for _ in range(times)]).double()
    error = ((ours.var(0) + theirs.var(0)) / times).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 6 * error + 1e-6).all()
    assert float(error.max()) < 0.3 * float(ours.mean(0).abs().max())  # so that it can tell


def test_linear_model_is_attributed_exactly(monkeypatch):
    """Whichever coalitions are drawn, if they are enough; and examples drawn and solved in several parts."""
    monkeypatch.setattr(kernel_shap, "_AT_ONCE", 2 * 40 * 6)
    weight, x, base, target = torch.randn(6, 2), torch.randn(7, 8, 6)[:, 3], torch.randn(6), torch.randint(0, 2, (7,))
    found = KernelShap(lambda x: x @ weight).attribute(x, base, target, n_samples=40, perturbations_per_eval=11)
    torch.testing.assert_close(found, (x - base) * weight.T[target], rtol=1e-4, atol=1e-5)


def test_rows_of_all_images_share_the_model_calls():
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.sum((1, 2))

    KernelShap(counted).attribute(torch.randn(5, 2, 2))
    assert calls == [32, 32, 32, 29]
    calls.clear()
    KernelShap(counted).attribute(torch.randn(3, 2, 2), n_samples=10, perturbations_per_eval=17)
    assert calls == [17, 13]


def test_model_that_gives_back_or_changes_its_input():
    x = torch.rand(6, 3) + 0.5
    for model in (lambda x: x[:, :1], lambda x: x[:, 1:2].relu_(), lambda x: x.mul_(2)[:, 2]):
        found = KernelShap(model).attribute(x.clone(), n_samples=30)
        assert (found.abs() > 1e-3).sum() == 6  # one element decides


def test_seeded_by_its_generator_and_drawn_anew_for_each_image():
    model, x = net(9), torch.randn(1, 9).expand(3, 9)
    first, again = (KernelShap(model).attribute(x, target=0, generator=seeded(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, KernelShap(model).attribute(x, target=0, generator=seeded(6)))


def test_mode_is_left_alone_and_no_gradient_is_kept():
    model, x = nn.Sequential(nn.Dropout(0.5), net(4)), torch.randn(2, 4, requires_grad=True)
    model[1].eval()
    found = KernelShap(model).attribute(x, target=0, n_samples=9)
    assert [m.training for m in model] == [True, False]
    assert not found.requires_grad
    assert x.grad is None


def test_left_out_nan_is_not_seen():
    x = torch.tensor([[1.0, math.nan, 2.0]])
    found = KernelShap(lambda x: x.nan_to_num(7.0).sum(1)).attribute(x, n_samples=30)
    torch.testing.assert_close(found, torch.tensor([[1.0, 7.0, 2.0]]), rtol=0, atol=1e-4)  # Captum: 0 * NaN, so never anything but 7


def test_empty_batch():
    model = KernelShap(net(2, 3))
    x = torch.empty(0, 2, 3)
    assert model.attribute(x, target=0).shape == (0, 2, 3)
    assert model.attribute((x, torch.empty(0, 4)))[1].shape == (0, 4)
    flat = model.attribute(x, target=torch.empty(0, dtype=torch.int64), feature_mask=patches(2, 3, 2)[None], return_input_shape=False)
    assert flat.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_samples": 2}, "3 or more.*not 2"),
        ({"perturbations_per_eval": 0}, "not 25, 0 and 6"),
        ({"feature_mask": torch.zeros(2, 3, dtype=torch.int64)}, "2 features or more.*and 1$"),
        ({"feature_mask": torch.zeros(4, 3, dtype=torch.int64)}, r"feature_mask.*int64 \(4, 3\) for float32 \(4, 2, 3\)"),
        ({"feature_mask": torch.zeros(1, 4, 2, 3, dtype=torch.int64)}, "feature_mask must be integers that broadcast"),
        ({"feature_mask": torch.zeros(2, 3)}, "feature_mask.*float32"),
        ({"feature_mask": (torch.zeros(2, 3, dtype=torch.int64),) * 2}, "one for each"),
        ({"baselines": torch.zeros(2, 2)}, r"baselines.*\(2, 2\)"),
        ({"baselines": (0, 1)}, "baselines.*one for each: not 0, 1"),
        ({"baselines": "mean"}, "baselines.*'mean'"),
        ({"target": 5}, r"target \[\[5\]\] does not fit an output of shape \(32, 5\)"),
        ({"target": -6}, "does not fit"),
        ({"target": torch.tensor([0, 1, -1, 2])}, "does not fit"),
        ({"target": (1, 1)}, "does not fit"),
        ({"target": None}, r"without a target the model gives shape \(32, 5\)"),
        ({"target": torch.tensor([1, 2])}, "target must be.*or 4 of them"),
        ({"target": 1.5}, "target must be"),
        ({"target": []}, "target must be"),
        ({"target": [1, (2, 3), 1, 1]}, "target must be"),
        ({"inputs": (torch.zeros(4, 2, 3), torch.zeros(3, 2))}, "the same N"),
        ({"inputs": [1.0, 2.0]}, "inputs must be a tensor"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"inputs": torch.randn(4, 2, 3), "target": 1, **change}
    with pytest.raises(InputError, match=message):
        KernelShap(net(2, 3)).attribute(**arguments)


@pytest.mark.parametrize("model", [lambda x: x.sum(), lambda x: 1.0, lambda x: x[:1]])
def test_model_without_a_value_for_each_example_is_refused(model):
    with pytest.raises(InputError, match="a value for the whole batch cannot be used"):
        KernelShap(model).attribute(torch.randn(2, 4))


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    model, x, ids = net(2, 3).double(), torch.randn(3, 2, 3).double(), irregular(3, 2, 3, M=5)
    arguments = {"target": torch.tensor([1, 0, 3]), "baselines": 0.5, "feature_mask": ids}
    here = KernelShap(model).attribute(x, generator=seeded(3), **arguments)
    there = KernelShap(model.cuda()).attribute(x.cuda(), generator=seeded(3), **arguments)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-6)


WEIGHT = torch.tensor([3.0, -1.0, 0.5])
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "float": lambda x: float((x * WEIGHT).sum()),
    "int": lambda x: int((4 * x * WEIGHT).sum().round()),
    "0-d": lambda x: (x * WEIGHT).sum(),
    "1-d": lambda x: (x * WEIGHT).sum().reshape(1),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_number_a_call(form: str) -> None:
    x, scale = torch.randint(1, 9, (1, 3)).float(), 4 if form == "int" else 1
    found = KernelShap(FORMS[form]).attribute(x, n_samples=60, perturbations_per_eval=1)
    torch.testing.assert_close(found, scale * x * WEIGHT, rtol=1e-4, atol=1e-4)
    both = x.expand(2, 3)  # one number for two rows: they are one example, as in Captum
    joint = KernelShap(FORMS[form]).attribute(both, n_samples=60, perturbations_per_eval=1, feature_mask=torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(joint, 2 * scale * x * WEIGHT, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="with perturbations_per_eval=1 a call has one example"):
        KernelShap(FORMS[form]).attribute(both, n_samples=60)


def test_one_row_a_call_when_asked_for() -> None:
    rows: list[int] = []
    x, model = torch.randn(3, 4), net(4)

    def counted(x: Tensor) -> Tensor:
        rows.append(len(x))
        if len(x) != 1:
            raise ValueError("one at a time")
        return model(x)

    found = KernelShap(counted).attribute(x, target=1, n_samples=20, perturbations_per_eval=1, generator=seeded(3))
    assert set(rows[1:]) == {1}  # after the question whether it gives one number for two
    torch.testing.assert_close(found, KernelShap(model).attribute(x, target=1, n_samples=20, generator=seeded(3)))


@pytest.mark.parametrize("rows", [1, 7, None])
def test_a_list_with_one_thing_an_example(rows: int | None) -> None:
    scales = {"cat": 1.0, "dog": 10.0, "hen": 100.0}
    x = torch.rand(3, 4) + 0.5

    def match(x: Tensor, names: list[str]) -> Tensor:
        return x.sum(1) * torch.tensor([scales[name] for name in names])

    found = KernelShap(match).attribute(x, additional_forward_args=(list(scales),), n_samples=80, perturbations_per_eval=rows)
    torch.testing.assert_close(found, x * torch.tensor([[1.0], [10.0], [100.0]]), rtol=1e-4, atol=1e-4)


def test_an_example_whose_output_is_no_number_is_named() -> None:
    x = torch.rand(4, 5) + 1
    x[[1, 3]] *= 1e3
    with pytest.raises(InputError, match=r"NaN or infinity for the examples \[1, 3\]"):
        KernelShap(lambda x: (x.half() ** 4).sum(1)).attribute(x, perturbations_per_eval=200)


def test_within_captum_s_noise_tunnel() -> None:
    model, x = nn.Linear(6, 3), torch.randn(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = NoiseTunnel(KernelShap(model)).attribute(x, target=1, nt_samples=3, stdevs=1e-6, n_samples=60)
    torch.testing.assert_close(found, x * model.weight[1].detach(), rtol=1e-3, atol=1e-3)


def test_progress_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    KernelShap(lambda x: x.sum(1)).attribute(torch.ones(4, 6), show_progress=True)
    assert "Kernel Shap attribution: 100%" in capsys.readouterr().err
    KernelShap(lambda x: x.sum(1)).attribute(torch.ones(4, 6))
    assert not capsys.readouterr().err
    with pytest.raises(NotImplementedError, match="no futures"):
        KernelShap(lambda x: x.sum(1)).attribute_future()
