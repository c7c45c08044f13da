"""The five spike codes (source: SpikingBrain report, section on spike coding; Int2Spike).

| code             | spikes     | S steps hold               | weight of step s           |
|------------------|------------|----------------------------|----------------------------|
| binary           | 0, 1       | 0 to S                     | 1                          |
| ternary          | -1, 0, 1   | -S to S                    | 1                          |
| bitwise          | 0, 1       | 0 to 2**S - 1              | 2**s                       |
| bitwise_signed   | -1, 0, 1   | -(2**S - 1) to 2**S - 1    | 2**s                       |
| twos_complement  | 0, 1       | -2**(S-1) to 2**(S-1) - 1  | 2**s, the last -2**(S-1)   |

Steps run from the low bit to the high one (Int2Spike emits the high bit first). S is the smallest
that holds the counts, so two's complement of -128 takes 8 steps where Int2Spike takes 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from spikelm.coding.train import Train
from spikelm.errors import CodingError

_MAX_BITS = 62  # of an int64
_MAX_UNARY = 2**16  # a train has as many steps as its largest count


@dataclass(frozen=True, slots=True)
class Code:
    """A way to write integers as spikes; two choices make all five."""

    name: str
    positional: bool
    """Step s is worth 2**s; otherwise every step is worth 1."""
    negative: Literal["none", "sign", "complement"]
    """How counts below zero are written: not at all, by negative spikes, by the last step."""

    @property
    def min_steps(self) -> int:
        return 2 if self.negative == "complement" else 1

    @property
    def max_steps(self) -> int:
        return _MAX_BITS if self.positional else _MAX_UNARY

    def range(self, steps: int) -> tuple[int, int]:
        """The lowest and the highest count that `steps` steps hold.

        Raises: CodingError for a number of steps the code does not have.
        """
        if not self.min_steps <= steps <= self.max_steps:
            raise CodingError(
                f"{self.name}: {steps} steps asked for; "
                f"allowed: {self.min_steps} to {self.max_steps}"
            )
        if self.negative == "complement":
            return -(2 ** (steps - 1)), 2 ** (steps - 1) - 1
        high = 2**steps - 1 if self.positional else steps
        return (-high if self.negative == "sign" else 0), high

    def weights(self, steps: int) -> tuple[int, ...]:
        """What one spike of each step is worth."""
        if not self.positional:
            return (1,) * steps
        values = [2**s for s in range(steps)]
        if self.negative == "complement":
            values[-1] = -values[-1]
        return tuple(values)

    def steps_for(self, counts: Tensor) -> int:
        """The smallest S that holds `counts` (counts below zero ask nothing of an unsigned code).

        Raises: CodingError for counts that are not integers.
        """
        integers = _integers(counts)
        if integers.numel() == 0:
            return self.min_steps
        low, high = (int(bound) for bound in integers.aminmax())
        if self.negative == "complement":
            return max(self.min_steps, max(high, ~low).bit_length() + 1)
        magnitude = max(high, -low if self.negative == "sign" else 0)
        return max(1, magnitude.bit_length() if self.positional else magnitude)

    def encode(self, counts: Tensor, steps: int | None = None, *, saturate: bool = False) -> Train:
        """Writes `counts` [...] as spikes [S, ...]; S is the smallest that holds them by default.

        Counts are integers, in a tensor of any dtype. With `saturate` those out of range become
        the nearest end of the range, and the train says how many.

        Raises: CodingError for counts that are not integers, or out of range.
        """
        integers = _integers(counts)
        size = self.steps_for(integers) if steps is None else steps
        low, high = self.range(size)
        inside = integers.clamp(low, high)
        saturated = int((inside != integers).sum())
        if saturated and not saturate:
            raise CodingError(
                f"{self.name}: {saturated} of {integers.numel()} counts, {int(integers.min())} to "
                f"{int(integers.max())}, are outside {low} to {high}; "
                "use more steps, a signed code, or saturate=True"
            )
        return Train(self._spikes(inside, size), self.weights(size), saturated)

    def decode(self, train: Train) -> Tensor:
        """The counts of a train this code wrote, [...] int64.

        Raises: CodingError for a train of another code.
        """
        if train.weights != self.weights(train.steps):
            raise CodingError(f"{self.name}: step weights {train.weights} are another code's")
        return train.counts()

    def _spikes(self, counts: Tensor, steps: int) -> Tensor:
        magnitude = counts.abs() if self.negative == "sign" else counts
        # An arithmetic shift of a negative integer yields the bits of its two's complement.
        planes = [(magnitude >> s) & 1 if self.positional else magnitude > s for s in range(steps)]
        spikes = torch.stack([plane.to(torch.int8) for plane in planes])
        return spikes * counts.sign().to(torch.int8) if self.negative == "sign" else spikes


CODES: Mapping[str, Code] = MappingProxyType(
    {
        code.name: code
        for code in (
            Code("binary", positional=False, negative="none"),
            Code("ternary", positional=False, negative="sign"),
            Code("bitwise", positional=True, negative="none"),
            Code("bitwise_signed", positional=True, negative="sign"),
            Code("twos_complement", positional=True, negative="complement"),
        )
    }
)


def _integers(counts: Tensor) -> Tensor:
    """`counts` as int64, which has room for the magnitude of every narrower integer."""
    if counts.is_floating_point():
        # Above 2**53 neighbouring float64 values are no longer one apart. NaN fails as well.
        if not bool(((counts == counts.round()) & (counts.abs() <= 2.0**53)).all()):
            raise CodingError("counts must be integers up to 2**53; round them before coding")
        return counts.long()
    if counts.is_complex():
        raise CodingError(f"counts are {counts.dtype}; allowed: integers, in any real dtype")
    integers = counts.long()
    if integers.numel() and max(map(abs, map(int, integers.aminmax()))) >= 2**_MAX_BITS:
        raise CodingError(f"counts must lie inside +-2**{_MAX_BITS}")
    return integers
