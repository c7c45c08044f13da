"""spikelm.models.recompute; that nothing changes is tested for every model in test_every_model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from spikelm.config import ModelConfig
from spikelm.models.layers import Context
from spikelm.models.recompute import recomputed
from spikelm.models.spikelm import LanguageModel

Make = Callable[..., ModelConfig]


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """What autograd keeps of a forward pass, without what it will compute again."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    loss.backward()
    return sum(sizes.values())


def test_a_part_runs_again_in_the_backward_pass() -> None:
    contexts = []

    def part(x: Tensor, context: Context) -> Tensor:
        contexts.append(context)
        context.shared.setdefault("first", x)
        return x.exp().exp()

    context = Context(torch.zeros(1, 1), None, probe=lambda neuron, x, spikes: None, losses=[])
    x = torch.ones(3, requires_grad=True)
    y = recomputed(part, x, context)
    assert len(contexts) == 1
    y.sum().backward()
    first, again = contexts
    assert first is context
    assert again.probe is None
    assert again.losses is not context.losses
    assert again.shared is not context.shared
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.detach() * x.detach().exp())
    with torch.no_grad():
        recomputed(part, x, context)
    assert contexts[2:] == [context]


def test_layers_keep_their_inputs_alone(tiny_config: Make) -> None:
    config = tiny_config(mixers=("delta",) * 6)
    model = LanguageModel(config).initialise(0).train()
    ids = torch.randint(0, 257, (2, 64))
    sizes = []
    for model.recompute_layers in (False, True):
        sizes.append(kept_bytes(lambda: model(ids)[0].square().mean()))
    assert sizes[1] < sizes[0] / 4


def test_losses_in_chunks_keep_no_logits(tiny_config: Make) -> None:
    sizes = []
    for vocabulary in (300, 3000):
        config = dataclasses.replace(tiny_config(), vocab_size=vocabulary)
        model = LanguageModel(config).initialise(0)
        ids = torch.randint(0, 257, (2, 64))

        def run(model: LanguageModel = model, ids: Tensor = ids) -> Tensor:
            def read(logits: Tensor, part: slice) -> Tensor:
                return logits.logsumexp(-1)

            return model(ids, read=read, read_tokens=16)[0].mean()

        sizes.append(kept_bytes(run))
    assert sizes[0] == sizes[1]
