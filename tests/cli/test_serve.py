"""``serve``: the bundled model over HTTP, from a command line to SIGTERM."""

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image as PillowImage
from typer.testing import Result

from skipkernels import Engine
from skipkernels.chat.chat_profile import Effort
from skipkernels.demo import demo_model_path
from skipkernels.modality.profile_file import load_profile
from skipkernels.server.http.service import Service
from tests.chat.multimodal.chats import picture
from tests.cli.test_errors import assert_one_line
from tests.multimodal import tiny_multimodal
from tests.server.http.media import image_part

Run = Callable[..., Result]
QUESTION = "Q: What is the reason phrase of HTTP status 404?\nA:"
WORDS = ["--threads", "1", "--skip-levels", "0,0.2", "--max-batch-size", "4", "--port", "0"]
QUICKEST = Effort(passages=4, rounds=2, batch_sizes=(1,), memory=False)
KEY = {"authorization": "Bearer the key"}


@dataclass
class Process:
    """A running server."""

    popen: "subprocess.Popen[str]"
    url: str
    said: list[str]  # on stderr

    def stop(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(60)

    def post(self, prompt: str = QUESTION, **fields: Any) -> httpx.Response:
        asked = {"model": "demo", "messages": [{"role": "user", "content": prompt}]} | fields
        return httpx.post(f"{self.url}/chat/completions", json=asked, headers=KEY, timeout=60)


@contextlib.contextmanager
def serving(*words: str, until: str = "serving ") -> Iterator[Process]:
    """Starts ``serve`` and waits until it says where, or something later."""
    command = [sys.executable, "-c", "from skipkernels.cli import main; main()", "serve", *words]
    cache = tempfile.mkdtemp()  # nobody's profile is there
    environment = os.environ | {"SKIPKERNELS_API_KEY": "the key", "COLUMNS": "100", "XDG_CACHE_HOME": cache}
    said: list[str] = []
    started = threading.Event()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as popen:

        def listen() -> None:
            for line in popen.stderr or []:
                said.append(line)
                if until in line:
                    started.set()
            started.set()

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            assert started.wait(300), said
            urls = [line.split()[3].rstrip(",") for line in said if line.startswith("serving ")]
            assert urls, "".join(said)
            yield Process(popen, urls[0], said)
        finally:
            popen.kill()
            listener.join(60)
            shutil.rmtree(cache)


@pytest.fixture(scope="module")
def server(prose: str) -> Iterator[Process]:
    with serving("demo", "--text", prose, *WORDS, until="measured in idle time") as process:
        yield process
        assert process.stop() == 0
    assert process.said[-1] == "stopped\n"


def dense_text(prompt: str, **options: Any) -> str:
    return Engine.from_pretrained(demo_model_path(), num_threads=1).generate(prompt, **options)[0].text


def promised_by_dense(server: Process) -> float:
    """Asking for this leaves no strategy but the dense one."""
    (model,) = httpx.get(f"{server.url}/models", headers=KEY).json()["data"]
    assert model["id"] == "demo"
    promises = {entry["strategy"]: entry["promised_accuracy"] for entry in model["skipkernels"]["strategies"]}
    assert set(promises) == {"text@0", "text@0.2"}
    return float(promises["text@0"])


def test_what_takes_long_is_named_where_there_is_no_terminal(server: Process) -> None:
    lines = [line.rstrip() for line in server.said]
    assert lines.index("loading demo ...") < lines.index("timing the dense model ...")
    assert lines[0] == "loading demo ...", "before anything else"


def test_it_listens_on_loopback_and_wants_the_key(server: Process) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert httpx.get(f"{server.url}/models").status_code == 401


def test_the_dense_answer_is_the_engines(server: Process) -> None:
    response = server.post(min_accuracy=promised_by_dense(server), max_tokens=16, stop="\n", deadline_ms=60_000)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["choices"][0]["message"]["content"].strip() == "Not Found"
    assert answer["choices"][0]["message"]["content"] == dense_text(QUESTION, max_new_tokens=16, stop=["\n"])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["skipkernels"]["strategy"] == "text@0"
    assert answer["skipkernels"]["deadline_met"]
    assert answer["usage"]["prompt_tokens"] > 10


def test_a_stream_comes_token_by_token(server: Process) -> None:
    options = {"min_accuracy": promised_by_dense(server), "stream": True, "stream_options": {"include_usage": True}}
    response = server.post("The interpreter", max_tokens=40, **options)
    *chunks, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    documents = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    pieces = [choice["delta"].get("content", "") for document in documents for choice in document["choices"]]
    assert "".join(pieces) == dense_text("The interpreter", max_new_tokens=40)
    assert len([piece for piece in pieces if piece]) > 30
    assert documents[-1]["usage"]["completion_tokens"] == 40


def test_what_is_exact_by_construction_promises_all(server: Process) -> None:
    assert promised_by_dense(server) == 1.0
    answer = server.post(min_accuracy=1, max_tokens=4).json()
    assert answer["skipkernels"] | {"strategy": "text@0", "promised_accuracy": 1.0} == answer["skipkernels"]


def test_a_second_server_on_the_port_is_refused_before_it_loads(run: Run, server: Process) -> None:
    port = server.url.split(":")[2].split("/")[0]
    assert_one_line(run("serve", "no such model", "--port", port), 1, "Address already in use")


def test_a_profile_measured_in_idle_time_is_kept(
    run: Run, checkpoint: str, prose: str, service: list[Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Until it is there, the dense model is served, with a promise that holds by construction."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("skipkernels.chat.chat_profile.IDLE", QUICKEST)
    words = ["serve", checkpoint, *WORDS, "--served-model-name", "mine"]
    measured: list[Path] = []

    def serve(service: Service, *_: object, on_started: Callable[[], None], **__: object) -> None:
        async def started() -> None:
            on_started()
            while not measured:
                measured.extend(tmp_path.glob("skipkernels/profiles/*.json"))
                await asyncio.sleep(0.01)
            while len(service.profile.strategies) == 1:
                await asyncio.sleep(0.01)

        assert [entry.promised_accuracy for entry in service.profile.strategies] == [1.0]
        asyncio.run(started())

    with monkeypatch.context() as patch:
        patch.setattr("skipkernels.server.http.server.serve", serve)
        first = run(*words, "--text", prose)
    assert first.exit_code == 0, first.output
    assert "2 strategies measured in idle time" in first.stderr
    second = run(*words)
    assert second.exit_code == 0, second.output
    assert service[0].profile.strategies == load_profile(measured[0]).strategies
    assert service[0].profile.model == "mine"


def test_a_prompt_that_does_not_fit_is_refused(server: Process) -> None:
    response = server.post("import " * 2000)
    assert response.status_code == 400
    assert "this model takes 1024" in response.json()["error"]["message"]


def test_sigterm_waits_for_every_accepted_request(prose: str) -> None:
    with serving("demo", "--text", prose, *WORDS) as server, ThreadPoolExecutor(12) as clients:
        asking = [
            clients.submit(server.post, f"def f{number}(", max_tokens=300, stream=number % 2 == 0)
            for number in range(12)
        ]
        metrics = ""
        while "jobs_accepted_total 12.0" not in metrics:
            metrics = httpx.get(f"{server.url.removesuffix('/v1')}/metrics", headers=KEY).text
        assert server.stop() == 0
        for number, answer in enumerate(asking):
            response = answer.result()
            assert response.status_code == 200, response.text
            assert number % 2 or response.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in response.text
    draining, last = server.said[-2:]
    # some may have ended between the count and the signal
    said = r"draining: (\d+ requests are|1 request is) running, for 30 s at most; a second signal ends them at once\n"
    assert re.fullmatch(said, draining)
    assert last == "stopped\n"


@pytest.mark.slow
def test_the_model_on_ray_answers_the_same(prose: str) -> None:
    words = ["demo", "--text", prose, *WORDS, "--ray", "--replicas", "2"]
    with serving(*words) as server:
        response = server.post(min_accuracy=promised_by_dense(server), max_tokens=16, stop="\n")
        assert response.json()["choices"][0]["message"]["content"].strip() == "Not Found"
        metrics = httpx.get(f"{server.url.removesuffix('/v1')}/metrics", headers=KEY).text
        assert "num_workers 2.0" in metrics
        assert server.stop() == 0
    assert server.said[-1] == "stopped\n"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    """What would have been served."""
    served: list[Service] = []
    monkeypatch.setattr("skipkernels.server.http.server.serve", lambda service, *_, **__: served.append(service))
    return served


def served_words(checkpoint: str, prose: str, *more: str) -> Sequence[str]:
    return ["serve", checkpoint, "--text", prose, *WORDS, *more]


def test_a_profile_is_measured_once(run: Run, checkpoint: str, prose: str, service: list[Service]) -> None:
    words = served_words(checkpoint, prose, "--profile", "profile.json", "--max-batch-size", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipkernels.chat.chat_profile.THOROUGH", QUICKEST)
        first = run(*words)
        assert first.exit_code == 0, first.output
    assert "wrote profile.json" in first.stderr
    assert not Path("profile.journal").exists()
    written = Path("profile.json").read_text()
    second = run(*words, "--max-requests", "7")
    assert second.exit_code == 0, second.output
    assert Path("profile.json").read_text() == written
    assert service[1].profile.strategies == load_profile("profile.json").strategies
    assert service[1].profile.model == Path(checkpoint).name
    assert service[1].limits.max_requests == 7


def test_a_level_that_saves_no_time_is_named_at_the_start(
    run: Run, checkpoint: str, prose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = served_words(checkpoint, prose, "--profile", "profile.json")
    monkeypatch.setattr("skipkernels.chat.chat_profile.THOROUGH", QUICKEST)
    monkeypatch.setattr("skipkernels.server.http.server.serve", lambda *_, on_started, **__: on_started())
    assert run(*words).exit_code == 0
    document = json.loads(Path("profile.json").read_text())
    for ms, said in ((542.0, True), (300.0, False)):
        for entry in document["strategies"]:
            for timing in entry["timings"]:
                timing["median_ms"] = timing["p95_ms"] = 476.0 if entry["strategy"] == "text@0" else ms
        Path("profile.json").write_text(json.dumps(document))
        lines = run(*words).stderr.splitlines()
        assert [line.startswith("text@0.2 is not chosen by the server") for line in lines].count(True) == said


def test_another_models_profile_is_refused(run: Run, checkpoint: str, prose: str, service: list[Service]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipkernels.chat.chat_profile.THOROUGH", QUICKEST)
        assert run(*served_words(checkpoint, prose, "--profile", "profile.json")).exit_code == 0
    words = served_words(checkpoint, prose, "--profile", "profile.json", "--skip-levels", "0,0.1")
    assert_one_line(run(*words), 1, "profile.json", "fingerprint")


def image_chat(text: str, seed: int) -> list[dict[str, Any]]:
    file = io.BytesIO()
    PillowImage.fromarray(picture(seed=seed).pixels).save(file, "PNG")
    return [{"role": "user", "content": [{"type": "text", "text": text}, image_part(file.getvalue())]}]


@pytest.fixture
def llava(tmp_path: Path) -> str:
    """A checkpoint that sees."""
    folder = tmp_path / "llava"
    for part in tiny_multimodal("llava"):
        part.save_pretrained(folder)
    return str(folder)


def test_a_multimodal_model_drops_the_image_for_a_deadline(
    run: Run, llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, profile = tmp_path / "samples.jsonl", tmp_path / "profile.json"
    samples.write_text("".join(json.dumps({"messages": image_chat("What?", seed)}) + "\n" for seed in range(3)))
    words = [llava, "--profile", str(profile), "--skip-levels", "0", "--max-batch-size", "2", "--port", "0"]
    with monkeypatch.context() as patch:
        patch.setattr("skipkernels.chat.chat_profile.THOROUGH", QUICKEST)
        patch.setattr("skipkernels.server.http.server.serve", lambda *_, **__: None)
        measured = run("serve", *words, "--samples", str(samples))
    assert measured.exit_code == 0, measured.output
    document = json.loads(profile.read_text())
    assert document["source"] == "measured on 3 samples; accuracy: agreement with image+text@0"
    scores = {entry["strategy"]: entry["score_sum"] for entry in document["strategies"]}
    assert scores["image+text@0"] == 3.0 > scores["text@0"]

    for entry in document["strategies"]:  # times that no busy machine confuses
        for timing in entry["timings"]:
            timing["median_ms"] = timing["p95_ms"] = 1.0 if entry["strategy"] == "text@0" else 1e5
    profile.write_text(json.dumps(document))
    with serving(*words, "--threads", "1") as server:
        (model,) = httpx.get(f"{server.url}/models", headers=KEY).json()["data"]
        promise = model["skipkernels"]["best_promised_accuracy"]
        options = {"model": "llava", "messages": image_chat("What is it?", 7), "max_tokens": 8}
        whole = server.post(**options).json()
        hurried = server.post(**options, deadline_ms=1000).json()
        exacting = server.post(**options, deadline_ms=1000, min_accuracy=promise).json()
        assert server.stop() == 0
    answers = (whole, hurried, exacting)
    assert [answer["skipkernels"]["strategy"] for answer in answers] == ["image+text@0", "text@0", "image+text@0"]
    assert whole["choices"] == exacting["choices"] != hurried["choices"]
    assert hurried["usage"]["prompt_tokens"] < whole["usage"]["prompt_tokens"]


def test_a_multimodal_model_needs_samples(run: Run, llava: str) -> None:
    words = ["serve", llava, "--skip-levels", "0", "--port", "0"]
    assert_one_line(run(*words), 1, "takes text, image", "--samples FILE")
    Path("samples.jsonl").write_text('{"messages": [{"role": "user", "content": "Without an image."}]}')
    assert_one_line(run(*words, "--samples", "samples.jsonl"), 1, "samples.jsonl, line 1", "holds no image")


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--samples", "none.jsonl"], 2, "give one"),
        (["--replicas", "2"], 2, "need --ray"),
        (["--ray-address", "x"], 2, "need --ray"),
        (["--admission", "nobody"], 2, "accuracy or deadline"),
        (["--skip-levels", "0,much"], 2, "numbers like"),
        (["--api-key", " "], 2, "--api-key is empty"),
        (["--port", "99999"], 2, "--port"),
        (["--selection", "best"], 1, "maximize"),
        (["--skip-levels", "0,0.9"], 1, "cannot be held"),
        (["--skip-levels", "0.2"], 1, "add skip level 0"),
        (["--policy", "none.json"], 1, "none.json"),
        (["--policy", "smollm2-135m-instruct"], 1, "30 entries"),  # it comes with the package
        (["--profile", "no/such/folder.json"], 1, "no folder"),
        (["--host", "256.1.1.1"], 1, "cannot listen on 256.1.1.1"),
        (["--dtype", "int3"], 1, "int3"),
        (["--batch-memory-mib", "5"], 1, "no memory measurements"),
    ],
)
def test_what_cannot_be_served(run: Run, checkpoint: str, prose: str, words: list[str], code: int, part: str) -> None:
    assert_one_line(run("serve", checkpoint, "--text", prose, "--port", "0", *words), code, part)


def test_a_port_that_is_taken(run: Run, checkpoint: str, server: Process) -> None:
    port = server.url.rpartition(":")[2].removesuffix("/v1")
    assert_one_line(run("serve", checkpoint, "--port", port), 1, f"cannot listen on 127.0.0.1, port {port}")


@pytest.mark.parametrize(("package", "words"), [("fastapi", []), ("ray", ["--ray"])])
def test_a_missing_package_is_named(checkpoint: str, package: str, words: list[str]) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from skipkernels.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", checkpoint, "--port", "0", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert package in line
    assert "pip install skipkernels[serve" in line


def test_an_open_door_is_pointed_out(run: Run, checkpoint: str, prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipkernels.server.http.server.serve", lambda *_, on_started, **__: on_started())
    words = served_words(checkpoint, prose)
    assert "no --api-key" in run(*words, "--host", "0.0.0.0").stderr
    assert "no --api-key" not in run(*words, "--host", "0.0.0.0", "--api-key", "x").stderr
    assert "no --api-key" not in run(*words).stderr
