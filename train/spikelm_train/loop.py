"""The training step and the loop around it; the only file that imports accelerate."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pickle
import time
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from safetensors import SafetensorError

from spikelm import checkpoint
from spikelm.doctor import cpu_flags
from spikelm.errors import CheckpointError, ConfigError, MissingExtraError, SpikelmError
from spikelm.models.spikelm import LanguageModel
from spikelm_train import resume
from spikelm_train.carried import CarriedState
from spikelm_train.config import TrainConfig
from spikelm_train.data import Corpus, make_sampler, prepare
from spikelm_train.distill import Distillation
from spikelm_train.optim import lr_factor, make_optimizer
from spikelm_train.quantised import Rounding
from spikelm_train.report import Reporter
from spikelm_train.silence import Silence
from spikelm_train.stages import Stages, close_bypasses, ramp
from spikelm_train.validation import cross_entropy, sample_text, to_batch, validation_sums

# The L1 term grows to its weight over this part of the run.
L1_RAMP = 0.1

_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)


def resolve_precision(wanted: Literal["auto", "bf16", "fp32"]) -> Literal["bf16", "fp32"]:
    """What `auto` means on this machine: bf16 where its matrix products are native."""
    if wanted != "auto":
        return wanted
    flags = cpu_flags()
    cuda = torch.cuda.is_available()
    pays = torch.cuda.is_bf16_supported() if cuda else flags["avx512_bf16"] or flags["amx"]
    return "bf16" if pays else "fp32"


def make_accelerator(config: TrainConfig) -> Any:
    """The launcher's view of this process. Raises: ConfigError if ranks do not see each other."""
    try:
        from accelerate.accelerator import Accelerator
    except ImportError:
        raise MissingExtraError("accelerate", "train") from None
    precision = {"bf16": "bf16", "fp32": "no"}[resolve_precision(config.precision)]
    # Without cpu=True every rank of a CPU launch believes it is alone (accelerate 1.15).
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched but accelerate sees {accelerator.num_processes}; "
            "on CPU start them with torchrun --nproc_per_node N -m spikelm_train"
        )
    return accelerator


def train(
    config: TrainConfig,
    out: Path,
    *,
    fresh: bool,
    stream: TextIO,
    corpus_folder: Path | None = None,
) -> int:
    """Runs or continues a recipe in the folder `out`; returns the exit status.

    The tokenised text is in `corpus_folder`, which runs may share, or in `out`/data.

    0 when the trained model is in `out`; 130 or 143 when SIGINT or SIGTERM ended the run after a
    checkpoint.

    Raises: ConfigError, DataError for input that cannot be used; SpikelmError if the loss stops
    being finite.
    """
    accelerator = make_accelerator(config)
    is_main: bool = accelerator.is_main_process
    with accelerator.main_process_first():
        position = resume.claim(
            out, config, fresh=fresh and is_main, num_processes=accelerator.num_processes
        )
        if position and position.finished and (out / checkpoint.WEIGHTS).is_file():
            if is_main:
                stream.write(
                    f"{out} is finished after {position.step} steps; --fresh starts it over\n"
                )
            return 0
        begins = is_main and position is None
        with resume.discarding(out, begins):
            corpus = prepare(config, corpus_folder or out / "data")
    reporter = Reporter(out, stream, position.step if position else 0) if is_main else None
    try:
        with resume.discarding(out, begins):
            trainer = Trainer(config, out, corpus, accelerator, reporter)
        if position:
            trainer.load(position)
        return trainer.run()
    finally:
        if reporter:
            reporter.close()


class Trainer:
    """One process's part of a run: model, optimiser, and the position in the run."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        corpus: Corpus,
        accelerator: Any,
        reporter: Reporter | None,
    ) -> None:
        if accelerator.device.type == "cpu":
            # Strong decays leave denormals in the states, which cost a quarter of the speed.
            torch.set_flush_denormal(True)
        self.config = config
        self.out = out
        self.corpus = corpus
        self.accelerator = accelerator
        self.reporter = reporter
        self.module = LanguageModel(config.model).initialise(config.seed)
        optimizer = make_optimizer(self.module, config.optim)
        self.distillation = self._distillation(optimizer)
        self.model, self.optimizer = accelerator.prepare(self.module, optimizer)
        if self.distillation and self.distillation.map is not None:
            self.distillation.map = accelerator.prepare(self.distillation.map)
        self.silence = Silence(self.module.neurons(), config.silence_rate, config.revive_after)
        self.silence.penalise = config.l1_hidden > 0
        accelerator.register_for_checkpointing(self.silence)
        self.stages = Stages(config.stages, self.module)
        if config.stages:
            accelerator.register_for_checkpointing(self.stages)
        self.rounding = Rounding(self.module, config.quantise_at)
        rows = config.micro_batch_size * config.grad_accum_steps * accelerator.num_processes
        self.sampler = make_sampler(config, corpus, rows)
        self.carried: CarriedState | None = None
        if config.data.sampling == "carried":
            from accelerate.utils.operations import gather_object

            self.carried = CarriedState(accelerator.device, gather_object)
            accelerator.register_for_checkpointing(self.carried)
        self.tokens_per_step = rows * config.data.sequence_length
        self.bits_per_byte = corpus.tokens_per_byte / math.log(2)
        """Factor from nats per training token to bits per byte."""
        self.step = 0
        self._seconds_before = 0.0
        self._began = time.perf_counter()

    def _distillation(self, optimizer: torch.optim.Optimizer) -> Distillation | None:
        """The recipe's teacher; what is trained to compare with it comes under `optimizer`."""
        config, accelerator = self.config, self.accelerator
        if config.distill.teacher is None:
            return None
        found = Distillation(
            config.distill, self.module, self.corpus.tokenizer, accelerator.autocast, config.seed
        )
        found.teacher.to(accelerator.device)
        if found.map is not None:
            optimizer.add_param_group({"params": found.map.parameters(), "weight_decay": 0.0})
        return found

    def run(self) -> int:
        """Trains to the end of the run, or to a signal; returns the exit status."""
        interruption = resume.Interruption()
        with interruption.listening():
            self._introduce()
            busy, busy_from = 0.0, self.step
            while True:
                seconds, signum = self._agree(interruption.signum)
                progress = self.config.progress(self.step, seconds)
                if progress >= 1:
                    break
                if signum:
                    self.save(seconds)
                    self._say(
                        f"stopped after step {self.step}; run the same command again to continue"
                    )
                    return 128 + signum
                began = time.perf_counter()
                record = self.advance(seconds)
                busy += time.perf_counter() - began
                if record is not None:
                    speed = (self.step - busy_from) * self.tokens_per_step / busy
                    if self.reporter:
                        self.reporter.progress({**record, "tokens_per_second": speed})
                    busy, busy_from = 0.0, self.step
                self._occasionally(seconds)
            self._finish(seconds)
        return 0

    def advance(self, seconds: float) -> dict[str, Any] | None:
        """One optimiser step `seconds` into the run; its measurements if it is to be logged.

        Raises: SpikelmError if the loss or its gradient is not finite; nothing is updated then.
        """
        config, silence = self.config, self.silence
        # Half a step ahead, so that the warm-up's first step is not wasted at rate 0.
        progress = config.progress(self.step + 0.5, seconds)
        self._enter_stages(progress)
        close_bypasses(silence.neurons, progress)
        lr = config.optim.lr * lr_factor(config.optim, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        logged = (self.step + 1) % config.log_every == 0 or self.step == 0
        silence.clear()
        silence.measure_all = logged
        if self.distillation:
            self.distillation.clear()
        loss = self._accumulate(progress)
        silence.shape(self._summed(silence.edges()))
        norm = self.accelerator.clip_grad_norm_(
            self.module.parameters(), config.optim.grad_clip or math.inf
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SpikelmError(self._diverged(loss, float(norm)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        counts = self._summed(silence.counts())
        silence.steer(counts, progress)
        silence.watch(self._summed(silence.fired()))
        self.step += 1
        if not logged:
            return None
        total, classes = silence.fractions(counts)
        return {
            "step": self.step,
            "progress": config.progress(self.step, seconds),
            "seconds": seconds,
            "loss": loss,
            "bits_per_byte": loss * self.bits_per_byte,
            "lr": lr,
            "gradient_norm": float(norm),
            "silent_fraction": total,
            "silent": classes,
            "dead": silence.dead(config.log_every),
            "saturated": silence.saturated(counts),
            **({"revived": silence.revived} if config.revive_after else {}),
            **self._distilled(),
        }

    def _accumulate(self, progress: float) -> float:
        """Gradients of the step's global batch; its mean loss in nats per token."""
        size, parts = self.config.micro_batch_size, self.config.grad_accum_steps
        accelerator = self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for part in range(parts):
            start = (part * accelerator.num_processes + accelerator.process_index) * size
            rows = self.sampler.rows(self.step, start, start + size)
            lanes = range(start, start + size)
            state = self.carried.take(lanes) if self.carried else None
            batch = to_batch(rows, self.corpus.tokenizer.eos_id, accelerator.device)
            more = part < parts - 1
            with accelerator.no_sync(self.model) if more else contextlib.nullcontext():
                balance: list[torch.Tensor] = []
                taught = self.distillation
                with taught.watching() if taught else contextlib.nullcontext():
                    logits, state = self.model(
                        batch.inputs, state, reset=batch.reset, probe=self.silence, losses=balance
                    )
                if self.carried:
                    self.carried.put(lanes, state)
                loss = cross_entropy(logits, batch.targets).mean()
                learned = taught.objective(loss, logits, batch) if taught else loss
                objective = sum(balance, start=learned)
                if self.silence.penalise:
                    weight = self.config.l1_hidden * ramp(progress, L1_RAMP)
                    objective = objective + weight * self.silence.take_l1()
                accelerator.backward(objective / parts)
            total += loss.detach() / parts
        return float(accelerator.reduce(total, "mean"))

    def _distilled(self) -> dict[str, float]:
        """What the last step differed from the teacher."""
        if self.distillation is None:
            return {}
        parts = self.config.grad_accum_steps
        sums = self.distillation.measured()
        return {n: float(self.accelerator.reduce(x / parts, "mean")) for n, x in sums.items()}

    def validate(self) -> tuple[float, float]:
        """(nats per token, bits per byte) of held-out text."""
        accelerator = self.accelerator
        self.module.eval()
        sums = validation_sums(
            self.module,
            self.corpus,
            self.config,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.module.train()
        nats, num_tokens, num_bytes = accelerator.reduce(sums, "sum").tolist()
        return nats / num_tokens, nats / num_bytes / math.log(2)

    def sample(self) -> str:
        """The recipe's prompt and what the model makes of it."""
        config = dataclasses.replace(self.config, model=self.module.config, stages=())
        return sample_text(self.module, self.corpus.tokenizer, config, self.out)

    def save(self, seconds: float, *, finished: bool = False) -> None:
        """Writes the checkpoint to continue from, and the loss curve."""
        accelerator = self.accelerator
        position = resume.Position(
            step=self.step,
            seconds=seconds,
            num_processes=accelerator.num_processes,
            finished=finished,
        )
        resume.replace(
            self.out,
            position,
            accelerator.save_state,
            is_main=accelerator.is_main_process,
            wait=accelerator.wait_for_everyone,
        )
        if self.reporter:
            self.reporter.draw()

    def load(self, position: resume.Position) -> None:
        """Continues from the run's checkpoint, bit for bit on the CPU."""
        found = resume.find(self.out)
        try:
            self.accelerator.load_state(str(found))
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{found} is damaged ({' '.join(str(error).split()):.200}); start over with --fresh"
            ) from None
        if self.distillation:
            self.distillation.check_same(self.out / resume.TEACHER)
        self.step, self._seconds_before = position.step, position.seconds

    def _agree(self, signum: int) -> tuple[float, int]:
        """Seconds in the loop and pending signal, the largest of all processes."""
        seconds = self._seconds_before + time.perf_counter() - self._began
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return seconds, signum
        mine = torch.tensor([[seconds, signum]], dtype=torch.float64).to(accelerator.device)
        seconds, largest = accelerator.gather(mine).amax(0).tolist()
        return seconds, int(largest)

    def _summed(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum over processes; nothing is sent where there is nothing to add."""
        total: torch.Tensor = self.accelerator.reduce(mine, "sum") if mine.numel() else mine
        return total

    def _occasionally(self, seconds: float) -> None:
        config, reporter = self.config, self.reporter
        if config.eval_every and self.step % config.eval_every == 0:
            self._report_validation()
        if reporter and config.sample_every and self.step % config.sample_every == 0:
            reporter.say(f"sample at step {self.step}: {self.sample()!r}")
        if config.save_every and self.step % config.save_every == 0:
            self.save(seconds)

    def _report_validation(self) -> None:
        loss, bits = self.validate()
        if self.reporter:
            record = {
                "step": self.step,
                "validation_loss": loss,
                "validation_bits_per_byte": bits,
            }
            self.reporter.record(record)
            self.reporter.say(
                f"validation at step {self.step}: loss {loss:.3f}  {bits:.3f} bits/byte"
            )

    def _enter_stages(self, progress: float) -> None:
        for stage in self.stages.enter(progress):
            changes = ", ".join(f"{name} {value:g}" for name, value in stage.changes.items())
            self._say(f"stage after step {self.step}: {stage.tensor_class} {changes}")
        if self.rounding.enter(progress):
            self._say(f"weights are rounded after step {self.step}")

    def _finish(self, seconds: float) -> None:
        # A budget may end before the last stage; the model is what the recipe ends with.
        self._enter_stages(1.0)
        self._report_validation()
        if self.reporter:
            if self.config.sample_every:
                self.reporter.say(f"sample: {self.sample()!r}")
            checkpoint.save(self.out, self.module, self.corpus.tokenizer)
        self.save(seconds, finished=True)
        self._say(f"finished after {self.step} steps, {seconds:.0f} s; the model is in {self.out}")

    def _introduce(self) -> None:
        corpus, accelerator = self.corpus, self.accelerator
        parameters = sum(p.numel() for p in self.module.parameters())
        self._say(
            f"{parameters:,} parameters, {len(corpus.train.tokens):,} training tokens "
            f"({corpus.train.num_bytes:,} bytes), {self.tokens_per_step:,} tokens per step, "
            f"{accelerator.num_processes} x {accelerator.device.type}, "
            f"{resolve_precision(self.config.precision)}"
            + (f"; continuing after step {self.step}" if self.step else "")
        )
        if self.distillation and self.reporter:
            rows = self.sampler.rows(self.step, 0, self.config.micro_batch_size)
            batch = to_batch(rows, corpus.tokenizer.eos_id, accelerator.device)
            self._say(self.distillation.introduction(batch))
            if self.step == 0:
                self.distillation.record(self.out / resume.TEACHER)

    def _say(self, text: str) -> None:
        if self.reporter:
            self.reporter.say(text)

    def _diverged(self, loss: float, norm: float) -> str:
        found = resume.find(self.out)
        kept = "no checkpoint was written yet"
        if found is not None:
            kept = f"the checkpoint of step {resume.read_position(found).step} is kept"
        return (
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; {kept}. Try --fresh with a "
            "lower optim.lr, a longer optim.warmup_fraction, a smaller optim.grad_clip or "
            "precision=fp32"
        )
