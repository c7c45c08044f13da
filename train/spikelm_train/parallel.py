"""How a model is spread over processes: copies, shards (FSDP2), or DeepSpeed's ZeRO.

The only file that imports accelerate. All three do the same arithmetic: every process takes its
rows of the step's global batch, gradients are averaged over processes, and their norm, over all
weights but the neurons', limits the step.

Neurons stay whole on every process, in float32, with an optimiser of their own where the weights
are sharded: they are a few numbers per channel, and the rules that steer their silence write to
them (an engine would keep them flattened, cast to bfloat16, or absent).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spikelm.doctor import cpu_flags
from spikelm.errors import CheckpointError, ConfigError, MissingExtraError
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron
from spikelm_train.config import TrainConfig
from spikelm_train.lora import merged
from spikelm_train.optim import adamw_over, make_optimizer

Strategy = Literal["copies", "shards", "zero"]

_ON = {"1", "true", "yes"}


def resolve_precision(wanted: Literal["auto", "bf16", "fp32"]) -> Literal["bf16", "fp32"]:
    """What `auto` means on this machine: bf16 where its matrix products are native."""
    if wanted != "auto":
        return wanted
    flags = cpu_flags()
    cuda = torch.cuda.is_available()
    pays = torch.cuda.is_bf16_supported() if cuda else flags["avx512_bf16"] or flags["amx"]
    return "bf16" if pays else "fp32"


def launched_strategy(shard: bool) -> Strategy:
    """What the launcher of this process asked for, or `shard` did.

    Raises: ConfigError for two of them at once.
    """
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _ON
    # Accelerate's own FSDP2 does not exist on CPUs: there it trains copies and says nothing.
    shard = shard or os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in _ON
    if zero and shard:
        raise ConfigError("--shard and DeepSpeed both share out the weights; take one of them")
    return "zero" if zero else "shards" if shard else "copies"


def make_accelerator(config: TrainConfig, strategy: Strategy = "copies") -> Any:
    """The launcher's view of this process.

    Raises: ConfigError if ranks do not see each other, or a launcher started fewer than it was
    asked for; MissingExtraError.
    """
    try:
        from accelerate.accelerator import Accelerator
        from accelerate.utils.dataclasses import InitProcessGroupKwargs
    except ImportError:
        raise MissingExtraError("accelerate", "train") from None
    env = os.environ
    if "MASTER_ADDR" in env and "WORLD_SIZE" not in env and "ACCELERATE_MIXED_PRECISION" in env:
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as it does on "
            "CPUs; use torchrun --nproc_per_node N -m spikelm_train"
        )
    precision = {"bf16": "bf16", "fp32": "no"}[resolve_precision(config.precision)]
    options: dict[str, Any] = {"mixed_precision": precision}
    on_cpu = not torch.cuda.is_available()
    if strategy == "zero":
        _check_deepspeed()
        options["gradient_accumulation_steps"] = config.grad_accum_steps
        if on_cpu:
            # Without a backend named, each rank takes itself for the only one (accelerate 1.15).
            options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
            _without_shared_memory_kernels()
    else:
        # Without cpu=True every rank of a CPU launch believes it is alone.
        options["cpu"] = on_cpu
    accelerator = Accelerator(**options)
    launched = int(env.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched but accelerate sees {accelerator.num_processes}; "
            "on CPU start them with torchrun --nproc_per_node N -m spikelm_train"
        )
    return accelerator


def _check_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise MissingExtraError("deepspeed", "deepspeed") from None
    # It calls collectives by their former names, at every step.
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)


def _without_shared_memory_kernels() -> None:
    """Spares the C++ compiler and two minutes that DeepSpeed takes for them on CPUs; the process
    group's own collectives are used.
    """
    import deepspeed

    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if compatible is not None:
        compatible["deepspeed_shm_comm"] = False


class Parallel(Protocol):
    """A model, its optimiser, and the processes they are spread over."""

    strategy: Strategy

    @property
    def model(self) -> Callable[..., Any]:
        """What is called to train: `LanguageModel.forward`."""
        ...

    @property
    def evaluated(self) -> Callable[..., Any]:
        """What is called to validate: all processes call it equally often."""
        ...

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and its backward; `last` of the step or not."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`; averages all of them over processes after the last."""
        ...

    def update(self, lr: float, max_norm: float | None) -> float:
        """One step of the optimiser at `lr`, unless a gradient is not finite; the norm of the
        weights' gradients, which `max_norm` limits. Gradients are zero after it.
        """
        ...

    def drop(self) -> None:
        """Forgets the gradients."""
        ...

    def state(self) -> dict[str, Any]:
        """What this process alone puts into a checkpoint; empty where another one has it."""
        ...

    def save_shards(self, folder: Path) -> None:
        """Writes what all processes put there together."""
        ...

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Continues from `state()` (of rank 0) and what `save_shards` wrote."""
        ...

    def whole(self) -> LanguageModel:
        """The model with float32 weights in one piece; to be called by all processes."""
        ...


def make_parallel(
    strategy: Strategy,
    accelerator: Any,
    module: LanguageModel,
    config: TrainConfig,
    extra: Iterable[nn.Parameter] = (),
) -> Parallel:
    """`module` spread as `strategy` says; `extra` parameters are trained along, without decay.

    Raises: ConfigError for a recipe that the strategy cannot run.
    """
    extra = list(extra)
    if strategy == "copies":
        return Copies(accelerator, module, config, extra)
    if extra:
        raise ConfigError(
            "distill.features between models of different widths trains a matrix, which is not "
            "spread over processes; set distill.features=0, or run without --shard and DeepSpeed"
        )
    if config.lora.rank:
        raise ConfigError(
            "lora: its matrices are not shared out; run without --shard and DeepSpeed, a copy of "
            "the model in every process"
        )
    if config.ema is not None:
        raise ConfigError(
            "ema: the average is kept whole, and weights are shared out here; leave it out, or run "
            "without --shard and DeepSpeed"
        )
    if config.optim.name != "adamw":
        raise ConfigError(
            f"optim.name: {config.optim.name} updates whole matrices, and weights are shared out "
            "here; take adamw, or run without --shard and DeepSpeed"
        )
    if strategy == "shards":
        return Shards(accelerator, module, config)
    return Zero(accelerator, module, config)


class Copies:
    """The whole model in every process (DDP), or one process alone."""

    strategy: Strategy = "copies"

    def __init__(
        self,
        accelerator: Any,
        module: LanguageModel,
        config: TrainConfig,
        extra: list[nn.Parameter],
    ) -> None:
        self.accelerator, self.module, self.lora = accelerator, module, config.lora
        optimizer = make_optimizer(module, config.optim, accelerator.device)
        if extra:
            optimizer.add_param_group({"params": extra, "weight_decay": 0.0})
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self.evaluated: Callable[..., Any] = module
        self._neurons = learned_neurons(module)
        self._weights = _other_parameters(module, self._neurons)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        if last:
            return contextlib.nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(self.model)
        return context

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def update(self, lr: float, max_norm: float | None) -> float:
        norm = float(clip(self._weights, self._neurons, max_norm))
        if math.isfinite(norm) and finite(self._neurons):
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.drop()
        return norm

    def drop(self) -> None:
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        if not self.accelerator.is_main_process:
            return {}
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save_shards(self, folder: Path) -> None: ...

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def whole(self) -> LanguageModel:
        if not self.lora.rank:
            return self.module
        return assembled(self.module, merged(self.module.state_dict(), self.lora))


class Shards:
    """Weights, gradients and moments shared out, layer by layer gathered when they are used
    (FSDP2: torch's `fully_shard`). Products are autocast as in one process, sums over processes
    are in float32. A checkpoint is torch's distributed one: any number of processes reads it.
    """

    strategy: Strategy = "shards"

    def __init__(self, accelerator: Any, module: LanguageModel, config: TrainConfig) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.accelerator, self.module = accelerator, module
        self.device: torch.device = accelerator.device
        _join_alone(self.device)
        module.to(self.device)
        mesh = init_device_mesh(self.device.type, (accelerator.num_processes,))
        whole = {p for neuron in module.neurons() for p in neuron.parameters()}
        for layer in module.layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        # Layers return views of their inputs; nobody changes them in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        self._root = fully_shard(module, mesh=mesh, ignored_params=whole)
        self._neurons = learned_neurons(module)
        self._weights = _other_parameters(module, self._neurons)
        self.optimizers = _optimizers(module, config, accelerator.device, self._neurons)
        self.evaluated = self.model
        self._last = True

    def model(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerator.autocast():
            logits, state = self.module(*args, **kwargs)
        return logits.float(), state

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        self._root.set_requires_gradient_sync(last)
        self._last = last
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self._last:
            average_gradients(self._neurons, self.accelerator.num_processes)

    def update(self, lr: float, max_norm: float | None) -> float:
        norm = float(clip(self._weights, self._neurons, max_norm))
        ok = math.isfinite(norm) and finite(self._neurons)
        for optimizer in self.optimizers if ok else ():
            set_lr(optimizer, lr)
            optimizer.step()
        self.drop()
        return norm

    def drop(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {}

    def save_shards(self, folder: Path) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_saver import save

        try:
            save(self._sharded(), checkpoint_id=folder)
        except CheckpointException as error:
            raise CheckpointError(f"{folder}: {' '.join(str(error).split()):.200}") from None

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict import set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        found = self._sharded()
        try:
            load(found, checkpoint_id=folder)
        except CheckpointException as error:
            raise CheckpointError(f"{folder}: {error}") from None
        set_state_dict(
            self.module,
            self.optimizers,
            model_state_dict=found["model"],
            optim_state_dict=found["optimizer"],
        )

    def _sharded(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.module, self.optimizers)
        return {"model": model, "optimizer": optimizer}

    def whole(self) -> LanguageModel:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
        weights: dict[str, Any] = get_model_state_dict(self.module, options=options)
        return assembled(self.module, weights)


class Zero:
    """DeepSpeed's engine as Accelerate sets it up from the launcher's configuration."""

    strategy: Strategy = "zero"
    FOLDER = "zero"

    def __init__(self, accelerator: Any, module: LanguageModel, config: TrainConfig) -> None:
        if config.model.weights.bits is not None or config.model.weights.bits_of:
            raise ConfigError(
                "model.weights: rounding in training needs whole float32 matrices; leave it out, "
                "or run without DeepSpeed"
            )
        if config.guard.spike != "ignore":
            raise ConfigError(
                "guard.spike: DeepSpeed cannot leave out a step whose gradients it has; set it to "
                "ignore, or run without DeepSpeed"
            )
        self.accelerator, self.module = accelerator, module
        module.to(accelerator.device)
        self.neurons = take_out_neurons(module)
        self._neurons = [p for p in self.neurons.values() if p.requires_grad]
        plugin = accelerator.state.deepspeed_plugin
        fill_deepspeed(plugin.deepspeed_config, config, resolve_precision(config.precision))
        self.optimizers = _optimizers(module, config, accelerator.device, self._neurons)
        self.model, _ = accelerator.prepare(module, self.optimizers[0])
        self.engine: Any = self.model
        self.evaluated = self.model
        # What bfloat16 does by itself: a step whose gradients are not finite is left out.
        if hasattr(self.engine.optimizer, "check_grad_overflow"):
            self.engine.optimizer.check_grad_overflow = True
        self._last = True

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(last)
        self._last = last
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)
        if self._last:
            average_gradients(self._neurons, self.accelerator.num_processes)

    def update(self, lr: float, max_norm: float | None) -> float:
        set_lr(self.engine.optimizer, lr)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        for optimizer in self.optimizers[1:]:
            if math.isfinite(norm) and finite(self._neurons):
                _scale(self._neurons, norm, max_norm)
                set_lr(optimizer, lr)
                optimizer.step()
            optimizer.zero_grad()
        return norm

    def drop(self) -> None:
        raise NotImplementedError("guard.spike, which would ask for it, is refused with DeepSpeed")

    def state(self) -> dict[str, Any]:
        if not self.accelerator.is_main_process:
            return {}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers[1:]]
        return {"neurons": self.neurons, "neuron_optimizers": optimizers}

    def save_shards(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=self.FOLDER, save_latest=False)

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        self.engine.load_checkpoint(str(folder), tag=self.FOLDER)
        with torch.no_grad():
            for name, parameter in self.neurons.items():
                parameter.copy_(state["neurons"][name])
        for optimizer, found in zip(self.optimizers[1:], state["neuron_optimizers"], strict=True):
            optimizer.load_state_dict(found)

    def whole(self) -> LanguageModel:
        from deepspeed.utils.tensor_fragment import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.engine.module.named_parameters():
            value = safe_get_full_fp32_param(parameter)
            weights[name] = (parameter if value is None else value).detach()
        return assembled(self.module, weights | self.neurons)


def fill_deepspeed(settings: dict[str, Any], config: TrainConfig, precision: str) -> None:
    """Puts the recipe's numbers where the DeepSpeed configuration says auto, or nothing.

    Raises: ConfigError where it says something else.
    """
    wanted = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps,
        "gradient_clipping": config.optim.grad_clip or 0.0,
    }
    for name, value in wanted.items():
        if settings.get(name, "auto") not in ("auto", value):
            raise ConfigError(
                f"the DeepSpeed configuration says {name} = {settings[name]}, the recipe {value}; "
                "let it say auto"
            )
        settings[name] = value
    for name in ("optimizer", "scheduler"):
        if name in settings:
            raise ConfigError(f"the DeepSpeed configuration has {name!r}, the recipe too; drop it")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage == 0 and precision == "bf16":
        raise ConfigError(
            "DeepSpeed without ZeRO trains differently in bfloat16; take stage 1, 2 or 3, "
            "precision=fp32, or torchrun without DeepSpeed"
        )


def learned_neurons(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of neurons that the optimiser trains."""
    found = (p for m in module.modules() if isinstance(m, Neuron) for p in m.parameters())
    return [parameter for parameter in found if parameter.requires_grad]


def _other_parameters(module: nn.Module, neurons: list[nn.Parameter]) -> list[nn.Parameter]:
    apart = set(map(id, neurons))
    return [p for p in module.parameters() if p.requires_grad and id(p) not in apart]


def take_out_neurons(module: nn.Module) -> dict[str, nn.Parameter]:
    """The neurons' parameters by their names in `module`, which no longer lists them: they remain
    attributes of their neurons.
    """
    taken: dict[str, nn.Parameter] = {}
    for path, neuron in module.named_modules():
        if isinstance(neuron, Neuron):
            for name, parameter in list(neuron.named_parameters(recurse=False)):
                delattr(neuron, name)
                # nn.Module's own __setattr__ would list it again.
                object.__setattr__(neuron, name, parameter)
                taken[f"{path}.{name}"] = parameter
    return taken


def _optimizers(
    module: LanguageModel,
    config: TrainConfig,
    device: torch.device,
    neurons: list[nn.Parameter],
) -> list[torch.optim.Optimizer]:
    """One for the weights, which may be shards, and one for the neurons where any are trained."""
    apart = set(map(id, neurons))
    first = make_optimizer(module, config.optim, device, lambda p: id(p) not in apart)
    if not neurons:
        return [first]
    c = config.optim
    groups = [{"params": neurons, "weight_decay": 0.0, "lr_factor": c.neuron_lr}]
    betas = (c.betas[0], c.betas[1])
    return [first, adamw_over(groups, device, lr=c.lr, betas=betas, eps=c.eps)]


def set_lr(optimizer: Any, lr: float) -> None:
    """The learning rate of every group, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def clip(
    weights: list[nn.Parameter], neurons: list[nn.Parameter], max_norm: float | None
) -> Tensor:
    """Scales all gradients so that those of `weights` have `max_norm` at most; the norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
        _scale(neurons, float(norm), max_norm)
    return norm


def _scale(neurons: list[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """What clipping the weights' gradients of `norm` to `max_norm` does to the neurons'."""
    if max_norm is not None:
        for parameter in neurons:
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))


def finite(parameters: list[nn.Parameter]) -> bool:
    """Whether the gradients are."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return not grads or math.isfinite(float(nn.utils.get_total_norm(grads)))


def average_gradients(parameters: list[nn.Parameter], num_processes: int) -> None:
    """Averages over processes the gradients of what every process has whole."""
    if num_processes == 1 or not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    parts = (flat / num_processes).split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def assembled(like: LanguageModel, weights: dict[str, Tensor]) -> LanguageModel:
    """A model of the configuration `like` has, with `weights` in float32 on the CPU."""
    with torch.device("meta"):
        model = LanguageModel(like.config)
    state = {name: tensor.detach().float().cpu() for name, tensor in weights.items()}
    if like.config.tie_embeddings:
        state["head.linear.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _join_alone(device: torch.device) -> None:
    """A process group of one where no launcher made one: shards need a group."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
        )


def read_zero(folder: Path) -> dict[str, Tensor]:
    """The float32 weights that `Zero.save_shards` wrote, without the neurons'.

    Raises: MissingExtraError; CheckpointError if they are damaged.
    """
    _check_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it counts what it finds
            found: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
                str(folder), tag=Zero.FOLDER
            )
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{folder}: {' '.join(str(error).split()):.200}") from None
    return found


def read_shards(folder: Path, like: LanguageModel) -> dict[str, Tensor]:
    """The weights that `Shards.save_shards` wrote of a model such as `like`.

    Raises: CheckpointError if they are damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    weights = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in like.state_dict().items()}
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    try:
        load({"model": weights}, checkpoint_id=folder, no_dist=True)
    except (CheckpointException, OSError, UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{folder}: {' '.join(str(error).split()):.200}") from None
    return weights
