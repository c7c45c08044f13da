"""Who takes part in `spikelm bench train`: training steps inside a contestant's process.

Tokens are random: speed does not depend on them, but for the silence that training brings.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, MissingExtraError
from spikelm.eval import process
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer
from spikelm_train.bench import LOG_EVERY
from spikelm_train.config import DataConfig, OptimConfig, TokenizerConfig, TrainConfig
from spikelm_train.cost import meta_model
from spikelm_train.data import Corpus
from spikelm_train.hardware import Gauge
from spikelm_train.objective import cross_entropy
from spikelm_train.optim import make_optimizer
from spikelm_train.parallel import make_accelerator
from spikelm_train.report import Reporter
from spikelm_train.texts.shards import Split
from spikelm_train.trainer import Trainer

TEXT_TOKENS = 200_000

Step = Callable[[], None]
_steps: dict[str, tuple[Step, int]] = {}


def enter(
    name: str,
    kind: str,
    shape: ModelConfig,
    length: int,
    rows: int,
    threads: int,
    precision: str,
    folder: str,
) -> None:
    """Builds a contestant in this process; peak memory counts from here on.

    kind: `spikelm` is what `spikelm train` does, in a run in `folder`; `bare` the model alone;
    `dense` that without neurons; `transformer` a Llama of as many parameters.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    model: nn.Module
    if kind == "spikelm":
        step, model = _ours(shape, length, rows, precision, Path(folder))
    else:
        model = llama_twin(shape, length) if kind == "transformer" else _build(shape, kind)
        step = _bare(model, shape.vocab_size, length, rows, precision)
    _steps[name] = step, sum(p.numel() for p in model.parameters())
    process.reset_peak()


def turn(name: str) -> tuple[float, float]:
    """Wall and CPU seconds of a training step."""
    run, _ = _steps[name]
    wall, cpu = perf_counter(), process_time()
    run()
    return perf_counter() - wall, process_time() - cpu


def facts(name: str) -> dict[str, int]:
    """Parameters, and the peak of this process' resident memory."""
    return {"parameters": _steps[name][1], "peak_bytes": process.memory_bytes("VmHWM")}


def _build(shape: ModelConfig, kind: str) -> LanguageModel:
    return LanguageModel(shape.dense_twin() if kind == "dense" else shape).initialise(0).train()


def _bare(model: nn.Module, vocab_size: int, length: int, rows: int, precision: str) -> Step:
    """Forward, cross-entropy, backward, clipping and the optimiser's step, and nothing else."""
    config = OptimConfig()
    optimizer = (
        make_optimizer(model, config)
        if isinstance(model, LanguageModel)
        else torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        tokens = torch.randint(vocab_size, (rows, length + 1), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = _logits(model, tokens[:, :-1])
        loss = cross_entropy(logits, tokens[:, 1:]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor
    if isinstance(model, LanguageModel):
        # As in training, where any token may begin a document.
        logits, _ = model(tokens, reset=tokens == 0)
    else:
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits


def _ours(
    shape: ModelConfig, length: int, rows: int, precision: str, folder: Path
) -> tuple[Step, nn.Module]:
    """What the loop of `spikelm train` does for a step, progress lines and records included."""
    config = TrainConfig(
        model=shape,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=shape.vocab_size),
        data=DataConfig(sequence_length=length),
        optim=OptimConfig(schedule="constant", warmup_fraction=0.0),
        micro_batch_size=rows,
        steps=10**6,
        log_every=LOG_EVERY,
        precision="bf16" if precision == "bf16" else "fp32",
    )
    ids = np.random.default_rng(0).integers(shape.vocab_size, size=TEXT_TOKENS + length)
    text = Split(ids.astype("<u4"), np.zeros(1, np.int64), len(ids), len(ids))
    reporter = Reporter(folder, io.StringIO(), 0)
    corpus = Corpus(Tokenizer.bytes(), text, text)
    accelerator = make_accelerator(config)
    trainer = Trainer(config, folder, corpus, accelerator, reporter)
    gauge = Gauge(config, accelerator.device, config.precision)

    def run() -> None:
        record = trainer.advance(0.0)
        if record is not None:
            reporter.progress({**record, **gauge.read(1.0, 1)})

    return run, trainer.module


def llama_twin(shape: ModelConfig, length: int) -> nn.Module:
    """transformers' Llama, by default with torch's fused attention, of the width, depth and
    vocabulary of `shape`, with an FFN that makes the parameters as many.

    Raises: MissingExtraError without transformers; ConfigError if attention alone has more.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtraError("transformers", "train") from None
    width = shape.width
    heads = max(1, width // 64)

    def make(hidden: int) -> nn.Module:
        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=width // heads,
            max_position_embeddings=length,
            tie_word_embeddings=shape.tie_embeddings,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model

    wanted = sum(p.numel() for p in meta_model(shape).parameters())
    with torch.device("meta"):
        least = sum(p.numel() for p in make(1).parameters())
    per_neuron = 3 * width * shape.num_layers
    hidden = 1 + round((wanted - least) / per_neuron)
    if hidden < 1:
        raise ConfigError(
            f"a Transformer of width {width} has {least:,} parameters without an FFN, the model "
            f"{wanted:,}; leave `transformer` out of --parts"
        )
    return make(hidden).train()
