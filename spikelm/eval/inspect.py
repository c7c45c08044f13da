"""Where are the spikes: every projection, what feeds it, how silent it is, what it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikelm import checkpoint
from spikelm.checkpoint import Checkpoint
from spikelm.coding.meter import Meter, Tally
from spikelm.config import NeuronConfig
from spikelm.corpus import builtin_documents
from spikelm.errors import CheckpointError, DataError
from spikelm.eval.evaluate import score, token_stream
from spikelm.eval.traffic import Matrix, num_parameters, weight_bytes, weight_traffic
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron
from spikelm.template import ChatTemplate

MEASURED_TOKENS = 4096
MEASURED_BYTES = 2**18
"""More text than this many bytes need not be read for that many tokens."""

FED_BY = {
    "embedding_output": "embedding",
    "mixer_input": "residual stream, normed",
    "mixer_output": "what the mixer read out",
    "queries_keys": "one head's query or key",
    "attention_queries": "one head's rotated query",
    "gate_input": "bottleneck of a gate",
    "mixer_residual": "output of the mixer",
    "ffn_input": "residual stream, normed",
    "ffn_hidden": "hidden neurons of the FFN",
    "ffn_residual": "output of the FFN",
    "head_input": "residual stream, normed",
}


def inspect(
    path: str | Path, documents: Sequence[str] | None = None, *, backend: str = "auto"
) -> dict[str, Any]:
    """The model folder `path` population by population, as JSON types.

    The silence of a spike-coded model is the one in its manifest; that of a float model is
    measured on the first tokens of `documents` or of the built-in validation text. Documents
    that are given are always measured on.

    Raises: CheckpointError for a folder that cannot be loaded; DataError for empty documents.
    """
    loaded = checkpoint.load(path, backend=backend)
    model = loaded.model
    measured_on, spikes = _spikes(loaded, documents)
    traffic = weight_traffic(model)
    silence = {name: found["silent_fraction"] for name, found in spikes.items()}
    skipped = traffic.skipped_fraction(silence)
    return {
        "name": loaded.name,
        "path": str(path),
        "kind": "float" if loaded.manifest is None else "spike-coded",
        "backend": next(matrix.backend for matrix in traffic.matrices.values()),
        "silence_measured_on": measured_on,
        "populations": [
            _population(neuron, spikes[neuron.name], traffic.matrices.get(neuron.name))
            for neuron in model.neurons()
        ],
        "parameters": num_parameters(model),
        "weight_bytes": weight_bytes(model),
        "weight_bytes_per_token": traffic.num_bytes,
        "weight_bytes_read_per_token": traffic.num_bytes * (1 - skipped),
        "other_bytes_per_token": traffic.other_bytes,
        "state": describe_state(model),
        "chat_template_rewrites": ChatTemplate.load(loaded.path, loaded.tokenizer).rewrites(),
    }


def describe_state(model: LanguageModel) -> dict[str, Any]:
    """One sequence's state: its bytes, the tensors of a layer of each kind, and its growth."""
    state = model.zero_state(1)
    mixers = model.config.mixers
    per_layer = {
        kind: {
            "layers": [i for i, mixer in enumerate(mixers) if mixer == kind],
            "tensors": {n: t.nbytes for n, t in state.layers[mixers.index(kind)].items()},
        }
        for kind in dict.fromkeys(mixers)
    }
    # The caches of full attention begin without slots and gain one per token.
    growth = sum(
        tensor[0, :0].new_zeros(tensor.shape[2:]).nbytes
        for layer in state.layers
        for name, tensor in layer.items()
        if name.endswith((".k", ".v")) and tensor.ndim > 2 and not tensor.shape[1]
    )
    return {
        "bytes": state.nbytes + growth * model.config.sink_embeddings,
        "bytes_per_token": growth,
        "per_layer": per_layer,
        "head": {name: tensor.nbytes for name, tensor in state.layers[-1].items()},
    }


def _spikes(
    loaded: Checkpoint, documents: Sequence[str] | None
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Where the silence was measured, and code, steps and silence of every population."""
    found = _from_manifest(loaded)
    if loaded.manifest is not None and documents is None:
        return f"calibration text, {loaded.manifest['calibration_tokens']} tokens", found
    texts = builtin_documents("validation") if documents is None else documents
    if not any(texts):
        raise DataError("there is no text to measure silence on; give documents that are not empty")
    stream = token_stream(loaded.tokenizer, texts).first(MEASURED_TOKENS + 1)
    meter = Meter()
    score(loaded.model, stream, meter)
    for neuron in loaded.model.neurons():
        # A routed expert may have seen no token.
        tally = meter.tallies.get(neuron.name, Tally(neuron))
        code = tally.code
        found[neuron.name] |= {
            "code": code[0].name if code else None,
            "steps": code[1] if code else None,
            "silent_fraction": tally.silent_fraction,
        }
    source = "built-in validation text" if documents is None else "given text"
    return f"{source}, {len(stream.ids) - 1} tokens", found


def _from_manifest(loaded: Checkpoint) -> dict[str, dict[str, Any]]:
    """What spikes.json says of every population; nothing for a float model."""
    names = [neuron.name for neuron in loaded.model.neurons()]
    if loaded.manifest is None:
        return {name: {} for name in names}
    path = loaded.path / checkpoint.MANIFEST
    keys = ("code", "steps", "silent_fraction", "threshold")
    try:
        entries = {entry["name"]: entry for entry in loaded.manifest["neurons"]}
        return {name: {key: entries[name][key] for key in keys} for name in names}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} lacks {error}; convert the model again") from None


def _population(neuron: Neuron, spikes: dict[str, Any], matrix: Matrix | None) -> dict[str, Any]:
    silent = spikes["silent_fraction"]
    weights = None
    if matrix is not None:
        weights = {
            "shape": [matrix.out_features, matrix.in_features],
            "bits": matrix.bits,
            "bytes": matrix.num_bytes,
            "bytes_read_per_token": matrix.num_bytes * (1 - silent * matrix.skips),
        }
    return {
        "name": neuron.name,
        "tensor_class": neuron.tensor_class,
        "fed_by": FED_BY[neuron.tensor_class],
        "channels": neuron.channels,
        "neuron": neuron.config.kind,
        "threshold": _threshold(neuron, spikes.get("threshold")),
        "code": spikes["code"],
        "steps": spikes["steps"],
        "silent_fraction": silent,
        "weights": weights,
    }


def _threshold(neuron: Neuron, origin: str | None) -> dict[str, Any] | None:
    """What decides whether the neuron fires; `origin` is "trained", "calibrated" or unknown."""
    config: NeuronConfig = neuron.config
    if config.kind == "off":
        return None
    learned = {name: float(p.mean()) for name, p in neuron.named_parameters()}
    if config.kind == "lif":
        tau, v = config.tau, config.v_threshold
        if config.learn:
            tau = 1 + math.exp(-learned["tau_logit"])
            v = math.exp(learned["v_threshold_log"])
        return {"v_threshold": v, "tau": tau, "origin": origin}
    if config.kind == "step":
        return {"v_threshold": learned.get("v_threshold", config.v_threshold), "origin": origin}
    clip = {"max_count": config.max_count, "unsigned": config.unsigned, "origin": origin}
    if config.scale == "fixed":
        return {"v_threshold": learned["step"], **clip}
    return {"k": learned["k"], "dead_zone": learned["dead_zone"], **clip}
