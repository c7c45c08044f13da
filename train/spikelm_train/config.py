"""The recipe of a training run, read from `configs/train/` or a path. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from spikelm.config import (
    TENSOR_CLASSES,
    ModelConfig,
    NeuronConfig,
    find_config,
    from_dict,
    load_yaml,
    override,
    to_dict,
)
from spikelm.errors import CheckpointError, ConfigError, did_you_mean

BYTE_VOCABULARY = 257


def _require(ok: bool, name: str, given: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}: {given!r} given; allowed: {allowed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """The tokenizer: trained on the run's own training text, or another model's."""

    kind: Literal["bpe", "bytes", "file"] = "bpe"
    """bpe: byte-level pairs; bytes: a token per byte, always 257 entries; file: that of `path`."""
    vocab_size: int = 1024
    """Entries of the bpe vocabulary, the document separator included; a file's follow from it."""
    path: str | None = None
    """A model folder, tokenizer.json, rwkv_vocab_*.txt, or what `spikelm data` wrote."""
    eos: str | None = None
    """The token of `path` that separates documents; null is the one that it ends texts with."""
    chat_template: str | None = None
    """A jinja file; null is the template beside `path`, else User: and Assistant: lines."""
    train_bytes: int | None = None
    """About how much of the training text bpe learns from, spread over it; null is all."""
    pad_to: int = 1
    """The model's rows are the entries rounded up to a multiple of this; no text has the others."""

    def __post_init__(self) -> None:
        if self.kind != "file":
            least = f"an integer >= {BYTE_VOCABULARY}"
            _require(self.vocab_size >= BYTE_VOCABULARY, "vocab_size", self.vocab_size, least)
        if (self.path is not None) != (self.kind == "file"):
            raise ConfigError(f"path: {self.path} given with kind {self.kind}; file alone has one")
        if self.eos is not None and self.kind != "file":
            raise ConfigError(f"eos: {self.eos} given with kind {self.kind}; file alone has one")
        size = self.train_bytes
        _require(size is None or size >= 1, "train_bytes", size, "an integer >= 1, or null")
        _require(self.pad_to >= 1, "pad_to", self.pad_to, "an integer >= 1")

    @property
    def size(self) -> int:
        """Entries of the vocabulary."""
        return BYTE_VOCABULARY if self.kind == "bytes" else self.vocab_size

    @property
    def num_rows(self) -> int:
        """Rows N of the model's embedding and head."""
        return math.ceil(self.size / self.pad_to) * self.pad_to


@dataclass(frozen=True, kw_only=True, slots=True)
class SetConfig:
    """One of the texts of a mixture."""

    weight: float
    """Its share of the rows, beside the other weights."""
    prepared: str | None = None
    """Folder that `spikelm data prepare` wrote."""
    sources: tuple[str, ...] = ()
    """Or files, globs and dataset names."""
    messages_key: str | None = None
    """The field of the sources' rows that holds a conversation; null: they hold text."""

    def __post_init__(self) -> None:
        _require(0 < self.weight < math.inf, "weight", self.weight, "a number > 0")
        if (self.prepared is not None) == bool(self.sources):
            raise ConfigError("a set of a mixture has either prepared or sources")
        if self.messages_key is not None and not self.sources:
            raise ConfigError(f"messages_key: {self.messages_key} given without sources")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What text is read and how it is cut into sequences."""

    sources: tuple[str, ...] = ()
    """Files, globs and dataset names; empty is the built-in corpus."""
    prepared: str | None = None
    """Folder that `spikelm data prepare` wrote, instead of `sources`."""
    mixture: tuple[SetConfig, ...] = ()
    """Several texts and their shares, instead of `sources`."""
    on_error: Literal["stop", "skip"] = "stop"
    """What unreadable files and rows do: end the run, or be counted and left out."""
    text_key: str = "text"
    """The field of a table's row that holds the text."""
    messages_key: str | None = None
    """The field that holds a conversation, a list of `role` and `content`, instead: its answers
    alone are learned, the rest is read. Null reads `text_key`."""
    max_documents: int | None = None
    """Stop reading `sources` after this many documents; null reads all."""
    max_bytes: int | None = None
    """Stop reading `sources` after this much text in bytes; null reads all."""
    validation_fraction: float = 0.02
    """Part of the text of `sources` held out (the built-in corpus has its own division)."""
    validation_sources: tuple[str, ...] = ()
    """Held-out text of its own, like `sources`; all of those are then trained on."""
    sampling: Literal["random_window", "packed", "carried"] = "random_window"
    """random_window: windows anywhere; packed: every document once per epoch, back to back;
    carried: the same, every row going on where it was a step before, with its state."""
    sequence_length: int = 256
    """Tokens T per sequence."""

    def __post_init__(self) -> None:
        fraction = self.validation_fraction
        _require(0 < fraction < 1, "validation_fraction", fraction, "0 < f < 1")
        _require(self.sequence_length >= 1, "sequence_length", self.sequence_length, ">= 1")
        for name in ("max_documents", "max_bytes"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "an integer >= 1, or null")
        if bool(self.sources) + (self.prepared is not None) + bool(self.mixture) > 1:
            raise ConfigError("give one of sources, prepared and mixture")
        if self.messages_key is not None and not (self.sources or self.prepared is not None):
            raise ConfigError(
                f"messages_key: {self.messages_key} given without sources; the built-in corpus has "
                "no conversations, and sets of a mixture have keys of their own"
            )
        if self.validation_sources and (self.prepared is not None or self.mixture):
            raise ConfigError("validation_sources: prepared texts and mixtures hold out their own")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimiser and schedule; the fractions are of the whole run."""

    name: Literal["adamw", "spam", "muon"] = "adamw"
    """adamw; spam: Adam with spike clipping and momentum resets; muon: orthogonalised momentum for
    projections but the head, AdamW for the rest."""
    lr: float = 3e-3
    """Peak learning rate."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """Decay per step of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of projection weights; everything else has none."""
    neuron_lr: float = 1.0
    """Learning rate of what neurons learn (k, dead zones, time constants), as a factor of `lr`."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate of the parameters whose names match a pattern such as `*.mixer.decay`, as a
    factor of `lr`; the first that matches counts."""
    decays: dict[str, float] = field(default_factory=dict)
    """Weight decay of the parameters whose names match a pattern; the first that matches counts."""
    grad_clip: float | None = 1.0
    """Largest gradient norm; null does not clip."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine; wsd: warm-up, stable, linear decay; constant after the warm-up."""
    warmup_fraction: float = 0.03
    """Part of the run in which the rate rises linearly from 0."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end of cosine and wsd, as a fraction of `lr`."""
    wsd_decay_fraction: float = 0.2
    """Last part of the run, in which wsd decays."""
    spam_threshold: float = 5000.0
    """Gradients g with g^2 above this many second moments are clipped to it."""
    spam_clip_after: int = 20
    """Steps after the start or a reset before spam clips."""
    spam_reset_every: int = 500
    """Steps between resets of the moments."""
    spam_warmup_steps: int = 150
    """Steps over which the updates come back after a reset."""
    spam_density: float = 1.0
    """Part of the entries of each matrix that spam updates between two resets."""
    muon_lr: float = 1.0
    """Learning rate of the matrices that muon updates, as a factor of `lr`; at 1 their updates are
    as large as AdamW's."""
    muon_momentum: float = 0.95
    """Decay per step of the momentum that muon orthogonalises."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", self.lr, "a number > 0")
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(ok, "betas", list(self.betas), "two numbers, 0 <= beta < 1")
        _require(self.eps > 0, "eps", self.eps, "a number > 0")
        for name in ("weight_decay", "neuron_lr", "muon_lr"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        for name in ("rates", "decays"):
            for pattern, value in getattr(self, name).items():
                _require(value >= 0, f"{name}.{pattern}", value, "a number >= 0")
        _require(0 <= self.muon_momentum < 1, "muon_momentum", self.muon_momentum, "0 <= m < 1")
        if self.grad_clip is not None:
            _require(self.grad_clip > 0, "grad_clip", self.grad_clip, "a number > 0, or null")
        for name in ("warmup_fraction", "final_lr_fraction", "wsd_decay_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, name, value, "0 to 1")
        if self.schedule == "wsd" and self.warmup_fraction + self.wsd_decay_fraction > 1:
            raise ConfigError("warmup_fraction + wsd_decay_fraction exceed 1; lower one of them")
        _require(self.spam_threshold > 0, "spam_threshold", self.spam_threshold, "a number > 0")
        _require(0 < self.spam_density <= 1, "spam_density", self.spam_density, "0 < d <= 1")
        for name, least in (("spam_clip_after", 0), ("spam_reset_every", 1)):
            value = getattr(self, name)
            _require(value >= least, name, value, f"an integer >= {least}")
        steps = self.spam_warmup_steps
        _require(steps >= 1, "spam_warmup_steps", steps, "an integer >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """From a share of the run on, one tensor class has other integer neurons: fewer counts in
    stages, as IIR-SNN takes fewer time steps (Chowdhury et al. 2021). Null leaves a field alone.
    """

    at: float
    """Share of the run after which the stage begins."""
    tensor_class: str
    """Whose neurons it changes."""
    k: float | None = None
    """Counts per mean |x| (adaptive scale); a learned k goes on from here."""
    max_count: int | None = None
    """Clip of |count|."""
    target_silence: float | None = None
    """Silent fraction that the dead zone is steered to."""

    def __post_init__(self) -> None:
        _require(0 < self.at < 1, "at", self.at, "0 < at < 1")
        if self.tensor_class not in TENSOR_CLASSES:
            near = did_you_mean(self.tensor_class, TENSOR_CLASSES)
            raise ConfigError(f"tensor_class: '{self.tensor_class}' given; {near}")
        if not self.changes:
            raise ConfigError("the stage changes nothing; give k, max_count or target_silence")

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of `NeuronConfig` that change, with their values."""
        given = {n: getattr(self, n) for n in ("k", "max_count", "target_silence")}
        return {name: value for name, value in given.items() if value is not None}


def staged(model: ModelConfig, stages: Sequence[StageConfig]) -> ModelConfig:
    """`model` once `stages` have begun, first to last: the same shapes, other neurons.

    Raises: ConfigError for a neuron that has no such field, or a value it does not take.
    """
    neurons = model.neurons
    for stage in stages:
        name = stage.tensor_class
        neuron: NeuronConfig = getattr(neurons, name)
        where = f"stages, {name} at {stage.at:g}"
        if neuron.kind != "integer":
            raise ConfigError(
                f"{where}: its neuron is {neuron.kind}; allowed: kind: integer, "
                f"set model.neurons.{name} or drop the stage"
            )
        if neuron.scale == "fixed" and stage.changes.keys() != {"max_count"}:
            raise ConfigError(f"{where}: a neuron of fixed scale changes max_count alone")
        try:
            neurons = replace(neurons, **{name: replace(neuron, **stage.changes)})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return replace(model, neurons=neurons)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """What to learn from a trained model; `spikelm_train.distill` has the formulas."""

    teacher: str | None = None
    """Model folder whose tokenizer is the run's, for example the dense twin's; null is none."""
    weight: float = 0.5
    """Share of the divergence from the teacher in the loss; the rest is the cross-entropy."""
    reverse: float = 0.0
    """Share of the reverse divergence KL(student, teacher) in it; 0 is the forward one alone."""
    temperature: float = 1.0
    """Both models' logits are divided by this for the divergence."""
    features: float = 0.0
    """Weight of the relative squared error of the residual stream in front of the norms."""

    def __post_init__(self) -> None:
        for name in ("weight", "reverse"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        _require(self.temperature > 0, "temperature", self.temperature, "a number > 0")
        _require(self.features >= 0, "features", self.features, "a number >= 0")
        if self.teacher is None:
            given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            if given:
                raise ConfigError(f"{given[0]} needs a teacher, the folder of a trained model")


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What to do about a loss that is not finite, or leaps; `spikelm_train.guard` has the rule."""

    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradient that is not finite. skip: leave the step out; rewind: go back to an
    earlier checkpoint and pass over the data behind it."""
    spike: Literal["ignore", "skip", "rewind"] = "ignore"
    """A loss that leaps."""
    spike_deviations: float = 6.0
    """Standard deviations above the mean of the steps before from which a loss leaps."""
    rewind_steps: int = 1
    """Steps to go back at least; the newest checkpoint that is so old is taken."""
    lower_lr: float = 1.0
    """The learning rate is multiplied by this every time."""
    at_most: int = 10
    """Times that it is done before the run stops."""

    def __post_init__(self) -> None:
        deviations, factor = self.spike_deviations, self.lower_lr
        _require(deviations > 0, "spike_deviations", deviations, "a number > 0")
        _require(0 < factor <= 1, "lower_lr", factor, "0 < factor <= 1")
        for name in ("rewind_steps", "at_most"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Small matrices to train instead of the weights; `spikelm_train.lora` has the formula."""

    rank: int = 0
    """Rank of what is added to the weights; 0 trains the weights."""
    alpha: float = 16.0
    """What is added counts alpha / rank times."""
    targets: tuple[str, ...] = ("layers.*",)
    """Patterns of the projections' names, such as `*.ffn.*` or `head`."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "rank", self.rank, "an integer >= 0")
        _require(self.alpha > 0, "alpha", self.alpha, "a number > 0")
        _require(bool(self.targets), "targets", list(self.targets), "at least one pattern")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A complete run."""

    model: ModelConfig
    """The model; in a recipe also the name of a preset in `configs/models/`, and with `init` what
    differs from that model."""
    init: str | None = None
    """Model folder whose weights the run begins with, and whose tokenizer it takes; null draws the
    weights."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to ids; the model's vocabulary follows it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text, and how it is cut."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    micro_batch_size: int = 16
    """Sequences per device and forward."""
    grad_accum_steps: int = 1
    """Forwards per optimiser step."""
    steps: int = 1000
    """Optimiser steps at most."""
    max_seconds: float | None = None
    """Wall-clock budget of the loop; null is none. The schedule follows what ends first."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Matrix products in bfloat16 (autocast) or float32; auto: bf16 where it pays."""
    seed: int = 0
    """Fixes the initial weights, the order of the data and what dropout drops."""
    loss_chunk: int = 0
    """Tokens whose logits are in memory at a time; they are computed again in the backward pass. 0
    keeps those of all tokens."""
    activation_checkpointing: Literal["none", "layers"] = "none"
    """layers: the backward pass computes each layer again instead of keeping its activations."""
    ema: float | None = None
    """Decay per step of the averaged weights that are validated, sampled and written at the end;
    null takes the trained ones."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's normaliser, mean over tokens (nats)."""
    l1_hidden: float = 0.0
    """Weight of sum_c |h_c| of the FFN's hidden vector, mean over tokens and layers (nats)."""
    silence_rate: float = 0.2
    """Gain per step of the rule that steers dead zones to `target_silence`."""
    revive_after: int = 0
    """Steps without a spike after which a channel's dead zone is halved, and again after as many
    (homeostasis, Turrigiano 2008); 0 never."""
    stages: tuple[StageConfig, ...] = ()
    """Changes of the neurons in the course of the run, in the order of their `at`."""
    quantise_at: float = 0.5
    """Share of the run after which the weights named in `model.weights` are rounded."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """A trained model to learn from."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adaptation of the model in `init`."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What to do about a loss that is not finite, or leaps."""
    log_every: int = 10
    """Steps between progress lines."""
    eval_every: int = 250
    """Steps between validations; 0 validates only at the end."""
    eval_tokens: int = 32768
    """Validation tokens used, at most."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves only at the end and when interrupted."""
    keep_last: int = 1
    """Checkpoints kept, the newest ones."""
    keep_best: bool = False
    """Whether the model with the lowest validation loss is kept in the run's folder `best`."""
    sample_every: int = 0
    """Steps between samples of text; 0 shows none."""
    sample_prompt: str = ""
    """The text a sample continues; of a run on conversations, what the user says first."""
    sample_tokens: int = 64
    """Tokens of a sample."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where measurements go besides metrics.jsonl."""
    peak_flops: float | None = None
    """FLOP/s of one device that MFU is a share of; null: of its data sheet, or measured."""

    def __post_init__(self) -> None:
        if self.model.vocab_size != self.tokenizer.num_rows:
            raise ConfigError(
                f"model.vocab_size {self.model.vocab_size} contradicts the "
                f"{self.tokenizer.kind} tokenizer's {self.tokenizer.num_rows} entries; drop "
                "model.vocab_size (it follows tokenizer.vocab_size) or make them equal"
            )
        for name in (
            "micro_batch_size",
            "grad_accum_steps",
            "steps",
            "log_every",
            "eval_tokens",
            "keep_last",
            "sample_tokens",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        for name in (
            "eval_every",
            "save_every",
            "sample_every",
            "revive_after",
            "seed",
            "loss_chunk",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "an integer >= 0")
        if self.peak_flops is not None:
            _require(self.peak_flops > 0, "peak_flops", self.peak_flops, "a number > 0, or null")
        _require(self.seed < 2**63, "seed", self.seed, "an integer below 2^63")
        for name in ("l1_hidden", "silence_rate", "z_loss"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "0 < decay < 1, or null")
        if self.loss_chunk and self.distill.teacher is not None:
            raise ConfigError(
                f"loss_chunk: {self.loss_chunk} given; allowed: 0 with distill.teacher, whose "
                "logits are compared as a whole"
            )
        _require(0 < self.quantise_at < 1, "quantise_at", self.quantise_at, "0 < at < 1")
        if self.data.sampling == "carried":
            growing = sorted({"full", "parallel_full"} & set(self.model.mixers))
            if growing:
                raise ConfigError(f"data.sampling: carried; the state of {growing[0]} layers grows")
            if self.distill.teacher is not None:
                raise ConfigError("data.sampling: carried; a teacher sees one window alone")
        if self.lora.rank:
            self._check_lora()
        if self.distill.features > 0 and self.model.sink_embeddings:
            raise ConfigError("distill.features needs a model without sink_embeddings")
        seconds = self.max_seconds
        ok = seconds is None or (seconds > 0 and math.isfinite(seconds))
        _require(ok, "max_seconds", seconds, "a number > 0, or null")
        for before, after in itertools.pairwise(self.stages):
            _require(before.at <= after.at, "stages", [before.at, after.at], "at in rising order")
        last = staged(self.model, self.stages)
        for spec in fields(last.neurons):
            neuron: NeuronConfig = getattr(last.neurons, spec.name)
            if neuron.target_silence is not None and neuron.dead_zone == 0:
                raise ConfigError(
                    f"model.neurons.{spec.name}.dead_zone: 0 given; allowed: > 0 where "
                    "target_silence is set (it is steered by factors), for example 0.5"
                )

    def _check_lora(self) -> None:
        if self.init is None:
            raise ConfigError("lora adapts a trained model; name its folder in init")
        if self.model.weights.bits is not None or self.model.weights.bits_of:
            raise ConfigError("lora: weights that are rounded in training cannot be adapted too")
        if self.ema is not None:
            raise ConfigError("lora: ema averages whole weights; leave one of the two out")

    def progress(self, steps: float, seconds: float) -> float:
        """How much of the run is over, 0 to 1, after `steps` and `seconds`."""
        by_time = seconds / self.max_seconds if self.max_seconds is not None else 0.0
        return min(1.0, max(steps / self.steps, by_time))


def load_recipe(
    name: str, assignments: Sequence[str] = (), sources: Sequence[str] = ()
) -> TrainConfig:
    """A recipe by name or path, `key=value` assignments (from the model inwards) applied.

    `model:` may name a preset; the result holds its whole mapping, with the vocabulary of the
    tokenizer unless it is given. Of a recipe with `init` it is laid over that model's. `sources`
    replace `data.sources`.

    Raises: ConfigError naming the key and the way out; DataError for a prepared text that is not
    there.
    """
    data = load_yaml(find_config("train", name))
    presets = [a for a in assignments if a.partition("=")[0] in ("model", "init")]
    data = override(data, presets)
    rows = None
    if isinstance(data.get("init"), str):
        model = _model_in(Path(data["init"]))
        rows = model["vocab_size"]
        if isinstance(data.get("model"), dict | None):
            data["model"] = _laid_over(model, data.get("model") or {})
    if isinstance(data.get("model"), str):
        data["model"] = load_yaml(find_config("models", data["model"]))
        # A preset's vocabulary belongs to the tokenizer it was published with.
        data["model"].pop("vocab_size", None)
    data = override(data, [a for a in assignments if a not in presets])
    if sources and isinstance(data.get("data") or {}, dict):
        # Texts that were named beside them are a contradiction, those of the recipe are replaced.
        named = {a.partition("=")[0].removeprefix("data.") for a in assignments}
        given = data.get("data") or {}
        if "data" not in named:
            for key in {"prepared", "mixture"} - named:
                given.pop(key, None)
        data["data"] = {**given, "sources": list(sources)}
    data["tokenizer"] = _tokenizer(data, rows)
    if isinstance(data.get("model"), dict):
        tokenizer = from_dict(TokenizerConfig, data["tokenizer"], "tokenizer")
        data["model"].setdefault("vocab_size", tokenizer.num_rows)
    if data.get("model") is None:
        raise ConfigError(
            f"{name} names no model; add --set model=PRESET for one with drawn weights, or --set "
            "init=MODEL for a trained one"
        )
    return from_dict(TrainConfig, data)


def _model_in(folder: Path) -> dict[str, Any]:
    """The configuration of the model in `folder`, all fields."""
    from spikelm.checkpoint import model_config_of, read_config

    try:
        return to_dict(model_config_of(read_config(folder), folder))
    except CheckpointError as error:
        raise ConfigError(f"init: {error}") from None


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the entries of `above`, mapping by mapping."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            merged[key] = _laid_over(below[key], above[key])
    return merged


def _tokenizer(data: Mapping[str, Any], rows: int | None) -> Any:
    """The recipe's tokenizer, with a file's size: where it names none, that of the model it begins
    with, whose embedding has so many `rows`, or that of a prepared text.
    """
    given = data.get("tokenizer") or {}
    if not isinstance(given, dict):
        return given
    if rows is not None:
        _check_same_tokenizer(given, Path(data["init"]))
        own = {} if given.get("kind") else {"kind": "file", "path": data["init"]}
        given = {"pad_to": rows, **given, **own}
    text = from_dict(DataConfig, data.get("data") or {}, "data")
    folders = (text.prepared, *(part.prepared for part in text.mixture))
    prepared = next(filter(None, folders), None)
    if prepared is not None and "kind" not in given:
        from spikelm_train.texts.shards import read_meta

        read_meta(Path(prepared))
        given = {**given, "kind": "file", "path": str(Path(prepared) / "tokenizer")}
    if given.get("kind") == "file" and given.get("path") and "vocab_size" not in given:
        from spikelm.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_file(Path(given["path"]), eos=given.get("eos"))
        given = {**given, "vocab_size": tokenizer.vocab_size}
    return given


def _check_same_tokenizer(given: Mapping[str, Any], model: Path) -> None:
    """Raises: ConfigError for another tokenizer than that of the model to begin with."""
    from spikelm.tokenizer import Tokenizer

    kind, path, eos = (given.get(key) for key in ("kind", "path", "eos"))
    if kind is None:
        return
    own = None
    if kind == "bytes":
        own = Tokenizer.bytes()
    elif kind == "file" and path:
        own = Tokenizer.from_file(Path(path), eos=eos)
    if own is None or own.fingerprint != Tokenizer.load(model).fingerprint:
        raise ConfigError(
            f"tokenizer.kind: {kind} given; a run that begins with {model} has that model's "
            "tokenizer: leave kind and path out"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Dotted names of the keys in which two configurations differ."""
    names = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{where}{key}.")
        elif a != b:
            names.append(f"{where}{key}")
    return names
