"""Every reference op against the Hugging Face module it stands for, on every layer of every family."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from skipkernels.decoding.prefill import prefill
from skipkernels.engine import Engine
from skipkernels.program.table import OPS
from skipkernels.skipping.policy import SkipPolicy
from tests.models import FAMILIES, random_prompt, tiny_engine, tiny_module
from tests.tolerances import assert_close

PROMPT = random_prompt(30)
MEASURED = SkipPolicy(threshold=1.0, cold_start=0, cold_end=0)  # every layer but the last is tested, none skipped


class Modules:
    """What went into and came out of every submodule of a forward pass, at the prompt's last position."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        hooks = [sub.register_forward_hook(self._hook(name), with_kwargs=True) for name, sub in module.named_modules()]
        with torch.inference_mode():
            module(torch.tensor([PROMPT]))
        for hook in hooks:
            hook.remove()
        cos, sin = module.model.rotary_emb(torch.zeros(1), torch.tensor([[len(PROMPT) - 1]]))
        self.cos, self.sin = cos[0], sin[0]

    def _hook(self, name: str) -> Callable[..., None]:
        def record(_: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            source = args[0] if args else kwargs.get("hidden_states")
            result = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
            if isinstance(source, torch.Tensor) and isinstance(result, torch.Tensor):
                self.inputs[name], self.outputs[name] = source[0, -1].clone(), result[0, -1].clone()

        return record

    def rotated(self, projected: torch.Tensor, head_dim: int) -> torch.Tensor:
        heads = projected.reshape(1, -1, 1, head_dim)  # batch, heads, tokens, head_dim
        return apply_rotary_pos_emb(heads, heads, self.cos[None], self.sin[None])[0][0, :, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_gives_what_its_module_gives(family: str) -> None:
    module = tiny_module(family)
    expected = Modules(module)
    engine = tiny_engine(module=module, executor="reference", policy=MEASURED)
    prefill(engine.config, engine.weights, engine.state, 0, torch.tensor(PROMPT, dtype=torch.int32))
    engine.state.max_new_tokens[0] = 5
    executor = engine.executor_for(engine.policy)
    compared, layer = set(), -1
    for index, ins in enumerate(executor.program):
        layer += ins.op == "qkv_rope_append"
        executor.run_instruction(index)
        compared.add(ins.op)
        _compare(ins.op, engine, expected, layer, len(PROMPT) - 1)
    assert compared == set(OPS)


def _compare(op: str, engine: Engine, expected: Modules, layer: int, position: int) -> None:
    s, config, what = engine.state, engine.config, f"{op} of layer {layer}"
    prefix = f"model.layers.{layer}."
    attention = prefix + "self_attn."
    if op == "embed":
        assert_close(s.hidden_states[0], expected.outputs["model.embed_tokens"], "fp32", what)
    elif op == "qkv_rope_append":
        normed = "_norm" if config.qk_norm else "_proj"
        query, key = (expected.outputs[attention + kind + normed].flatten() for kind in ("q", "k"))
        if config.qk_norm:  # normed before heads and positions change places: the last position is the whole output
            query, key = expected.outputs[attention + "q_norm"], expected.outputs[attention + "k_norm"]
        assert_close(s.query[0], expected.rotated(query, config.head_dim), "fp32", what + ", query")
        assert_close(s.k_cache[layer, 0, :, position], expected.rotated(key, config.head_dim), "fp32", what + ", key")
        value = expected.outputs[attention + "v_proj"].view(-1, config.head_dim)
        assert_close(s.v_cache[layer, 0, :, position], value, "fp32", what + ", value")
    elif op == "decode_attention":
        assert_close(s.attn_output[0].flatten(), expected.inputs[attention + "o_proj"], "fp32", what)
    elif op == "o_proj_add":
        assert_close(s.hidden_states[0], expected.inputs[prefix + "post_attention_layernorm"], "fp32", what)
    elif op == "gate_up_silu":
        assert_close(s.intermediate[0], expected.inputs[prefix + "mlp.down_proj"], "fp32", what)
    elif op == "down_proj_add":
        assert_close(s.hidden_states[0], expected.outputs[prefix.removesuffix(".")], "fp32", what)
    elif op == "skip_gate":  # stands in front of the next layer
        before, after = expected.inputs[prefix + "post_attention_layernorm"], expected.outputs[prefix.removesuffix(".")]
        assert_close(s.similarity[layer, 0], F.cosine_similarity(before, after, dim=0), "similarity", what)
    elif op == "lm_head":
        assert_close(s.logits[0], expected.outputs["lm_head"], "fp32", what)
    elif op == "sample":
        assert int(s.next_token[0]) == int(expected.outputs["lm_head"].argmax())
    else:
        assert op == "advance"
        assert s.token_ids[0, position + 1] == s.next_token[0]


def test_an_instruction_is_left_out_where_no_row_wants_it() -> None:
    engine = tiny_engine(executor="reference")
    executor = engine.executor_for(engine.policy)
    engine.state.hidden_states.fill_(7.0)
    for index in range(len(executor.program)):
        executor.run_instruction(index)
    assert (engine.state.hidden_states == 7.0).all()
    assert executor.run(3) == []
