"""Published lists of ImageNet classes by WordNet id. Each was found equal in two public sources at least; others are not here.

Classes of a subset are in the order of their ids, as an image folder of them has it; the order of the published list is in `LISTS`.
"""

from __future__ import annotations

from infoutil_fast.types import InputError

NETTE = "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257"
WOOF = "n02096294 n02093754 n02111889 n02088364 n02086240 n02089973 n02087394 n02115641 n02099601 n02105641"
MEOW = "n02123045 n02123159 n02123394 n02123597 n02124075 n02129165 n02129604 n02128925 n02128757 n02127052"
SQUAWK = "n01806143 n02007558 n01818515 n02051845 n02056570 n01614925 n01843383 n01518878 n01860187 n01819313"
FRUIT = "n07753275 n07753592 n07745940 n07747607 n07749582 n07768694 n07753113 n07720875 n07718472 n07742313"
YELLOW = "n02206856 n12057211 n07753592 n07749582 n12144580 n04146614 n03530642 n02129165 n01773157 n01531178"
GLAD_A = "n02111129 n02489166 n11879895 n02457408 n03042490 n12057211 n02342885 n03447447 n02071294 n02013706"
GLAD_B = "n02006656 n06359193 n01820546 n02116738 n13044778 n04487081 n01872401 n02112018 n03841143 n02025239"
GLAD_C = "n03393912 n01833805 n03344393 n03208938 n01828970 n02606052 n02129165 n02017213 n02280649 n01531178"
GLAD_D = "n01518878 n02111889 n01534433 n02112706 n01592084 n02389026 n02276258 n01622779 n01829413 n02277742"
GLAD_E = "n04277352 n01843383 n01860187 n02056570 n03992509 n03924679 n04153751 n01774750 n03857828 n02281787"
CMC = (
    "n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797 "
    "n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653 "
    "n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531 "
    "n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855 "
    "n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051 "
    "n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868 "
    "n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322 "
    "n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029 "
    "n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045 "
    "n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622"
)
SCAN = (
    "n01558993 n01601694 n01669191 n01751748 n01755581 n01756291 n01770393 n01855672 n01871265 n02018207 "
    "n02037110 n02058221 n02087046 n02088632 n02093256 n02093754 n02094114 n02096177 n02097130 n02097298 "
    "n02099267 n02100877 n02104365 n02105855 n02106030 n02106166 n02107142 n02110341 n02114855 n02120079 "
    "n02120505 n02125311 n02128385 n02133161 n02277742 n02325366 n02364673 n02484975 n02489166 n02708093 "
    "n02747177 n02835271 n02906734 n02909870 n03085013 n03124170 n03127747 n03160309 n03255030 n03272010 "
    "n03291819 n03337140 n03450230 n03483316 n03498962 n03530642 n03623198 n03649909 n03710721 n03717622 "
    "n03733281 n03759954 n03775071 n03814639 n03837869 n03838899 n03854065 n03929855 n03930313 n03954731 "
    "n03956157 n03983396 n04004767 n04026417 n04065272 n04200800 n04209239 n04235860 n04311004 n04325704 "
    "n04336792 n04346328 n04380533 n04428191 n04443257 n04458633 n04483307 n04509417 n04515003 n04525305 "
    "n04554684 n04591157 n04592741 n04606251 n07583066 n07613480 n07693725 n07711569 n07753592 n11879895"
)

# name/version: (ids in the published order, where it is from)
LISTS: dict[str, tuple[tuple[str, ...], str]] = {
    f"{name}/{version}": (tuple(ids.split()), origin)
    for name, version, ids, origin in (
        ("imagenette", "fastai", NETTE, "MTT and Minimax too"),
        ("imagewoof", "fastai", WOOF, "MTT and Minimax too"),
        ("imagemeow", "mtt", MEOW, "MTT; GLaD's cats"),
        ("imagesquawk", "mtt", SQUAWK, "MTT; GLaD's birds"),
        ("imagefruit", "mtt", FRUIT, "MTT; GLaD's fruits"),
        ("imageyellow", "mtt", YELLOW, "MTT, GLaD"),
        ("imagenet-a", "glad", GLAD_A, "GLaD; not the adversarial test set of that name"),
        ("imagenet-b", "glad", GLAD_B, "GLaD"),
        ("imagenet-c", "glad", GLAD_C, "GLaD; not the corrupted test set of that name"),
        ("imagenet-d", "glad", GLAD_D, "GLaD"),
        ("imagenet-e", "glad", GLAD_E, "GLaD"),
        ("imagenet-10", "idc", " ".join(CMC.split()[:10]), "IDC, Minimax: the first ten of imagenet-100/cmc"),
        ("imagenet-100", "cmc", CMC, "CMC; IDC, Minimax, solo-learn"),
        ("imagenet-100", "scan", SCAN, "SCAN, MV-MR; shares 12 classes with cmc"),
    )
}
ALIASES = {"imagenet-nette": "imagenette", "imagenet-woof": "imagewoof", "imagenet-cats": "imagemeow", "imagenet-birds": "imagesquawk"}
ALIASES |= {"imagenet-fruits": "imagefruit", "imagenet-yellow": "imageyellow"}


def subset(name: str) -> tuple[str, tuple[str, ...]]:
    """The full name (name/version) of a list, and its ids ascending. The version may be left out where only one is known.

    Raises `InputError` with the known names, and with the versions where a name has several.
    """
    base, _, version = name.lower().partition("/")
    base = ALIASES.get(base, base)
    full = [known for known in LISTS if known.partition("/")[0] == base and version in ("", known.partition("/")[2])]
    if not full:
        raise InputError(f"no list of ImageNet classes is called {name!r}; known: {', '.join(LISTS)}")
    if len(full) > 1:
        told = "; ".join(f"{known} ({LISTS[known][1]})" for known in full)
        raise InputError(f"{name!r} is the name of {len(full)} lists that differ: say which, {told}")
    return full[0], tuple(sorted(LISTS[full[0]][0]))
