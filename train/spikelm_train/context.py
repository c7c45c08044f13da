"""Context parallelism: the tokens of a row shared out over processes, one state handed on.

Every row of L tokens is cut into C equal slices. The processes of a group of C consecutive ranks
take one each; before a layer computes, it receives its state from the rank that has the slice
before, and sends it on when it has computed. So the ranks of a group work on different layers at
a time, C - 1 of them wait at either end of a step, and a layer costs one message of its state's
size, whatever L is. The backward pass hands the gradients of the states back the same way. What
comes out are the gradients of one process, if every rank's loss is the mean over its slice and
gradients are averaged over ranks (tests/train/test_context.py).

As LASP for linear attention (Sun et al. 2024, arXiv 2404.02882), for every mixer whose state does
not grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spikelm.errors import ConfigError
from spikelm.models.spikelm import LanguageModel, positions
from spikelm.state import LayerState, State
from spikelm_train.config import TrainConfig
from spikelm_train.cost import GROWING
from spikelm_train.data import Batch


def check_context(
    config: TrainConfig, size: int, num_processes: int, strategy: str = "copies"
) -> None:
    """Raises: ConfigError for what slices on `size` processes would train differently than whole
    rows on one.
    """
    if size == 1:
        return
    if size < 1 or num_processes % size:
        raise ConfigError(
            f"--context {size} given on {num_processes} process(es); allowed: a number that "
            "divides them, which torchrun --nproc_per_node N -m spikelm_train starts"
        )
    if config.data.sequence_length % size:
        raise ConfigError(
            f"--context {size} cuts rows into equal slices, and data.sequence_length is "
            f"{config.data.sequence_length}; take a multiple of {size}"
        )
    for reason in _inexact(config, strategy):
        raise ConfigError(f"--context {size} does not go together with {reason}")


def _inexact(config: TrainConfig, strategy: str) -> Iterator[str]:
    """What of a recipe needs whole rows."""
    model = config.model
    growing = sorted(set(model.mixers) & set(GROWING))
    if strategy != "copies":
        # All ranks gather or reduce a layer together there; here they are at different layers.
        yield "--shard or DeepSpeed; start it with torchrun alone"
    if growing:
        yield f"mixers whose state grows ({', '.join(growing)}); take window or parallel"
    if model.attention.kv_bits is not None and {"window", "parallel"} & set(model.mixers):
        yield "model.attention.kv_bits: int8 keys hand back no gradient; set it to null"
    for name in ("embedding_output", "head_input"):
        if getattr(model.neurons, name).kind == "lif":
            yield f"model.neurons.{name}.kind: lif; only the states of layers are handed on"
    for name in ("head_qk_dim", "sink_embeddings"):
        if getattr(model, name):
            yield f"model.{name}; set it to 0"
    if model.ffn.experts is not None and model.ffn.experts.balance:
        yield "the balance of experts, which is that of whole rows; set model.ffn.experts.balance=0"
    if config.data.sampling == "carried":
        yield "data.sampling: carried; take packed or random_window"
    if config.distill.teacher is not None:
        yield "distill.teacher, who reads whole rows"


class Link:
    """Messages to and from another rank, each way in the order they are put."""

    def __init__(self, rank: int, group: dist.ProcessGroup | None) -> None:
        self._rank, self._group = rank, group
        self._sent: list[tuple[dist.Work | None, Tensor]] = []

    def put(self, message: Tensor) -> None:
        """Begins to send a message, which nobody may change any more."""
        message = message.contiguous()
        self._sent.append((dist.isend(message, self._rank, self._group), message))

    def get(self, message: Tensor) -> Tensor:
        """Fills in the next message, which it waits for; returns it."""
        dist.recv(message, self._rank, self._group)
        return message

    def settle(self) -> None:
        """Waits until all that was put has arrived.

        Not left to the destructors, which would tell torch's profiler of it after its own end.
        """
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()


class Slices:
    """A rank's slice of every row, and the links to the ranks that have its neighbours.

    Of every `size` consecutive ranks the first has the first slice. To be made by all ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.size, self.index = size, rank % size
        # A group of their own: messages must not wait behind the averaging of gradients.
        group = dist.new_group()
        self.before = Link(rank - 1, group) if self.index > 0 else None
        self.after = Link(rank + 1, group) if self.index < size - 1 else None

    def take(self, batch: Batch, model: LanguageModel) -> tuple[Batch, State, Handover]:
        """This rank's slice of the rows of `batch`; the state in front of it, zeros but for its
        position; and who fills that in while the model computes.
        """
        rows, length = batch.inputs.shape
        first = self.index * (length // self.size)
        part = slice(first, first + length // self.size)
        zeros = model.zero_state(rows)
        position, _ = positions(batch.inputs, zeros.position, batch.reset)
        handover = Handover(self.before, self.after, model.device)
        return (
            Batch(*(tensor[:, part] for tensor in batch)),
            State(zeros.layers, position[:, first]),
            handover,
        )

    def settle(self) -> None:
        """Waits until the neighbours have what was put; to be called after every backward."""
        for link in (self.before, self.after):
            if link is not None:
                link.settle()


class Handover:
    """The messages of one forward and its backward (`spikelm.models.spikelm.Handover`).

    They form a chain, which ends in `end`, a zero to be added to the loss: so the backward pass
    comes to all of them, in the opposite order, on every rank the same.
    """

    def __init__(self, before: Link | None, after: Link | None, device: torch.device) -> None:
        self._before, self._after = before, after
        self.end = torch.zeros((), device=device, requires_grad=True)

    def receive(self, state: LayerState) -> LayerState:
        """The state that the rank before sends, shaped like `state`; the first rank's is that."""
        if self._before is None or not state:
            return state
        received: Tensor
        received, self.end = _Receive.apply(  # type: ignore[no-untyped-call]
            _flat(state), self.end, self._before
        )
        parts = received.split([state[name].numel() for name in sorted(state)])
        return {n: x.view_as(state[n]) for n, x in zip(sorted(state), parts, strict=True)}

    def send(self, state: LayerState) -> None:
        """Passes `state` on, if there is a next rank."""
        if self._after is not None and state:
            self.end = _Send.apply(  # type: ignore[no-untyped-call]
                _flat(state), self.end, self._after
            )


def _flat(state: LayerState) -> Tensor:
    """The tensors of a layer one behind the other, by name."""
    return torch.cat([state[name].flatten() for name in sorted(state)])


class _Receive(torch.autograd.Function):
    """A message of the size of `like`, to whose sender its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, end: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        ctx.link = link
        return link.get(torch.empty_like(like)), end.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        ctx.link.put(grads[0])
        return None, grads[1], None


class _Send(torch.autograd.Function):
    """A message, from whose receiver its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, end: Tensor, link: Link) -> Tensor:
        ctx.link, ctx.like = link, message.to("meta")
        link.put(message)
        return end.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gradient = torch.empty_like(ctx.like, device=grads[0].device)
        return ctx.link.get(gradient), grads[0], None
