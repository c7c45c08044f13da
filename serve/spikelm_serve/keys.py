"""API keys: kept as hashes, compared without telling how much of one was right."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from spikelm.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Key:
    """Whose requests it lets in."""

    name: str
    digest: bytes


class Keys:
    """Those of a server; without any, every request is let in."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    @staticmethod
    def read(path: Path) -> Keys:
        """The keys of a file, one `NAME sha256:HEX` on a line.

        Raises: ConfigError for a file that is missing, or has other lines or none.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-keys: cannot read {path}: {error}") from None
        keys = []
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            match = _LINE.fullmatch(text)
            if text and match is None:
                raise ConfigError(
                    f"{path}:{number}: a line is NAME sha256:HEX; make one with: spikelm serve-key "
                    "NAME --keys FILE"
                )
            if match:
                keys.append(Key(match[1], bytes.fromhex(match[2])))
        if not keys:
            raise ConfigError(f"{path} has no keys; make one with: spikelm serve-key NAME")
        return Keys(keys)

    def owner(self, given: str | None) -> str | None:
        """The name of the key that was given, None for none of them: all are compared."""
        digest = hashlib.sha256((given or "").encode("utf-8", "surrogatepass")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key.name
        return found


def make(name: str) -> tuple[str, str]:
    """A new key, and its line. Raises: ConfigError for a name that is not allowed."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} given; allowed: 1 to 64 letters, digits and ._-")
    key = f"sk-{secrets.token_urlsafe(32)}"
    return key, f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"
