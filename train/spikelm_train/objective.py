"""The loss of the logits: cross-entropy, and z-loss, from whole logits or from chunks of them.

    z-loss = weight * mean over tokens of (log Z)^2,    Z = sum_n exp(logit_n)

keeps the logits from drifting (Chowdhury et al. 2022, PaLM, arXiv 2204.02311).
B sequences, T tokens, N vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm.kernels.precision import widen

IGNORED = -100
"""The target of a token that is not learned."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per token [B T] of logits [B, T, N] against targets [B, T], in float32 at least; 0 where
    the target is IGNORED.
    """
    return F.cross_entropy(
        widen(logits).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )


def log_z(logits: Tensor, targets: Tensor, nats: Tensor) -> Tensor:
    """log Z of each token [B T], given its cross-entropy; takes no memory of the vocabulary's size.

    As -log p = log Z - logit, so in the gradients too. 0 where the target is IGNORED.
    """
    of_target = widen(logits.gather(-1, targets.clamp(min=0)[..., None])).flatten()
    return nats + of_target.masked_fill(targets.flatten() == IGNORED, 0.0)


def mean_over(values: Tensor, targets: Tensor, count: float | None = None) -> Tensor:
    """The sum of per-token `values` [B T] over the learned targets [B, T], over `count`.

    Without `count` it is the number of the targets. Values of IGNORED targets are to be 0.
    """
    return values.sum() / (targets.numel() if count is None else count)


class Objective:
    """Cross-entropy and z-loss of micro-batches, and what the latter came to.

    `chunk` > 0: the logits of so many tokens are in memory at a time.
    """

    def __init__(self, z_weight: float = 0.0, chunk: int = 0) -> None:
        self.z_weight, self.chunk = z_weight, chunk
        self.clear()

    def clear(self) -> None:
        """Forgets what was measured; call before every step."""
        self._z = torch.zeros(())

    def options(self, targets: Tensor) -> dict[str, Any]:
        """What the model is told so that its output is what the other methods take."""
        if not self.chunk:
            return {}

        def read(logits: Tensor, part: slice) -> Tensor:
            return self._losses(logits, targets[:, part])

        return {"read": read, "read_tokens": self.chunk}

    def nats(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token [B T]."""
        return self._of(output, targets)[..., 0].flatten()

    def terms(
        self, output: Tensor, targets: Tensor, count: float | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean cross-entropy, and the terms that are added to it; `count` as in `mean_over`."""
        losses = self._of(output, targets)
        loss = mean_over(losses[..., 0], targets, count)
        if not self.z_weight:
            return loss, []
        z = self.z_weight * mean_over(losses[..., 1].square(), targets, count)
        self._z = self._z.to(z.device) + z.detach()
        return loss, [z]

    def measured(self) -> dict[str, Tensor]:
        """The sum of the z-losses since `clear`, if there are any."""
        return {"z_loss": self._z} if self.z_weight else {}

    def _of(self, output: Tensor, targets: Tensor) -> Tensor:
        return output if self.chunk else self._losses(output, targets)

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy and, if it is wanted, log Z: [B, T, 1 or 2]."""
        losses = [cross_entropy(logits, targets)]
        if self.z_weight:
            losses.append(log_z(logits, targets, losses[0]))
        return torch.stack(losses, -1).view(*targets.shape, -1)
