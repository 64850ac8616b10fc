"""Imports run one way, and importing the package costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import skipkernels

PACKAGE = Path(skipkernels.__file__).parent
# each room may import from the rooms before it
ROOMS = [
    ["errors", "machine"],
    ["files", "config", "generation", "policy", "ops.philox", "fingerprint", "turns"],
    ["policy_file", "prompt", "prompts", "shards", "module_check", "weights", "state", "text", "checkpoint"],
    ["ops.table", "ops.reference", "ops"],
    ["program", "prefill"],
    ["executors"],
    ["decoding"],
    ["engine"],
]
RANK = {module: rank for rank, modules in enumerate(ROOMS) for module in modules}


def modules() -> list[str]:
    return sorted(
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    )


def rank(module: str) -> int:
    """Of the module or the room it is in; the doors (cli, integrations ...) come last."""
    while module not in RANK and "." in module:
        module = module.rpartition(".")[0]
    return RANK.get(module, len(ROOMS))


def imported(module: str) -> set[str]:
    base = PACKAGE.joinpath(*module.split("."))
    source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("skipkernels."):
            found.add(node.module.removeprefix("skipkernels."))
    return found


@pytest.mark.parametrize("module", [module for module in modules() if rank(module) < len(ROOMS)])
def test_imports_run_one_way(module: str) -> None:
    against = {other for other in imported(module) if rank(other) > rank(module)}
    assert not against, f"{module} imports {', '.join(sorted(against))}, which stand above it"


def test_every_module_of_the_core_has_its_room() -> None:
    assert set(RANK) <= set(modules())


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, skipkernels; print('torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", [name for name in skipkernels.__all__ if name != "__version__"])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(skipkernels, name).__name__ == name
