"""One recipe on one process, on two, and with weights shared out: the same training."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spikelm import checkpoint
from spikelm.errors import ConfigError, MissingExtraError
from spikelm_train.checkpoints import step_folder
from spikelm_train.cli import main
from spikelm_train.config import load_recipe
from spikelm_train.parallel import (
    assembled,
    clip,
    fill_deepspeed,
    launched_strategy,
    make_accelerator,
    make_parallel,
    take_out_neurons,
)
from spikelm_train.report import read_metrics
from spikelm_train.trainer import Trainer

Recipe = Callable[..., Path]
Make = Callable[..., Trainer]

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ALONE = ("--set", "grad_accum_steps=4")
SHOWN = ("loss", "gradient_norm", "silent_fraction", "validation_loss")

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")


def rich_recipe(tiny: dict[str, Any], folder: Path) -> dict[str, Any]:
    rows = [
        f"Document {i} says that cat number {i * i} sat on mat {i % 7}. " * 3 for i in range(40)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    zone = {"kind": "integer", "dead_zone": 0.5, "target_silence": 0.5, "learn": "dead_zone"}
    model = {**tiny["model"], "tie_embeddings": True}
    return {
        **tiny,
        "model": {**model, "neurons": {**model["neurons"], "mixer_input": zone}},
        "data": {**tiny["data"], "sources": [str(folder / "text.jsonl")]},
        "steps": 8,
        "grad_accum_steps": 2,
        "l1_hidden": 1e-3,
        "eval_every": 4,
        "save_every": 2,
        "keep_last": 9,
        "sample_every": 8,
        "sample_tokens": 2,
    }


def run(*command: str) -> str:
    """What Python prints, started in the checkout's root."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")}
    done = subprocess.run(
        [sys.executable, *command],
        env={**env, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def assert_same_curve(a: Path, b: Path, rel: float = 1e-4, names: Sequence[str] = SHOWN) -> None:
    left, right = read_metrics(a), read_metrics(b)
    assert len(left) == len(right)
    for one, two in zip(left, right, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & set(names):
            assert one[name] == pytest.approx(two[name], rel=rel), (name, one, two)


def assert_same_model(a: Path, b: Path, **tolerance: float) -> None:
    left, right = (checkpoint.load(str(folder)).model.state_dict() for folder in (a, b))
    torch.testing.assert_close(left, right, **tolerance)


@pytest.fixture(scope="module")
def rich(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with accumulation, trained and steered zones, L1, a tied head, four checkpoints;
    one process has run it in the folder `one` beside it.
    """
    folder = tmp_path_factory.mktemp("rich")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(rich_recipe(tiny, folder)))
    assert (
        main([str(path), "--out", str(folder / "one"), "--corpus", str(folder / "data"), *ALONE])
        == 0
    )
    return path


# Every rank runs the commands one after the other, which spares most of the time of a launch.
LAUNCHED = """
import json, os, sys
from accelerate.state import AcceleratorState
from spikelm.cli import main

for arguments, env in json.load(open(sys.argv[1])):
    AcceleratorState._reset_state(True)
    os.environ.update(env)
    if arguments[0] == "forget":
        if os.environ["RANK"] == "0":
            os.rename(arguments[1], arguments[2])
            for folder in arguments[3:]:
                os.rename(folder, folder + ".forgotten")
    elif status := main(["train", *arguments]):
        sys.exit(status)
"""
STRAIGHT = "straight.safetensors"


def forgetting(out: Path) -> list[str]:
    """A command after which the run continues after step 4 of 8."""
    later = [step_folder(out, 6), step_folder(out, 8)]
    return ["forget", *map(str, [out / "model.safetensors", out / STRAIGHT, *later])]


def test_two_processes_train_what_one_does(rich: Path, tmp_path: Path) -> None:
    """Copies, shards and ZeRO; then copies and shards go on with one process, ZeRO with two."""
    one, data = rich.parent / "one", ["--corpus", str(rich.parent / "data")]
    options = {"copies": [], "shards": ["--shard"]}
    commands: list[tuple[list[str], dict[str, str]]] = [
        ([str(rich), "--out", str(tmp_path / name), *data, *given], {})
        for name, given in options.items()
    ]
    stages = (1, 2, 3) if HAS_DEEPSPEED else ()
    for stage in stages:
        env = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"configs/deepspeed/zero{stage}.json",
        }
        out = tmp_path / f"zero{stage}"
        train = [str(rich), "--out", str(out), *data]
        commands += [(train, env)]
        if stage > 1:  # stage 1 writes what stage 2 does
            commands += [(forgetting(out), env), (train, env)]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    (tmp_path / "launched.py").write_text(LAUNCHED)
    launched = [*TORCHRUN, "2", str(tmp_path / "launched.py"), str(tmp_path / "commands.json")]
    shown = run(*launched)
    assert shown.count("2 x cpu") == len(options) + len(stages) + len(stages[1:])
    for name in [*options, *(f"zero{stage}" for stage in stages)]:
        assert_same_curve(one, tmp_path / name)
        assert_same_model(one, tmp_path / name, rtol=1e-3, atol=1e-4)
    for stage in stages[1:]:
        out = tmp_path / f"zero{stage}"
        assert (out / "model.safetensors").read_bytes() == (out / STRAIGHT).read_bytes()
    alone: list[Any] = []
    for name, given in options.items():
        out = tmp_path / name
        alone += [(forgetting(out), {}), ([str(rich), "--out", str(out), *data, *given], {})]
    (tmp_path / "commands.json").write_text(json.dumps(alone))
    shown = run(*TORCHRUN, "1", *launched[-2:])
    assert shown.count("1 x cpu") == shown.count("continuing after step 4") == 2
    for name in options:
        assert_same_curve(one, tmp_path / name)
        assert_same_model(one, tmp_path / name, rtol=1e-3, atol=1e-4)


@needs_deepspeed
def test_accelerate_launches_deepspeed(rich: Path, tmp_path: Path) -> None:
    """The command of train/README.md, in bfloat16, where the weights are rounded too."""
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/zero2.yaml",
    ]
    data = ["--corpus", str(rich.parent / "data"), "--set", "precision=bf16"]
    command = ["-m", "spikelm_train", str(rich), "--out", str(tmp_path / "zero"), *data]
    assert "2 x cpu, bf16" in run(*launcher, *command)
    losses = ("loss", "validation_loss")
    assert_same_curve(rich.parent / "one", tmp_path / "zero", rel=0.05, names=losses)


KILLED = """
import os, random, signal, sys, time
from spikelm.cli import main

random.seed(int(sys.argv[1]))
for attempt in range(10):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os._exit(main(["train", *sys.argv[2:]]))
    os.close(writer)
    left = random.randint(1, 4)
    with open(reader) as shown:
        for line in shown:
            left -= line.startswith("step ")
            if not left:
                time.sleep(random.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
                break
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit("it ended before it was killed")
sys.exit(main(["train", *sys.argv[2:]]))
"""


def test_a_run_killed_ten_times_ends_with_the_same_bits(
    recipe: Recipe, tiny: dict[str, Any], tmp_path: Path
) -> None:
    model = {**tiny["model"], "dropout": 0.1}
    path = recipe(steps=45, save_every=2, l1_hidden=1e-3, model=model)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folders = [tmp_path / "whole", tmp_path / "killed"]
    arguments = [[str(path), "--out", str(f), "--corpus", str(tmp_path / "c")] for f in folders]
    assert main(arguments[0]) == 0
    run(str(script), "7", *arguments[1])
    whole, killed = ((f / "model.safetensors").read_bytes() for f in folders)
    assert whole == killed
    a, b = ([r for r in read_metrics(f) if "loss" in r] for f in folders)
    assert [r["loss"] for r in a] == [r["loss"] for r in b]


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith("ACCELERATE") or name in ("MASTER_ADDR", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_the_launcher_says_how_weights_are_spread(no_launcher: pytest.MonkeyPatch) -> None:
    assert launched_strategy(shard=False) == "copies"
    assert launched_strategy(shard=True) == "shards"
    no_launcher.setenv("ACCELERATE_USE_FSDP", "true")
    assert launched_strategy(shard=False) == "shards"
    no_launcher.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert launched_strategy(shard=False) == "zero"
    with pytest.raises(ConfigError, match="--shard and DeepSpeed"):
        launched_strategy(shard=True)


def test_a_launch_of_one_where_several_were_asked_for(
    recipe: Recipe, no_launcher: pytest.MonkeyPatch
) -> None:
    # What `accelerate launch --cpu --num_processes 2` leaves in the environment of its one process.
    no_launcher.setenv("MASTER_ADDR", "127.0.0.1")
    no_launcher.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ConfigError, match="started one.*torchrun"):
        make_accelerator(load_recipe(str(recipe())))


def test_without_deepspeed(recipe: Recipe, no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"spikelm\[deepspeed\]"):
        make_accelerator(load_recipe(str(recipe())), "zero")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5, the recipe 1.0; let it say auto"),
        ({"optimizer": {"type": "Adam"}}, "has 'optimizer', the recipe too; drop it"),
        ({"scheduler": {"type": "WarmupLR"}}, "has 'scheduler'"),
        ({"zero_optimization": {"stage": 0}}, "without ZeRO trains differently in bfloat16"),
    ],
)
def test_deepspeed_settings_that_contradict_the_recipe(
    recipe: Recipe, settings: dict[str, Any], message: str
) -> None:
    config = load_recipe(str(recipe()), ["precision=bf16"])
    given = {"zero_optimization": {"stage": 2}, **settings}
    with pytest.raises(ConfigError, match=message):
        fill_deepspeed(given, config, "bf16")


def test_deepspeed_settings_are_the_recipes(recipe: Recipe) -> None:
    config = load_recipe(str(recipe(grad_accum_steps=3)))
    given = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    fill_deepspeed(given, config, "fp32")
    assert given["gradient_clipping"] == 1.0
    assert given["gradient_accumulation_steps"] == 3
    assert given["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("strategy", ["shards", "zero"])
def test_recipes_that_need_whole_matrices(make: Make, strategy: Any) -> None:
    trainer = make("optim.name=spam")
    with pytest.raises(ConfigError, match="optim.name: spam updates whole matrices"):
        make_parallel(strategy, trainer.accelerator, trainer.module, trainer.config)


def test_neurons_taken_out_still_work(make: Make) -> None:
    trainer = make("model.neurons.ffn_hidden.learn=dead_zone")
    module, rows = trainer.module, torch.tensor(trainer.sampler.rows(0, 0, 2))
    expected = module(rows)[0]
    names = set(dict(module.named_parameters()))
    neurons = take_out_neurons(module)
    assert len(neurons) == 8
    assert names - set(dict(module.named_parameters())) == set(neurons)
    assert torch.equal(module(rows)[0], expected)
    whole = assembled(module, {**dict(module.named_parameters()), **neurons})
    assert torch.equal(whole.train()(rows)[0], expected)


def test_clipping_leaves_the_neurons_out_of_the_norm(make: Make) -> None:
    weight, zone = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    weight.grad, zone.grad = torch.full((4,), 3.0), torch.full((4,), 100.0)
    assert float(clip([weight], [zone], 1.5)) == 6.0
    assert weight.grad.norm() == pytest.approx(1.5)
    assert zone.grad.tolist() == pytest.approx([25.0] * 4, rel=1e-4)
