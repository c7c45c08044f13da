"""Configuration as data: frozen dataclasses, strict YAML, dotted overrides.

Unknown keys are errors that suggest the nearest known one; values are checked against the
annotated types. No torch here: `spikelm --help` and `--dry-run` read this module.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from spikelm.errors import ConfigError, did_you_mean

T = TypeVar("T")

TENSOR_CLASSES = (
    "embedding_output",
    "mixer_input",
    "mixer_output",
    "queries_keys",
    "attention_queries",
    "gate_input",
    "mixer_residual",
    "ffn_input",
    "ffn_hidden",
    "ffn_residual",
    "head_input",
)

WEIGHTLESS_CLASSES = (
    "embedding_output",
    "queries_keys",
    "attention_queries",
    "mixer_residual",
    "ffn_residual",
)
"""Tensor classes that no projection reads: their silence skips no weights."""


Surrogate = Literal["arctan", "sigmoid", "rectangle", "triangle", "fast_sigmoid", "gaussian"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronConfig:
    """The neuron in front of one class of projections; docs/neurons.md has the formulas."""

    kind: Literal["off", "integer", "lif", "step"] = "off"
    """off: floats; integer: spike counts; lif: token-axis membrane; step: [x >= v_threshold]."""
    scale: Literal["adaptive", "fixed"] = "adaptive"
    """The size of one count: mean |x| / k of each token, or `v_threshold` (integer neuron)."""
    k: float = 3.0
    """Counts per mean |x|: v_threshold = mean|x| / k (integer neuron, adaptive scale)."""
    power: float = 1.0
    """x |x / mean|x||^(power - 1) becomes counts in place of x, 1 to 2: above 1 large entries grow
    and less is lost in the dead zone (integer neuron, adaptive scale)."""
    dead_zone: float = 0.0
    """Initial half-width of the zone that gives count 0, in units of the token's mean |x|."""
    max_count: int | None = None
    """Clip of |count|; null does not clip (SpikingBrain), 1 is ternary."""
    unsigned: bool = False
    """Counts are >= 0: for vectors that come out of a ReLU."""
    learn: Literal["dead_zone"] | bool = False
    """Train dead zone and k by gradient (integer), or the zone alone (dead_zone: JumpReLU's
    thresholds, Rajamanoharan et al. 2024); tau, threshold and softness (LIF)."""
    target_silence: float | None = None
    """Training steers the dead zone to this silent fraction; null leaves it alone. Of a zone that
    is learned too, the gradient shapes the channels and this rule the silence of all."""
    target_ramp: float = 0.0
    """Share of training in which the target rises to `target_silence` from what the first step
    measures."""
    bypass: float = 0.0
    """Share of training in which values = l * spikes + (1 - l) * x, l rising linearly from 0 to 1
    (the smooth path of SpikingMamba, 2026); outside training l is 1."""
    tau: float = 2.0
    """Membrane time constant in tokens (LIF)."""
    v_threshold: float = 1.0
    """Firing threshold (LIF, step), or the size of one count (integer, fixed scale)."""
    reset: Literal["zero", "subtract"] = "zero"
    """Hard reset to 0, or soft reset by v_threshold (LIF)."""
    detach_reset: bool = False
    """Stop the gradient through the reset (LIF)."""
    detach_membrane: bool = False
    """Stop the gradient through the carried membrane: SLTT (LIF)."""
    surrogate: Surrogate = "arctan"
    """Derivative used for the spike (LIF, step)."""
    alpha: float = 2.0
    """Sharpness of the surrogate (LIF, step)."""
    softness: float | None = None
    """UltraLIF's temperature: train with the soft maximum instead of a surrogate (LIF)."""

    def __post_init__(self) -> None:
        _require(self.k > 0, "k", self.k, "a number > 0")
        _require(self.dead_zone >= 0, "dead_zone", self.dead_zone, "a number >= 0")
        _require(self.tau >= 1, "tau", self.tau, "a number >= 1")
        if self.kind != "step":
            _require(self.v_threshold > 0, "v_threshold", self.v_threshold, "a number > 0")
        _require(self.alpha > 0, "alpha", self.alpha, "a number > 0")
        if self.softness is not None:
            _require(self.softness > 0, "softness", self.softness, "a number > 0, or null")
        if self.max_count is not None:
            _require(1 <= self.max_count <= 127, "max_count", self.max_count, "1 to 127, or null")
        if self.target_silence is not None:
            _require(
                0 <= self.target_silence < 1, "target_silence", self.target_silence, "0 <= s < 1"
            )
            if self.kind != "integer":
                raise ConfigError(
                    "target_silence needs kind: integer; an empty mapping {} switches a neuron off"
                )
        zoned = self.dead_zone or self.target_silence is not None
        if self.kind == "integer" and self.scale == "fixed" and zoned:
            raise ConfigError(
                "dead_zone and target_silence need scale: adaptive; a fixed scale has no zone"
            )
        _require(1 <= self.power <= 2, "power", self.power, "1 to 2")
        if self.power != 1 and (self.kind, self.scale) != ("integer", "adaptive"):
            raise ConfigError("power needs kind: integer and scale: adaptive")
        if self.learn == "dead_zone" and (self.kind, self.scale) != ("integer", "adaptive"):
            raise ConfigError("learn: dead_zone needs kind: integer and scale: adaptive")
        for name in ("target_ramp", "bypass"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        if self.target_ramp and self.target_silence is None:
            raise ConfigError("target_ramp needs target_silence, which it leads to")
        if self.bypass and self.kind == "off":
            raise ConfigError("bypass needs a kind that spikes: integer, lif or step, not off")
        if self.kind == "lif" and self.learn and self.tau == 1:
            raise ConfigError("tau: 1 given with learn: true; allowed: a number > 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronsConfig:
    """One neuron per tensor class; all off is the dense twin."""

    embedding_output: NeuronConfig = field(default_factory=NeuronConfig)
    """The embedding's vector, before its norm (SpikeGPT's binary embedding)."""
    mixer_input: NeuronConfig = field(default_factory=NeuronConfig)
    """The vectors that the projections of a mixer read."""
    mixer_output: NeuronConfig = field(default_factory=NeuronConfig)
    """The vector the output projection of a mixer reads."""
    queries_keys: NeuronConfig = field(default_factory=NeuronConfig)
    """Queries and keys of `delta` layers, per head: what is silent touches no state row."""
    attention_queries: NeuronConfig = field(default_factory=NeuronConfig)
    """Rotated queries of softmax attention, per head."""
    gate_input: NeuronConfig = field(default_factory=NeuronConfig)
    """The bottleneck vectors that low-rank gates read."""
    mixer_residual: NeuronConfig = field(default_factory=NeuronConfig)
    """What a mixer adds to the residual stream (SpikeGPT's first LIF)."""
    ffn_input: NeuronConfig = field(default_factory=NeuronConfig)
    """The vectors that the up (and gate) projections read."""
    ffn_hidden: NeuronConfig = field(default_factory=NeuronConfig)
    """The vector the down projection reads."""
    ffn_residual: NeuronConfig = field(default_factory=NeuronConfig)
    """What a feed-forward layer adds to the residual stream (SpikeGPT's second LIF)."""
    head_input: NeuronConfig = field(default_factory=NeuronConfig)
    """The vector the head reads."""

    def __post_init__(self) -> None:
        for name in ("queries_keys", "attention_queries"):
            if getattr(self, name).kind == "lif":
                raise ConfigError(f"{name} takes kind: off, integer or step, not lif")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaConfig:
    """The gated delta rule: S = (I - k (b*k)^T) Diag(a) S + k (w*v)^T per head."""

    num_heads: int = 4
    """Heads H."""
    key_dim: int = 64
    """Key channels per head K."""
    value_dim: int = 64
    """Value channels per head V."""
    decay: Literal["none", "scalar", "channel"] = "channel"
    """none: DeltaNet; one decay per head: Gated DeltaNet; one per key channel: KDA, GDN-2."""
    gates: Literal["tied", "split"] = "split"
    """tied: one write rate b = w per head; split: erase per key and write per value channel."""
    decay_floor: float = -1.0
    """Lowest log-decay per token; bounds the exponents of the chunkwise form."""
    gate_rank: int = 32
    """Width of the bottleneck that the decay, erase, write and output gates share."""
    conv_size: int = 4
    """Taps of the causal depthwise convolution on q, k and v; 1 is none."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads", "key_dim", "value_dim", "gate_rank", "conv_size")
        _require(-2.0 <= self.decay_floor < 0, "decay_floor", self.decay_floor, "-2 <= floor < 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class GLAConfig:
    """Gated linear attention: S = Diag(a) S + k v^T; the query heads of a group share one state."""

    num_heads: int = 4
    """Query heads H."""
    num_kv_heads: int = 4
    """Key/value heads G, each with one state."""
    key_dim: int = 64
    """Key channels per head K."""
    value_dim: int = 64
    """Value channels per head V."""
    decay: Literal["channel", "scalar", "tied", "lightning", "retnet"] = "channel"
    """channel: GLA; scalar: Simple-GLA; tied: a = 1 - k; lightning, retnet: fixed per head."""
    gate_rank: int | None = 16
    """Width of the decay gate's bottleneck; null is a full matrix."""
    gate_temperature: float = 16.0
    """log a = logsigmoid(gate logit) / gate_temperature."""
    feature_map: Literal["relu", "sigmoid", "silu", "identity"] = "relu"
    """Applied to queries and keys; `tied` needs sigmoid."""
    qkv_bias: bool = False
    """Biases on queries, keys and values."""
    output_gate: Literal["none", "headwise", "elementwise"] = "none"
    """A sigmoid gate from the mixer's input on the normed output."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads", "num_kv_heads", "key_dim", "value_dim")
        _require_groups(self.num_heads, self.num_kv_heads)
        _require(self.gate_temperature > 0, "gate_temperature", self.gate_temperature, "> 0")
        if self.gate_rank is not None:
            _require(self.gate_rank >= 1, "gate_rank", self.gate_rank, "an integer >= 1, or null")
        if self.decay == "tied" and self.feature_map != "sigmoid":
            raise ConfigError("decay: tied needs feature_map: sigmoid, as a = 1 - k lies in (0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3's stretched rotary frequencies."""

    factor: float
    """Division of the low frequencies."""
    low_freq_factor: float
    """Wavelengths above original_positions / low_freq_factor are stretched in full."""
    high_freq_factor: float
    """Wavelengths below original_positions / high_freq_factor are left alone."""
    original_positions: int
    """Context length before stretching."""

    def __post_init__(self) -> None:
        _require_positive(self, "factor", "low_freq_factor", "original_positions")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"high_freq_factor: {self.high_freq_factor} given; allowed: more than "
                f"low_freq_factor, {self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Softmax attention of the `window` and `full` layers."""

    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 4
    """Key/value heads; query heads share them in equal groups."""
    head_dim: int = 64
    """Channels per head."""
    window: int = 128
    """Tokens a `window` query sees: itself and the window - 1 before it."""
    sinks: int = 4
    """First tokens of the document that a `window` query always sees."""
    rope_theta: float | None = 10000.0
    """Base of the rotary position code; null is none."""
    rope_scaling: RopeScaling | None = None
    """Stretched frequencies (Llama 3); null is none."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""
    output_bias: bool = False
    """A bias on the output projection."""
    qk_norm: bool = False
    """An RMS norm on each head's queries and keys before the position code (Qwen3)."""
    output_gate: Literal["none", "headwise", "elementwise"] = "none"
    """A sigmoid gate from the mixer's input on the output (Gated Attention, Qiu et al. 2025)."""
    kv_bits: Literal[8] | None = None
    """8 keeps keys and values as int8 with one scale per token and head; null as floats."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads", "num_kv_heads", "head_dim", "window")
        _require(self.sinks >= 0, "sinks", self.sinks, "an integer >= 0")
        _require_groups(self.num_heads, self.num_kv_heads)
        if self.rope_theta is None and self.rope_scaling is not None:
            raise ConfigError("rope_scaling needs a rope_theta; null is given")
        if self.rope_theta is not None:
            _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a number > 0, or null")
            _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even when RoPE is on")


@dataclass(frozen=True, kw_only=True, slots=True)
class RWKV7Config:
    """RWKV-7: two-key delta rule with low-rank decay, rate, value and output gates."""

    head_dim: int = 64
    """Channels per head; the width is a multiple of it."""
    decay_rank: int = 64
    """Bottleneck of the decay w."""
    rate_rank: int = 64
    """Bottleneck of the in-context learning rate a."""
    value_rank: int = 32
    """Bottleneck of the mix with the first layer's values."""
    gate_rank: int = 128
    """Bottleneck of the output gate g."""

    def __post_init__(self) -> None:
        _require_positive(self, "head_dim", "decay_rank", "rate_rank", "value_rank", "gate_rank")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Mixture of experts: routed gated FFNs, top-k of them per token, and shared ones."""

    num_experts: int = 16
    """Routed experts N."""
    top_k: int = 1
    """Routed experts a token uses."""
    num_shared: int = 1
    """Experts every token uses."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become the weights of the experts."""
    balance: float = 0.01
    """Weight of the load-balance loss in training."""
    dense_layers: tuple[int, ...] = ()
    """Layers (from 0) that keep the plain feed-forward layer."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_experts")
        _require(self.num_shared >= 0, "num_shared", self.num_shared, "an integer >= 0")
        _require(
            1 <= self.top_k <= self.num_experts, "top_k", self.top_k, f"1 to {self.num_experts}"
        )
        _require(self.balance >= 0, "balance", self.balance, "a number >= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNConfig:
    """The feed-forward layer."""

    kind: Literal["channel_mix", "swiglu", "reglu"] = "channel_mix"
    """channel_mix: token shift and squared ReLU (RWKV); swiglu, reglu: gated, three matrices."""
    hidden_dim: int = 1024
    """Hidden neurons F."""
    receptance: bool = False
    """channel_mix: a sigmoid gate from the shifted input on the output (RWKV-4)."""
    token_shift: bool = False
    """swiglu, reglu: mix the previous token into the input, as channel_mix always does."""
    experts: ExpertsConfig | None = None
    """A mixture of gated experts of this shape; null is one dense layer."""

    def __post_init__(self) -> None:
        _require_positive(self, "hidden_dim")
        if self.kind != "channel_mix" and self.receptance:
            raise ConfigError(f"receptance: true needs kind: channel_mix, not {self.kind}")
        if self.kind == "channel_mix" and self.token_shift:
            raise ConfigError("token_shift is for swiglu and reglu; channel_mix always has one")
        if self.token_shift and self.experts is not None:
            raise ConfigError("token_shift: true needs experts: null; a routed token has no past")
        if self.kind == "channel_mix" and self.experts is not None:
            raise ConfigError(
                "experts need kind: swiglu or reglu, not channel_mix: a routed token has no past"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """Weights of projections on the integer grid that `spikelm convert` stores: trained so."""

    bits: Literal[8, 4] | None = None
    """Bits of every projection's weights; null leaves them floats."""
    bits_of: dict[str, Literal[8, 4] | None] = field(default_factory=dict)
    """Other bits by tensor class, or by the name of the neurons in front (`head`), which goes
    before its class."""
    group_size: int = 1
    """Outputs that share one step."""
    learn_step: bool = True
    """Train the steps (LSQ, Esser et al. 2020); false keeps those that rounding began with."""

    def __post_init__(self) -> None:
        _require_positive(self, "group_size")


Mixer = Literal[
    "delta",
    "gla",
    "wkv4",
    "rwkv7",
    "window",
    "full",
    "parallel",
    "parallel_full",
    "channel_mix",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that fixes a model's shapes and formulas."""

    vocab_size: int = 1024
    """Rows of the embedding and of the head N."""
    width: int = 256
    """Channels of the residual stream D."""
    mixers: tuple[Mixer, ...] = ("delta", "delta", "delta", "window")
    """The mixer of each layer, first to last; its length is the number of layers."""
    neurons: NeuronsConfig = field(default_factory=NeuronsConfig)
    """Where the spikes are; the defaults (all off) are the dense twin."""
    delta: DeltaConfig = field(default_factory=DeltaConfig)
    """Shape of the `delta` layers."""
    gla: GLAConfig = field(default_factory=GLAConfig)
    """Shape of the `gla` layers and of the linear branch of `parallel` ones."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Shape of the `window` and `full` layers and of the softmax branch of `parallel` ones."""
    rwkv7: RWKV7Config = field(default_factory=RWKV7Config)
    """Shape of the `rwkv7` layers."""
    ffn: FFNConfig = field(default_factory=FFNConfig)
    """Shape of the feed-forward layers."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Weights that are rounded in training."""
    tie_embeddings: bool = False
    """The head reads the embedding's matrix."""
    norm: Literal["rms", "layer"] = "rms"
    """RMS norm, or layer norm with a bias (RWKV)."""
    norm_eps: float = 1e-5
    """Added to the mean square (the variance) in every norm."""
    embedding_norm: bool = False
    """A norm between the embedding and the first layer (RWKV)."""
    sink_embeddings: int = 0
    """Learned vectors in front of every document that all tokens see (SpikingBrain-76B)."""
    head_qk_dim: int = 0
    """Width of the copy mechanism on the head (RWKV's head-QK); 0 is none."""
    dropout: float = 0.0
    """Share of the residual stream dropped after each layer in training."""
    init: Literal["normal", "orthogonal"] = "normal"
    """How matrices begin: normal of variance 1 / inputs, or RWKV-4's orthogonal and zero ones."""

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "width")
        _require(len(self.mixers) >= 1, "mixers", list(self.mixers), "at least one layer")
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "a number > 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "0 <= dropout < 1")
        _require(self.head_qk_dim >= 0, "head_qk_dim", self.head_qk_dim, "an integer >= 0")
        kinds = set(self.mixers)
        if kinds & {"parallel", "parallel_full"}:
            self._check_parallel()
        if "rwkv7" in kinds and self.width % self.rwkv7.head_dim:
            raise ConfigError(
                f"width {self.width} is not a multiple of rwkv7.head_dim {self.rwkv7.head_dim}"
            )
        sinks = self.attention.sinks
        if not 0 <= self.sink_embeddings <= min(sinks, self.attention.window):
            raise ConfigError(
                f"sink_embeddings: {self.sink_embeddings} given; allowed: 0 to attention.sinks "
                f"and attention.window, {min(sinks, self.attention.window)}"
            )
        experts = self.ffn.experts
        if experts is not None:
            for name in ("ffn_input", "ffn_hidden"):
                if getattr(self.neurons, name).kind == "lif":
                    raise ConfigError(f"neurons.{name}: experts see no past; lif needs one")
            if not all(0 <= layer < len(self.mixers) for layer in experts.dense_layers):
                raise ConfigError(
                    f"ffn.experts.dense_layers: {list(experts.dense_layers)} given; "
                    f"allowed: 0 to {len(self.mixers) - 1}"
                )

    def _check_parallel(self) -> None:
        gla, attention = self.gla, self.attention
        given = (gla.num_heads, gla.num_kv_heads, gla.key_dim, gla.value_dim, gla.qkv_bias)
        heads = (attention.num_heads, attention.num_kv_heads)
        wanted = (*heads, attention.head_dim, attention.head_dim, attention.qkv_bias)
        if given != wanted:
            raise ConfigError(
                "parallel layers project queries, keys and values once: gla and attention must "
                "agree in num_heads, num_kv_heads, qkv_bias, and key_dim, value_dim = head_dim"
            )
        if gla.decay in ("channel", "scalar"):
            raise ConfigError(
                f"gla.decay: {gla.decay} given; allowed in parallel layers: tied, lightning, retnet"
            )
        if gla.output_gate != "none" or attention.output_gate != "none":
            raise ConfigError("parallel layers have no output_gate")

    @property
    def num_layers(self) -> int:
        return len(self.mixers)

    def dense_twin(self) -> ModelConfig:
        """The same shapes with every neuron off."""
        return dataclasses.replace(self, neurons=NeuronsConfig())


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        allowed = "an integer >= 1" if isinstance(value, int) else "a number > 0"
        _require(value > 0, name, value, allowed)


def _require_groups(num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")


def _require(ok: bool, name: str, given: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}: {given!r} given; allowed: {allowed}")


def from_dict(cls: type[T], data: object, where: str = "") -> T:
    """Builds the dataclass `cls` from plain data, checking every key and type.

    Raises: ConfigError naming the key's full path.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'configuration'}: expected keys and values, got {data!r}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise ConfigError(f"unknown key '{path}'; {did_you_mean(str(key), hints)}")
        values[key] = _convert(hints[key], value, path)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise ConfigError(f"missing key '{where + '.' if where else ''}{f.name}'")
    try:
        return cls(**values)
    except ConfigError as error:
        name = str(error).partition(":")[0]
        joint = "." if name in hints else ": "
        raise ConfigError(f"{where}{joint}{error}" if where else str(error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain data that YAML and JSON can hold."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping. Raises: ConfigError if it is missing or not a mapping."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(data).__name__}")
    return data


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key '{key}' stands twice")
        return super().construct_mapping(node, deep)


def save_yaml(config: Any, path: Path) -> None:
    """Writes a dataclass as YAML that `load_yaml` and `from_dict` read back."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def find_config(kind: str, name: str) -> Path:
    """A path as given, or a file of `configs/<kind>/` by its name without `.yaml`.

    Raises: ConfigError listing the known names.
    """
    given = Path(name)
    if given.is_file():
        return given
    folders = _folders(kind)
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = {p.stem for folder in folders for p in folder.glob("*.yaml")}
    raise ConfigError(f"no such file or preset ({kind}): '{name}'; {did_you_mean(name, known)}")


def _folders(kind: str) -> list[Path]:
    """Where presets are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return [package / "configs" / kind, package.parent / "configs" / kind]


def presets() -> list[str]:
    """The names of the model presets."""
    return configs("models")


def configs(kind: str) -> list[str]:
    """The names of the files in `configs/<kind>/`."""
    return sorted({p.stem for folder in _folders(kind) for p in folder.glob("*.yaml")})


def load_model_config(name: str) -> ModelConfig:
    """A model preset by name (`configs/models/`) or by path."""
    return from_dict(ModelConfig, load_yaml(find_config("models", name)))


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Returns `data` with `a.b=value` assignments applied; values are read as YAML.

    Raises: ConfigError for an assignment without '=' or through a key that is not a mapping.
    """
    result = typing.cast(dict[str, Any], _plain(data))
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set takes key=value, got '{assignment}'")
        *parents, last = path.split(".")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {assignment}: '{parent}' is not a mapping")
            node = child
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {assignment}: '{text}' is not a YAML value") from None
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _convert(hint: Any, value: object, path: str) -> Any:
    """Checks `value` against the annotation `hint`, converting what YAML cannot express."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)  # type: ignore[arg-type]
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for option in arguments:
            if option is type(None):
                continue
            try:
                return _convert(option, value, path)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value is False and "off" in arguments:
            return "off"  # YAML 1.1 reads the bare word as a boolean
        if value not in arguments:
            near = did_you_mean(str(value), map(str, arguments))
            hint = "" if near.startswith("allowed") else f"; {near}"
            allowed = ", ".join(map(str, arguments))
            raise ConfigError(f"{path}: '{value}' given; allowed: {allowed}{hint}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected keys and values, got {value!r}")
        return {str(k): _convert(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 3e-4 (no dot) as text.
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r}")
