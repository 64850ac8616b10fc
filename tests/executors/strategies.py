"""Hypothesis draws the programs of ``programs``."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from skipkernels.model.config import ACTIVATIONS
from skipkernels.program.state import LAYOUTS, Layout
from skipkernels.skipping.policy import (
    BATCH_RULES,
    DensePolicy,
    FixedPolicy,
    NeuronPolicy,
    RandomPolicy,
    SkipPolicy,
    TimingPolicy,
)
from tests.executors.programs import Case

policies = st.one_of(
    st.just(DensePolicy()),
    st.builds(
        SkipPolicy,
        threshold=st.sampled_from([-1.0, 0.3, 0.7, 0.9]),
        span=st.sampled_from([None, 1, 2]),
        cold_start=st.just(0),
        cold_end=st.sampled_from([0, 1]),
        warmup_tokens=st.sampled_from([0, 2]),
        batch_rule=st.sampled_from(BATCH_RULES),
    ),
    st.builds(
        SkipPolicy,
        threshold=st.sampled_from([0.3, 0.9]),
        span=st.sampled_from([None, 1, 2]),
        cold_start=st.just(0),
        cold_end=st.just(0),
        warmup_tokens=st.sampled_from([0, 2]),
        target_ratio=st.sampled_from([0.1, 0.3]),
    ),
    st.builds(FixedPolicy, layers=st.sampled_from([(0,), (1, 3), (0, 1, 2, 3)]), warmup_tokens=st.sampled_from([0, 3])),
    st.builds(
        RandomPolicy,
        ratio=st.sampled_from([0.2, 0.5]),
        seed=st.integers(-(2**63), 2**63 - 1),
        warmup_tokens=st.just(2),
    ),
    st.builds(TimingPolicy, ratio=st.sampled_from([0.0, 0.25, 0.5])),
)


thresholds = st.sampled_from([(), (0.0,) * 4, (0.0, 0.2, 0.5, 1.5), (0.3,) * 4])
neuron_policies = st.one_of(
    st.builds(
        NeuronPolicy,
        gate_thresholds=thresholds,
        product_thresholds=st.sampled_from([(0.0, 0.2, 0.5, 1.5), (0.3,) * 4]),
        warmup_tokens=st.sampled_from([0, 2]),
        target_ratio=st.sampled_from([None, 0.1]),
    ),
    st.builds(SkipPolicy, threshold=st.sampled_from([0.3, 0.9]), gate_thresholds=thresholds, warmup_tokens=st.just(0)),
    st.builds(FixedPolicy, layers=st.just((1, 3)), gate_thresholds=thresholds, warmup_tokens=st.just(0)),
)


@st.composite
def cases(draw: st.DrawFn, layout: Layout = LAYOUTS["cpu"], max_sequences: int = 16, experts: bool = False) -> Case:
    """Any program over small buffers cut by ``layout``, with cache blocks of any size. What few families have
    follows from the seed: one draw more, and other programs would be drawn."""
    split = layout.kv_split_size
    longest = draw(st.sampled_from([5, 40, split, 2 * split + 40]))
    sequences = draw(st.integers(1, max_sequences if longest < split else 4))
    seq_lens = draw(st.lists(st.integers(0, longest), min_size=sequences, max_size=sequences))
    active = draw(st.lists(st.sampled_from([True, True, False]), min_size=sequences, max_size=sequences))
    with_prompts = draw(st.booleans())
    prompt_rows = [draw(st.integers(0, min(length, 9))) if with_prompts else 0 for length in seq_lens]
    chosen = draw(st.lists(policies, min_size=1, max_size=3))
    neuron_rows, post_norms_only = draw(st.booleans()), draw(st.sampled_from([False, False, True]))
    experts = experts and not post_norms_only
    if neuron_rows and draw(st.sampled_from([True, True, False])):
        chosen += draw(st.lists(neuron_policies, min_size=1, max_size=2))
    return Case(
        seq_lens=tuple(seq_lens),
        active=tuple(active),
        hidden_size=draw(st.integers(1, 140)),
        intermediate_size=draw(st.integers(4, 140)),  # the largest of fewer may be a cancelled sum: no measure
        vocab_size=draw(st.integers(2, 300)),
        head_dim=draw(st.sampled_from([2, 6, 10, 64, 80, 96, 128])),
        num_key_value_heads=draw(st.integers(1, 3)),
        group_size=draw(st.integers(1, 8)),
        sliding_window=draw(st.sampled_from([None, 1, 7, split, split + 50])),
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_proj_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        policies=tuple(chosen),
        neuron_rows=neuron_rows,
        seed=(seed := draw(st.integers(0, 1 << 30))),
        prompt_rows=tuple(prompt_rows),
        multi_axis=draw(st.booleans()),
        layout=replace(layout, block_size=draw(st.sampled_from([16, 32, 64]))),
        activation=(draw(st.sampled_from(ACTIVATIONS[:2])), "clamped_swiglu")[seed % 3 == 2],
        branch_norms=draw(st.booleans()),
        multiplier=draw(st.sampled_from([1.0, 0.3])),
        post_norms_only=post_norms_only,
        rotary_share=draw(st.sampled_from([1.0, 1.0, 0.75])),
        grows_queries=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        sinks=seed % 3 == 1,
        num_experts=draw(st.sampled_from([0, 0, 1, 5, 9, 30])) if experts else 0,
        expert_biases=experts and seed % 2 == 1,
    )
