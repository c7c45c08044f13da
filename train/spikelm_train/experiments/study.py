"""A study, read from `configs/experiments/` or a path: what is trained, on what text, what counts.

base, set                the recipe of all variants, and what the study changes of it
variants                 name -> what this one changes, and how it is converted
sweeps                   variant -> key -> values: one more variant for every combination
twins                    the variants that the others are compared with
data, seeds, measure     text by split, seeds, and what is measured

No torch here.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikelm.config import find_config, from_dict, load_yaml, to_dict
from spikelm.corpus import describe_builtin
from spikelm.errors import ConfigError, DataError, did_you_mean
from spikelm_train.config import TrainConfig, load_recipe

TRAINED = "trained"
"""Folder of a study's trained models."""
_NAME = re.compile(r"[\w.,=+-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFiles:
    """Text files and globs by split, `$NAME` being an environment variable. All empty is the
    built-in corpus with its own division.
    """

    train: tuple[str, ...] = ()
    """Trained on, without those that `validation` or `test` name."""
    validation: tuple[str, ...] = ()
    """What every run is measured on, and what choices are made by."""
    test: tuple[str, ...] = ()
    """Read by `--test` alone."""

    def __post_init__(self) -> None:
        if bool(self.train) != bool(self.validation) or (self.test and not self.train):
            raise ConfigError(
                "train and validation are given both, with or without test, or nothing is (the "
                "built-in corpus)"
            )

    def resolve(self) -> DataFiles:
        """Files in place of globs and variables, no file in two splits.

        Raises: DataError for a variable that is not set, or a glob that no file matches;
        ConfigError for a file that is held out twice.
        """
        validation, test = _files(self.validation), _files(self.test)
        twice = set(validation) & set(test)
        if twice:
            raise ConfigError(f"data: {min(twice)} is in validation and in test; take it out")
        held_out = {*validation, *test}
        train = tuple(file for file in _files(self.train) if file not in held_out)
        if self.train and not train:
            raise DataError("data.train: every file is held out; name more of them")
        return DataFiles(train=train, validation=validation, test=test)

    def sha256(self) -> str:
        """Of what is trained and validated on; `self` is resolved. The test text is not read."""
        if not self.train:
            return str(describe_builtin()["sha256"])
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for name in split:
                with Path(name).open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            digest.update(b"end of split")
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantConfig:
    """One of the models that are compared."""

    set: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe, as `spikelm train --set` takes them, and their values."""
    teacher: str | None = None
    """The variant above this one whose model of the same seed `distill` learns from."""
    bits: int = 8
    """Bits of the converted weights."""
    bits_of: dict[str, int] = field(default_factory=dict)
    """Bits by tensor class or projection, where they differ."""
    silence: dict[str, float] = field(default_factory=dict)
    """Silent fraction by tensor class for projections that were trained without a neuron."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureConfig:
    """What is measured of every run."""

    max_bytes: int | None = None
    """About so much of the held-out text, an equal share from the middle of every document."""
    calibration_tokens: int = 8192
    """Of the training text, to calibrate conversion on."""
    by_output_weights: int | None = None
    """As of `spikelm convert`; null is its default, which only large matrices reach."""
    decode_rounds: int = 9
    """Turns of every model when decoding is timed; 0 does not time it."""
    decode_tokens: int = 64
    """Tokens of a turn, of which the median counts."""
    decode_position: int = 128
    """Tokens of held-out text in front of them."""
    threads: int = 1
    """Threads of a timed decoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A named study."""

    about: str
    """What is asked."""
    base: str
    """Recipe, by name (`configs/train/`) or path."""
    variants: dict[str, VariantConfig]
    """By name."""
    set: dict[str, Any] = field(default_factory=dict)
    """What all variants change of the recipe."""
    data: DataFiles = field(default_factory=DataFiles)
    """The text."""
    twins: tuple[str, ...] = ()
    """Variants to compare with; of one that is swept, the best point on validation that is
    converted alike."""
    sweeps: dict[str, dict[str, tuple[Any, ...]]] = field(default_factory=dict)
    """Variant -> key of the recipe, or `bits` -> values."""
    seeds: tuple[int, ...] = (0,)
    """Every variant is trained with each."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    """What is measured."""

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds:
            raise ConfigError("a study has one variant and one seed at least")
        for where, names in (("twins", self.twins), ("sweeps", self.sweeps)):
            for name in names:
                if name not in self.variants:
                    near = did_you_mean(name, self.variants)
                    raise ConfigError(f"{where}: no variant '{name}'; {near}")


@dataclass(frozen=True, slots=True)
class Run:
    """One variant with one seed."""

    variant: str
    family: str
    """The variant that was swept to get this one; itself for one that is named."""
    config: TrainConfig
    conversion: dict[str, Any]
    """bits, bits_of and silence."""
    data_sha256: str
    measure: MeasureConfig
    teacher: Run | None = None
    """What `distill.teacher` names: `trained/` and its key."""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def corpus_key(self) -> str:
        """What the tokenised text depends on; paths do not matter, their content does."""
        data = dataclasses.replace(
            _without_paths(self.config).data, sampling="random_window", sequence_length=1
        )
        return _digest(data, self.config.tokenizer, self.data_sha256)

    @property
    def train_key(self) -> str:
        """What the trained model depends on."""
        return _digest(_without_paths(self.config), self.data_sha256)

    @property
    def key(self) -> str:
        """What the results depend on."""
        quality: tuple[int | None, ...] = self.measure.max_bytes, self.measure.calibration_tokens
        if self.measure.by_output_weights is not None:
            quality += (self.measure.by_output_weights,)
        return _digest(self.train_key, self.conversion, quality)

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed}"


def load_study(name: str) -> tuple[str, Study]:
    """A study by name or path, and its name. Raises: ConfigError naming the key."""
    path = find_config("experiments", name)
    return path.stem, from_dict(Study, load_yaml(path))


def plan(
    study: Study, data: DataFiles, *, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Run]:
    """The runs of a study on resolved `data`, all variants of a seed before the next seed.

    A sweep's point that equals its variant is left out. `only` names variants, or one that is
    swept for all of its points.

    Raises: ConfigError for an override that does not apply, or an unknown name in `only`.
    """
    found: list[Run] = []
    sha256 = data.sha256()
    variants = list(_expand(study))
    known = {name for name, _, _ in variants}
    for name in only:
        if name not in known:
            raise ConfigError(f"--only: no variant '{name}'; {did_you_mean(name, known)}")
    for seed in seeds or study.seeds:
        seen: dict[str, Run] = {}
        for name, family, variant in variants:
            overrides = {
                **study.set,
                **variant.set,
                "seed": seed,
                "data.sources": list(data.train),
                "data.validation_sources": list(data.validation),
            }
            teacher = _teacher(name, variant, seen, known)
            if teacher is not None:
                overrides["distill.teacher"] = f"{TRAINED}/{teacher.train_key}"
            # Every JSON value is a YAML value.
            assignments = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
            try:
                config = load_recipe(study.base, assignments)
            except ConfigError as error:
                raise ConfigError(f"variant {name}: {error}") from None
            conversion = {n: getattr(variant, n) for n in ("bits", "bits_of", "silence")}
            run = Run(name, family, config, conversion, sha256, study.measure, teacher)
            if name == family or run.key != seen[family].key:
                seen[name] = run
        found += [r for r in seen.values() if not only or r.variant in only or r.family in only]
    return found


def _teacher(
    name: str, variant: VariantConfig, before: Mapping[str, Run], known: Iterable[str]
) -> Run | None:
    if variant.teacher is None:
        return None
    if variant.teacher not in before:
        given = variant.teacher
        why = "it comes later" if given in known else did_you_mean(given, known)
        raise ConfigError(
            f"variant {name}: teacher '{given}' given; allowed: a variant before it; {why}"
        )
    return before[variant.teacher]


def _expand(study: Study) -> Iterable[tuple[str, str, VariantConfig]]:
    """(name, family, variant) of every variant and point of a sweep."""
    for name, variant in study.variants.items():
        yield _checked(name), name, variant
        sweep = study.sweeps.get(name, {})
        short = [key.rpartition(".")[2] for key in sweep]
        titles = [s if short.count(s) == 1 else key for s, key in zip(short, sweep, strict=True)]
        # Without keys there would be one empty combination.
        for values in itertools.product(*map(enumerate, sweep.values())) if sweep else ():
            point = dict(zip(sweep, (value for _, value in values), strict=True))
            # A mapping or list is named by its place.
            parts = [
                f"{title}={index if isinstance(value, dict | list) else value}"
                for title, (index, value) in zip(titles, values, strict=True)
            ]
            bits = point.pop("bits", variant.bits)
            changed = dataclasses.replace(variant, set={**variant.set, **point}, bits=bits)
            yield _checked(",".join([name, *parts])), name, changed


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"variant '{name}': names are file names: letters, digits and . , = + -")
    return name


def _files(patterns: Sequence[str]) -> tuple[str, ...]:
    """Absolute names of the files, each once, in the order of the patterns."""
    found: dict[str, None] = {}
    for pattern in patterns:
        for name in re.findall(r"\$(\w+)", pattern):
            if not os.environ.get(name):
                raise DataError(
                    f"this study reads {pattern}, but {name} is not set; set it to that folder: "
                    f"{name}=FOLDER spikelm experiment ..."
                )
        path = os.path.expandvars(pattern)
        matches = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not matches:
            raise DataError(f"no file matches {path}; correct the study's data, or unpack its text")
        found.update(dict.fromkeys(map(os.path.realpath, matches)))
    return tuple(found)


def changes(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults, nested.

    What a later version adds, off by default, changes nothing here.
    """
    found: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value, default = getattr(config, spec.name), spec.default
        if spec.default_factory is not dataclasses.MISSING:
            default = spec.default_factory()
        if value != default:
            found[spec.name] = changes(value) if dataclasses.is_dataclass(value) else value
    return found


def _without_paths(config: TrainConfig) -> TrainConfig:
    data = dataclasses.replace(config.data, sources=(), validation_sources=())
    return dataclasses.replace(config, data=data)


def _digest(*parts: object) -> str:
    plain = [
        changes(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else part
        for part in parts
    ]
    text = json.dumps(plain, sort_keys=True, default=to_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def same_recipe(recorded: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether a recorded recipe is `config`, paths of its text and new options aside."""
    return _without_paths(from_dict(TrainConfig, recorded)) == _without_paths(config)
