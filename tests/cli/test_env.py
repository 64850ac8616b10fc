"""``env`` and the command line's own help."""

import builtins
import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import Result

import skipkernels

Run = Callable[..., Result]


def test_env_names_what_is_usable(run: Run) -> None:
    result = run("env")
    assert result.exit_code == 0
    for part in (
        skipkernels.__version__,
        "executors",
        "instruction sets",
        "generic",
        "torch",
        "huge pages",
        "plot",
        "if_node",
    ):
        assert part in result.stdout


def test_env_names_the_extra_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipkernels.cli.env.find_spec", lambda name: None)
    assert "pip install skipkernels[plot]" in " ".join(run("env").stdout.split())


def test_env_as_json(run: Run) -> None:
    values = json.loads(run("env", "--json").stdout)
    assert values["skipkernels"]["executors"] == ["cpu", "graph", "reference"]
    assert values["machine"]["processors usable"] >= 1
    assert set(values["extras"]) == {"triton", "plot", "bench", "test"}
    assert values["gpu"]["kernels cuda"].startswith(("usable", "not usable: "))


def test_env_says_why_the_extension_is_not_usable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "skipkernels" and rest[2] and "_C" in rest[2]:
            raise ImportError("libstdc++.so.6: version missing")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    values = json.loads(run("env", "--json").stdout)
    assert values["skipkernels"]["executors"] == ["reference"]
    assert "version missing" in values["skipkernels"]["extension"]


def test_help_and_version(run: Run) -> None:
    assert run("--version").stdout == f"skipkernels {skipkernels.__version__}\n"
    for words in ([], ["--help"], ["-h"]):
        result = run(*words)
        assert result.exit_code == 0
        for command in ("generate", "calibrate", "trace", "demo", "env"):
            assert command in result.stdout
