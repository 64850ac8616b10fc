"""Trains the demo model from nothing: ``python -m skipkernels.demo.train --out DIR``.

Interrupting it is safe at any time; the same command goes on where it stopped. The weights are the same to the bit for
the same seed, library versions, processor and number of threads.
"""

import json
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import MofNCompleteColumn, Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from skipkernels.demo.batches import Batches
from skipkernels.demo.corpus import Corpus, build_corpus
from skipkernels.demo.evaluate import bits_per_byte, exact_match
from skipkernels.demo.fact_tables import build_facts
from skipkernels.demo.facts import FACTS_FILE, Fact, load_facts, save_facts
from skipkernels.demo.model import initial_model, model_config
from skipkernels.demo.tokenizer import train_tokenizer
from skipkernels.demo.trainer import Schedule, Trainer
from skipkernels.errors import ModelError

CONTEXT = 1024
SAVE_EVERY = 100
EVALUATE_EVERY = 200
LIBRARIES = ("torch", "transformers", "tokenizers")
FACT_REPEATS = 4  # of the facts among the texts that the tokenizer is learned from


def main(
    out: Annotated[Path, typer.Option(help="Folder for the finished checkpoint and the state of the training.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = Schedule().steps,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 24,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 128,
    vocab: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the batches.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the demo model, or go on training it, and write the finished checkpoint to OUT."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus()
    facts, tokenizer = _prepare(out, corpus, vocab)
    model = initial_model(model_config(tokenizer, layers=layers, hidden=hidden, context=CONTEXT), seed)
    batches = Batches(tokenizer, corpus.train, facts, seed)
    try:
        trainer = Trainer(model, batches, Schedule(steps=steps), out / "state" / "trainer.pt")
    except ModelError as error:
        raise typer.BadParameter(str(error)) from error
    _train(trainer, tokenizer, facts)
    model.bfloat16().save_pretrained(out)
    report = _report(out, trainer, corpus, facts)
    (out / "training_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(report, indent=2))


def _prepare(out: Path, corpus: Corpus, vocab: int) -> tuple[list[Fact], PreTrainedTokenizerBase]:
    """Facts and tokenizer: those of an earlier run in ``out``, or else new ones, written there."""
    (out / "state").mkdir(exist_ok=True)
    if not (out / FACTS_FILE).exists():
        facts = build_facts()
        texts = [*corpus.train, *([fact.text for fact in facts] * FACT_REPEATS)]
        train_tokenizer(texts, vocab, CONTEXT).save_pretrained(out)
        save_facts(facts, out / FACTS_FILE)
    return load_facts(out / FACTS_FILE), AutoTokenizer.from_pretrained(out)


def _train(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, facts: list[Fact]) -> None:
    """Run all steps with a progress bar; SIGINT and SIGTERM save and end the program."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with _stop_signals() as stopping, Progress(*columns) as progress:
        bar = progress.add_task("", total=trainer.schedule.steps, completed=trainer.step)
        sample = facts[:: max(1, len(facts) // 200)]

        def after_step(loss: float) -> bool:
            progress.update(bar, completed=trainer.step, description=f"loss {loss:.3f}")
            if trainer.step % EVALUATE_EVERY == 0:
                match = exact_match(trainer.model, tokenizer, sample)
                progress.console.print(
                    f"step {trainer.step}: loss {loss:.3f}, exact match of sampled facts {match:.1%}"
                )
            if trainer.step % SAVE_EVERY == 0 or stopping:
                trainer.save()
            return bool(stopping)

        trainer.run(trainer.schedule.steps, after_step)
    if stopping:
        typer.echo(f"stopped at step {trainer.step}; the same command goes on from there", err=True)
        raise typer.Exit(128 + stopping[0])
    trainer.save()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are put into a list instead of ending the program."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _report(out: Path, trainer: Trainer, corpus: Corpus, facts: list[Fact]) -> dict[str, object]:
    """Figures of the checkpoint in ``out``, measured on the weights as they were written."""
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    return {
        "date": date.today().isoformat(),
        "facts": len(facts),
        "facts_exact_match": exact_match(model, tokenizer, facts),
        "held_out_bits_per_byte": bits_per_byte(model, tokenizer, corpus.held_out),
        "held_out_bytes": sum(len(text.encode()) for text in corpus.held_out),
        "train_bytes": sum(len(text.encode()) for text in corpus.train),
        "parameters": model.num_parameters(),
        "steps": trainer.step,
        "tokens": trainer.step * trainer.schedule.step_tokens,
        "seconds": round(trainer.seconds),
        "threads": torch.get_num_threads(),
        "schedule": asdict(trainer.schedule),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }


if __name__ == "__main__":
    typer.run(main)
