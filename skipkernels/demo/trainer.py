"""The training loop: deterministic, and exact to the bit when it is interrupted and resumed."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from skipkernels.demo.batches import Batches
from skipkernels.errors import ModelError

STALL_SECONDS = 30.0  # a step that took longer was stopped from outside, and counts as this long


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train. Warm-up, constant rate, then a linear decay to zero on longer rows."""

    steps: int = 1500
    warmup_steps: int = 60
    decay_steps: int = 700
    learning_rate: float = 4e-3
    step_tokens: int = 2048
    length: int = 256
    decay_length: int = 1024

    @property
    def decay_start(self) -> int:
        """First step of the decay."""
        return self.steps - self.decay_steps

    def rate(self, step: int) -> float:
        """Learning rate of ``step``, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps)

    def row_length(self, step: int) -> int:
        """Tokens per row at ``step``; the number of rows keeps the tokens per step the same."""
        return self.length if step < self.decay_start else self.decay_length

    def continues(self, other: "Schedule", step: int) -> bool:
        """Whether the first ``step`` steps of ``other`` are those of this schedule too."""
        before_decay = step <= min(self.decay_start, other.decay_start)
        return self == (replace(other, steps=self.steps) if before_decay else other)


class Trainer:
    """A model, its optimizers and the number of steps taken, kept in ``path`` between runs."""

    def __init__(self, model: LlamaForCausalLM, batches: Batches, schedule: Schedule, path: Path) -> None:
        self.model = model
        self.batches = batches
        self.schedule = schedule
        self.path = path
        self.step = 0
        self.seconds = 0.0
        self.optimizers = _optimizers(model)
        if path.exists():
            self._load()

    def run(self, until: int, after_step: Callable[[float], bool]) -> None:
        """Train up to step ``until``, or until ``after_step``, called with the loss of each step, returns true."""
        self.model.train()
        while self.step < until:
            started = time.monotonic()
            loss = self._take_step()
            self.seconds += min(time.monotonic() - started, STALL_SECONDS)
            self.step += 1
            if after_step(loss):
                return

    def save(self) -> None:
        """Write the state beside its place, then move it there: a crash leaves the old state or the new one."""
        state = {
            "schedule": asdict(self.schedule),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        saved = Schedule(**state["schedule"])
        if not self.schedule.continues(saved, state["step"]):
            found = f"{self.path} holds step {state['step']} of {saved}, not of {self.schedule}"
            raise ModelError(f"{found}; ask for {saved.steps} steps, or start in another folder")
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _take_step(self) -> float:
        """One update; returns the loss in nats per token, weighted."""
        length = self.schedule.row_length(self.step)
        tokens, weights = self.batches.draw(self.step, self.schedule.step_tokens // length, length)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.rate(self.step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = _weighted_loss(logits, tokens[:, 1:], weights)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(f"the loss is {value} at step {self.step}")
        return value


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the cross-entropies: logits ``[rows, length, vocab]``, the rest ``[rows, length]``."""
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()
