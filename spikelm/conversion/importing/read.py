"""Tensors of a foreign checkpoint by name, read one at a time."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spikelm.errors import CheckpointError

INDEX = "model.safetensors.index.json"


class Tensors(NamedTuple):
    """What a checkpoint holds."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def read_pickle(path: Path) -> Tensors:
    """A `.pth` file: a flat dictionary of tensors, mapped into memory where the format allows it.

    The only place where the project reads pickle; nothing but tensors is accepted.
    Raises: CheckpointError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mmap = zipfile.is_zipfile(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    # A damaged pickle raises anything; a whole one with more than tensors, UnpicklingError.
    except Exception as error:  # noqa: BLE001
        raise CheckpointError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}): it is damaged, cut "
            "short or holds other objects; copy it again, or write torch.save(model.state_dict())"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} is no flat dictionary of tensors, as torch.save(state_dict)")
    return Tensors(path, {n: tuple(t.shape) for n, t in tensors.items()}, tensors.__getitem__)


def read_safetensors(folder: Path) -> Tensors:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises: CheckpointError naming a missing or damaged file.
    """
    index = folder / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise CheckpointError(f"{index} has no weight_map")
        files = sorted({Path(file).name for file in names.values()})
    else:
        files = ["model.safetensors"]
    shapes: dict[str, tuple[int, ...]] = {}
    where: dict[str, Any] = {}
    for file in files:
        try:
            shard: Any = safe_open(folder / file, framework="pt")
            for name in shard.keys():  # noqa: SIM118  (no mapping)
                shapes[name] = tuple(shard.get_slice(name).get_shape())
                where[name] = shard
        except FileNotFoundError:
            raise CheckpointError(
                f"no such file: {folder / file}; weights are read from safetensors only"
            ) from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / file} is damaged ({error}); copy it again") from None
    return Tensors(folder, shapes, lambda name: where[name].get_tensor(name))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data
