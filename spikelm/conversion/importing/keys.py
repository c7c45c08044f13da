"""Where each of our tensors stands in the checkpoints of others: tables, no code.

Left our name, right the rule that makes the tensor from theirs. Names inside a layer leave out the
layer's prefix on both sides. Matrices are [out, in] on both sides unless `transposed`.

Sources: BlinkDL/RWKV-LM (RWKV-4, RWKV-7), ridgerchu/SpikeGPT, BICLab/SpikingBrain-7B and
huggingface/transformers (llama, qwen2, qwen3), names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SCALES = "weight_quantizer.scales"
"""Beside a `weight` of W8ASpike: the sizes of its int8 steps [out, groups, 1]."""


@dataclass(frozen=True)
class Rule:
    """How one tensor of ours is made from theirs."""

    parts: tuple[tuple[str, str | None], ...]
    """Their tensors, one below the other, each with the name of its row count (None: all rows)."""
    form: Literal["copy", "transpose", "complement"] = "copy"
    """complement: 1 - x."""


@dataclass(frozen=True)
class Layout:
    """The names of one family of checkpoints."""

    model: Mapping[str, Rule]
    """Outside the layers."""
    layer: Mapping[str, Rule]
    """In every layer."""
    mixers: Mapping[str, Mapping[str, Rule]]
    """In layers of one mixer."""
    prefix: str
    """Their prefix of a layer's names."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that carry nothing."""
    quantised: bool = False
    """Every projection of a layer has scales."""


def same(name: str) -> Rule:
    return Rule(((name, None),))


def transposed(name: str) -> Rule:
    return Rule(((name, None),), "transpose")


def complement(name: str) -> Rule:
    """They keep the share of the present token, we that of the previous one."""
    return Rule(((name, None),), "complement")


def rows(*parts: tuple[str, str]) -> Rule:
    """Their tensors, top to bottom, each with the name of its row count."""
    return Rule(parts)


# --- RWKV -----------------------------------------------------------------------------------------

_RWKV_MODEL = {
    "embedding.weight": same("emb.weight"),
    "embedding_norm.weight": same("blocks.0.ln0.weight"),
    "embedding_norm.bias": same("blocks.0.ln0.bias"),
    "norm.weight": same("ln_out.weight"),
    "norm.bias": same("ln_out.bias"),
    "head.linear.weight": same("head.weight"),
    "head_qk.queries.linear.weight": same("head_q.weight"),
    "head_qk.keys.linear.weight": same("head_k.weight"),
}
_RWKV_NORMS = {
    "mixer_norm.weight": same("ln1.weight"),
    "mixer_norm.bias": same("ln1.bias"),
    "ffn_norm.weight": same("ln2.weight"),
    "ffn_norm.bias": same("ln2.bias"),
}


def _channel_mix(ours: str, theirs: str) -> dict[str, Rule]:
    return {
        f"{ours}.shift": complement(f"{theirs}.time_mix_k"),
        f"{ours}.input.linear.weight": same(f"{theirs}.key.weight"),
        f"{ours}.output.linear.weight": same(f"{theirs}.value.weight"),
        f"{ours}.receptance_shift": complement(f"{theirs}.time_mix_r"),
        f"{ours}.receptance.linear.weight": same(f"{theirs}.receptance.weight"),
    }


RWKV4 = Layout(
    model=_RWKV_MODEL,
    layer={**_RWKV_NORMS, **_channel_mix("ffn", "ffn")},
    mixers={
        "wkv4": {
            "mixer.key_shift": complement("att.time_mix_k"),
            "mixer.value_shift": complement("att.time_mix_v"),
            "mixer.receptance_shift": complement("att.time_mix_r"),
            "mixer.decay": same("att.time_decay"),
            "mixer.bonus": same("att.time_first"),
            "mixer.key.linear.weight": same("att.key.weight"),
            "mixer.value.linear.weight": same("att.value.weight"),
            "mixer.receptance.linear.weight": same("att.receptance.weight"),
            "mixer.output.linear.weight": same("att.output.weight"),
        },
        "channel_mix": _channel_mix("mixer", "ffnPre"),
    },
    prefix="blocks.{}.",
    # The causal mask of head-QK, as long as the training context.
    ignored=("copy_mask",),
)

RWKV7 = Layout(
    model=_RWKV_MODEL,
    layer={
        **_RWKV_NORMS,
        "ffn.shift": same("ffn.x_k"),
        "ffn.input.linear.weight": same("ffn.key.weight"),
        "ffn.output.linear.weight": same("ffn.value.weight"),
    },
    mixers={
        "rwkv7": {
            "mixer.receptance_shift": same("att.x_r"),
            "mixer.decay_shift": same("att.x_w"),
            "mixer.key_shift": same("att.x_k"),
            "mixer.value_shift": same("att.x_v"),
            "mixer.rate_shift": same("att.x_a"),
            "mixer.gate_shift": same("att.x_g"),
            "mixer.receptance.linear.weight": same("att.receptance.weight"),
            "mixer.key.linear.weight": same("att.key.weight"),
            "mixer.value.linear.weight": same("att.value.weight"),
            "mixer.output.linear.weight": same("att.output.weight"),
            "mixer.decay_down.linear.weight": transposed("att.w1"),
            "mixer.decay_up.linear.weight": transposed("att.w2"),
            "mixer.decay_bias": same("att.w0"),
            "mixer.rate_down.linear.weight": transposed("att.a1"),
            "mixer.rate_up.linear.weight": transposed("att.a2"),
            "mixer.rate_bias": same("att.a0"),
            "mixer.value_down.linear.weight": transposed("att.v1"),
            "mixer.value_up.linear.weight": transposed("att.v2"),
            "mixer.value_bias": same("att.v0"),
            "mixer.gate_down.linear.weight": transposed("att.g1"),
            "mixer.gate_up.linear.weight": transposed("att.g2"),
            "mixer.key_scale": same("att.k_k"),
            "mixer.key_rate": same("att.k_a"),
            "mixer.bonus": same("att.r_k"),
            "mixer.norm.weight": same("att.ln_x.weight"),
            "mixer.norm.bias": same("att.ln_x.bias"),
        },
    },
    prefix="blocks.{}.",
    # The first layer has nobody's values to mix with.
    ignored=("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"),
)

# --- transformers ---------------------------------------------------------------------------------

_MLP = {
    "ffn.input.linear.weight": rows(
        ("mlp.gate_proj.weight", "hidden"), ("mlp.up_proj.weight", "hidden")
    ),
    "ffn.output.linear.weight": same("mlp.down_proj.weight"),
}


def _qkv(theirs: str, kind: str) -> tuple[tuple[str, str], ...]:
    counts = {"q": "queries", "k": "keys", "v": "values"}
    return tuple((f"{theirs}.{x}_proj.{kind}", count) for x, count in counts.items())


def _attention(theirs: str) -> dict[str, Rule]:
    return {
        "mixer.input.linear.weight": rows(*_qkv(theirs, "weight")),
        "mixer.qkv_bias": rows(*_qkv(theirs, "bias")),
        "mixer.heads.query_norm.weight": same(f"{theirs}.q_norm.weight"),
        "mixer.heads.key_norm.weight": same(f"{theirs}.k_norm.weight"),
        "mixer.output.linear.weight": same(f"{theirs}.o_proj.weight"),
        "mixer.output.bias": same(f"{theirs}.o_proj.bias"),
    }


TRANSFORMERS = Layout(
    model={
        "embedding.weight": same("model.embed_tokens.weight"),
        "norm.weight": same("model.norm.weight"),
        "head.linear.weight": same("lm_head.weight"),
    },
    layer={
        "mixer_norm.weight": same("input_layernorm.weight"),
        "ffn_norm.weight": same("post_attention_layernorm.weight"),
        **_MLP,
    },
    mixers={"full": _attention("self_attn"), "window": _attention("self_attn")},
    prefix="model.layers.{}.",
    ignored=("*.rotary_emb.inv_freq",),
)

# --- SpikingBrain ---------------------------------------------------------------------------------

_GLA = {
    "mixer.qkv_bias": rows(*_qkv("attn", "bias")),
    "mixer.heads.norm.weight": same("attn.g_norm.weight"),
    "mixer.output.linear.weight": same("attn.o_proj.weight"),
}

SPIKINGBRAIN = Layout(
    model={
        "embedding.weight": same("model.embeddings.weight"),
        "norm.weight": same("model.norm.weight"),
        "head.linear.weight": same("lm_head.weight"),
    },
    layer={
        "mixer_norm.weight": same("attn_norm.weight"),
        "ffn_norm.weight": same("mlp_norm.weight"),
        **_MLP,
    },
    mixers={
        "window": _attention("attn"),
        "gla": {
            **_GLA,
            "mixer.input.linear.weight": rows(
                *_qkv("attn", "weight"), ("attn.gk_proj.0.weight", "gate")
            ),
            "mixer.decay.linear.weight": same("attn.gk_proj.1.weight"),
            "mixer.decay_bias": same("attn.gk_proj.1.bias"),
        },
    },
    prefix="model.layers.{}.",
    ignored=("*.rotary_emb.inv_freq",),
)

W8ASPIKE = Layout(
    model=SPIKINGBRAIN.model,
    layer=SPIKINGBRAIN.layer,
    mixers={
        "window": _attention("attn"),
        # The two matrices of the decay gate are merged into one.
        "gla": {
            **_GLA,
            "mixer.input.linear.weight": rows(
                *_qkv("attn", "weight"), ("attn.gk_proj.weight", "gate")
            ),
            "mixer.decay_bias": same("attn.gk_proj.bias"),
        },
    },
    prefix=SPIKINGBRAIN.prefix,
    ignored=SPIKINGBRAIN.ignored,
    quantised=True,
)
