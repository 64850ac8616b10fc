"""Loaded modules that compute something else than their parameters say: followed, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import PreTrainedModel

from skipkernels import Engine, hf_generate
from skipkernels.errors import ModelError
from tests.models import random_prompt, stock_tokens, tiny_engine, tiny_module

PROMPT = random_prompt(9)


class Int8Linear(nn.Linear):
    """As bitsandbytes has them: the weight is int8, its scale stands beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).T


class DoublingLinear(nn.Linear):
    """A fork of Linear with the same parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class LoraLinear(nn.Module):
    """A wrapper as peft has them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.Linear(linear.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Wrapped(torch.Tensor):
    """A tensor of a class of its own, as torchao and DTensor have them."""


class Negated(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


def copied(kind: type[nn.Linear], linear: nn.Linear) -> nn.Linear:
    made = kind(linear.in_features, linear.out_features, bias=False)
    made.weight = linear.weight
    return made


def mlp(module: PreTrainedModel) -> Any:
    return module.model.layers[1].mlp


def attention(module: PreTrainedModel) -> Any:
    return module.model.layers[1].self_attn


def with_adapter(module: PreTrainedModel) -> None:
    attention(module).q_proj = LoraLinear(attention(module).q_proj)


def int8(module: PreTrainedModel) -> None:
    mlp(module).down_proj = Int8Linear(mlp(module).down_proj)


def int8_parameter(module: PreTrainedModel) -> None:
    mlp(module).up_proj.weight = nn.Parameter(mlp(module).up_proj.weight.to(torch.int8), requires_grad=False)


def forked(module: PreTrainedModel) -> None:
    mlp(module).up_proj = copied(DoublingLinear, mlp(module).up_proj)


def forked_head(module: PreTrainedModel) -> None:
    module.lm_head = copied(DoublingLinear, module.lm_head)


def wrapped_tensor(module: PreTrainedModel) -> None:
    mlp(module).up_proj.weight = nn.Parameter(mlp(module).up_proj.weight.detach().as_subclass(Wrapped))


def parametrised(module: PreTrainedModel) -> None:
    parametrize.register_parametrization(mlp(module).up_proj, "weight", Negated())


def pruned(module: PreTrainedModel) -> None:
    prune.random_unstructured(mlp(module).gate_proj, "weight", amount=0.5)


def biased(module: PreTrainedModel) -> None:
    mlp(module).down_proj.bias = nn.Parameter(torch.ones(40))


def biased_head(module: PreTrainedModel) -> None:
    module.lm_head.bias = nn.Parameter(torch.linspace(-9, 9, 259))


def hooked(module: PreTrainedModel) -> None:
    module.model.layers[0].register_forward_hook(lambda _, args, output: output * 2)


def hooked_before(module: PreTrainedModel) -> None:
    mlp(module).register_forward_pre_hook(lambda _, args: (args[0] * 2,))


def hooked_whole(module: PreTrainedModel) -> None:
    module.register_forward_hook(lambda _, args, output: output)


def replaced_forward(module: PreTrainedModel) -> None:
    part, own = mlp(module), mlp(module).forward
    part.forward = lambda x: -own(x)


def other_activation(module: PreTrainedModel) -> None:
    mlp(module).act_fn = nn.GELU()


def other_norm(module: PreTrainedModel) -> None:
    module.model.norm = nn.LayerNorm(40, bias=False)


def other_rotary(module: PreTrainedModel) -> None:
    class Still(nn.Module):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (1, position_ids.shape[1], 10)
            return torch.ones(shape), torch.zeros(shape)

    module.model.rotary_emb = Still()


def other_eps(module: PreTrainedModel) -> None:
    module.model.layers[2].input_layernorm.variance_epsilon = 0.5


def other_scaling(module: PreTrainedModel) -> None:
    attention(module).scaling = 3.0


def clipped_embeddings(module: PreTrainedModel) -> None:
    module.model.embed_tokens.max_norm = 0.1


def quantised_config(module: PreTrainedModel) -> None:
    module.config.quantization_config = {"quant_method": "fp8"}


def own_attention(module: PreTrainedModel) -> None:
    module.config._attn_implementation = "mine"


def dropping(module: PreTrainedModel) -> None:
    attention(module).attention_dropout = 0.5
    module.train()


REFUSED = [
    with_adapter,
    int8,
    int8_parameter,
    forked,
    forked_head,
    wrapped_tensor,
    parametrised,
    pruned,
    biased,
    biased_head,
    hooked,
    hooked_before,
    hooked_whole,
    replaced_forward,
    other_activation,
    other_norm,
    other_rotary,
    other_eps,
    other_scaling,
    clipped_embeddings,
    quantised_config,
    own_attention,
    dropping,
]


def through_transformers(module: PreTrainedModel) -> list[int]:
    ids = torch.tensor([PROMPT])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "skip_threads": 1}
    output = module.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=hf_generate, **options)
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_is_no_parameter_is_refused_by_the_engine(change: Callable[[PreTrainedModel], None]) -> None:
    module = tiny_module()
    change(module)
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(ModelError) as caught:
        tiny_engine(module=module)
    assert "\n" not in str(caught.value)
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_changes_after_the_first_call_is_seen_by_the_second(change: Callable[[PreTrainedModel], None]) -> None:
    module = tiny_module()
    assert through_transformers(module) == stock_tokens(module, PROMPT, 12)
    change(module)
    with pytest.raises(ModelError):
        through_transformers(module)


def negated_norm(module: PreTrainedModel) -> None:
    with torch.no_grad():
        module.model.norm.weight[:20].mul_(-1)


def untied(module: PreTrainedModel) -> None:
    module.lm_head.weight = nn.Parameter(-module.lm_head.weight.detach().clone())


def tied(module: PreTrainedModel) -> None:
    module.lm_head.weight = module.model.embed_tokens.weight


def faster_rotation(module: PreTrainedModel) -> None:
    module.model.rotary_emb.inv_freq.mul_(1.7)


def halved(module: PreTrainedModel) -> None:
    module.to(torch.bfloat16).to(torch.float32)


def fewer_layers(module: PreTrainedModel) -> None:
    module.model.layers = module.model.layers[:3]
    module.config.num_hidden_layers = 3


def swapped_layers(module: PreTrainedModel) -> None:
    first, second = module.model.layers[0], module.model.layers[1]
    module.model.layers[0], module.model.layers[1] = second, first
    for index, layer in enumerate(module.model.layers):
        layer.self_attn.layer_idx = index


@pytest.mark.parametrize("change", [negated_norm, untied, faster_rotation, halved, fewer_layers, swapped_layers])
@pytest.mark.parametrize("first", [False, True], ids=["before the first call", "after it"])
def test_other_values_are_followed(change: Callable[[PreTrainedModel], None], first: bool) -> None:
    module = tiny_module()
    if first:
        through_transformers(module)
    change(module)
    assert through_transformers(module) == stock_tokens(module, PROMPT, 12)


def test_a_tie_after_the_first_call_is_followed() -> None:
    module = tiny_module()
    through_transformers(module)
    tied(module)
    assert through_transformers(module) == stock_tokens(module, PROMPT, 12)
    untied(module)
    assert through_transformers(module) == stock_tokens(module, PROMPT, 12)


def test_hooks_that_transformers_installs_to_watch_are_none() -> None:
    module = tiny_module()
    module(torch.tensor([PROMPT]), output_hidden_states=True, output_attentions=True)
    assert through_transformers(module) == stock_tokens(module, PROMPT, 12)


def test_a_meta_module_is_named() -> None:
    with pytest.raises(ModelError, match="on the meta device and holds no values"):
        through_transformers(tiny_module().to("meta"))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, nn.Sequential, id])
def test_a_wrapped_module_is_no_module(wrap: Callable[[PreTrainedModel], Any]) -> None:
    with pytest.raises(ModelError, match="a model is a folder, a hub id or a transformers module, got a"):
        Engine.from_pretrained(wrap(tiny_module()))
