"""Each kind of image file, and what comes of it; `python -m pytest tests/test_kinds.py -s -k table` prints the table of docs/data.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kinds import KINDS, Kind

from infoutil_fast.data import decode
from infoutil_fast.data.reading import square
from infoutil_fast.types import InputError, UnreadableError

DOCS = Path(__file__).parents[1] / "docs" / "data.md"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_file_is_read_or_left_out(kind: Kind, tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / f"picture{kind.suffix}"
    expected = kind.write(path, rng)
    if kind.outcome != "read":
        with pytest.raises(UnreadableError, match=rf"picture\{kind.suffix} cannot be read as an image: .*{kind.outcome}") as caught:
            decode.read(path)
        assert "\n" not in str(caught.value)
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # nothing ran, nothing was left behind
        return
    found = decode.read(path)
    assert (found.dtype, found.shape[2]) == (np.uint8, 3)
    assert found.flags.owndata or found.base is not None
    assert decode.short_side(path) == min(found.shape[:2])
    np.testing.assert_array_equal(found, expected)
    assert square(found, 32).shape == (32, 32, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int, tmp_path: Path, rng: np.random.Generator) -> None:
    """A picture stored turned, with the tag that says so, comes back as it was."""
    from PIL import Image

    upright = rng.integers(0, 256, (11, 23, 3), dtype=np.uint8)
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decode.read(tmp_path / "a.png"), upright)


def test_a_disk_that_fails_is_no_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Else a server's hiccup would change the set without a word."""
    kind = next(kind for kind in KINDS if kind.name == "PNG")
    kind.write(tmp_path / "a.png", rng)

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(InputError, match=r"a\.png cannot be opened: Input/output error") as caught:
        decode.read(tmp_path / "a.png")
    assert not isinstance(caught.value, UnreadableError)


def test_a_sliver_is_cut_before_it_is_enlarged(rng: np.random.Generator) -> None:
    """1 x 20,000 px at 224 would be 224 x 4,480,000 whole."""
    sliver = rng.integers(0, 256, (1, 20_000, 3), dtype=np.uint8)
    np.testing.assert_array_equal(square(sliver, 224), np.broadcast_to(sliver[:, 9999:10000], (224, 224, 3)))


def table() -> str:
    rows = ["| file | outcome |", "|---|---|"]
    for kind in KINDS:
        left_out = "left out, " + (f"“{kind.outcome}”" if kind.outcome else "with the decoder's reason")
        rows.append(f"| {kind.name} | {left_out if kind.outcome != 'read' else 'read' + (f', {kind.said}' if kind.said else '')} |")
    return "\n".join(rows)


def test_the_table_in_the_documentation_is_this_one() -> None:
    print(f"\n{table()}")
    missing = [row for row in table().splitlines() if row not in DOCS.read_text("utf-8")]
    assert not missing, "\n".join(missing)
