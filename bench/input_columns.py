"""What a third grain would bring: input columns of gate_proj, or of o_proj, left out beside single neurons.

    python bench/input_columns.py FOLDER TEXT_FILE

Plain PyTorch on the Hugging Face model in fp32, teacher-forced, without skipkernels. Thresholds are the same quantiles
in every layer, of the first 5 passages; the other passages are measured. A prompt of 32 tokens runs in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

PROMPT, TOKENS, PASSAGES, CALIBRATION = 32, 160, 12, 5
FFN = ((0.0, 0.2, 0.5), (0.25, 0.1, 0.38), (0.3, 0.2, 0.5), (0.4, 0.25, 0.57))
"""Shares dropped of gate_proj's input columns, of gates, and of products."""
ATTENTION = (0.2, 0.4, 0.6)
"""Shares dropped of o_proj's input columns."""

Shares = dict[str, float]


class Dropping:
    """A model whose FFNs and o_proj leave out what is small, by the kind of number that is compared."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._sorted: dict[tuple[str, int], torch.Tensor] = {}
        self._samples: dict[tuple[str, int], list[torch.Tensor]] | None = None
        self._shares: Shares = {}
        self.unread: list[float] = []
        """Share of each FFN's bytes."""
        for index, layer in enumerate(model.model.layers):
            layer.mlp.forward = self._ffn(index, layer.mlp)
            layer.self_attn.o_proj.forward = self._output(index, layer.self_attn.o_proj)

    def record(self, ids: torch.Tensor) -> None:
        self._samples = {}
        self.log_probs(ids, {})
        self._sorted = {key: torch.cat(values).sort().values for key, values in self._samples.items()}
        self._samples = None

    @torch.inference_mode()
    def log_probs(self, ids: torch.Tensor, shares: Shares) -> torch.Tensor:
        self._shares, self.unread = shares, []
        return torch.as_tensor(self._model(ids, use_cache=False).logits).float().log_softmax(-1)

    def _kept(self, kind: str, index: int, values: torch.Tensor) -> torch.Tensor:
        if self._samples is not None:
            self._samples.setdefault((kind, index), []).append(values[:, PROMPT:].abs().flatten()[::7])
        share = self._shares.get(kind, 0.0)
        if share == 0.0:
            return torch.ones_like(values, dtype=torch.bool)
        of_layer = self._sorted[kind, index]
        kept = values.abs() >= of_layer[int(share * len(of_layer))]
        kept[:, :PROMPT] = True
        return kept

    def _ffn(self, index: int, mlp: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            columns = self._kept("columns", index, x)
            gate = mlp.act_fn(mlp.gate_proj(x * columns))
            up = self._kept("gates", index, gate)
            product = gate * mlp.up_proj(x)
            down = up & self._kept("products", index, product)
            read = [kept[:, PROMPT:].float().mean() for kept in (columns, up, down)]
            self.unread.append(1.0 - float(sum(read)) / 3)
            return torch.as_tensor(mlp.down_proj(product * down))

        return forward

    def _output(self, index: int, o_proj: Any) -> Any:
        plain = o_proj.forward
        return lambda x: plain(x * self._kept("o_proj", index, x))


def passages(tokenizer: Any, text: str) -> torch.Tensor:
    step = max(4000, len(text) // PASSAGES)
    cut = (
        tokenizer(text[start : start + 4000], add_special_tokens=False)["input_ids"][20 : 20 + TOKENS]
        for start in range(0, len(text) - 4000, step)
    )
    return torch.tensor([ids for ids in cut if len(ids) == TOKENS])


def variants() -> Iterable[Shares]:
    for columns, gates, products in FFN:
        yield {"columns": columns, "gates": gates, "products": products}
    for share in ATTENTION:
        yield {"o_proj": share}


def main(
    model: Annotated[Path, typer.Argument(help="A folder with a checkpoint.", exists=True)],
    text: Annotated[Path, typer.Argument(help="Text.", exists=True)],
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Print a row for each variant."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    ids = passages(AutoTokenizer.from_pretrained(model), text.read_text(encoding="utf-8"))
    dropping = Dropping(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    dropping.record(ids[:CALIBRATION])
    held_out = ids[CALIBRATION:]
    full = dropping.log_probs(held_out, {})
    print(
        "| left out | FFN bytes not read | KL from full, nats | same next token | perplexity |\n|---|---|---|---|---|"
    )
    for shares in ({}, *variants()):
        other = dropping.log_probs(held_out, shares)
        kl = (full.exp() * (full - other)).sum(-1)[:, PROMPT:].mean()
        same = (full.argmax(-1) == other.argmax(-1))[:, PROMPT:].float().mean()
        loss = -other[:, PROMPT:-1].gather(-1, held_out[:, PROMPT + 1 :, None]).mean()
        name = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share) or "nothing"
        unread = sum(dropping.unread) / len(dropping.unread)
        print(f"| {name} | {unread:.1%} | {kl:.4f} | {same:.1%} | {math.exp(loss):.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
