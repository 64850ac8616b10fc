"""Shape and initial weights of the demo model: a deep and narrow Llama, so that there are many FFN blocks to skip."""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def model_config(tokenizer: PreTrainedTokenizerBase, *, layers: int, hidden: int, context: int) -> LlamaConfig:
    """A Llama whose FFN is twice as wide as its residual stream, which has four heads and two key-value heads."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def initial_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """``random_llama`` from ``seed``."""
    torch.manual_seed(seed)
    return random_llama(config)


def random_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """Random weights; the projections that write to the residual stream are scaled down by the root of their number."""
    model = LlamaForCausalLM(config)
    scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model
