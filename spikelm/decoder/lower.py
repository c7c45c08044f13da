"""Lowering: the one-token step of every layer as native operations.

The formulas are those of the torch modules, which stay the specification: tests compare both. What
has no native form is refused with the reason, and decodes in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from spikelm.config import NeuronConfig
from spikelm.decoder.program import Code, Program
from spikelm.kernels.gla import fixed_log_decay
from spikelm.kernels.outputs import Gated, Halves
from spikelm.kernels.rope import frequencies
from spikelm.kernels.rows import RowMatrix
from spikelm.models.coded import CodedLinear
from spikelm.models.ffn import ChannelMix, ExpertsFFN, GatedFFN
from spikelm.models.layers import LayerNorm, Part, Projection, RMSNorm
from spikelm.models.mixers.attention import AttentionMixer, SoftmaxHeads
from spikelm.models.mixers.delta import UNIT_EPS as DELTA_UNIT_EPS
from spikelm.models.mixers.delta import DeltaMixer
from spikelm.models.mixers.gla import GLAMixer, LinearHeads
from spikelm.models.mixers.parallel import ParallelMixer
from spikelm.models.mixers.rwkv7 import DECAY_FLOOR, RWKV7Mixer
from spikelm.models.mixers.rwkv7 import UNIT_EPS as RWKV7_UNIT_EPS
from spikelm.models.mixers.wkv4 import WKV4Mixer
from spikelm.models.spikelm import LanguageModel, Layer
from spikelm.neurons import Neuron
from spikelm.neurons.integer import MIN_K, MIN_THRESHOLD

# In the order of the enumerations in native/decode.cpp.
NEURONS = ("integer", "lif", "step")
FEATURES = ("relu", "sigmoid", "silu", "identity")
ACTIVATIONS = ("none", "squared_relu", "swiglu", "reglu", "tanh", "sigmoid")
MAX_HEAD, MAX_RWKV7_HEAD = 1024, 256


class NotLoweredError(Exception):
    """Why a model has no native one-token step."""


def lower(model: LanguageModel) -> Program:
    """The program of a spike-coded model whose linears are packed for native code.

    Raises: NotLoweredError.
    """
    return _Lowering(model).program


class _Lowering:
    def __init__(self, model: LanguageModel) -> None:
        config = model.config
        if model.head_qk is not None:
            raise NotLoweredError("head-QK")
        self.program = program = Program()
        self.width = config.width
        self.x = program.vector(self.width)
        self.normed = program.vector(self.width)
        self.index, self.prefix = 0, ""
        self.residual: Neuron | None = None
        self.first_values: int | None = None
        if "rwkv7" in config.mixers:
            self.first_values = program.vector(self.width)
        program.emit(
            Code.EMBED,
            "embedding",
            size=[self.width],
            at=[self.x],
            data=[_float(model.embedding.weight)],
        )
        program.barrier()
        if model.embedding_output is not None:
            outer = len(model.layers)
            spikes = self._fire(model.embedding_output, self.x, outer, "", counted=False)
            program.barrier()
            program.emit(
                Code.ADD_SPIKES, "embedding", size=[self.width], at=[self.x], spikes=spikes
            )
            program.barrier()
        if model.embedding_norm is not None:
            self._norm(model.embedding_norm, self.x, self.x)
        kept = program.used
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            self._layer(index, layer)
            program.used = kept
        self._norm(model.norm, self.x, self.normed)
        logits = program.vector(config.vocab_size)
        spikes = self._fire(model.head.neuron, self.normed, len(model.layers), "")
        program.barrier()
        self._head(model.head, spikes, logits)
        program.finish(logits, config.vocab_size)

    def _layer(self, index: int, layer: Layer) -> None:
        self.index = index
        for part, norm, residual in (
            (layer.mixer, layer.mixer_norm, layer.mixer_residual),
            (layer.ffn, layer.ffn_norm, layer.ffn_residual),
        ):
            self.prefix = "mixer." if part is layer.mixer else "ffn."
            self.residual = residual
            self._norm(norm, self.x, self.normed)
            for kind, method in self._methods.items():
                if isinstance(part, kind):
                    method(self, part)
                    break
            else:
                raise NotLoweredError(f"{_kind(part)} layers")

    # Parts.

    def _rwkv7(self, mixer: RWKV7Mixer) -> None:
        program, width = self.program, self.width
        H, K = mixer.bonus.shape
        if K > MAX_RWKV7_HEAD:
            raise NotLoweredError(f"rwkv7 heads of more than {MAX_RWKV7_HEAD} channels")
        assert self.first_values is not None
        shift = self._state("shift")
        downs = {
            "decay": (mixer.decay_down, mixer.decay_up, "tanh"),
            "rate": (mixer.rate_down, mixer.rate_up, "none"),
            "gate": (mixer.gate_down, mixer.gate_up, "sigmoid"),
        }
        if mixer.has_first_values:
            downs["value"] = (mixer.value_down, mixer.value_up, "none")
        inputs = {
            "receptance": mixer.receptance,
            "key": mixer.key,
            "value": mixer.value,
            **{f"{name}_down": down for name, (down, _, _) in downs.items()},
        }
        lists, vectors = {}, {}
        for name, projection in inputs.items():
            share = mixer.get_parameter(f"{name.removesuffix('_down')}_shift")
            lists[name] = self._spike(projection, self.normed, shift=(shift, share))
        program.barrier()
        for name, projection in inputs.items():
            own = name == "value" and not mixer.has_first_values
            vectors[name] = self.first_values if own else program.vector(_outputs(projection))
            self._matvec(projection, lists[name], vectors[name])
        program.emit(Code.KEEP, "shift", size=[width], at=[self.normed], state=[shift])
        program.barrier()
        for name, (_, up, activation) in downs.items():
            lists[name] = self._spike(up, vectors[f"{name}_down"], activation=activation)
        program.barrier()
        logits = {name: program.vector(width) for name in downs}
        for name, (_, up, _) in downs.items():
            self._matvec(up, lists[name], logits[name])
        program.barrier()
        out = program.vector(width)
        at = [vectors["receptance"], vectors["key"], vectors["value"], logits["decay"]]
        at += [logits["rate"], logits["gate"]]
        biases = [_float(mixer.decay_bias), _float(mixer.rate_bias)]
        program.emit(
            Code.RWKV7,
            "rwkv7",
            size=[H, K],
            at=[*at, logits.get("value"), self.first_values, out],
            state=[self._state("S")],
            number=[DECAY_FLOOR, RWKV7_UNIT_EPS, mixer.norm.eps],
            data=[
                *biases,
                _float(mixer.value_bias) if mixer.has_first_values else None,
                *(_float(t) for t in (mixer.key_scale, mixer.key_rate, mixer.bonus)),
                *(_float(t) for t in (mixer.norm.weight, mixer.norm.bias)),
            ],
        )
        program.barrier()
        self._add(mixer.output, out)

    def _delta(self, mixer: DeltaMixer) -> None:
        program, c = self.program, mixer.config
        if max(c.key_dim, c.value_dim) > MAX_HEAD:
            raise NotLoweredError(f"heads of more than {MAX_HEAD} channels")
        projected = self._project(mixer.input, self.normed)
        size = sum(mixer.qkv_sizes)
        mixed = program.vector(size)
        conv = self._state("conv") if c.conv_size > 1 else None
        program.emit(
            Code.CONV,
            "conv",
            size=[size, c.conv_size],
            at=[projected, mixed],
            state=[conv],
            data=[_float(mixer.conv)],
        )
        logits = self._project(mixer.gates, projected + size)
        out = program.vector(mixer.qkv_sizes[2])
        decays = {"none": 0, "scalar": 1, "channel": c.key_dim}[c.decay]
        split = c.gates == "split"
        counts, max_count, unsigned, zones = _head_neurons(mixer.queries, mixer.keys)
        program.emit(
            Code.DELTA,
            mixer.queries.name,
            size=[
                *(c.num_heads, c.key_dim, c.value_dim, decays),
                *(c.key_dim if split else 1, c.value_dim if split else 0),
                *(max_count, unsigned),
            ],
            at=[mixed, logits, out],
            state=[self._state("S"), self._state("pending") if mixer.lazy else None],
            number=[c.decay_floor, DELTA_UNIT_EPS, mixer.norm.eps, *counts],
            data=[_float(mixer.gate_bias), _float(mixer.norm.weight), *zones],
        )
        program.barrier()
        self._add(mixer.output, out)

    def _window(self, mixer: AttentionMixer) -> None:
        program = self.program
        projected = self._project(mixer.input, self.normed)
        out = program.vector(mixer.sizes[0])
        self._softmax_heads(mixer.heads, projected, out, mixer.qkv_bias, "")
        program.barrier()
        self._add(mixer.output, out)

    def _softmax_heads(
        self, heads: SoftmaxHeads, qkv: int, out: int, bias: Tensor | None, branch: str
    ) -> None:
        program, c = self.program, heads.config
        if c.head_dim > MAX_HEAD:
            raise NotLoweredError(f"heads of more than {MAX_HEAD} channels")
        grows = heads.window is None
        sinks = 0 if grows else c.sinks
        gates = {"none": 0, "headwise": 1, "elementwise": c.head_dim}[c.output_gate]
        counts, max_count, unsigned, zones = _head_neurons(heads.queries)
        rope = None
        if c.rope_theta is not None:
            device = torch.device("cpu")
            rope = frequencies(c.head_dim // 2, c.rope_theta, c.rope_scaling, device).contiguous()
        norms = [
            None if n is None else _float(n.weight) for n in (heads.query_norm, heads.key_norm)
        ]
        program.emit(
            Code.WINDOW,
            "window" if heads.queries is None else heads.queries.name,
            size=[
                *(c.num_heads, c.num_kv_heads, c.head_dim, heads.window or 0, sinks, gates),
                *(max_count, unsigned, c.kv_bits is not None),
            ],
            at=[qkv, out],
            state=[
                *(self._state(branch + name, grows=grows) for name in ("k", "v")),
                *(self._state(branch + name) for name in ("sink_k", "sink_v")),
            ],
            number=[0.0 if heads.query_norm is None else heads.query_norm.eps, 0.0, 0.0, *counts],
            data=[None if bias is None else _float(bias), rope, *norms, *zones],
        )

    def _channel_mix(self, ffn: ChannelMix) -> None:
        program = self.program
        shift = self._state("shift")
        spikes = self._spike(ffn.input, self.normed, shift=(shift, ffn.shift))
        gate = None
        if ffn.receptance is not None:
            share = ffn.receptance_shift
            gate = self._spike(ffn.receptance, self.normed, shift=(shift, share))
        program.barrier()
        hidden = program.vector(_outputs(ffn.input))
        logits = program.vector(self.width)
        if ffn.receptance is not None and gate is not None:
            self._matvec(ffn.receptance, gate, logits)
        program.emit(Code.KEEP, "shift", size=[self.width], at=[self.normed], state=[shift])
        linear = ffn.input.linear
        assert isinstance(linear, CodedLinear)
        if isinstance(linear.table, Halves):
            # What the neuron makes of a negative number is 0, whatever the number.
            upper = self._estimate(ffn.input, linear.table, spikes, hidden)
            self._exact(ffn.input, linear.table, spikes, hidden, upper, positive=True)
        else:
            self._matvec(ffn.input, spikes, hidden)
            program.barrier()
        gated = None if ffn.receptance is None else logits
        self._add(ffn.output, hidden, activation="squared_relu", gate=gated)

    def _gated(self, ffn: GatedFFN) -> None:
        shift = None if ffn.shift is None else (self._state("shift"), ffn.shift)
        spikes = self._spike(ffn.input, self.normed, shift=shift)
        self.program.barrier()
        if shift is not None:
            # Nothing reads the token before any more.
            self.program.emit(
                Code.KEEP, "shift", size=[self.width], at=[self.normed], state=[shift[0]]
            )
        linear = ffn.input.linear
        assert isinstance(linear, CodedLinear)
        if isinstance(linear.table, Gated):
            projected = self._behind_gates(ffn.input, linear.table, spikes)
        else:
            projected = self.program.vector(_outputs(ffn.input))
            self._matvec(ffn.input, spikes, projected)
            self.program.barrier()
        self._add(ffn.output, projected, activation=ffn.kind)

    def _behind_gates(self, projection: Projection, table: Gated, spikes: int) -> int:
        """Gates, and what they let through as far as they are open: one vector."""
        program, hidden = self.program, table.out_features // 2
        projected = program.vector(2 * hidden)
        scale, bias = _scale_and_bias(projection)
        assert bias is None
        program.emit(
            Code.MATVEC,
            projection.neuron.name,
            size=[False],
            at=[projected, projected],
            data=[table.gates.handle, scale[:hidden]],
            spikes=spikes,
        )
        program.barrier()
        wanted = program.list(hidden, counted=False)
        program.emit(Code.OPEN, "gates", size=[hidden], at=[projected], spikes=wanted)
        program.barrier()
        program.emit(
            Code.OUTPUTS,
            projection.neuron.name,
            size=[wanted, False],
            at=[projected + hidden],
            data=[table.values.handle, scale[hidden:]],
            spikes=spikes,
        )
        program.barrier()
        return projected

    def _head(self, projection: Projection, spikes: int, logits: int) -> None:
        """The logits: if weights are in halves, estimates of all and exact ones of the largest."""
        assert isinstance(projection.linear, CodedLinear)
        table = projection.linear.table
        if not isinstance(table, Halves):
            self._matvec(projection, spikes, logits)
            return
        upper = self._estimate(projection, table, spikes, logits)
        self._exact(projection, table, spikes, logits, upper, positive=False)

    def _estimate(self, projection: Projection, table: Halves, spikes: int, y: int) -> int:
        """What the upper halves say of every output, in y; the vector of their integers."""
        upper = self.program.vector(table.out_features)
        self.program.emit(
            Code.ESTIMATE,
            projection.neuron.name,
            at=[y, upper],
            data=[table.upper.handle, *_scale_and_bias(projection)],
            spikes=spikes,
        )
        self.program.barrier()
        return upper

    def _exact(
        self,
        projection: Projection,
        table: Halves,
        spikes: int,
        y: int,
        upper: int,
        *,
        positive: bool,
    ) -> None:
        """Makes exact what may be `positive`, or the largest outputs (`SHORTLIST`)."""
        program, outputs = self.program, table.out_features
        scale, bias = _scale_and_bias(projection)
        wanted = program.list(outputs, counted=False)
        program.emit(
            Code.SHORTLIST,
            projection.neuron.name,
            size=[outputs, spikes, table.in_features, positive],
            at=[y],
            data=[scale],
            spikes=wanted,
        )
        program.barrier()
        program.emit(
            Code.OUTPUTS,
            projection.neuron.name,
            size=[wanted, True],
            at=[y, upper],
            data=[table.lower.handle, scale, bias],
            spikes=spikes,
        )
        program.barrier()

    def _experts(self, ffn: ExpertsFFN) -> None:
        """All experts are listed; those that the router does not choose are passed over."""
        program, width, c = self.program, self.width, ffn.config
        experts = [*ffn.experts, *ffn.shared]
        weights = program.vector(len(experts))
        router = _float(ffn.router.weight)
        program.emit(
            Code.ROUTE,
            "router",
            size=[c.num_experts, width, c.top_k, c.router == "sigmoid", c.num_shared],
            at=[self.normed, weights],
            data=[router],
        )
        program.barrier()
        outputs = program.vector(len(experts) * width)

        def each(step: Callable[[GatedFFN, int, int], int]) -> None:
            for index, expert in enumerate(experts):
                assert isinstance(expert, GatedFFN)
                program.when = weights + index
                values[index] = step(expert, index, values[index])
            program.when = -1
            program.barrier()

        def project(expert: GatedFFN, index: int, spikes: int) -> int:
            projected = program.vector(_outputs(expert.input))
            self._matvec(expert.input, spikes, projected)
            return projected

        def put(expert: GatedFFN, index: int, spikes: int) -> int:
            self._matvec(expert.output, spikes, outputs + index * width)
            return -1

        values = [-1] * len(experts)
        each(lambda expert, index, _: self._spike(expert.input, self.normed))
        each(project)
        each(lambda expert, index, x: self._spike(expert.output, x, activation=expert.kind))
        each(put)
        y = self.x if self.residual is None else program.vector(width)
        program.emit(
            Code.ADD_EXPERTS,
            "experts",
            size=[len(experts), width, self.residual is None],
            at=[weights, outputs, y],
        )
        program.barrier()
        self._add_residual(y)

    def _wkv4(self, mixer: WKV4Mixer) -> None:
        program, width = self.program, self.width
        shift = self._state("shift")
        projections = {"key": mixer.key, "value": mixer.value, "receptance": mixer.receptance}
        lists = [
            self._spike(projection, self.normed, shift=(shift, mixer.get_parameter(f"{n}_shift")))
            for n, projection in projections.items()
        ]
        program.barrier()
        vectors = [program.vector(width) for _ in lists]
        for projection, spikes, y in zip(projections.values(), lists, vectors, strict=True):
            self._matvec(projection, spikes, y)
        program.emit(Code.KEEP, "shift", size=[width], at=[self.normed], state=[shift])
        program.barrier()
        out = program.vector(width)
        program.emit(
            Code.WKV4,
            "wkv4",
            size=[width],
            at=[*vectors, out],
            state=[self._state(name) for name in "pqo"],
            data=[-_float(mixer.decay).exp(), _float(mixer.bonus)],
        )
        program.barrier()
        self._add(mixer.output, out)

    def _gla(self, mixer: GLAMixer) -> None:
        program = self.program
        projected = self._project(mixer.input, self.normed)
        logits = projected + sum(mixer.sizes)
        gates = logits + mixer.gate_sizes[0]
        if mixer.decay is not None:
            logits = self._project(mixer.decay, logits)
        c = mixer.config
        out = program.vector(c.num_heads * c.value_dim)
        self._linear_heads(
            mixer.heads, projected, logits, gates, out, mixer.qkv_bias, mixer.decay_bias, ""
        )
        program.barrier()
        self._add(mixer.output, out)

    def _linear_heads(
        self,
        heads: LinearHeads,
        qkv: int,
        logits: int,
        gates: int,
        out: int,
        bias: Tensor | None,
        decay_bias: Tensor | None,
        branch: str,
    ) -> None:
        c = heads.config
        if max(c.key_dim, c.value_dim) > MAX_HEAD:
            raise NotLoweredError(f"heads of more than {MAX_HEAD} channels")
        decay = {"channel": 0, "scalar": 1, "tied": 2}.get(c.decay, 3)
        fixed = None
        if c.decay == "lightning" or c.decay == "retnet":
            fixed = fixed_log_decay(c.decay, c.num_kv_heads, heads.layer, heads.num_layers)
        per_head = {"none": 0, "headwise": 1, "elementwise": c.value_dim}[c.output_gate]
        self.program.emit(
            Code.GLA,
            "gla",
            size=[
                *(c.num_heads, c.num_kv_heads, c.key_dim, c.value_dim),
                *(decay, FEATURES.index(c.feature_map), per_head),
            ],
            at=[qkv, logits, gates, out],
            state=[self._state(branch + "S")],
            number=[c.gate_temperature, c.key_dim**-0.5, heads.norm.eps],
            data=[
                None if bias is None else _float(bias),
                None if decay_bias is None else _float(decay_bias),
                _float(heads.norm.weight),
                None if fixed is None else _float(fixed),
            ],
        )

    def _parallel(self, mixer: ParallelMixer) -> None:
        program = self.program
        projected = self._project(mixer.input, self.normed)
        linear, softmax = (program.vector(mixer.sizes[0]) for _ in range(2))
        bias = mixer.qkv_bias
        self._linear_heads(
            mixer.linear, projected, projected, projected, linear, bias, None, "linear."
        )
        self._softmax_heads(mixer.softmax, projected, softmax, bias, "softmax.")
        program.barrier()
        out = program.vector(mixer.sizes[0])
        program.emit(
            Code.MEAN,
            "parallel",
            size=[mixer.sizes[0] // mixer.head_dim, mixer.head_dim],
            at=[linear, softmax, out],
            number=[mixer.softmax_norm.eps],
            data=[_float(mixer.softmax_norm.weight)],
        )
        program.barrier()
        self._add(mixer.output, out)

    # Pieces.

    def _norm(self, norm: object, source: int, target: int) -> None:
        assert isinstance(norm, RMSNorm | LayerNorm)
        bias = _float(norm.bias) if isinstance(norm, LayerNorm) else None
        self.program.emit(
            Code.NORM,
            "norm",
            size=[self.width],
            at=[source, target],
            number=[norm.eps],
            data=[_float(norm.weight), bias],
        )
        self.program.barrier()

    def _state(self, name: str, *, grows: bool = False) -> int:
        """The slot of a state tensor of the part at hand."""
        return self.program.state(self.index, self.prefix + name, grows=grows)

    def _spike(
        self,
        projection: Projection,
        x: int,
        *,
        shift: tuple[int, Tensor] | None = None,
        activation: str = "none",
    ) -> int:
        """The list of the spikes that the projection's neurons send."""
        return self._fire(
            projection.neuron, x, self.index, self.prefix, shift=shift, activation=activation
        )

    def _fire(
        self,
        neuron: Neuron,
        x: int,
        layer: int,
        prefix: str,
        *,
        shift: tuple[int, Tensor] | None = None,
        activation: str = "none",
        counted: bool = True,
    ) -> int:
        program, c, n = self.program, neuron.config, neuron.channels
        numbers, membrane = [0.0, 0.0, 0.0], None
        tensors: list[Tensor | None] = [None] * 4
        if c.kind == "integer":
            if c.max_count is None:
                raise NotLoweredError(f"counts without clip ({neuron.name})")
            if c.scale == "adaptive":
                numbers[0], tensors[0] = max(neuron.k.item(), MIN_K), _float(neuron.dead_zone)
                numbers[2] = _power(c)
            else:
                numbers[1] = max(neuron.step.item(), MIN_THRESHOLD)
        elif c.kind == "lif":
            if c.softness is not None:
                raise NotLoweredError(f"soft neurons ({neuron.name})")
            membrane = program.state(layer, f"{prefix}{neuron.key}.v")
            constants = neuron.constants(torch.empty(0))
            tensors[2], tensors[3] = (
                constant.expand(n).contiguous()
                for constant in (constants.tau, constants.v_threshold)
            )
        elif c.kind == "step":
            threshold = neuron.v_threshold if c.learn else torch.tensor(c.v_threshold)
            tensors[3] = _float(threshold.expand(n))
        else:
            raise NotLoweredError(f"no neuron in front of {neuron.name}")
        if shift is not None:
            tensors[1] = _float(shift[1])
        spikes, scratch = program.list(n, counted=counted), program.vector(n)
        fired = None if c.kind == "integer" else program.vector(n)
        program.emit(
            Code.SPIKE,
            neuron.name,
            size=[
                *(n, ACTIVATIONS.index(activation), c.unsigned, c.max_count or 0),
                *(NEURONS.index(c.kind), c.reset == "zero"),
            ],
            at=[x, scratch, fired],
            state=[None if shift is None else shift[0], membrane],
            number=numbers,
            data=tensors,
            spikes=spikes,
        )
        return spikes

    def _matvec(self, projection: Projection, spikes: int, y: int, *, add: bool = False) -> None:
        linear = projection.linear
        assert isinstance(linear, CodedLinear)
        assert isinstance(linear.table, RowMatrix)
        integers = self.program.vector(linear.out_features) if add else y
        self.program.emit(
            Code.MATVEC,
            projection.neuron.name,
            size=[add],
            at=[y, integers],
            data=[linear.table.handle, *_scale_and_bias(projection)],
            spikes=spikes,
        )

    def _project(self, projection: Projection, x: int) -> int:
        """The vector that the projection makes of x."""
        spikes = self._spike(projection, x)
        self.program.barrier()
        y = self.program.vector(_outputs(projection))
        self._matvec(projection, spikes, y)
        self.program.barrier()
        return y

    def _add(
        self,
        projection: Projection,
        x: int,
        *,
        activation: str = "none",
        gate: int | None = None,
    ) -> None:
        """The residual stream plus what the projection of x gives, gated and through a neuron."""
        program = self.program
        spikes = self._spike(projection, x, activation=activation)
        program.barrier()
        if gate is None and self.residual is None:
            self._matvec(projection, spikes, self.x, add=True)
            program.barrier()
            return
        y = program.vector(self.width)
        self._matvec(projection, spikes, y)
        program.barrier()
        if gate is not None:
            target = self.x if self.residual is None else y
            adds = self.residual is None
            program.emit(
                Code.GATED_ADD, "receptance", size=[self.width, adds], at=[y, gate, target]
            )
            program.barrier()
        self._add_residual(y)

    def _add_residual(self, y: int) -> None:
        """The residual stream plus what the neurons on it make of y, if there are any."""
        if self.residual is None:
            return
        program = self.program
        spikes = self._fire(self.residual, y, self.index, "", counted=False)
        program.barrier()
        program.emit(
            Code.ADD_SPIKES, "residual", size=[self.width, True], at=[self.x], spikes=spikes
        )
        program.barrier()

    _methods: ClassVar[dict[type[Part], Callable[..., None]]] = {
        RWKV7Mixer: _rwkv7,
        DeltaMixer: _delta,
        AttentionMixer: _window,
        WKV4Mixer: _wkv4,
        GLAMixer: _gla,
        ParallelMixer: _parallel,
        ChannelMix: _channel_mix,
        GatedFFN: _gated,
        ExpertsFFN: _experts,
    }


def _head_neurons(
    *neurons: Neuron | None,
) -> tuple[tuple[float, float], int, bool, list[Tensor | None]]:
    """(k (0 if off), power), clip (0 if none), unsigned and dead zones of populations that share
    them.
    """
    c = None if neurons[0] is None else neurons[0].config
    if c is None or c.kind == "off":
        return (0.0, 0.0), 0, False, [None for _ in neurons]
    if c.kind != "integer" or c.scale != "adaptive":
        raise NotLoweredError(f"{c.kind} neurons of {c.scale} scale on queries and keys")
    present = [neuron for neuron in neurons if neuron is not None]
    k = {max(neuron.k.item(), MIN_K) for neuron in present}
    if len(k) > 1:
        raise NotLoweredError("queries and keys with different k")
    zones: list[Tensor | None] = [_float(neuron.dead_zone) for neuron in present]
    return (k.pop(), _power(c)), c.max_count or 0, c.unsigned, zones


def _power(config: NeuronConfig) -> float:
    """The power of an integer neuron as operations take it: 0 is none."""
    return config.power if config.power != 1 else 0.0


def _scale_and_bias(projection: Projection) -> tuple[Tensor, Tensor | None]:
    assert isinstance(projection.linear, CodedLinear)
    bias = None if projection.bias is None else _float(projection.bias)
    return projection.linear.out_scale().contiguous(), bias


def _outputs(projection: Projection) -> int:
    assert isinstance(projection.linear, CodedLinear)
    return projection.linear.out_features


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _kind(part: object) -> str:
    assert isinstance(part, Part)
    return type(part).__name__.removesuffix("Mixer").lower()
