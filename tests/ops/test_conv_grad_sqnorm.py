"""Squared norms of per-sample weight gradients of a convolution: both forms, on every backend, against autograd in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infoutil_fast.ops import dispatch
from infoutil_fast.ops.sqnorms import conv_grad_sqnorm, gram_sqnorm
from infoutil_fast.types import InputError

F32, BF16 = torch.float32, torch.bfloat16
CPU = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(dispatch.missing("cpp") is not None, reason=f"cpp: {dispatch.missing('cpp')}")),
]
TOLERANCES = {torch.float64: 1e-11, F32: 3e-6, BF16: 3e-6}  # of the inputs as they are: products are exact, sums in float32
# N, C, O, H, W, kernel, stride, padding, dilation, groups
SHAPES = [
    (3, 3, 5, 9, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 3, 5, 11, 8, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (2, 4, 7, 9, 10, (3, 2), (1, 3), (2, 0), (2, 1), 1),
    (3, 5, 3, 4, 4, (4, 4), (1, 1), (0, 0), (1, 1), 1),
    (2, 2, 13, 13, 17, (3, 5), (3, 2), (0, 2), (1, 1), 1),
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 33, 17, 7, 5, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (2, 17, 40, 8, 8, (3, 3), (2, 2), (1, 1), (3, 3), 1),
    (2, 19, 21, 3, 5, (3, 3), (1, 1), (4, 4), (1, 1), 1),  # more padding than image
    (2, 67, 53, 4, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 3, 11, 37, 41, (7, 7), (2, 2), (3, 3), (1, 1), 1),  # more than one band of positions
    (0, 3, 5, 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 6, 9, 7, 5, (3, 3), (2, 2), (1, 1), (1, 1), 3),
    (2, 7, 14, 6, 5, (5, 5), (1, 1), (2, 2), (1, 1), 7),
]
FORMS = {"direct": SHAPES, "gram": [shape for shape in SHAPES if shape[-1] == 1]}
CASES = [pytest.param(form, shape, id=f"{form}-{i}") for form, shapes in FORMS.items() for i, shape in enumerate(shapes)]
LAYOUTS = ("channels_last", "contiguous", "sliced")


def inputs(shape: tuple[Any, ...], layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Input, output gradient and options of a convolution; the smaller numbers matter as much as the large ones."""
    n, c, o, h, w, *options, groups = shape
    x = torch.randn(n, c, h, w, dtype=torch.float64)
    with torch.no_grad():
        g = torch.randn_like(F.conv2d(x, torch.zeros(o, c // groups, *options[0]).double(), None, *options[1:], groups))

    def laid(t: Tensor) -> Tensor:
        if layout == "sliced":
            wide = torch.full((2 * t.shape[0], t.shape[1] + 1, t.shape[2], t.shape[3] * 2), torch.nan, dtype=dtype)
            wide[::2, 1:, :, ::2] = t.to(dtype)
            return wide[::2, 1:, :, ::2]
        return t.to(dtype).contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)

    return laid(x), laid(g), (*options, groups)


def run(form: str, x: Tensor, g: Tensor, options: tuple[Any, ...], backend: str) -> Tensor:
    if form == "direct":
        return conv_grad_sqnorm(x, g, *options, backend=backend)
    return gram_sqnorm(x, g, *options[:-1], backend=backend)


def by_autograd(x: Tensor, g: Tensor, options: tuple[Any, ...]) -> Tensor:
    kernel, *rest = options
    x, g = x.double(), g.double()
    squares = torch.zeros(len(x), dtype=torch.float64)
    for i in range(len(x)):
        weight = torch.zeros(g.shape[1], x.shape[1] // options[-1], *kernel, dtype=torch.float64, requires_grad=True)
        y = F.conv2d(x[i : i + 1], weight, None, *rest)
        squares[i] = torch.autograd.grad(y, weight, g[i : i + 1])[0].square().sum()
    return squares


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(("form", "shape"), CASES)
def test_squares_of_the_weight_gradient(form: str, shape: tuple[Any, ...], backend: str) -> None:
    for dtype in (torch.float64, F32, BF16):
        for layout in LAYOUTS:
            x, g, options = inputs(shape, layout, dtype)
            if dtype == torch.float64 and backend == "cpp":
                with pytest.raises(InputError, match=r"on cpu in float64 runs \('torch',\), not 'cpp'"):
                    run(form, x, g, options, backend)
                continue
            got = run(form, x, g, options, backend)
            assert got.dtype == (torch.float64 if dtype == torch.float64 else F32)
            torch.testing.assert_close(got.double(), by_autograd(x, g, options), rtol=TOLERANCES[dtype], atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.skipif(dispatch.missing("cpp") is not None, reason="extension not built")
def test_threads_and_neighbours_do_not_change_the_bits(form: str) -> None:
    x, g, options = inputs((7, 19, 13, 9, 11, (3, 3), (2, 1), (1, 1), (1, 1), 1), "channels_last", F32)
    alone = torch.cat([run(form, x[i : i + 1], g[i : i + 1], options, "cpp") for i in range(7)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(form, x, g, options, "cpp"), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("form", FORMS)
def test_a_sample_that_is_not_finite_spoils_only_itself(form: str, backend: str) -> None:
    x, g, options = inputs((3, 5, 6, 7, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1), "channels_last", F32)
    want = run(form, x, g, options, backend)
    x[1, 2, 3, 3] = torch.nan
    got = run(form, x, g, options, backend)
    assert got[1].isnan()
    assert torch.equal(got[[0, 2]], want[[0, 2]])


X, G = torch.zeros(2, 4, 5, 7), torch.zeros(2, 6, 5, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x must be \[N, C, H, W\] of floats, not \[4, 5, 7\] float32"),
        ({"g": G.int()}, r"g must be \[N, O, H', W'\] of floats, not .* int32"),
        ({"g": G[:1]}, r"as many samples, one dtype and one device"),
        ({"g": G.double()}, r"as many samples, one dtype and one device"),
        ({"stride": (2, 2)}, r"has \[3, 4\] positions, and g is \[2, 6, 5, 7\]"),
        ({"stride": (0, 1)}, r"stride \(0, 1\).* must be at least 1"),
        ({"padding": (-1, 1)}, r"padding \(-1, 1\) 0"),
        ({"groups": 3}, r"4 and 6 channels do not fall into 3 groups"),
        ({"backend": "triton"}, r"conv_grad_sqnorm on cpu runs \('torch',.*\), not 'triton'"),
    ],
)
def test_wrong_input_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    given = {"x": X, "g": G, "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1} | change
    with pytest.raises(InputError, match=message) as error:
        conv_grad_sqnorm(**given)
    assert "\n" not in str(error.value)


INTERPRETED = """
import torch
from infoutil_fast.kernels.conv_grad_sqnorm import conv_grad_sqnorm
from infoutil_fast.kernels.gram_sqnorm import gram_sqnorm
from test_conv_grad_sqnorm import FORMS, TOLERANCES, by_autograd, inputs
torch.manual_seed({seed})
more = (2, 70, 67, 11, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1)  # more than one tile of outputs, inputs and positions
for form, shapes in FORMS.items():
    for shape in [s for s in [*shapes, more] if form == "direct" or s[5] != (7, 7)]:  # 49 offsets of 91 pairs of tiles: minutes
        for dtype, layout in ((torch.float32, "channels_last"), (torch.bfloat16, "sliced")):
            x, g, options = inputs(shape, layout, dtype)
            got = conv_grad_sqnorm(x, g, *options) if form == "direct" else gram_sqnorm(x, g, *options[:-1])
            torch.testing.assert_close(got.double(), by_autograd(x, g, options), rtol=TOLERANCES[dtype], atol=0)
print("agree")
"""


def interpreted(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel's module is imported, hence the second interpreter
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agree", done.stderr


def test_triton_agrees_under_the_interpreter(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(INTERPRETED.format(seed=seed), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "shape"), CASES)
def test_triton_agrees_on_the_device(form: str, shape: tuple[Any, ...]) -> None:
    pytest.importorskip("triton")
    for dtype in (F32, BF16):
        for layout in LAYOUTS:
            x, g, options = inputs(shape, layout, dtype)
            got = run(form, x.cuda(), g.cuda(), options, "triton")
            torch.testing.assert_close(got.cpu().double(), by_autograd(x, g, options), rtol=TOLERANCES[dtype], atol=0)
