"""One process's part of a run: a step, and everything that a checkpoint holds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch

from spikelm import checkpoint
from spikelm.errors import CheckpointError, SpikelmError
from spikelm.models.spikelm import LanguageModel
from spikelm_train import checkpoints, lora, resume
from spikelm_train.average import Average
from spikelm_train.carried import CarriedState
from spikelm_train.checkpoints import Position
from spikelm_train.config import TrainConfig
from spikelm_train.context import Handover, Slices
from spikelm_train.data import Batch, Corpus, make_sampler
from spikelm_train.distill import Distillation
from spikelm_train.guard import Guard
from spikelm_train.initial import begin_with
from spikelm_train.objective import IGNORED, Objective
from spikelm_train.optim import lr_factor
from spikelm_train.parallel import Strategy, make_parallel
from spikelm_train.quantised import Rounding
from spikelm_train.report import Reporter
from spikelm_train.silence import Silence
from spikelm_train.stages import Stages, close_bypasses, ramp
from spikelm_train.validation import sample_text, to_batch, validation_sums

# The L1 term grows to its weight over this part of the run.
L1_RAMP = 0.1


class Trainer:
    """One process's part of a run: model, optimiser, and the position in the run.

    A step has `rows` sequences over all processes (None: as many as the recipe makes here); a run
    that continues on other processes than it began with takes as many as before, in the same order.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        corpus: Corpus,
        accelerator: Any,
        reporter: Reporter | None,
        strategy: Strategy = "copies",
        rows: int | None = None,
        context: int = 1,
    ) -> None:
        if accelerator.device.type == "cpu":
            # Strong decays leave denormals in the states, which cost a quarter of the speed.
            torch.set_flush_denormal(True)
        # Processes that share rows are one to those who share out the rows.
        self.group = accelerator.process_index // context
        self.num_groups = accelerator.num_processes // context
        self.slices = Slices(accelerator.process_index, context) if context > 1 else None
        per_forward = config.micro_batch_size * self.num_groups
        self.rows = rows or per_forward * config.grad_accum_steps
        config = dataclasses.replace(config, grad_accum_steps=self.rows // per_forward)
        self.config = config
        self.out = out
        self.corpus = corpus
        self.accelerator = accelerator
        self.reporter = reporter
        restore_random(None, config.seed, 0, accelerator.process_index)
        self.module = LanguageModel(config.model).initialise(config.seed)
        if config.init is not None:
            begin_with(self.module, Path(config.init))
        if config.lora.rank:
            lora.adapt(self.module, config.lora)
        self.num_parameters = sum(p.numel() for p in self.module.parameters())
        self.module.recompute_layers = config.activation_checkpointing == "layers"
        self.average = Average(self.module, config.ema, accelerator.device)
        self.objective = Objective(config.z_loss, config.loss_chunk)
        self.stages = Stages(config.stages, self.module)
        self.rounding = Rounding(self.module, config.quantise_at)
        self.distillation = self._distillation()
        learned = self.distillation.map if self.distillation else None
        # An adapter is for a model whose neurons are as they were.
        steered = (0.0, 0) if config.lora.rank else (config.silence_rate, config.revive_after)
        self.silence = Silence(self.module.neurons(), *steered)
        self.silence.penalise = config.l1_hidden > 0
        extra = () if learned is None else learned.parameters()
        self.parallel = make_parallel(strategy, accelerator, self.module, config, extra)
        if self.distillation and learned is not None:
            self.distillation.map = accelerator.prepare(learned)
        self.guard = Guard(config.guard)
        self.sampler = make_sampler(config, corpus, self.rows)
        self.carried: CarriedState | None = None
        if config.data.sampling == "carried":
            from accelerate.utils.operations import gather_object

            self.carried = CarriedState(accelerator.device, gather_object)
        self.tokens_per_step = self.rows * config.data.sequence_length
        self.bits_per_byte = corpus.tokens_per_byte / math.log(2)
        """Factor from nats per training token to bits per byte."""
        self.step = 0
        self.best = math.inf
        """The lowest validation loss so far, in nats per token."""
        self.writer = checkpoints.Writer(
            out, accelerator.process_index, config.keep_last, accelerator.wait_for_everyone
        )
        self._seconds_before = 0.0
        self._began = time.perf_counter()

    def _distillation(self) -> Distillation | None:
        """The recipe's teacher."""
        config, accelerator = self.config, self.accelerator
        if config.distill.teacher is None:
            return None
        found = Distillation(
            config.distill, self.module, self.corpus.tokenizer, accelerator.autocast, config.seed
        )
        found.teacher.to(accelerator.device)
        return found

    def advance(self, seconds: float) -> dict[str, Any] | None:
        """One optimiser step `seconds` into the run; its measurements if it is to be logged.

        Raises: SpikelmError if the loss or its gradient is not finite and the recipe says to stop
        then; nothing is updated.
        """
        config, silence = self.config, self.silence
        # Half a step ahead, so that the warm-up's first step is not wasted at rate 0.
        progress = config.progress(self.step + 0.5, seconds)
        self.enter_stages(progress)
        close_bypasses(silence.neurons, progress)
        lr = config.optim.lr * lr_factor(config.optim, progress) * self.guard.lr_factor
        logged = (self.step + 1) % config.log_every == 0 or self.step == 0
        silence.clear()
        silence.measure_all = logged
        self.objective.clear()
        if self.distillation:
            self.distillation.clear()
        batches = [self._batch(part) for part in range(config.grad_accum_steps)]
        num_learned = self._num_learned(batches)
        if num_learned == 0:
            self._pass_by(batches)
            return None
        loss = self._accumulate(batches, num_learned, progress)
        silence.shape(self._summed(silence.edges()))
        if self.guard.leaps(loss):
            self.parallel.drop()
            self._intervene(config.guard.spike, f"loss {loss:.4g} leaps")
            return None
        norm = self.parallel.update(lr, config.optim.grad_clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
            self._intervene(config.guard.non_finite, what)
            return None
        self.guard.watch(loss)
        counts = self._summed(silence.counts())
        silence.steer(counts, progress)
        silence.watch(self._summed(silence.fired()))
        self.average.update()
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
            "gradient_norm": norm,
            "silent_fraction": total,
            "silent": classes,
            "dead": silence.dead(config.log_every),
            "saturated": silence.saturated(counts),
            **({"revived": silence.revived} if config.revive_after else {}),
            **self._measured(),
        }

    def _intervene(self, action: str, what: str) -> None:
        """Leaves the step out, or goes back to an earlier checkpoint; says so.

        Raises: SpikelmError if neither is to be done, or possible.
        """
        guard, at = self.guard, self.step + 1
        if guard.interventions >= guard.config.at_most:
            action = "stop"
        if action == "skip":
            guard.intervene()
            self.step += 1
            self._report_intervention(at, f"{what}; the step is left out")
            return
        # First, as it may take the place of an older one.
        self._finish_writing()
        earlier = [
            s for s in checkpoints.kept_steps(self.out) if s <= at - guard.config.rewind_steps
        ]
        if action == "stop" or not earlier:
            raise SpikelmError(self._diverged(at, what))
        if self.accelerator.is_main_process:
            checkpoints.forget_after(self.out, earlier[-1])
        kept, seconds = guard.state_dict(), self._seconds_before
        self.load(checkpoints.read_position(checkpoints.step_folder(self.out, earlier[-1])))
        self._seconds_before = seconds
        guard.load_state_dict(kept)
        guard.intervene(steps_back=at - self.step)
        self._report_intervention(
            at, f"{what}; back to step {self.step}, past {at - self.step} steps of data"
        )

    def _report_intervention(self, step: int, text: str) -> None:
        rate = self.guard.lr_factor
        slower = f", the learning rate times {rate:.3g}" if rate < 1 else ""
        self.say(f"guard: step {step}: {text}{slower}")
        if self.reporter:
            self.reporter.record({"step": step, "guard": text, "lr_factor": rate})

    def _pass_by(self, batches: list[Batch]) -> None:
        """A step of which nothing is learned: it changes nothing but states that are carried."""
        if self.carried:
            with torch.no_grad():
                for part, batch in enumerate(batches):
                    lanes = self._lanes(part)
                    _, state = self.parallel.model(
                        batch.inputs, self.carried.take(lanes), reset=batch.reset
                    )
                    self.carried.put(lanes, state)
        self.step += 1
        self.say(f"step {self.step}: none of its tokens is learned, it is left out")

    def _accumulate(self, batches: list[Batch], num_learned: int | None, progress: float) -> float:
        """Gradients of the step's global batch; its mean loss in nats per learned token."""
        parts, accelerator = len(batches), self.accelerator
        total = torch.zeros((), device=accelerator.device)
        # A forward's sums are divided by this, so that the mean over all forwards, of all
        # processes, is that over the step's learned tokens.
        forwards: int = parts * accelerator.num_processes
        count = None if num_learned is None else num_learned / forwards
        for part, batch in enumerate(batches):
            lanes = self._lanes(part)
            state = self.carried.take(lanes) if self.carried else None
            handover: Handover | None = None
            if self.slices:
                batch, state, handover = self.slices.take(batch, self.module)
            with self.parallel.accumulating(last=part == parts - 1):
                balance: list[torch.Tensor] = []
                taught = self.distillation
                with taught.watching() if taught else contextlib.nullcontext():
                    output, state = self.parallel.model(
                        batch.inputs,
                        state,
                        reset=batch.reset,
                        probe=self.silence,
                        losses=balance,
                        handover=handover,
                        **self.objective.options(batch.targets),
                    )
                if self.carried:
                    self.carried.put(lanes, state)
                if handover:
                    balance.append(handover.end)
                loss, more_terms = self.objective.terms(output, batch.targets, count)
                learned = taught.objective(loss, output, batch, count) if taught else loss
                objective = sum([*balance, *more_terms], start=learned)
                if self.silence.penalise:
                    weight = self.config.l1_hidden * ramp(progress, L1_RAMP)
                    objective = objective + weight * self.silence.take_l1()
                self.parallel.backward(objective / parts)
            if self.slices:
                self.slices.settle()
            total += loss.detach() / parts
        return float(accelerator.reduce(total, "mean"))

    def _lanes(self, part: int) -> range:
        """The rows of the step's global batch that this process's forward number `part` is for."""
        size = self.config.micro_batch_size
        start = (part * self.num_groups + self.group) * size
        return range(start, start + size)

    def _batch(self, part: int) -> Batch:
        lanes = self._lanes(part)
        rows = self.sampler.rows(self.step + self.guard.data_steps, lanes.start, lanes.stop)
        return to_batch(rows, self.corpus.tokenizer.eos_id, self.accelerator.device)

    def _num_learned(self, batches: list[Batch]) -> int | None:
        """Tokens of the step, of all processes, that are learned; None where all are."""
        if not self.corpus.has_conversations:
            return None
        mine = torch.stack([(batch.targets != IGNORED).sum() for batch in batches]).sum()
        # Every process that shares a row has counted it.
        return int(self.accelerator.reduce(mine, "sum")) // (self.slices.size if self.slices else 1)

    def _measured(self) -> dict[str, float]:
        """The last step's terms of the loss beside the cross-entropy."""
        parts = self.config.grad_accum_steps
        sums = self.objective.measured()
        if self.distillation:
            sums |= self.distillation.measured()
        return {n: float(self.accelerator.reduce(x / parts, "mean")) for n, x in sums.items()}

    def validate(self) -> tuple[float, float]:
        """(nats per token, bits per byte) of held-out text."""
        accelerator = self.accelerator
        self.module.eval()
        with self.average.applied():
            sums = validation_sums(
                self.parallel.evaluated,
                self.corpus,
                self.config,
                accelerator.device,
                accelerator.process_index,
                accelerator.num_processes,
            )
        self.module.train()
        nats, num_tokens, num_bytes = accelerator.reduce(sums, "sum").tolist()
        return nats / num_tokens, nats / num_bytes / math.log(2)

    def sample(self) -> str:
        """The recipe's prompt and what the model makes of it; to be called by all processes."""
        model = self.parallel.whole()
        config = dataclasses.replace(self.config, model=self.module.config, stages=())
        with self.average.applied():
            if self.accelerator.is_main_process:
                return sample_text(model, self.corpus, config, self.out)
        return ""

    def export(self, folder: Path) -> None:
        """Writes the model as a folder of its own; to be called by all processes."""
        model = self.parallel.whole()
        with self.average.applied():
            if self.accelerator.is_main_process:
                checkpoint.save(folder, model, self.corpus.tokenizer)
        if self.config.init and self.config.lora.rank and self.accelerator.is_main_process:
            lora.save_adapter(self.module, self.config.lora, self.config.init, folder / lora.FOLDER)

    def save(self, seconds: float, *, finished: bool = False) -> None:
        """Begins to write the checkpoint to continue from."""
        self._finish_writing()
        position = Position(
            step=self.step,
            seconds=seconds,
            num_processes=self.accelerator.num_processes,
            rows=self.rows,
            strategy=self.parallel.strategy,
            finished=finished,
        )
        own = {"random": random_state(self.accelerator.device)}
        self.writer.begin(position, self._shared(), own, self.parallel.save_shards)

    def load(self, position: Position) -> None:
        """Continues from a checkpoint of the run, on the CPU bit for bit."""
        found = checkpoints.step_folder(self.out, position.step)
        shared, own = checkpoints.load(found, self.accelerator.process_index)
        try:
            self.parallel.load(found / checkpoints.SHARDS, shared)
            for name, part in self._parts().items():
                part.load_state_dict(shared[name])
            self.best = shared["best"]
            # Processes that were not there before draw numbers of their own.
            rank = self.accelerator.process_index
            restore_random(own and own["random"], self.config.seed, position.step, rank)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise checkpoints.damaged(found, error) from None
        if self.distillation:
            self.distillation.check_same(self.out / resume.TEACHER)
        self.step, self._seconds_before = position.step, position.seconds

    def _parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model and its optimiser."""
        parts: dict[str, Any] = {
            "silence": self.silence,
            "stages": self.stages,
            "guard": self.guard,
        }
        if self.distillation and self.distillation.map is not None:
            parts["feature_map"] = self.accelerator.unwrap_model(self.distillation.map)
        if self.carried is not None:
            parts["carried"] = self.carried
        if self.config.ema is not None:
            parts["average"] = self.average
        return parts

    def _shared(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**self.parallel.state(), **parts, "best": self.best}

    def _finish_writing(self) -> None:
        """Names the checkpoint that was being written. One that could not be written is said, and
        the run goes on.
        """
        try:
            self.writer.finish()
        except CheckpointError as error:
            self.say(f"{error}; the run goes on")

    def agree(self, signum: int) -> tuple[float, int]:
        """Seconds in the loop and pending signal, the largest of all processes; a checkpoint that
        all of them have written gets its name.
        """
        seconds = self._seconds_before + time.perf_counter() - self._began
        waiting = not self.writer.written()
        accelerator = self.accelerator
        if accelerator.num_processes > 1:
            mine = torch.tensor([[seconds, signum, waiting]], dtype=torch.float64)
            largest = accelerator.gather(mine.to(accelerator.device)).amax(0).tolist()
            seconds, signum, waiting = largest[0], int(largest[1]), bool(largest[2])
        if self.writer.busy and not waiting:
            self._finish_writing()
        return seconds, signum

    def _summed(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum over processes; nothing is sent where there is nothing to add."""
        total: torch.Tensor = self.accelerator.reduce(mine, "sum") if mine.numel() else mine
        return total

    def enter_stages(self, progress: float) -> None:
        """Begins what is due when `progress` (0 to 1) of the run is over."""
        for stage in self.stages.enter(progress):
            changes = ", ".join(f"{name} {value:g}" for name, value in stage.changes.items())
            self.say(f"stage after step {self.step}: {stage.tensor_class} {changes}")
            self.average.restart()
        if self.rounding.enter(progress):
            self.say(f"weights are rounded after step {self.step}")

    def say(self, text: str) -> None:
        """A line of the run's log, on the process that writes it."""
        if self.reporter:
            self.reporter.say(text)

    def _diverged(self, step: int, what: str) -> str:
        kept = checkpoints.kept_steps(self.out)
        last = (
            f"the checkpoint of step {kept[-1]} is kept"
            if kept
            else "no checkpoint was written yet"
        )
        return (
            f"step {step}: {what}; {last}. Try --fresh with a lower optim.lr, a longer "
            "optim.warmup_fraction, a smaller optim.grad_clip, precision=fp32 or a guard "
            "(guard.non_finite: skip or rewind)"
        )


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The generators that a process draws dropout from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: dict[str, torch.Tensor] | None, seed: int, step: int, rank: int) -> None:
    """Sets those generators, or seeds them where nothing was kept."""
    if state is None:
        torch.manual_seed(hash((seed, step, rank)))
        return
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
