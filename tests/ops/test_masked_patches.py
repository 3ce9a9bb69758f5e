"""masked_patches against loops over its pixels; then every fast version against the torch body, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infoutil_fast.ops import dispatch
from infoutil_fast.ops.patches import masked_patches
from infoutil_fast.types import InputError

F32, BF16 = torch.float32, torch.bfloat16
CPU = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(dispatch.missing("cpp") is not None, reason=f"cpp: {dispatch.missing('cpp')}")),
]
# B, C, H, W, rows, cols, M
SHAPES = [
    (1, 3, 8, 8, 4, 4, 5),
    (2, 3, 7, 11, 3, 5, 1),
    (3, 1, 5, 5, 5, 5, 7),
    (2, 4, 1, 13, 1, 3, 2),
    (5, 2, 13, 1, 2, 1, 3),
    (1, 1, 1, 1, 1, 1, 1),
    (0, 3, 6, 6, 2, 2, 3),
    (2, 3, 6, 6, 2, 2, 0),
]
FILLS = ("number", "channels", "image", "images")


def inputs(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, float | Tensor]:
    """Images, masks and a fill, none of them contiguous."""
    B, C, H, W, rows, cols, M = shape
    images = torch.randn(B, 2 * H, C, W + 3)[:, ::2, :, 1 : W + 1].transpose(1, 2).to(dtype)
    masks = torch.rand(rows * cols, 2 * M).lt(0.5)[:, ::2].T
    images[:, :, : H // 2, 0] = float("inf")  # must not leak out of absent patches
    fill = {
        "number": 0.3,
        "channels": torch.randn(2 * C)[::2],
        "image": torch.randn(C, H + 1, W).to(BF16)[:, 1:],
        "images": torch.randn(B, H, W, C).permute(0, 3, 1, 2),
    }[kind]
    return images, masks, fill


def by_pixel(images: Tensor, masks: Tensor, grid: tuple[int, int], fill: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Patch r owns the pixels from ceil(r * H / rows) to below ceil((r + 1) * H / rows): the definition turned round."""
    (B, C, H, W), (rows, cols), M = images.shape, grid, len(masks)
    fill = torch.tensor(fill) if isinstance(fill, float) else fill
    fill = (fill[:, None, None] if fill.ndim == 1 else fill).expand(B, C, H, W)
    out = torch.full((B * M, C, H, W), -7.0, dtype=dtype)
    for b in range(B):
        for m in range(M):
            for r in range(rows):
                for c in range(cols):
                    for y in range(-(-r * H // rows), -(-(r + 1) * H // rows)):
                        for x in range(-(-c * W // cols), -(-(c + 1) * W // cols)):
                            source = images if masks[m, r * cols + c] else fill
                            out[b * M + m, :, y, x] = source[b, :, y, x].to(dtype)
    return out


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_pixel_comes_from_the_image_or_the_fill(shape: tuple[int, ...], kind: str, backend: str) -> None:
    for dtype in (F32, BF16):
        images, masks, fill = inputs(shape, kind, dtype)
        for result in (None, F32, BF16):
            got = masked_patches(images, masks, shape[4:6], fill, dtype=result, backend=backend)
            assert got.dtype == (result or dtype)
            assert got.numel() == 0 or got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, by_pixel(images, masks, shape[4:6], fill, result or dtype))


@pytest.mark.parametrize("backend", CPU)
def test_rounding_to_bfloat16_is_to_nearest_even_and_nan_stays_nan(backend: str) -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0x00000001], dtype=torch.int32)
    images, masks = bits.view(F32).reshape(1, 1, 1, 6), torch.ones(1, 1, dtype=torch.bool)
    got = masked_patches(images, masks, (1, 1), dtype=BF16, backend=backend).flatten()
    assert got[[0, 1, 2, 3, 5]].view(torch.int16).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0]
    assert got[4].isnan()


@pytest.mark.parametrize("backend", CPU)
def test_out_is_written_and_returned(backend: str) -> None:
    images, masks, fill = inputs((2, 3, 7, 11, 3, 5, 4), "image", F32)
    for dtype in (F32, BF16):
        out = torch.full((8, 3, 7, 11), float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
        assert masked_patches(images, masks, (3, 5), fill, dtype=dtype, out=out, backend=backend) is out
        assert torch.equal(out, by_pixel(images, masks, (3, 5), fill, dtype))


@pytest.mark.skipif(dispatch.missing("cpp") is not None, reason="extension not built")
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_the_number_of_threads_does_not_change_the_bits(threads: int) -> None:
    images, masks, fill = inputs((3, 3, 17, 19, 3, 5, 13), "images", F32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = masked_patches(images, masks, (3, 5), fill, backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, masked_patches(images, masks, (3, 5), fill, backend="torch"))


def test_inputs_are_left_alone_and_no_gradient_is_carried() -> None:
    images = torch.randn(2, 3, 5, 5, requires_grad=True)
    kept = images.detach().clone()
    got = masked_patches(images, torch.zeros(1, 4, dtype=torch.bool), (2, 2), 1.0)
    assert not got.requires_grad
    assert torch.equal(images, kept)


IMAGES, MASKS = torch.zeros(2, 3, 4, 6), torch.ones(5, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES[0]}, r"\[B, C, H, W\] float32 or bfloat16, not \[3, 4, 6\] float32"),
        ({"images": IMAGES.double()}, r"not \[2, 3, 4, 6\] float64"),
        ({"grid": (5, 1)}, r"a 4x6 image has no 5x1 grid"),
        ({"grid": (0, 2)}, r"no 0x2 grid"),
        ({"masks": MASKS[:, :3]}, r"masks must be \[M, 4\] bool for a 2x2 grid, not \[5, 3\] bool"),
        ({"masks": MASKS.float()}, r"not \[5, 4\] float32"),
        ({"fill": torch.zeros(2)}, r"fill must be a number or .*, not \[2\] float32"),
        ({"fill": "blur"}, r"not str"),
        ({"dtype": torch.float16}, r"dtype must be float32 or bfloat16, not torch.float16"),
        ({"out": torch.empty(10, 3, 4, 6)}, r"in channels_last"),
        ({"out": torch.empty(9, 3, 4, 6, memory_format=torch.channels_last)}, r"\[10, 3, 4, 6\]"),
        ({"masks": MASKS.to("meta")}, r"masks is on meta and images on cpu"),
        ({"backend": "triton"}, r"masked_patches on cpu runs \('torch',.*\), not 'triton'"),
        ({"backend": "fastest"}, r"not 'fastest'"),
    ],
)
def test_wrong_input_is_refused_in_one_line(change: dict, message: str) -> None:
    given = {"images": IMAGES, "masks": MASKS, "grid": (2, 2), "fill": 0.0} | change
    with pytest.raises(InputError, match=message) as error:
        masked_patches(**given)
    assert "\n" not in str(error.value)


INTERPRETED = """
import itertools, torch
from infoutil_fast.kernels.masked_patches import masked_patches as kernel
from infoutil_fast.ops import masked_patches
from test_masked_patches import FILLS, SHAPES, inputs
torch.manual_seed({seed})
shapes = [*SHAPES[1:], (1, 3, 19, 23, 3, 5, 6)]  # the last has more than one tile and more than one group of coalitions
dtypes = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)
for shape, kind, (dtype, result) in itertools.product(shapes, FILLS, dtypes):
    images, masks, fill = inputs(shape, kind, dtype)
    got = kernel(images, masks, shape[4:6], fill, dtype=result, out=None)
    want = masked_patches(images, masks, shape[4:6], fill, dtype=result, backend="torch")
    assert got.dtype == want.dtype and got.stride() == want.stride() and torch.equal(got, want), (shape, kind, dtype, result)
print("agree")
"""


def test_triton_agrees_under_the_interpreter(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel's module is imported, hence the second interpreter
    code = INTERPRETED.format(seed=seed)
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agree", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 3, 224, 224, 4, 4, 67), (2, 3, 129, 97, 14, 14, 5)], ids=str)
def test_triton_agrees_on_the_device(shape: tuple[int, ...], kind: str) -> None:
    pytest.importorskip("triton")
    for dtype in (F32, BF16):
        images, masks, fill = inputs(shape, kind, dtype)
        images, masks, fill = images.cuda(), masks.cuda(), fill.cuda() if isinstance(fill, Tensor) else fill
        for result in (F32, BF16):
            got = masked_patches(images, masks, shape[4:6], fill, dtype=result, backend="triton")
            want = masked_patches(images, masks, shape[4:6], fill, dtype=result, backend="torch")
            assert got.stride() == want.stride()
            assert torch.equal(got, want)
