"""A model folder from a run's checkpoint, however many files and processes it was written by."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from spikelm import checkpoint
from spikelm.config import from_dict, load_yaml
from spikelm.errors import ConfigError
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer
from spikelm_train import checkpoints, resume
from spikelm_train.config import TrainConfig
from spikelm_train.lora import merged
from spikelm_train.parallel import assembled, read_shards, read_zero
from spikelm_train.stages import Stages


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm export",
        description="Write the model of a run's checkpoint as a model folder, in transformers' "
        "format, with float32 weights in one file. What FSDP2 or DeepSpeed shared out is put "
        "together, on one process and without a GPU.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", required=True, type=Path, help="folder for the model")
    parser.add_argument(
        "--step", type=int, metavar="N", help="checkpoint to take (the newest that is there)"
    )
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    step = export(arguments.run, arguments.out, arguments.step)
    print(f"{arguments.out}: the model after step {step}")
    return 0


def export(run: Path, out: Path, step: int | None = None) -> int:
    """Writes the model of `run`'s checkpoint of `step`, or the newest one, to `out`; its step.

    Raises: ConfigError for a folder that is no run, has no such checkpoint, or an `out` that holds
    something else; CheckpointError for a damaged checkpoint; MissingExtraError.
    """
    if not (run / resume.CONFIG).is_file():
        raise ConfigError(f"{run} is no training run: it has no {resume.CONFIG}")
    if out.resolve() == run.resolve() or (out.exists() and any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; give --out a folder of its own")
    config = from_dict(TrainConfig, load_yaml(run / resume.CONFIG))
    found = checkpoints.find(run, step)
    if found is None:
        raise ConfigError(f"{run} has no checkpoint yet")
    position = checkpoints.read_position(found)
    shared, _ = checkpoints.load(found, rank=0)
    with torch.device("meta"):
        model = LanguageModel(config.model)
    Stages(config.stages, model).load_state_dict(shared["stages"])
    shards = found / checkpoints.SHARDS
    if position.strategy == "zero":
        weights = {**read_zero(shards), **shared["neurons"]}
    elif position.strategy == "shards":
        weights = read_shards(shards, model)
    else:
        weights = merged(shared["model"], config.lora)
    tokenizer = Tokenizer.load(run / resume.TOKENIZER)
    checkpoint.save(out, assembled(model, weights), tokenizer)
    return position.step
