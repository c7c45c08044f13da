"""Decoding natively: a model becomes a list of operations that one call per token runs."""

from __future__ import annotations

from spikelm.decoder.lower import NotLoweredError, lower
from spikelm.decoder.program import Counts, Program, Watch
from spikelm.models.coded import CodedLinear, projections
from spikelm.models.spikelm import LanguageModel

__all__ = ["Counts", "Program", "Watch", "native_program"]


def native_program(model: LanguageModel) -> tuple[Program | None, str | None]:
    """The model's one-token step as a native program, or None and the reason why torch decodes."""
    for projection in projections(model):
        linear = projection.linear
        if not isinstance(linear, CodedLinear):
            return None, "its weights are floats"
        if linear.backend != "native":
            return None, f"its products run in {linear.backend}"
    try:
        return lower(model), None
    except NotLoweredError as error:
        return None, f"there is no native form of {error}"
