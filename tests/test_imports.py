"""Imports run one way, and importing the package costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import skipkernels

PACKAGE = Path(skipkernels.__file__).parent
# a room may import from itself and from the rooms before it
ROOMS = [
    "errors",
    "support",
    "modality",  # this early: it knows no model and no HTTP
    "demo",
    "skipping",
    "model",
    "program",
    "kernels",
    "executors",
    "decoding",
    "engine",
    "calibration",
    "methods",
    "integrations",
    "evaluation",
    "chat",
    "workloads",
    "server",
    "benchmark",
    "cli",
]
FLOOR = {"_C", "__version__"}  # of the package itself, for everybody
DOORS = {"", "__main__"}  # what stands above all rooms: the package's public names, and python -m skipkernels
RANK = {room: rank for rank, room in enumerate(ROOMS)}


def modules() -> list[str]:
    """All modules without the package's name, which is the empty one."""
    paths = (path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in paths)


def rank(module: str) -> int:
    return RANK.get(module.partition(".")[0], len(ROOMS))


def imported(tree: ast.AST) -> set[str]:
    """What a source imports of this package, wherever in it, for type checking too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "skipkernels":
                found |= {alias.name for alias in node.names} - FLOOR
            elif node.module and node.module.startswith("skipkernels."):
                found.add(node.module.removeprefix("skipkernels."))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "skipkernels"]
            found |= {name.removeprefix("skipkernels").removeprefix(".") for name in names}
    return found


def against_the_order(module: str, tree: ast.AST) -> set[str]:
    return {other for other in imported(tree) if rank(other) > rank(module)}


@pytest.mark.parametrize("module", [module for module in modules() if module not in DOORS])
def test_imports_run_one_way(module: str) -> None:
    base = PACKAGE.joinpath(*module.split("."))
    source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    against = against_the_order(module, ast.parse(source.read_text(encoding="utf-8")))
    assert not against, f"{module} imports {', '.join(sorted(against))}, whose rooms come after its own"


@pytest.mark.parametrize(
    "line",
    [
        "from skipkernels.engine import Engine",
        "from skipkernels import Engine",
        "from skipkernels import engine",
        "import skipkernels",
        "import skipkernels.cli.app",
        "def later():\n    from skipkernels.server.http.app import create_app",
    ],
)
def test_an_import_against_the_order_is_seen(line: str) -> None:
    assert against_the_order("modality.scheduler", ast.parse(line))


def test_every_module_is_in_a_room_and_every_room_is_there() -> None:
    rooms = {module.partition(".")[0] for module in modules() if module not in DOORS}
    assert rooms == set(ROOMS)


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, skipkernels; print('torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", [name for name in skipkernels.__all__ if name != "__version__"])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(skipkernels, name).__name__ == name
