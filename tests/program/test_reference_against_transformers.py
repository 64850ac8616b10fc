"""Every reference op against the Hugging Face module it stands for, on every layer of every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from skipkernels.model.config import ModelConfig
from skipkernels.program.table import OPS
from skipkernels.skipping.policy import SkipPolicy
from tests.executors.decoder import Decoder, packed
from tests.models import FAMILIES, random_prompt, tiny_module
from tests.tolerances import assert_close

PROMPT = random_prompt(30)
LAST = len(PROMPT) - 1
BRANCHES = {"o_proj_add": "self_attn.o_proj", "down_proj_add": "mlp.down_proj"}
MEASURED = SkipPolicy(threshold=1.0, cold_start=0, cold_end=0)  # every layer but the last is tested, none skipped


class Modules:
    """What went into and came out of every submodule of a forward pass, at each of the prompt's positions."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        hooks = [sub.register_forward_hook(self._hook(name), with_kwargs=True) for name, sub in module.named_modules()]
        with torch.inference_mode():
            module(torch.tensor([PROMPT]))
        for hook in hooks:
            hook.remove()
        self._module = module

    def _hook(self, name: str) -> Callable[..., None]:
        def record(_: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            source = args[0] if args else kwargs.get("hidden_states")
            result = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
            if isinstance(source, torch.Tensor) and isinstance(result, torch.Tensor):
                self.inputs[name], self.outputs[name] = source[0].clone(), result[0].clone()

        return record

    def logits(self, position: int) -> torch.Tensor:
        """Of a position, capped where the model caps them."""
        cap = getattr(self._module.config, "final_logit_softcapping", None)
        logits = self.outputs["lm_head"][position]
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def parameter(self, name: str) -> torch.Tensor:
        return self._module.get_parameter(name).detach()

    def part(self, name: str) -> Any:
        return self._module.get_submodule(name)

    def rotated(self, projected: torch.Tensor, head_dim: int, layer: int) -> torch.Tensor:
        """Queries or keys [positions, heads, head_dim] of a layer at their positions."""
        heads = projected.reshape(1, len(PROMPT), -1, head_dim).transpose(1, 2)
        if self._module.config.model_type == "gemma3_text":  # whose heads come first already when they are normed
            heads = projected[None]
        config, rotary = self._module.config, self._module.model.rotary_emb
        if config.model_type == "smollm3" and not config.no_rope_layers[layer]:
            return heads[0].transpose(0, 1)
        kind = (config.layer_types[layer],) if config.model_type in ("gemma3_text", "olmo3") else ()
        cos, sin = rotary(torch.zeros(1), torch.arange(len(PROMPT))[None], *kind)
        if config.model_type == "gpt_oss":  # whose tables hold each pair once
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        width = cos.shape[-1]
        turned = apply_rotary_pos_emb(heads[..., :width], heads[..., :width], cos, sin)[0]
        return torch.cat((turned, heads[..., width:]), dim=-1)[0].transpose(0, 1)

    def grown(self, query: torch.Tensor) -> torch.Tensor:
        """Queries [positions, heads, head_dim], scaled by their positions."""
        if (rope := self._module.config.rope_parameters).get("llama_4_scaling_beta") is None:
            return query
        beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        return query * get_llama_4_attn_scale(torch.arange(len(PROMPT))[None], beta, length)[0, 0, :, :, None]


NEURON_OPS = {
    "neuron_gate",
    "gate_proj_act",
    "select_neurons",
    "up_proj_mul",
    "down_proj_neurons_add",
    "experts_down_proj_neurons_add",
}
"""They do what no module does: ``test_neurons`` and ``test_expert_neurons`` render it."""
EXPERT_OPS = {"route_experts", "experts_gate_up_act", "experts_down_proj_add"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_gives_what_its_module_gives(family: str) -> None:
    """The whole prompt is one step: its last token in a decode row, all before it in prompt rows."""
    module = tiny_module(family)
    expected = Modules(module)
    decoder = Decoder(*packed(module, max_seq_len=96), num_prompt_rows=LAST, gated=True)
    decoder.begin(0, PROMPT, policy=MEASURED)
    decoder.give_blocks(0)
    decoder.add_prompt_rows(0, 0, PROMPT[:-1])
    decoder.state.start_decoding(0)
    compared, layer, projection = set(), -1, ""
    for index, ins in enumerate(decoder.program):
        is_qkv = ins.op == "o_proj_add" and ins.tensors["hidden_states"] is decoder.state.qkv
        layer += is_qkv or ins.op == "qkv_rope_append"
        if is_qkv:  # compared when its heads are normed
            decoder.executor.run_instruction(index)
            continue
        projection = ins.op if ins.op in BRANCHES else projection
        decoder.executor.run_instruction(index)
        compared.add(ins.op)
        if ins.op in BRANCHES and decoder.config.changes_branches:
            output = expected.outputs[f"model.layers.{layer}.{BRANCHES[ins.op]}"]
            assert_close(_positions(decoder.state.branch), output, "fp32", f"{ins.op} of layer {layer}")
        else:  # branch_add adds to the residual stream what the projection adds elsewhere
            _compare(projection if ins.op == "branch_add" else ins.op, decoder, expected, layer)
    assert compared == _ops_of(decoder.config)
    assert not decoder.state.branch.any()


def _ops_of(config: ModelConfig) -> set[str]:
    ops = set(OPS) - NEURON_OPS
    ops -= {"qkv_rope_append" if config.norms_whole_qk else "norm_rope_append"}
    if not config.changes_branches:
        ops -= {"branch_add"}
    if not config.num_experts:
        return ops - EXPERT_OPS
    return ops if not all(config.expert_layers) else ops - {"gate_up_act", "down_proj_add"}


def _positions(rows: torch.Tensor) -> torch.Tensor:
    """A buffer's rows in the order of their positions: the decode row's is the last."""
    return rows.roll(-1, dims=0)


def _compare(op: str, decoder: Decoder, expected: Modules, layer: int) -> None:
    s, config, what = decoder.state, decoder.config, f"{op} of layer {layer}"
    prefix = f"model.layers.{layer}."
    attention = prefix + "self_attn."
    hidden = _positions(s.hidden_states)
    ffn_norm = "pre_feedforward_layernorm" if config.branch_norms else "post_attention_layernorm"
    ffn_norm = ffn_norm if config.input_norms else "mlp"
    if op == "embed":
        assert_close(hidden, expected.inputs["model.layers.0"], "fp32", what)
    elif op in ("qkv_rope_append", "norm_rope_append"):
        if (fused := expected.outputs.get(attention + "qkv_proj")) is not None:
            kv_size = config.num_key_value_heads * config.head_dim
            *projected, value = fused.split([config.attention_size, kv_size, kv_size], dim=-1)
        else:
            normed = "_norm" if config.qk_norm else "_proj"
            projected = [expected.outputs[attention + kind + normed] for kind in "qk"]
            value = expected.outputs[attention + "v_proj"]
        query, key = (expected.rotated(heads, config.head_dim, layer) for heads in projected)
        query = expected.grown(query)
        value = value.reshape(len(PROMPT), -1, config.head_dim)
        assert_close(_positions(s.query), query, "fp32", what + ", query")
        keys, values = (cache[layer].transpose(0, 1) for cache in decoder.cached(0, len(PROMPT)))
        assert_close(keys, key, "fp32", what + ", key")
        assert_close(values, value, "fp32", what + ", value")
    elif op == "decode_attention":
        assert_close(_positions(s.attn_output).flatten(1), expected.inputs[attention + "o_proj"], "fp32", what)
    elif op == "o_proj_add":
        assert_close(hidden, expected.inputs[prefix + ffn_norm], "fp32", what)
    elif op == "gate_up_act":
        assert_close(_positions(s.intermediate), expected.inputs[prefix + "mlp.down_proj"], "fp32", what)
    elif op == "route_experts":
        own = prefix + ("mlp.router." if config.expert_biases else "mlp.gate.")
        bias = expected.parameter(own + "bias") if config.expert_biases else None
        logits = F.linear(expected.inputs[prefix + "mlp"], expected.parameter(own + "weight"), bias)
        assert_close(_positions(s.router_logits), logits, "fp32", what)
        shares, chosen = logits.softmax(-1).topk(config.num_experts_per_tok)
        assert _positions(s.expert_ids).tolist() == chosen.tolist()
        shares = shares / shares.sum(-1, keepdim=True) if config.norm_topk_prob else shares
        assert_close(_positions(s.expert_weights), shares, "fp32", what + ", shares")
    elif op == "experts_gate_up_act":
        weight, x = expected.parameter(prefix + "mlp.experts.gate_up_proj"), expected.inputs[prefix + "mlp"]
        chosen = _positions(s.expert_ids).long()
        if config.expert_biases:  # gpt-oss
            bias, module = expected.parameter(prefix + "mlp.experts.gate_up_proj_bias"), expected.part(prefix + "mlp")
            gate_up = torch.einsum("pcho,ph->pco", weight[chosen], x) + bias[chosen]
            assert_close(_positions(s.expert_intermediate), module.experts._apply_gate(gate_up), "fp32", what)
            return
        gate, up = torch.einsum("pcoh,ph->pco", weight[chosen], x).chunk(2, dim=-1)
        assert_close(_positions(s.expert_intermediate), F.silu(gate) * up, "fp32", what)
    elif op in ("down_proj_add", "experts_down_proj_add"):
        assert_close(hidden, expected.outputs[prefix.removesuffix(".")], "fp32", what)
    elif op == "skip_gate":  # stands in front of the next layer
        if layer < 0:
            return
        before, after = expected.inputs[prefix + ffn_norm], expected.outputs[prefix.removesuffix(".")]
        similarity = F.cosine_similarity(before[LAST], after[LAST], dim=0)
        assert_close(s.similarity[layer, 0], similarity, "similarity", what)
    elif op == "lm_head":
        assert_close(s.logits[0], expected.logits(LAST) * config.logits_multiplier, "fp32", what)
    elif op == "sample":
        assert int(s.next_token[0]) == int(expected.outputs["lm_head"][LAST].argmax())
    else:
        assert op == "advance"
        assert s.token_ids[0, len(PROMPT)] == s.next_token[0]
        assert s.active.tolist() == [1] + [0] * LAST


def test_an_instruction_is_left_out_where_no_row_wants_it() -> None:
    decoder = Decoder(*packed(tiny_module(), max_seq_len=96), gated=True)
    decoder.state.hidden_states.fill_(7.0)
    for index in range(len(decoder.program)):
        decoder.executor.run_instruction(index)
    assert (decoder.state.hidden_states == 7.0).all()
    assert decoder.executor.run(3) == []
