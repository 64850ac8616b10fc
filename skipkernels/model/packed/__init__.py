"""Hugging Face checkpoints whose matrices GPTQ, AWQ, compressed-tensors or fp8 packed."""
