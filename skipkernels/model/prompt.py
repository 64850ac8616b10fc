"""A prompt whose embeddings come from elsewhere: images and sounds through their encoders, beside text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from skipkernels.errors import RequestError
from skipkernels.model.config import ModelConfig
from skipkernels.model.matrix import AnyMatrix, weight_rows


@dataclass(frozen=True, eq=False)
class EmbeddedPrompt:
    """What the first layer is to see at each position of a prompt.

    Args:
        token_ids: one per position, with the model's placeholder where an encoder's output stands. The last one is
            text: the decode program looks its embedding up.
        embeddings: [tokens, hidden_size].
        positions: i64 [3, tokens]: time, height and width of each token, for models that rotate by all three
            (M-RoPE: Qwen2-VL, arXiv 2409.12191); the last token's three are equal. None: 0, 1, 2 and so on.
    """

    token_ids: Sequence[int]
    embeddings: torch.Tensor = field(repr=False)
    positions: torch.Tensor | None = field(default=None, repr=False)

    def check(self, config: ModelConfig, embed_tokens: AnyMatrix, max_seq_len: int) -> None:
        """Raises RequestError when a model of these sizes and this embedding table [vocab, hidden_size] cannot start
        from it."""
        tokens = len(self.token_ids)
        if not tokens:
            raise RequestError("the prompt holds no tokens")
        if tuple(self.embeddings.shape) != (tokens, config.hidden_size):
            raise RequestError(
                f"embeddings have shape {tuple(self.embeddings.shape)}, expected {(tokens, config.hidden_size)}"
            )
        last = weight_rows(embed_tokens, torch.tensor([self.token_ids[-1]]))[0]
        own = last.float() * config.embed_scale_in(last.dtype)
        if not bool((self.embeddings[-1].to(last) == own.to(last)).all()):
            raise RequestError(
                f"the prompt's last token, {self.token_ids[-1]}, is not embedded as the model embeds it; "
                "end the prompt with text"
            )
        if self.positions is None:
            return
        if config.position_axes is None:
            raise RequestError(f"{config.model_type} rotates by one position a token; leave positions out")
        if tuple(self.positions.shape) != (3, tokens):
            raise RequestError(f"positions have shape {tuple(self.positions.shape)}, expected {(3, tokens)}")
        if len(self.positions[:, -1].unique()) > 1:
            raise RequestError(f"the last token's positions are {self.positions[:, -1].tolist()}, expected equal ones")
        farthest = int(shifted(self.positions).abs().max())
        if farthest >= max_seq_len:
            raise RequestError(
                f"the prompt's positions span more than {farthest}, the rotary tables hold max_seq_len={max_seq_len}; "
                "load the engine with a larger one"
            )


def shifted(positions: torch.Tensor) -> torch.Tensor:
    """Positions [3, tokens] moved so that the last token's is ``tokens - 1``, where the decode program goes on from.

    A prompt with images has fewer positions than tokens. Attention sees differences of positions only, so all may be
    moved together, and the program's own count of cached positions stays right; some may become negative.
    """
    return positions + (positions.shape[1] - 1 - positions[:, -1:])
