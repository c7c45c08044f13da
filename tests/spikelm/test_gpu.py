"""The same model on CUDA: outputs, states, gradients and spike counts as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm import checkpoint
from spikelm.config import ModelConfig
from spikelm.errors import BackendError
from spikelm.generate import Engine, prompt_ids, stream_text
from spikelm.models.spikelm import LanguageModel
from spikelm.sampling import SamplingParams

pytestmark = pytest.mark.gpu


def test_forward_and_gradients_equal_the_cpu(tiny_config: Callable[..., ModelConfig]) -> None:
    ids = torch.randint(0, 257, (2, 130))
    reset = torch.rand(2, 130) < 0.05
    results = []
    for device in ("cpu", "cuda"):
        model = LanguageModel(tiny_config()).initialise(0).double().to(device)
        logits, state = model(ids.to(device), reset=reset.to(device))
        logits.square().mean().backward()
        tensors = [logits, *(t for layer in state.layers for t in layer.values())]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([t.detach().cpu() for t in (*tensors, *grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_spike_coded_folder(coded_folder: Path) -> None:
    ids = torch.randint(0, 257, (1, 70))
    cpu = checkpoint.load(coded_folder).model.double()
    cuda = checkpoint.load(coded_folder, device="cuda").model.double()
    torch.testing.assert_close(cuda(ids.cuda())[0].cpu(), cpu(ids)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(BackendError, match="for CPUs"):
        checkpoint.load(coded_folder, backend="embedding_bag_int8", device="cuda")


def test_engine_generates(coded_folder: Path) -> None:
    engine = Engine(checkpoint.load(coded_folder, device="cuda"))
    params = SamplingParams(temperature=0.0, max_tokens=16)
    chunks = list(stream_text(engine, prompt_ids(engine.tokenizer, "Hello"), params))
    assert sum(len(chunk.token_ids) for chunk in chunks) == 16


def test_bfloat16_training_step(tiny_config: Callable[..., ModelConfig]) -> None:
    model = LanguageModel(tiny_config()).initialise(0).cuda()
    ids = torch.randint(0, 257, (4, 129)).cuda()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cuda", torch.bfloat16):
            logits, _ = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
