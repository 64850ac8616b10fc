"""Text that every Python installation has: the documentation inside the standard library.

Documents are the language reference topics of ``pydoc``, the docstrings of every module, class and function of the
library, and the licence. Nothing is imported to find them except the built-in modules, whose docstrings have no source.
"""

import ast
import hashlib
import importlib
import inspect
import pydoc_data.topics
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_CHARACTERS = 60
HELD_OUT_SHARE = 0.02
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, none of them in both parts."""

    train: list[str]
    held_out: list[str]


def build_corpus(library: Path | None = None, pause: Callable[[], None] = lambda: None) -> Corpus:
    """Collect the documents below ``library`` (default: the running Python's) and split them by the hash of their body.

    A document is a heading and a body; of documents with the same body only the first is kept. ``pause`` is called
    between two documents.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    headings: dict[str, str] = {}
    for heading, body in _documents(library):
        pause()
        if len(body) >= MIN_CHARACTERS:
            headings.setdefault(body, heading)
    corpus = Corpus(train=[], held_out=[])
    for body, heading in headings.items():
        part = corpus.held_out if _unit_hash(body) < HELD_OUT_SHARE else corpus.train
        part.append(f"{heading}\n{body}")
    return corpus


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


def _documents(library: Path) -> Iterator[tuple[str, str]]:
    for name, topic in pydoc_data.topics.topics.items():
        yield f"topic {name}", topic.strip()
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            yield from _docstrings(path)
    for name in sys.builtin_module_names:
        yield from _compiled_docstrings(name)
    yield "licence", (library / "LICENSE.txt").read_text(encoding="utf-8").strip()


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The signature and the docstring of every documented definition in a source file."""
    try:
        with warnings.catch_warnings(action="ignore"):
            module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # files kept broken on purpose
        return
    for node in ast.walk(module):
        if isinstance(node, Definition) and (docstring := ast.get_docstring(node)):
            yield _signature(node, path), docstring


def _signature(node: Definition, path: Path) -> str:
    if isinstance(node, ast.Module):
        return f"module {path.stem}"
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}({', '.join(map(ast.unparse, node.bases))})"
    return f"def {node.name}({ast.unparse(node.args)})"


def _compiled_docstrings(module_name: str) -> Iterator[tuple[str, str]]:
    """The name and the docstring of every public callable in a built-in module, methods of its classes included."""
    module = importlib.import_module(module_name)
    for owner in (module, *(value for _, value in inspect.getmembers(module, inspect.isclass))):
        for name, value in inspect.getmembers(owner):
            docstring = inspect.getdoc(value) if callable(value) else None
            if docstring and not name.startswith("_"):
                yield name, docstring
