"""Error-compensated rounding: what one weight loses, the weights not yet rounded make up for.

For inputs x of a projection, the error of its outputs is tr(E H E^T) with E = W - Q and H = sum
x x^T. Weights are rounded one input after the other; the error of each is spread over the inputs
still to come so that the sum grows least, which the Cholesky factor of H^-1 says. Source: Frantar
et al. 2022 (GPTQ), after Hassibi and Stork 1993 (optimal brain surgeon). Here x are the spikes,
count times threshold, and inputs are taken in the order of falling mean square, which is free as
no scale is shared along the input.

K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from spikelm.models.coded import CodedLinear, projections
from spikelm.models.grid import round_to_levels
from spikelm.models.layers import Projection
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes

HESSIAN_BYTES = 2**30
"""What the Hessians of one pass over the text may take together."""

# Inputs rounded before the rest of the matrix is brought up to date, a matter of speed alone.
BLOCK = 128
# Added to the diagonal of H, relative to its mean: inputs that never fired apart then have an
# inverse, and a short text is not fitted to the last digit.
DAMPING = 0.01


class Hessians:
    """Probe: sum of x x^T [K, K] over all tokens for the populations `names`, in float32.

    The inputs themselves are not kept.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.sums: dict[str, Tensor] = dict.fromkeys(names, torch.zeros(()))

    @torch.no_grad()
    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        if neuron.name not in self.sums:
            return
        values = spikes.values.flatten(0, -2).float()
        before = self.sums[neuron.name]
        if not before.ndim:
            before = values.new_zeros(neuron.channels, neuron.channels)
        self.sums[neuron.name] = before.addmm_(values.T, values)


@torch.inference_mode()
def compensate(
    model: LanguageModel,
    weights: Mapping[str, Tensor],
    windows: Tensor,
    hessian_bytes: int = HESSIAN_BYTES,
) -> None:
    """Rounds the projections named in `weights` anew under the scales they have, float matrices
    [N, K] by the name of the population in front, for the inputs they get from the token `windows`
    [B, T].

    One pass over the text serves as many matrices, in the order of the layers, as have Hessians
    that fit into `hessian_bytes`, and at least one: small models take one pass, and of a large one
    a few layers' Hessians exist at a time. Later passes see what earlier ones have rounded. While
    a matrix is rounded there are up to four float64 matrices [K, K] more.
    """
    chosen = [p for p in projections(model) if p.neuron.name in weights]
    for group in _groups(chosen, hessian_bytes):
        hessians = Hessians([p.neuron.name for p in group])
        for window in windows.split(1):
            model(window, probe=hessians)
        for projection in group:
            linear, name = projection.linear, projection.neuron.name
            assert isinstance(linear, CodedLinear)
            hessian = hessians.sums.pop(name)
            integers = compensated(
                weights[name], hessian, linear.scale, linear.group_size, linear.bits
            )
            linear.fill(integers, linear.scale)


def _groups(chosen: Sequence[Projection], hessian_bytes: int) -> Iterator[list[Projection]]:
    group: list[Projection] = []
    taken = 0
    for projection in chosen:
        size = 4 * projection.neuron.channels**2
        if group and taken + size > hessian_bytes:
            yield group
            group, taken = [], 0
        group.append(projection)
        taken += size
    if group:
        yield group


def compensated(
    weight: Tensor, hessian: Tensor, scale: Tensor, group_size: int, bits: int
) -> Tensor:
    """The integers int8 [K, N] of weight [N, K] under scale [N / group] for little error under
    hessian [K, K], a scalar 0 if nothing was seen.

    An input that was always silent takes no part and is rounded to nearest.
    """
    N, K = weight.shape
    per_output = scale.repeat_interleave(group_size)[:N]
    energy = hessian.diagonal() if hessian.ndim else torch.zeros(K)
    order = energy.argsort(descending=True, stable=True)
    heard = order[: int((energy > 0).sum())]
    w = weight.float().T.contiguous()
    integers = round_to_levels(w, per_output, bits)
    if len(heard):
        factor = _inverse_factor(hessian[heard[:, None], heard].double()).float()
        integers[heard] = _round_in_order(w[heard], factor, per_output, bits)
    return integers.to(torch.int8)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = (H + damping)^-1; H is used up."""
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _round_in_order(w: Tensor, factor: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The integers of w [K, N], which is used up, for `_inverse_factor`'s [K, K] and scale [N]."""
    integers = torch.empty_like(w)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        errors = torch.empty_like(w[start:stop])
        for i in range(start, stop):
            integers[i] = round_to_levels(w[i], scale, bits)
            errors[i - start] = (w[i] - integers[i] * scale) / factor[i, i]
            w[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return integers
