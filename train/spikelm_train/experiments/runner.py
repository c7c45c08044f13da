"""Runs of a study: train, convert, measure; what is finished is not done again.

data/KEY/               tokenised text, shared by the runs that read the same
trained/KEY/            run folders of `spikelm train`, with train.log and sessions.jsonl; variants
                        that differ only in conversion share one
coded/KEY/              spike-coded models
results/*.json          one file per variant and seed
decode.json             time per token of all variants, measured in turns
test-reads.jsonl        every time the test text was read
table.md summary.json bits-*.png   the report
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from spikelm import checkpoint
from spikelm.config import save_yaml, to_dict
from spikelm.conversion.cli import calibration_windows
from spikelm.conversion.convert import convert
from spikelm.corpus import Split, builtin_documents, read_documents
from spikelm.errors import ConfigError, DataError, SpikelmError
from spikelm.eval.cli import write_json
from spikelm.eval.evaluate import evaluate
from spikelm.eval.race import race
from spikelm.tokenizer import Tokenizer
from spikelm_train.checkpoints import find, read_position
from spikelm_train.cli import count_parameters
from spikelm_train.data import prepare
from spikelm_train.experiments.provenance import provenance
from spikelm_train.experiments.study import TRAINED, DataFiles, Run, Study, same_recipe
from spikelm_train.report import read_metrics
from spikelm_train.resume import Interruption
from spikelm_train.texts.division import check_disjoint
from spikelm_train.texts.shards import META

Say = Callable[[str], None]
Outcome = Literal["finished", "failed", "busy"]
LOG, SESSIONS, LOCK = "train.log", "sessions.jsonl", ".lock"
TEST_READS, DECODE = "test-reads.jsonl", "decode.json"
POLL_SECONDS = 0.5
# Text of a turn of decoding: far more bytes than its tokens take.
BYTES_PER_TOKEN = 64


class Interrupted(BaseException):
    """A signal ended a run after a checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Runner:
    """A study in its folder; `data` is resolved, `runs` are all that count, finished or not."""

    def __init__(
        self, name: str, study: Study, data: DataFiles, runs: Sequence[Run], out: Path, say: Say
    ) -> None:
        self.name, self.study, self.data, self.runs = name, study, data, runs
        self.out, self.say = out, say

    def file(self, run: Run) -> Path:
        """Where the result of a run is or will be."""
        return self.out / "results" / f"{run.variant}-seed{run.seed}-{run.key}.json"

    def result(self, run: Run) -> dict[str, Any] | None:
        """What was measured, or why it failed; None as long as neither is known.

        Raises: ConfigError for a result whose recipe has become another by new defaults.
        """
        try:
            found: dict[str, Any] = json.loads(self.file(run).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if not same_recipe(found["recipe"], run.config):
            raise ConfigError(
                f"{self.file(run)} was made when a default of its recipe was another; move it away "
                "to run it again"
            )
        return found

    def state(self, run: Run) -> str:
        """How far a run has come, for people."""
        found = self.result(run)
        if found is not None:
            return "finished" if found["error"] is None else f"failed: {found['error']}"
        position = find(self._trained(run))
        if position is None:
            return "to do"
        at = read_position(position)
        return "trained" if at.finished else f"at step {at.step} of {run.config.steps}"

    def describe(self, run: Run) -> dict[str, Any]:
        """What a run is and costs."""
        return {
            "run": str(run),
            "variant": run.variant,
            "seed": run.seed,
            "parameters": count_parameters(run.config.model),
            "tokens": run.config.steps * tokens_per_step(run),
            "trained": f"{TRAINED}/{run.train_key}",
            "result": str(self.file(run).relative_to(self.out)),
        }

    def is_finished(self, run: Run) -> bool:
        found = self.result(run)
        return found is not None and found["error"] is None

    def execute(self, runs: Sequence[Run]) -> int:
        """Does what is missing of `runs`; how many failed. Raises: Interrupted."""
        self.out.mkdir(parents=True, exist_ok=True)
        save_yaml(self.study, self.out / "study.yaml")
        outcomes: list[Outcome] = []
        for number, run in enumerate(runs, 1):
            if self.is_finished(run):
                outcomes.append("finished")
                continue
            self.say(f"[{number}/{len(runs)}] {run}")
            outcomes.append(self._execute(run))
        if "busy" in outcomes:
            self.say(f"{outcomes.count('busy')} runs are being done by another process")
        return outcomes.count("failed")

    def _execute(self, run: Run) -> Outcome:
        trained = self._trained(run)
        with locked(trained) as lock:
            if lock is None:
                return "busy"
            record: dict[str, Any] = {
                "study": self.name,
                "variant": run.variant,
                "family": run.family,
                "seed": run.seed,
                "recipe": to_dict(run.config),
                "conversion": run.conversion,
                "measure": to_dict(run.measure),
                "data": {"sha256": run.data_sha256, **to_dict(self.data)},
                "trained": str(trained.relative_to(self.out)),
                "error": None,
            }
            try:
                record["training"] = self._train(run, trained, lock)
                record |= self._measure(run, trained)
            except DataError:
                # The text is the same for all runs.
                raise
            except SpikelmError as error:
                record["error"] = str(error)
                self.say(f"    failed: {error}")
            write_json(self.file(run), {**record, "provenance": provenance()})
        return "failed" if record["error"] else "finished"

    def _train(self, run: Run, folder: Path, lock: int) -> dict[str, Any]:
        """Trains in `folder`, unless that is done, after the teacher; what it cost.

        Raises: SpikelmError with the last line of the log if it fails; Interrupted.
        """
        position = find(folder)
        if position is None or not read_position(position).finished:
            config = run.config
            if run.teacher is not None:
                theirs = self._trained(run.teacher)
                with locked(theirs, wait=True) as their_lock:
                    assert their_lock is not None
                    self._train(run.teacher, theirs, their_lock)
                distill = dataclasses.replace(config.distill, teacher=str(theirs.resolve()))
                config = dataclasses.replace(config, distill=distill)
            corpus = self.out / "data" / run.corpus_key
            with locked(corpus, wait=True):
                prepare(run.config, corpus)
            meta = json.loads((corpus / META).read_text(encoding="utf-8"))
            text = {split: meta[split] for split in ("train", "validation")}
            began = {"text": text, **provenance()}
            recipe = folder.with_suffix(".yaml")
            save_yaml(config, recipe)
            wall, cpu = time.perf_counter(), _children_seconds()
            status = train_process(recipe, folder, corpus, lock)
            session = {
                "status": status,
                "seconds": time.perf_counter() - wall,
                "cpu_seconds": _children_seconds() - cpu,
                **began,
            }
            append_line(folder / SESSIONS, session)
            if status > 128:
                raise Interrupted(status - 128)
            if status < 0:
                raise SpikelmError(f"training was killed by signal {-status} ({folder / LOG})")
            if status:
                raise SpikelmError(_last_line(folder / LOG))
        return self._training(run, folder)

    def _training(self, run: Run, folder: Path) -> dict[str, Any]:
        sessions = read_lines(folder / SESSIONS)
        validated = [r for r in read_metrics(folder) if "validation_bits_per_byte" in r]
        found = find(folder)
        assert found is not None
        position = read_position(found)
        config = run.config
        tokens = position.step * tokens_per_step(run)
        parameters = count_parameters(config.model)
        # A row of the embedding is looked up, not multiplied.
        multiplied = parameters - config.model.vocab_size * config.model.width
        if config.model.tie_embeddings:
            multiplied = parameters
        return {
            "steps": position.step,
            "tokens": tokens,
            "parameters": parameters,
            "tokens_x_parameters": tokens * parameters,
            "flops": 6 * tokens * multiplied,
            "loop_seconds": position.seconds,
            "seconds": sum(s["seconds"] for s in sessions),
            "cpu_seconds": sum(s["cpu_seconds"] for s in sessions),
            "windows_bits_per_byte": validated[-1]["validation_bits_per_byte"],
            "sessions": sessions,
        }

    def _measure(self, run: Run, trained: Path) -> dict[str, Any]:
        """Converts the trained model, and measures it on validation text."""
        wall, cpu = time.perf_counter(), time.process_time()
        coded = self._coded(run)
        if not (coded / checkpoint.MANIFEST).is_file():
            windows = calibration_windows(
                Tokenizer.load(trained), self._text("train"), run.measure.calibration_tokens
            )
            conversion = run.conversion
            convert(
                trained,
                coded,
                windows,
                bits=conversion["bits"],
                bits_of=conversion["bits_of"],
                silence=conversion["silence"],
                by_output_weights=run.measure.by_output_weights,
            )
        documents = excerpts(list(self._text("validation")), run.measure.max_bytes)
        loaded = checkpoint.load(coded, backend="auto")
        validation = evaluate(loaded, documents)
        self.say(f"    {validation['bits_per_byte']:.4f} bits per byte on validation")
        return {
            "coded": str(coded.relative_to(self.out)),
            "fingerprint": loaded.fingerprint,
            "validation": validation,
            "test": None,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }

    def test(self, runs: Sequence[Run]) -> None:
        """Measures finished `runs` on the test text, once each, and writes down that it was read.

        Raises: ConfigError if there is no test text, or nothing is finished; DataError if a test
        document was trained or chosen on.
        """
        if self.data.train and not self.data.test:
            raise ConfigError("the study has no test text; name files in data.test")
        finished = [run for run in runs if self.is_finished(run)]
        if not finished:
            raise ConfigError("nothing is finished yet; run the study without --test first")
        missing = [r for r in finished if (found := self.result(r)) and found["test"] is None]
        if not missing:
            return
        # Written first: whatever happens then, it was read.
        names = [str(run) for run in missing]
        append_line(self.out / TEST_READS, {"runs": names, **provenance()})
        texts = list(self._text("test"))
        if self.data.train:
            check_disjoint([*self._text("train"), *self._text("validation")], texts, "test")
        for run in missing:
            self.say(f"test text: {run}")
            found = self.result(run)
            assert found is not None
            found["test"] = evaluate(self._coded(run), excerpts(texts, run.measure.max_bytes))
            write_json(self.file(run), found)

    def time_decoding(self) -> None:
        """Times the models of the first seed that has all of them, in turns, if any changed."""
        measure = self.study.measure
        by_seed: dict[int, dict[str, Any]] = {}
        for run in self.runs:
            by_seed.setdefault(run.seed, {})[run.variant] = self.result(run)
        whole = [seed for seed, results in by_seed.items() if None not in results.values()]
        if not measure.decode_rounds or not whole:
            return
        models = {n: found for n, found in by_seed[whole[0]].items() if found["error"] is None}
        key = {
            "seed": whole[0],
            "fingerprints": {name: found["fingerprint"] for name, found in models.items()},
            "measure": to_dict(measure),
        }
        before = self.decoding()
        if not models or (before and {name: before[name] for name in key} == key):
            return
        self.say(f"timing decoders of {len(models)} models in turns")
        needed = BYTES_PER_TOKEN * (measure.decode_position + measure.decode_tokens)
        text = "".join(self._text("validation"))
        timed = race(
            {name: self.out / found["coded"] for name, found in models.items()},
            text[:needed],
            rounds=measure.decode_rounds,
            tokens=measure.decode_tokens,
            position=measure.decode_position,
            threads=measure.threads,
        )
        write_json(self.out / DECODE, {**key, **timed, "provenance": provenance()})

    def decoding(self) -> dict[str, Any] | None:
        """What `time_decoding` wrote."""
        try:
            found: dict[str, Any] = json.loads((self.out / DECODE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def test_reads(self) -> list[dict[str, Any]]:
        """When the test text was read, and for what."""
        return read_lines(self.out / TEST_READS)

    def _trained(self, run: Run) -> Path:
        return self.out / TRAINED / run.train_key

    def _coded(self, run: Run) -> Path:
        return self.out / "coded" / run.key

    def _text(self, split: Split) -> Iterator[str]:
        files: tuple[str, ...] = getattr(self.data, split)
        if not self.data.train:
            return iter(builtin_documents(split))
        return read_documents(files, text_key=self.runs[0].config.data.text_key)


def tokens_per_step(run: Run) -> int:
    config = run.config
    return config.micro_batch_size * config.grad_accum_steps * config.data.sequence_length


def train_process(recipe: Path, out: Path, corpus: Path, lock: int) -> int:
    """`spikelm train` in a process of its own, which a run's memory and settings end with; its
    status. A first signal is passed on, so that it stops with a checkpoint, a second one ends it.

    The process keeps the lock as well, should this one die before it.
    """
    command = [sys.executable, "-m", "spikelm_train", str(recipe)]
    command += ["--out", str(out), "--corpus", str(corpus)]
    interruption, passed_on = Interruption(), False
    with (out / LOG).open("ab") as log, interruption.listening():
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            # Otherwise a terminal's Ctrl-C would reach it twice, which ends it at once.
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(POLL_SECONDS)
                    # It may have been too young to know the signal.
                    return 128 + interruption.signum if passed_on and status else status
                if interruption.signum and not passed_on:
                    process.send_signal(interruption.signum)
                    passed_on = True
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[int | None]:
    """A descriptor that keeps other processes out of `folder`, or None if one is in there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = None
        else:
            held = file.fileno()
        yield held


def excerpts(documents: Sequence[str], max_bytes: int | None) -> list[str]:
    """About `max_bytes` of the documents: the same share of each, from its middle."""
    total = sum(len(text.encode("utf-8", "surrogatepass")) for text in documents)
    if max_bytes is None or total <= max_bytes:
        return list(documents)
    share = max_bytes / total
    found = []
    for text in documents:
        size = math.ceil(share * len(text))
        start = (len(text) - size) // 2
        found.append(text[start : start + size])
    return found


def append_line(file: Path, data: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(data) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """What `append_line` wrote; nothing if it never did."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it said nothing"
    return f"{last.removeprefix('spikelm: error: ')} ({log})"
