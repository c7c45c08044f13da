"""Distillation: learning from a trained model that has the same tokenizer, such as the dense twin.

    loss = (1 - w) CE + w D + f E
    D = t^2 ((1 - r) KL(p, q) + r KL(q, p)),   p, q = softmax(teacher, student logits / t)
    E = mean over norms of |M x - y|^2 / |y|^2

with `weight` w, `temperature` t, `reverse` r and `features` f. D is per token in nats; t^2 keeps
the gradient's size (Hinton et al. 2015). The reverse divergence does not force the student to
cover what it cannot (Gu et al. 2023, MiniLLM); MAR (2026, arXiv 2601.21503) takes both for a
spiking student, 0.2 forward and 0.7 reverse: w = 0.9, r = 0.78.

E matches pre-norm features, as MAR does: x and y are the residual streams of student and teacher
in front of each norm, layer to layer, both sums over all tokens. It is relative as the stream
grows from layer to layer. M, trained along, is only there where the widths differ; one matrix for
all layers, as all of them read and write one space (as in TinyBERT, Jiao et al. 2020).

B sequences, T tokens, D width, N vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm import checkpoint
from spikelm.errors import CheckpointError, ConfigError
from spikelm.models.layers import draw
from spikelm.models.spikelm import LanguageModel, Layer
from spikelm.tokenizer import Tokenizer
from spikelm_train.config import DistillConfig
from spikelm_train.data import Batch
from spikelm_train.objective import IGNORED, mean_over


class FeatureMap(nn.Module):
    """The student's features in the teacher's width: weight [teacher's D, D]."""

    def __init__(self, width: int, teacher_width: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(teacher_width, width))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            draw(self.weight, "normal", 1.0)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [F.linear(x, self.weight) for x in features]


class Distillation:
    """The teacher, and what a step's forwards differ from it.

    `map` is to be trained with the student; None where no features are matched, or none is needed.
    Raises: ConfigError for a teacher that `student` cannot learn from.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: LanguageModel,
        tokenizer: Tokenizer,
        autocast: Callable[[], AbstractContextManager[Any]],
        seed: int,
    ) -> None:
        assert config.teacher is not None
        self.config, self.student, self.autocast = config, student, autocast
        loaded = checkpoint.load(config.teacher)
        self.teacher, self.fingerprint = loaded.model, loaded.fingerprint
        self._check(loaded.tokenizer, tokenizer)
        widths = student.config.width, self.teacher.config.width
        needed = config.features > 0 and widths[0] != widths[1]
        self.map: nn.Module | None = FeatureMap(*widths, seed) if needed else None
        self.clear()

    def _check(self, theirs: Tokenizer, ours: Tokenizer) -> None:
        folder = self.config.teacher
        if theirs.fingerprint != ours.fingerprint:
            raise ConfigError(
                f"the teacher in {folder} has another tokenizer (vocabulary {theirs.vocab_size}, "
                f"fingerprint {theirs.fingerprint[:12]}; the run's: {ours.vocab_size}, "
                f"{ours.fingerprint[:12]}); train both with the same tokenizer and data.sources"
            )
        a, b = self.student.config, self.teacher.config
        if a.vocab_size != b.vocab_size:
            raise ConfigError(
                f"the teacher in {folder} has {b.vocab_size} logits, the model {a.vocab_size}"
            )
        if self.config.features > 0 and (a.num_layers != b.num_layers or b.sink_embeddings):
            raise ConfigError(
                f"the teacher in {folder} has {b.num_layers} layers and {b.sink_embeddings} sink "
                f"embeddings; distill.features needs {a.num_layers} and 0, or set it to 0"
            )

    def clear(self) -> None:
        """Forgets what was measured; call before every step."""
        self._sums = [torch.zeros(()), torch.zeros(())]
        self._ours: list[Tensor] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps the student's features, if they are wanted, while open."""
        with self._recording(self.student) as self._ours:
            yield

    def objective(
        self, cross_entropy: Tensor, logits: Tensor, batch: Batch, count: float | None = None
    ) -> Tensor:
        """The loss of logits [B, T, N] that came out of `watching` of `batch`; `count` as in
        `objective.mean_over`.
        """
        c = self.config
        with torch.no_grad(), self.autocast(), self._recording(self.teacher) as theirs:
            wanted, _ = self.teacher(batch.inputs, reset=batch.reset)
        nats = divergence(logits, wanted, c.reverse, c.temperature)
        apart = mean_over(nats.masked_fill(batch.targets == IGNORED, 0.0), batch.targets, count)
        loss = (1 - c.weight) * cross_entropy + c.weight * apart
        self._sums[0] = self._sums[0].to(apart.device) + apart.detach()
        if c.features > 0:
            ours = self._ours if self.map is None else self.map(self._ours)
            error = feature_error(ours, theirs)
            loss = loss + c.features * error
            self._sums[1] = self._sums[1].to(error.device) + error.detach()
        return loss

    def measured(self) -> dict[str, Tensor]:
        """Sums of D and, if features are matched, E over the forwards since `clear`."""
        names = ("divergence", "feature_error")[: 2 if self.config.features > 0 else 1]
        return dict(zip(names, self._sums, strict=False))

    def introduction(self, batch: Batch) -> str:
        """The teacher, the memory it takes, and the time of its forward for `batch`."""
        seconds = []
        for _ in range(2):  # the first call warms up
            began = time.perf_counter()
            with torch.no_grad(), self.autocast():
                self.teacher(batch.inputs, reset=batch.reset)[0][0, 0, 0].item()
            seconds.append(time.perf_counter() - began)
        tensors = [*self.teacher.parameters(), *self.teacher.buffers()]
        parameters = sum(p.numel() for p in self.teacher.parameters())
        logits = 4 * batch.inputs.numel() * self.teacher.config.vocab_size
        megabytes = (sum(t.nbytes for t in tensors) + logits) / 1e6
        return (
            f"teacher {self.config.teacher} ({self.fingerprint[:12]}): {parameters:,} parameters, "
            f"{megabytes:.0f} MB with its logits, {1e3 * min(seconds):.0f} ms per forward"
        )

    def record(self, path: Path) -> None:
        """Writes who the teacher is."""
        data = {"teacher": self.config.teacher, "fingerprint": self.fingerprint}
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def check_same(self, path: Path) -> None:
        """Raises: ConfigError if the run that wrote `path` (`record`) began with another teacher,
        CheckpointError if it is damaged.
        """
        try:
            known = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is missing or damaged ({error}); start over with --fresh"
            ) from None
        if known != self.fingerprint:
            raise ConfigError(
                f"the teacher in {self.config.teacher} is not the one this run began with "
                f"(fingerprint {self.fingerprint[:12]}, then {known[:12]}); restore it, or start "
                "over with --fresh"
            )

    @contextlib.contextmanager
    def _recording(self, model: LanguageModel) -> Iterator[list[Tensor]]:
        """A list that gets what stands in front of each norm [B, T, D] in `model`'s forward."""
        features: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor]) -> None:
            features.append(args[0])

        norms = _norms(model) if self.config.features > 0 else []
        hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
        try:
            yield features
        finally:
            for hook in hooks:
                hook.remove()


def _norms(model: LanguageModel) -> list[nn.Module]:
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    inner = [norm for layer in layers for norm in (layer.mixer_norm, layer.ffn_norm)]
    return [*inner, model.norm]


def divergence(logits: Tensor, wanted: Tensor, reverse: float, temperature: float) -> Tensor:
    """D [B, T] of the student's and the teacher's logits [B, T, N], in float32."""
    q = F.log_softmax(logits.float() / temperature, -1)
    p = F.log_softmax(wanted.float() / temperature, -1)
    total = torch.zeros((), device=logits.device)
    if reverse < 1:
        total = total + (1 - reverse) * (p.exp() * (p - q)).sum(-1)
    if reverse > 0:
        total = total + reverse * (q.exp() * (q - p)).sum(-1)
    return temperature**2 * total


def feature_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """E of features [B, T, D] in front of each norm."""
    errors = [
        (x.float() - y.float()).square().sum() / y.float().square().sum()
        for x, y in zip(ours, theirs, strict=True)
    ]
    return torch.stack(errors).mean()
