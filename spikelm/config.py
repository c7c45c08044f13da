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
    "mixer_input",
    "mixer_output",
    "queries_keys",
    "gate_input",
    "ffn_input",
    "ffn_hidden",
    "head_input",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronConfig:
    """The neuron in front of one class of projections (DESIGN section 3)."""

    kind: Literal["off", "integer", "lif"] = "off"
    """off: a float projection; integer: adaptive integer counts; lif: token-axis membrane."""
    k: float = 3.0
    """Counts per mean |x|: v_threshold = mean|x| / k (integer neuron)."""
    dead_zone: float = 0.0
    """Initial half-width of the zone that gives count 0, in units of the token's mean |x|."""
    max_count: int | None = None
    """Clip of |count|; null does not clip (SpikingBrain), 1 is ternary."""
    unsigned: bool = False
    """Counts are >= 0: for vectors that come out of a ReLU."""
    learn: bool = False
    """Train dead zone and k by gradient."""
    target_silence: float | None = None
    """Training steers the dead zone to this silent fraction; null leaves it alone."""
    tau: float = 2.0
    """Membrane time constant in tokens (LIF)."""
    v_threshold: float = 1.0
    """Firing threshold of the membrane (LIF)."""
    reset: Literal["zero", "subtract"] = "zero"
    """Hard reset to 0, or soft reset by v_threshold (LIF)."""
    detach_reset: bool = False
    """Stop the gradient through the reset (LIF)."""
    surrogate: Literal["arctan", "sigmoid", "rectangle"] = "arctan"
    """Derivative used for the spike (LIF)."""
    alpha: float = 2.0
    """Sharpness of the surrogate (LIF)."""

    def __post_init__(self) -> None:
        _require(self.k > 0, "k", self.k, "a number > 0")
        _require(self.dead_zone >= 0, "dead_zone", self.dead_zone, "a number >= 0")
        _require(self.tau >= 1, "tau", self.tau, "a number >= 1")
        _require(self.v_threshold > 0, "v_threshold", self.v_threshold, "a number > 0")
        _require(self.alpha > 0, "alpha", self.alpha, "a number > 0")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronsConfig:
    """One neuron per tensor class; all off is the dense twin."""

    mixer_input: NeuronConfig = field(default_factory=NeuronConfig)
    """The vector every projection of a mixer reads."""
    mixer_output: NeuronConfig = field(default_factory=NeuronConfig)
    """The vector the output projection of a mixer reads."""
    queries_keys: NeuronConfig = field(default_factory=NeuronConfig)
    """Queries and keys of `delta` layers, per head: what is silent touches no state row."""
    gate_input: NeuronConfig = field(default_factory=NeuronConfig)
    """The bottleneck vector that the gates of a `delta` layer read."""
    ffn_input: NeuronConfig = field(default_factory=NeuronConfig)
    """The vector the up (and gate) projections read."""
    ffn_hidden: NeuronConfig = field(default_factory=NeuronConfig)
    """The vector the down projection reads."""
    head_input: NeuronConfig = field(default_factory=NeuronConfig)
    """The vector the head reads."""

    def __post_init__(self) -> None:
        if self.queries_keys.kind == "lif":
            raise ConfigError("queries_keys takes kind: off or integer, not lif")


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
        for name in ("num_heads", "key_dim", "value_dim", "gate_rank", "conv_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        _require(-2.0 <= self.decay_floor < 0, "decay_floor", self.decay_floor, "-2 <= floor < 0")


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

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim", "window"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        _require(self.sinks >= 0, "sinks", self.sinks, "an integer >= 0")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.rope_theta is not None:
            _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a number > 0, or null")
            _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even when RoPE is on")


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNConfig:
    """The feed-forward layer."""

    kind: Literal["channel_mix", "swiglu", "reglu"] = "channel_mix"
    """channel_mix: token shift and squared ReLU (RWKV); swiglu, reglu: gated, three matrices."""
    hidden_dim: int = 1024
    """Hidden neurons F."""

    def __post_init__(self) -> None:
        _require(self.hidden_dim >= 1, "hidden_dim", self.hidden_dim, "an integer >= 1")


Mixer = Literal["delta", "window", "full"]


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
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Shape of the `window` and `full` layers."""
    ffn: FFNConfig = field(default_factory=FFNConfig)
    """Shape of the feed-forward layers."""
    tie_embeddings: bool = False
    """The head reads the embedding's matrix."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMS norm."""

    def __post_init__(self) -> None:
        _require(self.vocab_size >= 1, "vocab_size", self.vocab_size, "an integer >= 1")
        _require(self.width >= 1, "width", self.width, "an integer >= 1")
        _require(len(self.mixers) >= 1, "mixers", list(self.mixers), "at least one layer")
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "a number > 0")

    @property
    def num_layers(self) -> int:
        return len(self.mixers)

    def dense_twin(self) -> ModelConfig:
        """The same shapes with every neuron off."""
        return dataclasses.replace(self, neurons=NeuronsConfig())


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
    package = Path(__file__).parent
    folders = [package / "configs" / kind, package.parent / "configs" / kind]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = {p.stem for folder in folders for p in folder.glob("*.yaml")}
    raise ConfigError(f"no such file or preset ({kind}): '{name}'; {did_you_mean(name, known)}")


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
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
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
