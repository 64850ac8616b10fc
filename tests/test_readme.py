"""Every example of the README runs: its Python as one session, its commands in one shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line[:2] == "$ "]


def servers() -> list[tuple[str, list[str]]]:
    """Each server that the README starts, with the requests it makes of that server."""
    found: list[tuple[str, list[str]]] = []
    for command in commands():
        if command.startswith("skipkernels serve "):
            found.append((command, []))
        elif command.startswith("curl "):
            found[-1][1].append(command)
    return found


MAKE = [command for command in commands() if command.startswith("make ")]
SERVERS = servers()
SKIPKERNELS = [command for command in commands() if command.startswith("skipkernels ") and command not in dict(SERVERS)]
PORT = "8000"
HEALTH = f"curl -s http://127.0.0.1:{PORT}/health"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_every_command_is_of_a_kind_that_is_tested():
    assert MAKE
    assert SKIPKERNELS
    assert SERVERS
    requests = [request for _, made in SERVERS for request in made]
    assert set(commands()) == {*MAKE, *SKIPKERNELS, *dict(SERVERS), *requests}


def test_python_examples_run_in_one_session(tmp_path):
    session = tmp_path / "session.py"
    session.write_text("\n".join(blocks("python")), encoding="utf-8")
    result = subprocess.run([sys.executable, session], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "Not Found" in result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all commands: some read what others wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", SKIPKERNELS)
def test_command_runs(command, folder):
    result = subprocess.run(
        shlex.split(command), cwd=folder, capture_output=True, text=True, timeout=280, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize(("server", "requests"), SERVERS, ids=[server for server, _ in SERVERS])
def test_server_answers(server, requests, folder, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(shlex.split(server.replace(PORT, port)), cwd=folder, stderr=stderr, env=ENVIRONMENT)
    try:
        while f"http://127.0.0.1:{port}/v1" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        for request in [*requests, HEALTH]:
            answer = subprocess.run(
                shlex.split(request.replace(PORT, port)), capture_output=True, text=True, timeout=60, check=True
            )
            assert answer.stdout
            assert '"error"' not in answer.stdout
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 0, log.read_text()


@pytest.mark.parametrize("command", MAKE)
def test_make_target_exists(command):
    result = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
