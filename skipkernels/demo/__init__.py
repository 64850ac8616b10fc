"""The bundled demo model: a small Llama that knows a thousand facts, to see what skipping costs and saves."""

from pathlib import Path

from skipkernels.demo.facts import Fact, load_facts

__all__ = ["Fact", "demo_model_path", "load_facts"]


def demo_model_path() -> Path:
    """Folder of the bundled checkpoint, as ``AutoModelForCausalLM.from_pretrained`` takes it."""
    return Path(__file__).parent / "checkpoint"
