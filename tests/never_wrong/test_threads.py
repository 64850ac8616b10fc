"""Threads, forks and inference mode: never other tokens, never a hang."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from skipkernels import _C, hf_generate
from skipkernels.errors import DeviceError, RequestError, SkipkernelsError
from skipkernels.support import machine
from tests.models import random_prompt, stock_tokens, tiny_engine, tiny_module

PROMPTS = [random_prompt(length, seed=length) for length in (5, 9, 14, 20)]
PATIENCE_S = 120


def in_threads(*jobs: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # into the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("entry", ["generate", "hf_generate"])
def test_threads_take_turns(entry: str) -> None:
    module = tiny_module()
    expected = [stock_tokens(module, prompt, 12) for prompt in PROMPTS]
    engine = tiny_engine(module=module, num_threads=2)

    def ask(number: int) -> None:
        prompt = PROMPTS[number]
        for _ in range(6):
            if entry == "generate":
                answer = engine.generate(prompt, max_new_tokens=12)[0].token_ids
            else:
                ids = torch.tensor([prompt])
                output = module.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=12,
                    do_sample=False,
                    pad_token_id=0,
                    custom_generate=hf_generate,
                    skip_threads=2,
                )
                answer = output[0, len(prompt) :].tolist()
            assert answer == expected[number]

    in_threads(*(lambda number=number: ask(number) for number in range(len(PROMPTS))))


def test_streams_of_two_threads_give_their_own_tokens_or_an_error() -> None:
    module = tiny_module()
    expected = [stock_tokens(module, prompt, 12) for prompt in PROMPTS]
    engine, refused = tiny_engine(module=module), []

    def follow(number: int) -> None:
        for _ in range(8):
            seen = []
            try:
                for chunk in engine.stream(PROMPTS[number], max_new_tokens=12):
                    if chunk.token_id is not None:
                        seen.append(chunk.token_id)
            except RequestError:
                refused.append(number)
            assert seen == expected[number][: len(seen)]

    in_threads(*(lambda number=number: follow(number) for number in range(len(PROMPTS))))
    assert engine.generate(PROMPTS[0], max_new_tokens=12)[0].token_ids == expected[0]


def test_the_native_executor_refuses_a_second_caller() -> None:
    engine = tiny_engine(max_seq_len=512)
    decoding = engine.begin([PROMPTS[0]], max_new_tokens=400, eos_token_ids=[])
    executor = engine.executor_for(engine.policy)
    outcomes: list[int] = []
    refusals: list[str] = []

    def run() -> None:
        try:
            outcomes.append(len(executor.run(400)))
        except ValueError as error:
            refusals.append(str(error))

    in_threads(run, run, run)
    assert sum(outcomes) <= 400
    assert all("another thread is running this executor" in refusal for refusal in refusals)
    assert decoding.rows


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_decodes_as_its_parent(threads: int) -> None:
    torch.set_num_threads(2)
    engine = tiny_engine(num_threads=threads)
    expected = engine.generate(PROMPTS[3], max_new_tokens=12)[0].token_ids
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if engine.generate(PROMPTS[3], max_new_tokens=12)[0].token_ids == expected else 3)
        except SkipkernelsError:
            os._exit(4)
        except BaseException:
            os._exit(5)
    deadline = time.monotonic() + PATIENCE_S
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert engine.generate(PROMPTS[3], max_new_tokens=12)[0].token_ids == expected


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_leaves_module_and_engine_usable(made_inside: bool) -> None:
    module = tiny_module()
    expected = stock_tokens(module, PROMPTS[1], 8)
    ids = torch.tensor([PROMPTS[1]])
    engine = None if made_inside else tiny_engine(module=module)
    with torch.inference_mode():
        engine = engine or tiny_engine(module=module)
        assert engine.generate(PROMPTS[1], max_new_tokens=8)[0].token_ids == expected
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "custom_generate": hf_generate}
        output = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert output[0, len(PROMPTS[1]) :].tolist() == expected
    assert engine.generate(PROMPTS[1], max_new_tokens=8)[0].token_ids == expected
    module(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    optimizer.step()
    output = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert output[0, len(PROMPTS[1]) :].tolist() == stock_tokens(module, PROMPTS[1], 8)


def test_a_module_made_in_inference_mode_can_be_used_there() -> None:
    with torch.inference_mode():
        module = tiny_module()
        engine = tiny_engine(module=module)
        assert engine.generate(PROMPTS[1], max_new_tokens=8)[0].token_ids == stock_tokens(module, PROMPTS[1], 8)
    assert engine.generate(PROMPTS[1], max_new_tokens=8)[0].token_ids == stock_tokens(module, PROMPTS[1], 8)


@pytest.mark.parametrize("threads", [1025, 100_000, 1 << 31])
def test_too_many_threads_are_refused(threads: int) -> None:
    with pytest.raises(DeviceError, match="num_threads must be at most 1024"):
        tiny_engine(num_threads=threads)
    with pytest.raises((ValueError, TypeError)):
        _C.measure_read(1024, 1, threads)


@pytest.mark.parametrize(
    ("files", "lines", "expected"),
    [
        ({"cpu.max": "max 100000"}, "0::/\n", None),
        ({"cpu.max": "150000 100000"}, "0::/\n", 1.5),
        ({"a/cpu.max": "200000 100000", "cpu.max": "max 100000"}, "0::/a/b\n", 2.0),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b\n", 0.5),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/\n", 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/\n", None),
        (
            {"cpu,cpuacct/j/cpu.cfs_quota_us": "100000", "cpu,cpuacct/j/cpu.cfs_period_us": "100000"},
            "2:memory:/\n4:cpu,cpuacct:/j\n",
            1.0,
        ),
        ({"cpu.max": "junk"}, "0::/\n", None),
        ({}, "", None),
    ],
)
def test_the_quota_of_the_control_group(
    tmp_path: Path, files: dict[str, str], lines: str, expected: float | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "own").write_text(lines)
    assert machine.processor_quota(tmp_path, tmp_path / "own") == expected


def test_a_quota_torch_and_the_environment_limit_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "processor_quota", lambda: 2.5)
    assert machine.usable_processors() == 2
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert machine.default_threads() == 1
        engine = tiny_engine(num_threads=None)
        assert engine.executor_for(engine.policy).num_threads == 1  # type: ignore[attr-defined]
    finally:
        torch.set_num_threads(before)
    program = "from skipkernels.support.machine import default_threads; print(default_threads())"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"
