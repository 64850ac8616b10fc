"""What leaving out neurons costs on a model: thresholds from one text, decoded by force on more of it and on others.

    python bench/neuron_quality.py MODEL TEXT [OTHER_TEXT ...] --json quality.json

Of TEXT, passages of 192 tokens are taken at equal distances; the first five are calibrated on, the others held out. Of
the other texts nothing is calibrated on. The first 32 tokens of a passage run in full; KL and top-1 count those after
them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from skipkernels import Engine
from skipkernels.calibration.neuron_profile import profile_neurons
from skipkernels.calibration.passages import Passage
from skipkernels.calibration.tuning import Decoder
from skipkernels.support.report import environment

PROMPT, TOKENS, CALIBRATION = 32, 192, 5
LETTERS = 4000  # that hold a passage
SKIPPED = 20  # tokens at its beginning, which may be the end of a word
TUNED_ON = 3  # passages


def passages(engine: Engine, text: str, count: int) -> list[Passage]:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    bos = [tokenizer.bos_token_id] if engine.encode("a")[:1] == [tokenizer.bos_token_id] else []
    found = []
    for start in range(0, len(text) - LETTERS, max(LETTERS, len(text) // count)):
        ids = tokenizer(text[start : start + LETTERS], add_special_tokens=False)["input_ids"][SKIPPED:]
        if len(ids) >= TOKENS:
            found.append(Passage(tuple((bos + ids)[:TOKENS]), PROMPT))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--savings", default="0.1,0.24,0.33,0.4")
    parser.add_argument("--split", type=float, default=1.0)
    parser.add_argument("--passages", type=int, default=7, help="of each text, held out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    engine = Engine.from_pretrained(
        args.model, max_batch_size=8, max_seq_len=TOKENS + 16, neuron_rows=True, num_threads=args.threads
    )
    first, *others = (path.read_text(encoding="utf-8") for path in args.texts)
    own = passages(engine, first, CALIBRATION + args.passages)
    started = time.process_time()
    profile = profile_neurons(engine, own[:CALIBRATION])
    profile_cpu_s = time.process_time() - started
    search = Decoder(engine, own[:TUNED_ON], lambda tokens: None)
    kinds = [own[CALIBRATION:], *(passages(engine, text, args.passages) for text in others)]
    held_out = [Decoder(engine, kind, lambda tokens: None) for kind in kinds]
    rows = []
    for saving in map(float, args.savings.split(",")):
        policy_at = partial(profile.policy, split=args.split, warmup_tokens=1)
        policy = search.tune("neurons", policy_at, saving, 1, runs=2).policy
        for path, decoder in zip(args.texts, held_out, strict=True):
            found = decoder.try_out("neurons", policy, saving, 1).comparison
            rows.append({"text": path.name, "wanted": saving, **asdict(found)})
            print(
                f"{path.name:32s} {saving:.2f}  saved {found.skip_ratio:.4f}  KL {found.kl:.4f}  top-1 "
                f"{found.top1_agreement:.3f}  perplexity {found.perplexity:.2f} ({found.dense_perplexity:.2f})",
                flush=True,
            )
            document = {
                "command": shlex.join(["python", *sys.argv]),
                "environment": environment(engine.execution),
                "dtype": engine.dtype,
                "profile_cpu_s": round(profile_cpu_s, 1),
                "rows": rows,
            }
            args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
