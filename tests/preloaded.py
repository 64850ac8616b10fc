"""What commands import before they do anything; see processes.py."""

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from skipkernels import Engine
from skipkernels.cli import main

__all__ = ["AutoConfig", "AutoTokenizer", "Engine", "GenerationConfig", "PreTrainedTokenizerFast", "main"]
