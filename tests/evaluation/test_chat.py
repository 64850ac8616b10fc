"""Chat: MT-Bench's files, answers that survive an unreachable judge, and the judge's protocol on a local server."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.evaluation.chat import Chat, read_questions
from skipkernels.evaluation.judge import Judge, JudgeUnreachable
from skipkernels.methods.setup import Setup
from tests.evaluation.fakes import WORK, FakeMethod
from tests.methods.conftest import ALIKE
from tests.models import byte_tokenizer, tiny_engine

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 101, "category": "math", "turns": ["Count."], "reference": ["1"]},
]
Reply = tuple[int, str]


class FakeJudge:
    """An endpoint on loopback that answers as it is told; the last reply is repeated."""

    def __init__(self, replies: list[Reply], delay_s: float = 0.0) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append((self.path, dict(self.headers), body))
                time.sleep(delay_s)
                code, text = replies[min(len(fake.requests), len(replies)) - 1]
                data = text.encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


Serve = Callable[..., FakeJudge]


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[FakeJudge] = []

    def start(replies: list[Reply], delay_s: float = 0.0) -> FakeJudge:
        running.append(FakeJudge(replies, delay_s))
        return running[-1]

    yield start
    for server in running:
        server.close()


def completion(text: str) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def judge_at(url: str, **options: Any) -> Judge:
    return Judge(url, "strong", first_pause_s=0.01, **options)


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny_engine(tokenizer=tokenizer, max_seq_len=400)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_prompt(prompt: list[int]) -> str:
    """An answer that tells what was asked."""
    return f"answer {len(prompt)}"


def test_answers_are_in_mt_benchs_format(engine: Engine, questions: Path, tmp_path: Path) -> None:
    task = Chat(engine, questions, tmp_path, ALIKE, max_new_tokens=30)
    method, done = FakeMethod(by_prompt), []
    outcome = task.run(method, "skip@0.25-abc", done.append)
    path = tmp_path / "model_answer" / "skip@0.25-abc.jsonl"
    first, second = lines(path)
    assert [first["question_id"], second["question_id"]] == [81, 101]
    assert (first["model_id"], first["choices"][0]["index"]) == ("skip@0.25-abc", 0)
    assert len(first["choices"][0]["turns"]) == 2
    assert {"answer_id", "tstamp"} <= first.keys()
    turn = first["choices"][0]["turns"][0]
    assert bytes(method.prompts[1]).decode() == f"[user] Write.\n[assistant] {turn}\n[user] Again.\n[assistant] "
    assert outcome.groups == ["writing", "math"]
    assert outcome.items["answer length"][0] == (len("".join(first["choices"][0]["turns"])), 2.0)
    assert outcome.work.tokens == 3 * WORK.tokens
    assert sum(done) == task.total == 2
    assert [metric.name for metric in task.metrics] == ["repeated 4-grams", "answer length"]


def test_every_turn_is_graded(
    engine: Engine, questions: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve([completion("Good. Rating: [[8]]"), completion("Rating: [[3.5]]"), completion("Rating: [[10]]")])
    task = Chat(engine, questions, tmp_path, ALIKE, judge=judge_at(server.url), max_new_tokens=30)
    outcome = task.run(FakeMethod(by_prompt), "full-abc")
    assert outcome.items["judge's score"] == [(11.5, 2.0), (10.0, 1.0)]
    path, headers, body = server.requests[1]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("strong", 0)
    graded = body["messages"][1]["content"]
    answers = lines(tmp_path / "model_answer" / "full-abc.jsonl")[0]["choices"][0]["turns"]
    assert graded == f"[user]\nWrite.\n\n[assistant]\n{answers[0]}\n\n[user]\nAgain.\n\n[assistant]\n{answers[1]}"
    judged = lines(tmp_path / "model_judgment" / "strong_single.jsonl")
    assert [(line["question_id"], line["turn"], line["score"]) for line in judged] == [
        (81, 1, 8.0),
        (81, 2, 3.5),
        (101, 1, 10.0),
    ]
    assert {line["model"] for line in judged} == {"full-abc"}


def test_an_unreachable_judge_leaves_the_answers_and_is_gone_on_with(
    engine: Engine, questions: Path, tmp_path: Path, serve: Serve
) -> None:
    server = serve([completion("Rating: [[8]]"), (503, "later")])
    task = Chat(engine, questions, tmp_path, ALIKE, judge=judge_at(server.url), max_new_tokens=30)
    with pytest.raises(JudgeUnreachable, match=r"gave no grade \(HTTP 503 .*the answers are kept.*--resume"):
        task.run(FakeMethod(by_prompt), "full-abc")
    asked = len(server.requests)
    assert asked == 1 + 4  # one grade, then four attempts
    with pytest.raises(JudgeUnreachable):  # the next method leaves its answers, and does not wait again
        task.run(FakeMethod(by_prompt), "other-abc")
    assert len(server.requests) == asked
    assert len(lines(tmp_path / "model_answer" / "full-abc.jsonl")) == 2
    assert len(lines(tmp_path / "model_answer" / "other-abc.jsonl")) == 2
    assert len(lines(tmp_path / "model_judgment" / "strong_single.jsonl")) == 1

    better = serve([completion("Rating: [[6]]")])
    resumed = Chat(engine, questions, tmp_path, ALIKE, judge=judge_at(better.url), max_new_tokens=30)
    silent = FakeMethod([])  # would fail if it were asked anything
    assert resumed.run(silent, "full-abc").items["judge's score"] == [(14.0, 2.0), (6.0, 1.0)]
    assert len(better.requests) == 2


def test_a_line_that_an_interruption_cut_off_is_written_again(engine: Engine, questions: Path, tmp_path: Path) -> None:
    Chat(engine, questions, tmp_path, ALIKE, max_new_tokens=30).run(FakeMethod(by_prompt), "full")
    path = tmp_path / "model_answer" / "full.jsonl"
    path.write_text(path.read_text()[:-20])
    method = FakeMethod(by_prompt)
    Chat(engine, questions, tmp_path, ALIKE, max_new_tokens=30).run(method, "full")
    assert [line["question_id"] for line in lines(path)] == [81, 101]
    assert len(method.prompts) == 1


def test_answers_of_another_length_are_refused(engine: Engine, questions: Path, tmp_path: Path) -> None:
    Chat(engine, questions, tmp_path, ALIKE, max_new_tokens=30).run(FakeMethod(by_prompt), "full")
    with pytest.raises(RequestError, match="at most 30 tokens, this command wants 40"):
        Chat(engine, questions, tmp_path, ALIKE, max_new_tokens=40).run(FakeMethod(by_prompt), "full")


@pytest.mark.parametrize(
    ("reply", "problem", "attempts"),
    [
        ((401, "no"), "HTTP 401 Unauthorized", 1),
        ((429, "slow down"), "HTTP 429", 4),
        ((500, "oops"), "HTTP 500", 4),
        ((200, "not json"), "a reply that is not a chat completion", 4),
        ((200, '{"choices": []}'), "a reply that is not a chat completion", 4),
        (completion("I like it."), "a reply without a rating from 1 to 10: 'I like it.'", 4),
        (completion("Rating: [[11]]"), "a reply without a rating", 4),
    ],
)
def test_what_a_judge_can_do_wrong(serve: Serve, reply: Reply, problem: str, attempts: int) -> None:
    server = serve([reply])
    with pytest.raises(JudgeUnreachable, match=problem):
        judge_at(server.url).grade([{"role": "user", "content": "x"}])
    assert len(server.requests) == attempts


def test_a_judge_that_fails_once_is_asked_again(serve: Serve) -> None:
    server = serve([(502, "x"), completion("no grade"), completion("Rating: [[7]]")])
    assert judge_at(server.url).grade([{"role": "user", "content": "x"}]).score == 7.0


def test_a_judge_that_does_not_answer_in_time(serve: Serve) -> None:
    server = serve([completion("Rating: [[7]]")], delay_s=0.5)
    with pytest.raises(JudgeUnreachable, match="timed out"):
        judge_at(server.url, timeout_s=0.05).grade([{"role": "user", "content": "x"}])


def test_nobody_there() -> None:
    with pytest.raises(JudgeUnreachable, match="Connection refused"):
        judge_at("http://127.0.0.1:9").grade([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x", "file:///etc/passwd", "http://"])
def test_a_wrong_address_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="http:// or https://"):
        Judge(url, "strong")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question_id": 1, "category": "a"}', "line 1: the field 'turns' is missing"),
        ('{"question_id": "1", "category": "a", "turns": ["x"]}', "'question_id' must be a whole number, got a text"),
        ('{"question_id": 1, "category": "a", "turns": []}', "question 1: 'turns' must be a list of one text or more"),
        ('{"question_id": 1, "category": "a", "turns": [2]}', "question 1: 'turns' must be a list"),
        ('{"question_id": 1, "category": "a", "turns": ["x"]}\n' * 2, "question_id 1 appears twice"),
    ],
)
def test_bad_questions_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_questions(path)


def test_a_model_without_a_chat_template_is_refused(setup: Setup, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="needs a tokenizer with a chat template"):
        Chat(setup.engine, questions, tmp_path, ALIKE)
