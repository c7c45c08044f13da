"""Imported models give the logits of the code that their checkpoints were made for.

Random weights under the released names. Oracles: transformers, the `rwkv` package, and plain
float64 loops written from the published formulas, one token at a time, apart from our kernels.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

VOCAB = 257
TOKENS = torch.tensor([[5, 200, 5, 97, 32, 256, 13, 13, 5, 97, 64, 1, 0, 255, 5, 32, 99, 100, 7]])
Weights = dict[str, Tensor]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 2}),
        ("Llama", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 12}),
        ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
        ("Qwen3", {"attention_bias": True, "head_dim": 8}),
    ],
)
def test_transformers(
    family: str, options: dict[str, Any], tmp_path: Path, imported: Callable[..., Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **counts, **options})
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.2)
        theirs.save_pretrained(tmp_path / family, max_shard_size="40KB")
        assert len(list((tmp_path / family).glob("*.safetensors"))) > 1
        ours = imported(tmp_path / family)
        logits = theirs.double()(TOKENS).logits
        # transformers forms norms and angles in float32.
        assert_close(ours(TOKENS)[0], logits, 2e-5)


# --- rwkv -----------------------------------------------------------------------------------------

# Prefill of all tokens but one, then one step; for RWKV-4, then RWKV-7. The package decides at
# import which of the two it is, and compiles RWKV-7 with TorchScript, which only costs time here.
DRIVER = """
import importlib, os, sys, torch
os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0", RWKV_V7_ON="0")
torch.jit.script = torch.jit.script_method = lambda f: f
torch.jit.ScriptModule = torch.nn.Module
import rwkv.model
tokens = torch.load("tokens.pth").tolist()
for kind in ("rwkv4", "rwkv7"):
    model = rwkv.model.RWKV(kind if kind == "rwkv7" else kind + ".pth", "cpu fp32")
    first, state = model.forward(tokens[:-1], None, full_output=True)
    last, state = model.forward(tokens[-1:], state)
    torch.save((torch.cat([first, last[None]]), state), kind + ".out")
    os.environ["RWKV_V7_ON"] = "1"
    importlib.reload(rwkv.model)
"""


@pytest.fixture(scope="module")
def rwkv_package(
    tmp_path_factory: pytest.TempPathFactory, released: dict[str, Callable[..., Weights]]
) -> Path:
    """A folder with RWKV-4 and RWKV-7 files, and the logits and states of the rwkv package."""
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("needs the package rwkv")
    folder = tmp_path_factory.mktemp("rwkv")
    torch.manual_seed(0)
    for kind in ("rwkv4", "rwkv7"):
        torch.save(released[kind](), folder / f"{kind}.pth")
    torch.save(TOKENS[0], folder / "tokens.pth")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return folder


def test_rwkv4(rwkv_package: Path, imported: Callable[..., Any]) -> None:
    ours, state = imported(rwkv_package / "rwkv4.pth", "--kind", "rwkv4")(TOKENS)
    logits, theirs = torch.load(rwkv_package / "rwkv4.out")
    assert_close(ours[0], logits, 2e-5)
    for i in range(2):
        shift, p, q, o, ffn_shift = theirs[5 * i : 5 * i + 5]
        layer = {name: tensor[0] for name, tensor in state.layers[i].items()}
        assert_close(layer["mixer.shift"][0], shift, 2e-5)
        assert_close(layer["mixer.o"], o, 2e-5)
        assert_close(layer["mixer.p"], p, 2e-5)
        assert_close(layer["mixer.q"], q, 2e-5)
        assert_close(layer["ffn.shift"][0], ffn_shift, 2e-5)


def test_rwkv7(rwkv_package: Path, imported: Callable[..., Any]) -> None:
    ours, state = imported(rwkv_package / "rwkv7.pth")(TOKENS)
    logits, theirs = torch.load(rwkv_package / "rwkv7.out")
    assert_close(ours[0], logits, 5e-5)
    for i in range(2):
        shift, S, ffn_shift = theirs[3 * i : 3 * i + 3]
        layer = {name: tensor[0] for name, tensor in state.layers[i].items()}
        assert_close(layer["mixer.shift"][0], shift, 5e-5)
        assert_close(layer["mixer.S"], S.mT, 5e-5)  # theirs is [H, V, K]
        assert_close(layer["ffn.shift"][0], ffn_shift, 5e-5)


# --- SpikeGPT -------------------------------------------------------------------------------------


def spikegpt(w: Weights, tokens: list[int], *, binary: bool) -> tuple[Tensor, float]:
    """Logits [T, N] and the firing rate of the residual spikes (reference: Zhu et al. 2023)."""
    width = w["emb.weight"].shape[1]
    blocks = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    zero = torch.zeros(width, dtype=torch.float64)
    shift = [[zero, zero] for _ in range(blocks)]
    membrane = [[zero, zero] for _ in range(blocks)]
    sums = [[zero, zero] for _ in range(blocks)]
    queries, keys, logits, fired = [], [], [], []

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def mixed(name: str, x: Tensor, before: Tensor) -> Tensor:
        share = w[name].flatten()
        return x * share + before * (1 - share)

    def channel_mix(name: str, x: Tensor, before: Tensor) -> Tensor:
        hidden = w[f"{name}.key.weight"] @ mixed(f"{name}.time_mix_k", x, before)
        gate = w[f"{name}.receptance.weight"] @ mixed(f"{name}.time_mix_r", x, before)
        return gate.sigmoid() * (w[f"{name}.value.weight"] @ hidden.relu().square())

    def time_mix(i: int, x: Tensor, before: Tensor) -> Tensor:
        name = f"blocks.{i}.att"
        r, k, v = (
            w[f"{name}.{long}.weight"] @ mixed(f"{name}.time_mix_{long[0]}", x, before)
            for long in ("receptance", "key", "value")
        )
        bonus, decay = (w[f"{name}.time_first"] + k).exp(), (-w[f"{name}.time_decay"].exp()).exp()
        above, below = sums[i]
        out = r.sigmoid() * (above + bonus * v) / (below + bonus)
        sums[i] = [decay * above + k.exp() * v, decay * below + k.exp()]
        return w[f"{name}.output.weight"] @ out

    def lif(i: int, which: int, x: Tensor) -> Tensor:
        v = membrane[i][which] + (x - membrane[i][which]) / 2
        spike = (v >= 1).double()
        membrane[i][which] = (1 - spike) * v
        fired.append(spike)
        return spike

    for token in tokens:
        x = w["emb.weight"][token]
        x = norm((x >= 0).double() if binary else x, "blocks.0.ln0")
        for i in range(blocks):
            for which in (0, 1):
                z = norm(x, f"blocks.{i}.ln{which + 1}")
                before, shift[i][which] = shift[i][which], z
                if which:
                    y = channel_mix(f"blocks.{i}.ffn", z, before)
                elif f"blocks.{i}.ffnPre.key.weight" in w:
                    y = channel_mix(f"blocks.{i}.ffnPre", z, before)
                else:
                    y = time_mix(i, z, before)
                x = x + lif(i, which, y)
        x = norm(x, "ln_out")
        out = w["head.weight"] @ x
        if "head_q.weight" in w:
            queries.append(w["head_q.weight"] @ x)
            keys.append(w["head_k.weight"] @ x)
            for seen, key in zip(tokens, keys, strict=False):
                out[seen] += queries[-1] @ key / len(key)
        logits.append(out)
    return torch.stack(logits), float(torch.stack(fired).mean())


@pytest.mark.parametrize(("ffn_pre", "head_qk", "binary"), [(False, 0, True), (True, 6, False)])
def test_spikegpt(
    tmp_path: Path,
    imported: Callable[..., Any],
    released: dict[str, Callable[..., Weights]],
    ffn_pre: bool,
    head_qk: int,
    binary: bool,
) -> None:
    # A gain at which sub-blocks do fire.
    tensors = released["rwkv4"](layers=3, ffn_pre=ffn_pre, head_qk=head_qk, gain=4.0)
    torch.save(tensors, tmp_path / "spikegpt.pth")
    doubled = {name: tensor.double() for name, tensor in tensors.items()}
    logits, rate = spikegpt(doubled, TOKENS[0].tolist(), binary=binary)
    assert 0.02 < rate < 0.5
    options = ["--kind", "spikegpt", *([] if binary else ["--raw-embedding"])]
    ours = imported(tmp_path / "spikegpt.pth", *options)
    assert_close(ours(TOKENS)[0][0], logits, 1e-6)


# --- SpikingBrain ---------------------------------------------------------------------------------


def gla_swa(w: Weights, tokens: list[int]) -> Tensor:
    """Logits [T, N] of the SpikingBrain layout: 4 layers, 4 query and 2 key/value heads of 8
    channels, window 6 (Pan et al. 2025, sections 2 and 3). Where projections have scales, their
    inputs spike, the down projection's included, and so do the rotated queries; keys and values
    are rounded to int8.
    """
    spiking = any(name.endswith(".scales") for name in w)

    def spikes(x: Tensor) -> Tensor:
        v_threshold = (x.abs().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
        return (x / v_threshold).round() * v_threshold

    def int8(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    def linear(name: str, x: Tensor) -> Tensor:
        weight = w[f"{name}.weight"]
        scales = w.get(f"{name}.weight_quantizer.scales")
        if scales is not None:
            codes = (weight.unflatten(1, (-1, 16)) / scales).round().clamp(-128, 127)
            weight, x = (codes * scales).flatten(1), spikes(x)
        y = x @ weight.T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        angle = torch.arange(len(x)).double()[:, None] * 1e6 ** (-torch.arange(4).double() / 4)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        turned = torch.complex(x[..., :4], x[..., 4:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    def window(p: str, x: Tensor) -> Tensor:
        q, k, v = (linear(f"{p}.{n}_proj", x).unflatten(-1, (-1, 8)) for n in "qkv")
        q, k = rotated(q), rotated(k)
        if spiking:
            q, k, v = spikes(q), int8(k), int8(v)
        out = torch.zeros_like(q)
        for t in range(len(x)):
            for h in range(4):
                seen = slice(max(0, t - 5), t + 1)
                weights = (k[seen, h // 2] @ q[t, h] * 8**-0.5).softmax(0)
                out[t, h] = weights @ v[seen, h // 2]
        return linear(f"{p}.o_proj", out.flatten(1))

    def gla(p: str, x: Tensor) -> Tensor:
        q, k, v = (linear(f"{p}.{n}_proj", x).unflatten(-1, (-1, 8)) for n in "qkv")
        if spiking:
            gate = linear(f"{p}.gk_proj", x)
        else:
            gate = linear(f"{p}.gk_proj.1", linear(f"{p}.gk_proj.0", x))
        decay = gate.sigmoid().pow(1 / 16).unflatten(-1, (-1, 8))
        out = torch.zeros_like(q)
        for h in range(4):
            S = torch.zeros(8, 8, dtype=x.dtype)
            for t in range(len(x)):
                S = decay[t, h // 2, :, None] * S + torch.outer(k[t, h // 2].relu(), v[t, h // 2])
                out[t, h] = q[t, h].relu() * 8**-0.5 @ S
        return linear(f"{p}.o_proj", norm(out, f"{p}.g_norm").flatten(1))

    x = w["model.embeddings.weight"][tokens]
    for i in range(4):
        p = f"model.layers.{i}"
        mix = window if i % 2 else gla
        x = x + mix(f"{p}.attn", norm(x, f"{p}.attn_norm"))
        h = norm(x, f"{p}.mlp_norm")
        hidden = F.silu(linear(f"{p}.mlp.gate_proj", h)) * linear(f"{p}.mlp.up_proj", h)
        x = x + linear(f"{p}.mlp.down_proj", hidden)
    return linear("lm_head", norm(x, "model.norm"))


@pytest.mark.parametrize("quantised", [False, True])
def test_spikingbrain(
    tmp_path: Path,
    imported: Callable[..., Any],
    released: dict[str, Callable[..., Weights]],
    quantised: bool,
) -> None:
    tensors = released["spikingbrain"](tmp_path / "7B", quantised=quantised)
    doubled = {name: tensor.double() for name, tensor in tensors.items()}
    logits = gla_swa(doubled, TOKENS[0].tolist())
    # A quantised weight is rounded once more, to float32.
    assert_close(imported(tmp_path / "7B")(TOKENS)[0][0], logits, 1e-5 if quantised else 1e-9)
