"""Every example of README.md and docs/ runs: the Python of a page as one session, its commands in one folder."""

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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from tests.processes import run_command, run_script

ROOT = Path(__file__).resolve().parent.parent
PORT = "8000"
HEALTH = f"curl -s http://127.0.0.1:{PORT}/health"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, flags=re.MULTILINE | re.DOTALL)

    @cached_property
    def commands(self) -> list[str]:
        lines = [line for block in self.blocks("console") for line in block.splitlines()]
        return [line.removeprefix("$ ") for line in lines if line[:2] == "$ "]

    @cached_property
    def servers(self) -> list[tuple[str, list[str]]]:
        """Each server that the page starts, with the requests it makes of that server."""
        found: list[tuple[str, list[str]]] = []
        for command in self.commands:
            if command.startswith("skipkernels serve "):
                found.append((command, []))
            elif command.startswith("curl "):
                found[-1][1].append(command)
        return found

    @cached_property
    def make(self) -> list[str]:
        return [command for command in self.commands if command.startswith("make ")]

    @cached_property
    def skipkernels(self) -> list[str]:
        served = dict(self.servers)
        return [command for command in self.commands if command.startswith("skipkernels ") and command not in served]


PAGES = [Page(path) for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))]


def of_pages(kind: str) -> list[object]:
    found = []
    for page in PAGES:
        for item in getattr(page, kind):
            command = item[0] if isinstance(item, tuple) else item
            marks = [pytest.mark.slow] if "--ray" in command else []  # a minute, most of which Ray takes to start
            found.append(pytest.param(page, item, id=f"{page.name}: {command}", marks=marks))
    return found


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    """One folder for all commands of a page: some read what others wrote."""
    folders: dict[str, Path] = {}
    return lambda page: folders.setdefault(page.name, tmp_path_factory.mktemp(page.path.stem))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_of_a_kind_that_is_tested(page: Page):
    requests = [request for _, made in page.servers for request in made]
    assert set(page.commands) == {*page.make, *page.skipkernels, *dict(page.servers), *requests}


def test_all_kinds_of_examples_are_there():
    readme = PAGES[0]
    assert readme.make
    assert readme.skipkernels
    assert any(page.servers for page in PAGES)


def test_the_readme_can_be_read_in_one_sitting():
    assert len(PAGES[0].text.splitlines()) <= 200


@pytest.mark.parametrize("page", [page for page in PAGES if page.blocks("python")], ids=lambda page: page.name)
def test_python_examples_run_in_one_session(page: Page, tmp_path):
    session = tmp_path / "session.py"
    session.write_text("\n".join(page.blocks("python")), encoding="utf-8")
    result = run_script([str(session)], tmp_path, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert "404" not in session.read_text(encoding="utf-8") or "Not Found" in result.stdout


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory):
    """The folder that a calibration has filled. It takes a minute, and several pages show the same command, some with
    one more option at its end: the longest is run for all."""
    folders: dict[str, Path] = {}
    shown = [command for page in PAGES for command in page.skipkernels]

    def run_once(command: str) -> Path:
        longest = max((other for other in shown if other.startswith(command)), key=len)
        if longest not in folders:
            folder = tmp_path_factory.mktemp("calibrated")
            run(longest, folder)
            folders[longest] = folder
        return folders[longest]

    return run_once


def run(command: str, folder: Path) -> None:
    result = run_command(shlex.split(command)[1:], folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize(("page", "command"), of_pages("skipkernels"))
def test_command_runs(page: Page, command: str, folder_of, calibrated):
    if command.startswith("skipkernels calibrate "):
        shutil.copytree(calibrated(command), folder_of(page), dirs_exist_ok=True)
    else:
        run(command, folder_of(page))


@pytest.mark.parametrize(("page", "server"), of_pages("servers"))
def test_server_answers(page: Page, server: tuple[str, list[str]], folder_of, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command, requests = server
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            shlex.split(command.replace(PORT, port)), cwd=folder_of(page), stderr=stderr, env=ENVIRONMENT
        )
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


@pytest.mark.parametrize(("page", "command"), of_pages("make"))
def test_make_target_exists(page: Page, command: str):
    result = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.text)
    for target in targets:
        assert target.startswith("https://") or (page.path.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_text_exist(page: Page):
    named = re.findall(r"`((?:bench|csrc|docs|skipkernels|tests)/[\w./-]+\.\w+)`", page.text)
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed (extra: docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "site" / "your-model" / "index.html").exists()
