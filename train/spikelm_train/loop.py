"""A run from its folder to its model: claims, loops, looks at it from time to time, finishes."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from spikelm import checkpoint
from spikelm.config import to_dict
from spikelm_train import checkpoints, resume
from spikelm_train.config import TrainConfig
from spikelm_train.context import check_context
from spikelm_train.data import prepare
from spikelm_train.hardware import Gauge
from spikelm_train.parallel import launched_strategy, make_accelerator, resolve_precision
from spikelm_train.profiling import FOLDER, StepProfiler
from spikelm_train.report import Reporter
from spikelm_train.summary import write_summary
from spikelm_train.trainer import Trainer
from spikelm_train.validation import to_batch


def train(
    config: TrainConfig,
    out: Path,
    *,
    fresh: bool,
    stream: TextIO,
    corpus_folder: Path | None = None,
    shard: bool = False,
    step: int | None = None,
    profile: int = 0,
    context: int = 1,
) -> int:
    """Runs or continues a recipe in the folder `out`; returns the exit status.

    The tokenised text is in `corpus_folder`, which runs may share, or in `out`/data. `shard`
    spreads the weights over the processes. It continues at the newest checkpoint or `step`'s.
    `profile` steps are traced (`spikelm_train.profiling`). `context` processes share the tokens of
    every row (`spikelm_train.context`).

    0 when the trained model is in `out`; 130 or 143 when SIGINT or SIGTERM ended the run after a
    checkpoint.

    Raises: ConfigError, DataError for input that cannot be used, and if another command trains in
    `out`; SpikelmError if the loss stops
    being finite, or the last checkpoint cannot be written.
    """
    strategy = launched_strategy(shard)
    accelerator = make_accelerator(config, strategy)
    is_main: bool = accelerator.is_main_process
    check_context(config, context, accelerator.num_processes, strategy)
    # The first process of a run keeps its folder for all of them.
    with resume.occupied(out) if is_main else contextlib.nullcontext():
        with accelerator.main_process_first():
            position = resume.claim(
                out,
                config,
                fresh=fresh and is_main,
                num_processes=accelerator.num_processes,
                strategy=strategy,
                step=step,
                context=context,
            )
            if position and position.finished and (out / checkpoint.WEIGHTS).is_file():
                if is_main:
                    stream.write(
                        f"{out} is finished after {position.step} steps; --fresh starts it over\n"
                    )
                return 0
            begins = is_main and position is None
            with resume.undone_if_it_fails(out, begins):
                corpus = prepare(config, corpus_folder or out / "data")
        begun, rows = (position.step, position.rows) if position else (0, None)
        reporter = (
            Reporter(out, stream, begun, config.report_to, to_dict(config)) if is_main else None
        )
        try:
            with resume.undone_if_it_fails(out, begins):
                trainer = Trainer(
                    config, out, corpus, accelerator, reporter, strategy, rows, context
                )
            if begins:
                resume.begun(out)
            if position:
                trainer.load(position)
            if step is not None and is_main:
                # The run goes another way from here on.
                checkpoints.forget_after(out, step)
            return run(trainer, profile)
        finally:
            if reporter:
                reporter.close()


def run(trainer: Trainer, profile: int = 0) -> int:
    """Trains to the end of the run, or to a signal; returns the exit status."""
    config = trainer.config
    gauge = None
    if trainer.reporter:
        precision = resolve_precision(config.precision)
        gauge = Gauge(config, trainer.accelerator.device, precision)
    interruption = resume.Interruption()
    traced = profile if trainer.reporter else 0
    profiler = StepProfiler(traced, trainer.out / FOLDER, trainer.silence.neurons, trainer.say)
    with interruption.listening(), contextlib.closing(profiler):
        _introduce(trainer)
        busy, busy_from = 0.0, trainer.step
        while True:
            seconds, signum = trainer.agree(interruption.signum)
            progress = config.progress(trainer.step, seconds)
            if progress >= 1:
                break
            if signum:
                trainer.save(seconds)
                trainer.writer.finish()
                if trainer.reporter:
                    trainer.reporter.draw()
                trainer.say(
                    f"stopped after step {trainer.step}; run the same command again to continue"
                )
                return 128 + signum
            began = time.perf_counter()
            with profiler.step():
                record = trainer.advance(seconds)
            busy += time.perf_counter() - began
            if record is not None:
                speed = (trainer.step - busy_from) * trainer.tokens_per_step / busy
                if trainer.reporter and gauge:
                    pace = gauge.read(speed, trainer.accelerator.num_processes)
                    trainer.reporter.progress({**record, **pace})
                busy, busy_from = 0.0, trainer.step
            _occasionally(trainer, seconds)
        _finish(trainer, gauge, seconds)
    return 0


def _occasionally(trainer: Trainer, seconds: float) -> None:
    config = trainer.config
    # The last step is looked at when the run is finished.
    last = trainer.step == config.steps
    if config.eval_every and trainer.step % config.eval_every == 0 and not last:
        _report_validation(trainer)
    if config.sample_every and trainer.step % config.sample_every == 0 and not last:
        _report_sample(trainer, f"sample at step {trainer.step}")
    if config.save_every and trainer.step % config.save_every == 0:
        trainer.save(seconds)


def _report_validation(trainer: Trainer) -> None:
    loss, bits = trainer.validate()
    if trainer.reporter:
        record = {
            "step": trainer.step,
            "validation_loss": loss,
            "validation_bits_per_byte": bits,
        }
        trainer.reporter.record(record)
        trainer.reporter.say(
            f"validation at step {trainer.step}: loss {loss:.3f}  {bits:.3f} bits/byte"
        )
        trainer.reporter.draw()
    if loss < trainer.best:
        trainer.best = loss
        if trainer.config.keep_best:
            trainer.export(trainer.out / resume.BEST)


def _report_sample(trainer: Trainer, title: str) -> None:
    text = trainer.sample()
    if trainer.reporter:
        trainer.reporter.record({"step": trainer.step, "sample": text})
        trainer.reporter.say(f"{title}: {text!r}")


def _facts(trainer: Trainer, gauge: Gauge, seconds: float) -> dict[str, Any]:
    """What the page of a finished run says besides its recipe and its measurements."""
    train, accelerator = trainer.corpus.train, trainer.accelerator
    return {
        "parameters": trainer.num_parameters,
        "training_tokens": len(train.tokens),
        "training_bytes": train.num_bytes,
        "tokens_per_step": trainer.tokens_per_step,
        "flops_per_token": gauge.flops_per_token,
        "peak_flops": gauge.peak.flops,
        "peak_source": gauge.peak.source,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "precision": resolve_precision(trainer.config.precision),
        "steps": trainer.step,
        "seconds": seconds,
    }


def _finish(trainer: Trainer, gauge: Gauge | None, seconds: float) -> None:
    # A budget may end before the last stage; the model is what the recipe ends with.
    trainer.enter_stages(1.0)
    _report_validation(trainer)
    if trainer.config.sample_every:
        _report_sample(trainer, "sample")
    trainer.export(trainer.out)
    trainer.save(seconds, finished=True)
    trainer.writer.finish()
    trainer.writer.close()
    if trainer.reporter and gauge:
        trainer.reporter.draw()
        write_summary(trainer.out, trainer.config, _facts(trainer, gauge, seconds))
    trainer.say(
        f"finished after {trainer.step} steps, {seconds:.0f} s; the model is in {trainer.out}"
    )


def _introduce(trainer: Trainer) -> None:
    corpus, accelerator = trainer.corpus, trainer.accelerator
    share = ""
    if trainer.config.lora.rank:
        trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
        share = f" ({trained:,} trained)"
    text = corpus.train
    learned = f", {text.num_learned / len(text.tokens):.0%} learned" * corpus.has_conversations
    trainer.say(
        f"{trainer.num_parameters:,} parameters{share}, {len(text.tokens):,} training tokens "
        f"({text.num_bytes:,} bytes{learned}; {corpus.validation.num_bytes:,} held out), "
        f"{trainer.tokens_per_step:,} tokens per step, "
        f"{accelerator.num_processes} x {accelerator.device.type}"
        + (f" of which {trainer.slices.size} share a row, " if trainer.slices else ", ")
        + resolve_precision(trainer.config.precision)
        + (f"; continuing after step {trainer.step}" if trainer.step else "")
    )
    length = trainer.config.data.sequence_length
    if corpus.has_conversations and trainer.config.data.sampling == "packed":
        cut = int((np.diff(text.starts, append=len(text.tokens)) > length).sum())
        if cut:
            trainer.say(
                f"{cut:,} of {text.num_documents:,} conversations are longer than a row of "
                f"{length} tokens: what is behind a cut does not see what is in front of it "
                "(data.sequence_length, or data.sampling=carried)"
            )
    if trainer.accelerator.is_main_process:
        corpus.tokenizer.save(trainer.out / resume.TOKENIZER)
    if trainer.distillation and trainer.reporter:
        rows = trainer.sampler.rows(trainer.step, 0, trainer.config.micro_batch_size)
        batch = to_batch(rows, corpus.tokenizer.eos_id, accelerator.device)
        trainer.say(trainer.distillation.introduction(batch))
        if trainer.step == 0:
            trainer.distillation.record(trainer.out / resume.TEACHER)
