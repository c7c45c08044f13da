"""`spikelm train`: run a recipe, continue it, or show what it would do."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from spikelm.config import ModelConfig, to_dict
from spikelm.doctor import memory_bytes
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
        help="continue from the checkpoint of this step (auto: the newest, if there is one)",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="share weights, gradients and moments out over the processes (FSDP2)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the resolved recipe and its cost; write nothing",
    )
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    config = load_recipe(arguments.recipe, arguments.set, arguments.data)
    if arguments.out == Path():
        raise ConfigError("--out is empty; name a folder for the run and its model")
    check_memory(config)
    check_optimizer(config)
    if arguments.dry_run:
        print(describe(config))
        return 0
    from spikelm_train.loop import train

    return train(
        config,
        arguments.out,
        fresh=arguments.fresh,
        stream=sys.stdout,
        corpus_folder=arguments.corpus,
        shard=arguments.shard,
        step=_step(arguments.resume),
    )


def _step(given: str) -> int | None:
    """The step of `--resume`, None for auto."""
    if given == "auto":
        return None
    if not given.isdecimal():
        raise ConfigError(f"--resume: {given!r} given; allowed: auto, or the step of a checkpoint")
    return int(given)


def describe(config: TrainConfig) -> str:
    """The resolved recipe, the size of its model, its schedule and an estimate of its memory.

    Raises: DataError if its sources do not begin with a readable text.
    """
    from spikelm_train.optim import lr_factor
    from spikelm_train.parallel import resolve_precision

    for sources in filter(None, (config.data.sources, config.data.validation_sources)):
        from spikelm.corpus import read_documents

        next(read_documents(sources, text_key=config.data.text_key))
    parameters = count_parameters(config.model)
    precision = resolve_precision(config.precision)
    micro_tokens = config.micro_batch_size * config.data.sequence_length
    tokens = micro_tokens * config.grad_accum_steps
    marks = sorted({0.0, config.optim.warmup_fraction, 0.5, 0.9, 1.0})
    rates = ", ".join(
        f"{config.optim.lr * lr_factor(config.optim, mark):.2g} at {mark:.0%}" for mark in marks
    )
    megabytes = estimate_bytes(config, parameters, precision) / 1e6
    budget = "" if config.max_seconds is None else f" or {config.max_seconds:g} s"
    numbers: dict[str, Any] = {
        "parameters": f"{parameters:,}",
        "tokens per step": f"{tokens:,} per process",
        "length": f"{config.steps:,} steps{budget}, at most {config.steps * tokens:,} tokens",
        "learning rate": rates,
        "precision": precision,
        "memory": f"about {megabytes:,.0f} MB per process",
    }
    lines = [f"{name + ':':17}{value}" for name, value in numbers.items()]
    return yaml.safe_dump(to_dict(config), sort_keys=False) + "\n" + "\n".join(lines)


def check_memory(config: TrainConfig) -> None:
    """Raises: ConfigError for a run that this machine cannot hold."""
    import torch

    from spikelm_train.parallel import resolve_precision

    if torch.cuda.is_available():
        return
    parameters = count_parameters(config.model)
    needed = estimate_bytes(config, parameters, resolve_precision(config.precision))
    present = memory_bytes()
    if present is not None and needed > present:
        raise ConfigError(
            f"the run needs about {needed / 1e9:,.0f} GB and {present / 1e9:,.0f} GB are here; "
            "lower model.width, micro_batch_size, data.sequence_length or tokenizer.vocab_size"
        )


def check_optimizer(config: TrainConfig) -> None:
    """Raises: ConfigError for patterns of `optim` that match no parameter."""
    import torch

    from spikelm.models.spikelm import LanguageModel
    from spikelm_train.optim import parameter_groups

    with torch.device("meta"):
        parameter_groups(LanguageModel(config.model), config.optim)


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, a tied head counted once."""
    import torch

    from spikelm.models.spikelm import LanguageModel

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(config).parameters())


def estimate_bytes(config: TrainConfig, parameters: int, precision: str) -> int:
    """A rough estimate of a process's peak memory for tensors.

    Parameters, gradients and two moments (and the average) in float32; per token and layer some
    24 D + 6 F kept values, and three copies of the logits in float32. Of layers that are computed
    again one is kept, and the inputs of all.
    """
    model = config.model
    tokens = config.micro_batch_size * config.data.sequence_length
    width = 2 if precision == "bf16" else 4
    kept = (24 * model.width + 6 * model.ffn.hidden_dim) * width
    if config.activation_checkpointing == "layers":
        kept += 4 * model.num_layers * model.width
    else:
        kept *= model.num_layers
    logits, teacher = 12 * model.vocab_size, 0
    if config.distill.teacher is not None:
        # Its logits, and probabilities of both.
        logits *= 2
        teacher = 4 * count_parameters(_config_of(config.distill.teacher))
    held = 20 if config.ema is not None else 16
    in_logits = min(tokens, config.loss_chunk or tokens)
    return held * parameters + teacher + tokens * kept + in_logits * logits


def _config_of(folder: str) -> ModelConfig:
    from spikelm import checkpoint

    return checkpoint.model_config_of(checkpoint.read_config(Path(folder)), folder)
