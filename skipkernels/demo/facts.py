"""Facts: short questions with one short answer each, and the one place that says how they are written as text."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FACTS_FILE = "facts.jsonl"


@dataclass(frozen=True, slots=True)
class Fact:
    """One question with its one right answer; ``topic`` names the table that both come from."""

    question: str
    answer: str
    topic: str

    @property
    def prompt(self) -> str:
        """The text that a model is given."""
        return f"Q: {self.question}\nA:"

    @property
    def completion(self) -> str:
        """The text that a model should continue ``prompt`` with."""
        return f" {self.answer}\n\n"

    @property
    def text(self) -> str:
        """Prompt and completion, as the model saw them in training."""
        return self.prompt + self.completion


def load_facts(path: Path | None = None) -> list[Fact]:
    """The facts of a jsonl file; without ``path``, those that the bundled model was trained on."""
    path = path or Path(__file__).parent / "checkpoint" / FACTS_FILE
    with path.open(encoding="utf-8") as lines:
        return [Fact(**json.loads(line)) for line in lines]


def save_facts(facts: Iterable[Fact], path: Path) -> None:
    """Write one JSON object per line."""
    lines = (json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in facts)
    path.write_text("".join(lines), encoding="utf-8")
