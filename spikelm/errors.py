"""The exception tree. Every message says what was given, what is allowed and what to do.

SpikelmError
|-- ConfigError(ValueError)        a key, value or preset that cannot be used
|-- DataError(ValueError)          text sources that are missing, empty or unreadable
|-- CheckpointError(ValueError)    a model folder that is incomplete, corrupt or another model's
|-- CodingError(ValueError)        counts outside the range of a spike code
|-- BackendError(RuntimeError)     an implementation asked for by name that cannot run here
|-- RequestError(ValueError)       an API request that cannot be served; carries an HTTP status
`-- MissingExtraError(ImportError) an optional dependency that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpikelmError(Exception):
    """Root of all errors a user can cause; the command line prints them as one line."""


class ConfigError(SpikelmError, ValueError):
    """A configuration key or value that cannot be used."""


class DataError(SpikelmError, ValueError):
    """A text source that is missing, empty or unreadable."""


class CheckpointError(SpikelmError, ValueError):
    """A model folder that is incomplete, corrupt or belongs to another model."""


class CodingError(SpikelmError, ValueError):
    """Spike counts outside the range of the requested code."""


class BackendError(SpikelmError, RuntimeError):
    """An implementation asked for by name that cannot run here."""


class RequestError(SpikelmError, ValueError):
    """An API request that cannot be served.

    `status` is the HTTP status, `param` the offending field, `code` a short machine-readable
    reason in OpenAI's vocabulary (for example ``model_not_found``).
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class MissingExtraError(SpikelmError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this command needs the package '{package}', which is not installed; "
            f'run: pip install "spikelm[{extra}]"'
        )


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The tail of an unknown-name message: the nearest allowed name, or all of them."""
    choices = sorted(allowed)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"allowed: {', '.join(choices)}"
