"""Writing a folder whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from spikelm.errors import ConfigError

STAGING = ".saving"


def check_out(out: Path, *, replace: str | None = None) -> None:
    """Says before any work whether `out` can be written: it is new or empty, or, with `replace`,
    it holds the file of that name.

    Raises: ConfigError.
    """
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{nearest} is no folder; give another OUT")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{nearest} is not writable; give another OUT")
    # What an interrupted save may have left is no content.
    if nearest == out and {path.name for path in out.iterdir()} - {STAGING}:
        if replace is None:
            raise ConfigError(f"{out} exists and is not empty; give another OUT")
        if not (out / replace).is_file():
            raise ConfigError(f"{out} exists and has no {replace} to replace; give another OUT")


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which then move to `folder`; if that fails, nothing stays."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        yield staging
        for file in staging.iterdir():
            file.replace(folder / file.name)
        staging.rmdir()
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()
        raise
