"""assemble_patterns against a loop over its pixels; then every fast version against the torch body, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infoutil_fast.ops import dispatch
from infoutil_fast.ops.patches import assemble_patterns
from infoutil_fast.types import InputError

F32, BF16 = torch.float32, torch.bfloat16
CPU = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(dispatch.missing("cpp") is not None, reason=f"cpp: {dispatch.missing('cpp')}")),
]
# B, P, M, C, H, W, R, S
SHAPES = [
    (2, 16, 5, 4, 8, 8, 3, 3),
    (1, 2, 3, 3, 7, 11, 3, 5),
    (3, 5, 7, 1, 5, 3, 2, 3),
    (2, 4, 2, 5, 1, 13, 1, 4),
    (2, 3, 3, 2, 13, 1, 4, 1),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (0, 4, 3, 3, 6, 6, 2, 2),
    (2, 4, 0, 3, 6, 6, 2, 2),
]
LAYOUTS = ("channels_last", "contiguous", "sliced")


def inputs(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps in that layout; an index and tables that are not contiguous; block rows and columns in no order, some perhaps of no pixel."""
    B, P, M, C, H, W, R, S = shape
    maps = torch.randn(B * P, C, H, W).to(dtype)
    if layout == "channels_last":
        maps = maps.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        maps = torch.randn(2 * B * P, H + 1, C, W + 2).to(dtype)[::2, 1:, :, 1 : W + 1].transpose(1, 2)
    index = torch.randint(P, (S, R, 2 * M), dtype=torch.int32)[..., ::2].permute(2, 1, 0)
    row, col = (torch.randint(blocks, (2 * side,), dtype=torch.int32)[::2] for blocks, side in ((R, H), (S, W)))
    return maps, index, row, col


def by_pixel(maps: Tensor, index: Tensor, row: Tensor, col: Tensor, images: int) -> Tensor:
    """The definition, a pixel at a time."""
    (rows, C, H, W), M = maps.shape, len(index)
    out = torch.full((images * M, C, H, W), -7.0, dtype=maps.dtype)
    for b in range(images):
        for m in range(M):
            for y in range(H):
                for x in range(W):
                    out[b * M + m, :, y, x] = maps[b * (rows // images) + int(index[m, row[y], col[x]]), :, y, x]
    return out


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_pixel_comes_from_the_pattern_of_its_block(shape: tuple[int, ...], layout: str, backend: str) -> None:
    for dtype in (F32, BF16):
        given = inputs(shape, layout, dtype)
        got = assemble_patterns(*given, images=shape[0], backend=backend)
        assert got.dtype == dtype
        assert got.numel() == 0 or got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got, by_pixel(*given, images=shape[0]))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_pattern_everywhere_gives_that_map(backend: str, dtype: torch.dtype) -> None:
    maps, _, row, col = inputs((3, 6, 1, 5, 7, 9, 2, 3), "channels_last", dtype)
    maps[::2, :, 3] = float("inf")
    maps[1::2, :, 4] = float("nan")  # not computed with: bits are compared
    index = torch.arange(6, dtype=torch.int32)[:, None, None].expand(6, 2, 3)
    got = assemble_patterns(maps, index, row, col, images=3, backend=backend)
    bits = {F32: torch.int32, BF16: torch.int16}[dtype]
    assert torch.equal(got.view(bits), maps.view(bits))


@pytest.mark.parametrize("backend", CPU)
def test_an_image_of_many_bands_is_gathered_whole(backend: str) -> None:
    """16 patterns of 19 rows of 4.6 kB each are more than what C++ keeps in the cache at a time."""
    for layout in LAYOUTS:
        given = inputs((2, 16, 3, 37, 19, 31, 3, 3), layout, F32)
        assert torch.equal(assemble_patterns(*given, images=2, backend=backend), by_pixel(*given, images=2))


@pytest.mark.parametrize("backend", CPU)
def test_out_is_written_and_returned(backend: str) -> None:
    for dtype in (F32, BF16):
        given = inputs((2, 4, 5, 3, 7, 11, 3, 5), "channels_last", dtype)
        out = torch.full((10, 3, 7, 11), float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
        assert assemble_patterns(*given, images=2, out=out, backend=backend) is out
        assert torch.equal(out, by_pixel(*given, images=2))


@pytest.mark.skipif(dispatch.missing("cpp") is not None, reason="extension not built")
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_the_number_of_threads_does_not_change_the_bits(threads: int) -> None:
    given = inputs((3, 16, 13, 8, 17, 19, 3, 3), "channels_last", F32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = assemble_patterns(*given, images=3, backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, assemble_patterns(*given, images=3, backend="torch"))


def test_inputs_are_left_alone_and_no_gradient_is_carried() -> None:
    maps, index, row, col = inputs((2, 3, 4, 3, 5, 5, 2, 2), "contiguous", F32)
    kept = maps.clone()
    got = assemble_patterns(maps.requires_grad_(), index, row, col, images=2)
    assert not got.requires_grad
    assert torch.equal(maps, kept)


MAPS, INDEX = torch.zeros(8, 3, 4, 6), torch.zeros(5, 2, 3, dtype=torch.int32)
ROW, COL = torch.zeros(4, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": MAPS[0]}, r"\[B \* P, C, H, W\] float32 or bfloat16, .*not \[3, 4, 6\] float32"),
        ({"maps": MAPS.double()}, r"not \[8, 3, 4, 6\] float64"),
        ({"maps": MAPS[:, :0]}, r"C, H and W at least 1, not \[8, 0, 4, 6\] float32"),
        ({"images": 3}, r"images must divide the 8 maps.*, not 3"),
        ({"images": 0}, r"not 0"),
        ({"images": -2}, r"not -2"),
        ({"index": INDEX[0]}, r"index must be \[M, R, S\] int32, .*not \[2, 3\] int32"),
        ({"index": INDEX.long()}, r"not \[5, 2, 3\] int64"),
        ({"index": INDEX[:, :0]}, r"R and S at least 1, not \[5, 0, 3\] int32"),
        ({"row": COL}, r"row must be \[4\] int32 for 4x6 maps, not \[6\] int32"),
        ({"col": COL.long()}, r"col must be \[6\] int32 for 4x6 maps, not \[6\] int64"),
        ({"index": INDEX + 4}, r"index must lie in 0 to 3, not 4 to 4"),
        ({"index": INDEX - 1}, r"index must lie in 0 to 3, not -1 to -1"),
        ({"row": ROW + 2}, r"row must lie in 0 to 1, not 2 to 2"),
        ({"col": COL - 1}, r"col must lie in 0 to 2, not -1 to -1"),
        ({"out": torch.empty(10, 3, 4, 6)}, r"in channels_last"),
        ({"out": torch.empty(9, 3, 4, 6, memory_format=torch.channels_last)}, r"\[10, 3, 4, 6\]"),
        (
            {"out": torch.empty(10, 3, 4, 6, dtype=BF16, memory_format=torch.channels_last)},
            r"torch.float32 in channels_last, not .* bfloat16",
        ),
        ({"index": INDEX.to("meta")}, r"index is on meta and maps on cpu"),
        ({"backend": "triton"}, r"assemble_patterns on cpu runs \('torch',.*\), not 'triton'"),
        ({"backend": "fastest"}, r"not 'fastest'"),
    ],
)
def test_wrong_input_is_refused_in_one_line(change: dict, message: str) -> None:
    given = {"maps": MAPS, "index": INDEX, "row": ROW, "col": COL, "images": 2} | change
    with pytest.raises(InputError, match=message) as error:
        assemble_patterns(**given)
    assert "\n" not in str(error.value)


INTERPRETED = """
import itertools, torch
from infoutil_fast.kernels.assemble_patterns import assemble_patterns as kernel
from infoutil_fast.ops import assemble_patterns
from test_assemble_patterns import LAYOUTS, SHAPES, inputs
torch.manual_seed({seed})
shapes = [*SHAPES, (1, 4, 2, 67, 7, 5, 3, 2), (1, 2, 2, 259, 3, 3, 2, 2)]  # the last two have more than one tile of pixels, of channels
for shape, layout, dtype in itertools.product(shapes, LAYOUTS, (torch.float32, torch.bfloat16)):
    given = inputs(shape, layout, dtype)
    got = kernel(*given, images=shape[0], out=None)
    want = assemble_patterns(*given, images=shape[0], backend="torch")
    assert got.dtype == want.dtype and got.stride() == want.stride() and torch.equal(got, want), (shape, layout, dtype)
print("agree")
"""


def test_triton_agrees_under_the_interpreter(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel's module is imported, hence the second interpreter
    code = INTERPRETED.format(seed=seed)
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agree", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 16, 67, 128, 28, 28, 3, 3), (2, 16, 5, 259, 13, 17, 7, 7)], ids=str)
def test_triton_agrees_on_the_device(shape: tuple[int, ...], layout: str) -> None:
    pytest.importorskip("triton")
    for dtype in (F32, BF16):
        given = [tensor.cuda() for tensor in inputs(shape, layout, dtype)]
        got = assemble_patterns(*given, images=shape[0], backend="triton")
        want = assemble_patterns(*given, images=shape[0], backend="torch")
        assert got.stride() == want.stride()
        assert torch.equal(got, want)
