"""`spikelm train`: run a recipe, continue it, or show what it would do."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from spikelm.config import ModelConfig, to_dict
from spikelm.errors import ConfigError
from spikelm_train.config import TrainConfig, load_recipe


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm train",
        description="Train a model from a recipe. The same command again continues an "
        "interrupted run; Ctrl-C stops after the current step and saves.",
        epilog="Several processes: torchrun --nproc_per_node N -m spikelm_train RECIPE --out DIR; "
        "DeepSpeed: accelerate launch --config_file configs/accelerate/zero2.yaml -m spikelm_train "
        "RECIPE --out DIR (train/README.md).",
    )
    parser.add_argument("recipe", help="a YAML file, or the name of one in configs/train/")
    parser.add_argument("--out", required=True, type=Path, help="folder of the run and its model")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the recipe, for example optim.lr=1e-3 or model.width=128",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="SRC",
        help="files, globs (.txt .md .jsonl .parquet, packed or not) or Hugging Face dataset "
        "names, instead of the recipe's sources",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="DIR",
        help="folder of the tokenised text, for runs that share it (OUT/data)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete an earlier run in DIR and start over"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="STEP",
        help="continue from the checkpoint of this step, later ones are deleted (auto: from the "
        "newest, if there is one)",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="share weights, gradients and moments out over the processes (FSDP2)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=1,
        metavar="C",
        help="share the tokens of every row out over C processes, which hand on the state "
        "(%(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the resolved recipe and its cost, two steps of it really run; write nothing",
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="trace N steps after a warm-up: OUT/profile has a Chrome trace and a table",
    )
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    config = load_recipe(arguments.recipe, arguments.set, arguments.data)
    if arguments.out == Path():
        raise ConfigError("--out is empty; name a folder for the run and its model")
    check_optimizer(config)
    if arguments.profile < 0:
        raise ConfigError(f"--profile {arguments.profile} given; allowed: steps >= 0")
    if arguments.dry_run:
        return dry_run(config, arguments.corpus, as_json=arguments.json, context=arguments.context)
    from spikelm_train.dryrun import check_memory
    from spikelm_train.loop import train

    check_memory(config)
    return train(
        config,
        arguments.out,
        fresh=arguments.fresh,
        stream=sys.stdout,
        corpus_folder=arguments.corpus,
        shard=arguments.shard,
        step=_step(arguments.resume),
        profile=arguments.profile,
        context=arguments.context,
    )


def _step(given: str) -> int | None:
    """The step of `--resume`, None for auto."""
    if given == "auto":
        return None
    if not given.isdecimal():
        raise ConfigError(f"--resume: {given!r} given; allowed: auto, or the step of a checkpoint")
    return int(given)


def dry_run(
    config: TrainConfig, corpus: Path | None, *, as_json: bool = False, context: int = 1
) -> int:
    """Prints the recipe and its cost, in the first of the processes.

    Raises: DataError if its sources do not begin with a readable text; ConfigError, after
    printing, for a run that this machine cannot hold.
    """
    from spikelm.corpus import read_documents
    from spikelm_train import dryrun
    from spikelm_train.context import check_context

    for sources in filter(None, (config.data.sources, config.data.validation_sources)):
        next(read_documents(sources, text_key=config.data.text_key))
    check_context(config, context, dryrun.world_size())
    found = dryrun.plan(config, context)
    if found["fits"] is not False:
        found |= dryrun.two_steps(config, found, corpus, context)
    recipe = to_dict(config)
    if not dryrun.is_main():
        pass
    elif as_json:
        print(json.dumps({"recipe": recipe, **found}, indent=2))
    else:
        print(yaml.safe_dump(recipe, sort_keys=False) + "\n" + dryrun.describe(found))
    dryrun.require_memory(found)
    return 0


def check_optimizer(config: TrainConfig) -> None:
    """Raises: ConfigError for patterns of `optim` that match no parameter."""
    import torch

    from spikelm.models.spikelm import LanguageModel
    from spikelm_train.optim import parameter_groups

    with torch.device("meta"):
        parameter_groups(LanguageModel(config.model), config.optim)


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, a tied head counted once."""
    from spikelm_train.cost import meta_model

    return sum(parameter.numel() for parameter in meta_model(config).parameters())
