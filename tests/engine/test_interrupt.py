"""Ctrl-C ends a long generation, although its loop is one call of native code."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import signal
import torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs start without
from tests.models import tiny_engine, tiny_module
module = tiny_module(max_position_embeddings=1 << 20, vocab_size=20000)
engine = tiny_engine(module=module, max_seq_len=1 << 17)
expected = engine.generate([1, 2, 3], max_new_tokens=20)[0].token_ids
print("decoding", flush=True)
try:
    engine.generate([1, 2, 3])
except KeyboardInterrupt:
    generated = int(engine.state.num_generated[0])
    assert engine.generate([1, 2, 3], max_new_tokens=20)[0].token_ids == expected
    print("interrupted after", generated, flush=True)
    raise
"""


def test_ctrl_c_ends_a_generation_at_once_and_leaves_the_engine_usable() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout.readline() == "decoding\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        deadline = threading.Timer(60, process.kill)  # were the signal lost, the loop would run for minutes
        deadline.start()
        said = process.stdout.readline()
        waited_s = time.monotonic() - asked
        _, errors = process.communicate()
        deadline.cancel()
    assert said.startswith("interrupted after"), errors
    assert int(said.split()[-1]) > 20
    assert waited_s < 5  # a tenth of a second on a free processor
    assert errors.rstrip().endswith("KeyboardInterrupt")
