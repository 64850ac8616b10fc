"""From prompts to tokens: sampling parameters, prefill, the decoding loop, results."""
