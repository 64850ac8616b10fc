"""Multimodal language models of transformers, their decoders on the engine."""
