"""Imports point down, in no circle: read from the syntax trees, also those inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the top. A module may import what stands on a lower line, or beside it if that makes no circle. A name includes its submodules.
ORDER = """
__main__
cli
benchmarks
pipeline
methods
scoring selection synthesis
training
contract
sets
models
data images influence
gradnorm shapley pixels
ops runtime
drawing
kernels
ranges
types _version
""".strip().splitlines()
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line.split()}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    package = {str(path.relative_to(ROOT / "infoutil_fast")): path for path in (ROOT / "infoutil_fast").rglob("*.py")}
    kernels = {f"kernels/{path.name}": path for path in (ROOT / "kernels").glob("*.py")}
    names = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for name, path in {**package, **kernels}.items()}
    names.pop("__init__")  # the public names: imports what they are
    return names


def imported(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, by their dotted names below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "infoutil_fast":
                dotted = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
                found.update([module for module in dotted if module in known][:1])
    return found


GRAPH = {name: imported(path, set(modules())) - {name} for name, path in modules().items()}


def level(module: str) -> int:
    return LEVEL[module.partition(".")[0]]


def test_every_module_has_a_place_in_the_order() -> None:
    assert {name.partition(".")[0] for name in GRAPH} <= LEVEL.keys()


def test_imports_point_down() -> None:
    up = [f"{name} imports {other}" for name, others in GRAPH.items() for other in others if level(other) < level(name)]
    assert not up, up


def test_no_circles() -> None:
    left = {name: set(others) for name, others in GRAPH.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in or above a circle: {left}"


def test_the_graph_is_not_empty() -> None:
    assert "ops.dispatch" in GRAPH["ops.patches"]
    assert "types" in GRAPH["ops.dispatch"]


def test_the_package_imports_triton_only_in_its_kernels() -> None:
    for name, path in modules().items():
        if name.partition(".")[0] != "kernels":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
                assert not any(n.split(".")[0] == "triton" for n in names), f"{path}:{node.lineno}"
