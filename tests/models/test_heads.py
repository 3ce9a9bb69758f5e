"""Which output of a head belongs to which class folder."""

import sys

import pytest
import torch
from torchvision_placeholders import package

from infoutil_fast.models import heads
from infoutil_fast.types import InputError


def test_the_built_in_ids_are_timms() -> None:
    known = package("timm.data").ImageNetInfo().label_names()
    assert len(heads.KNOWN_WNIDS) == 20
    assert all(known[place] == wnid for wnid, place in heads.KNOWN_WNIDS.items())


def test_any_imagenet_id_is_found_with_timm_and_refused_without(monkeypatch: pytest.MonkeyPatch) -> None:
    package("timm")
    assert heads.class_outputs("net", 1000, ["n15075141", "n01440764"]) == [999, 0]
    assert heads.class_outputs("net", 21841, ["n00004475"]) == [0]
    with pytest.raises(InputError, match=r"no output is known for 1 of them \(n99999999\)"):
        heads.class_outputs("net", 1000, ["n01440764", "n99999999"])
    monkeypatch.setitem(sys.modules, "timm.data", None)
    assert heads.class_outputs("net", 1000, ["n02086240", "n01440764"]) == [155, 0]
    with pytest.raises(InputError, match=r"with timm \(pip install 'infoutil_fast\[vision\]'\)"):
        heads.class_outputs("net", 1000, ["n15075141", "n01440764"])


def test_all_folders_are_found_by_sorting_and_other_names_stay_in_their_order() -> None:
    ids = [f"n{i:08d}" for i in torch.randperm(1000).tolist()]
    assert heads.class_outputs("net", 1000, ids) == [int(wnid[1:]) for wnid in ids]
    assert heads.class_outputs("net", 3, ["zebra", "ant", "cat"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("classes", "index", "says"),
    [
        ([f"c{i}" for i in range(7)], None, r"net has 1000 outputs, the source has 7 classes \(c0, c1, c2, \.\.\.\)"),
        ([], None, "has 0 classes"),
        (["n01440764", "tench"], None, "has 2 classes"),
        (["n01440764", "n01440764"], None, "each class needs an output of its own"),
        (["a", "b"], {"a": 1}, r"no output is known for 1 of them \(b\)"),
        (["a", "b"], {"a": 1, "b": 1000}, r"in 0\.\.999"),
        (["a", "b"], {"a": -1, "b": 3}, r"in 0\.\.999"),
    ],
)
def test_classes_without_an_output_of_their_own_are_refused(classes: list[str], index: dict[str, int] | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        heads.class_outputs("net", 1000, classes, index)
