"""The training command, on little data."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer import Exit

from skipkernels.demo import train
from skipkernels.demo.corpus import Corpus
from skipkernels.demo.fact_tables import build_facts

ARGUMENTS = {"steps": 3, "layers": 2, "hidden": 16, "vocab": 300, "seed": 0, "threads": torch.get_num_threads()}


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"def item{number}(self)\nReturn item number {number} of the sequence." for number in range(100)]
    monkeypatch.setattr(train, "build_corpus", lambda: Corpus(train=documents[10:], held_out=documents[:10]))
    facts = build_facts()[:20]
    monkeypatch.setattr(train, "build_facts", lambda: facts)


def test_an_interrupted_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.main(tmp_path / "whole", **ARGUMENTS)
    with monkeypatch.context() as patched:
        patched.setattr(train.Trainer, "_take_step", _interrupted(train.Trainer._take_step))
        with pytest.raises(Exit) as stopped:
            train.main(tmp_path / "parts", **ARGUMENTS)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    train.main(tmp_path / "parts", **ARGUMENTS)

    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    report = json.loads((tmp_path / "parts" / "training_report.json").read_text())
    assert report["steps"] == 3
    assert report["parameters"] == sum(weight.numel() for weight in whole.values())


def _interrupted(take_step: Callable[[train.Trainer], float]) -> Callable[[train.Trainer], float]:
    def step_and_stop(trainer: train.Trainer) -> float:
        loss = take_step(trainer)
        signal.raise_signal(signal.SIGTERM)
        return loss

    return step_and_stop
