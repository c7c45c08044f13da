"""Parameter groups, optimisers, and learning-rate schedules as pure functions of progress."""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.errors import ConfigError, did_you_mean
from spikelm.neurons import Neuron
from spikelm_train.config import OptimConfig

# The order of the groups, which checkpoints count on.
MATRICES, DECAYED, OTHERS, NEURONS = range(4)

# Devices that torch has a fused AdamW for.
FUSED = ("cpu", "cuda", "mps", "xpu")

_log = logging.getLogger(__name__)


def lr_factor(config: OptimConfig, progress: float) -> float:
    """Learning rate over peak rate when `progress` (0 to 1) of the run is over.

    Linear warm-up from 0, then cosine to `final_lr_fraction`, or constant with a linear decay
    to it over the last `wsd_decay_fraction` (wsd), or constant.
    """
    final, warmup = config.final_lr_fraction, config.warmup_fraction
    if progress < warmup:
        return progress / warmup
    if config.schedule == "cosine":
        x = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * x))
    if config.schedule == "wsd" and progress > 1 - config.wsd_decay_fraction:
        return final + (1 - final) * (1 - progress) / config.wsd_decay_fraction
    return 1.0


def parameter_groups(
    model: nn.Module,
    config: OptimConfig,
    wanted: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> list[dict[str, Any]]:
    """Projection weights with decay; embeddings, norms, biases, convolutions and neurons without.

    A row of the embedding gets a gradient only when its token occurs, so decay would shrink rare
    tokens; a head tied to it goes with it. Parameters without gradient are left out, and those
    that are not `wanted`. A group has a "weight_decay", a "lr_factor" (its learning rate over
    `config.lr`) and "matrices", whether Muon's method is for it: projection weights of hidden
    layers, not the head's. Patterns of `config` go before all of this.

    Raises: ConfigError for a pattern that no trained parameter's name matches.
    """
    modules = model.modules() if config.neuron_lr != 1 else ()
    apart = {id(p) for module in modules if isinstance(module, Neuron) for p in module.parameters()}
    muon = config.name == "muon"
    # A tied weight is named once, as the embedding's.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for key, patterns in (("rates", config.rates), ("decays", config.decays)):
        _check_patterns(key, patterns, trained)
    groups: dict[tuple[int, float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        if not wanted(parameter):
            continue
        decay, factor, order = 0.0, 1.0, OTHERS
        if name.endswith("linear.weight"):
            hidden = muon and not name.startswith("head.")
            order = MATRICES if hidden else DECAYED
            decay, factor = config.weight_decay, config.muon_lr if hidden else 1.0
        elif id(parameter) in apart:
            factor, order = config.neuron_lr, NEURONS
        decay = _first_match(name, config.decays, decay)
        factor = _first_match(name, config.rates, factor)
        groups.setdefault((order, decay, factor), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": key[1], "lr_factor": key[2], "matrices": not key[0]}
        for key in sorted(groups)
    ]


def _check_patterns(key: str, patterns: Mapping[str, float], names: Collection[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = did_you_mean(pattern, names)
            if near.startswith("allowed"):
                near = f"the names are those of model.safetensors, such as {next(iter(names))}"
            raise ConfigError(f"optim.{key}: '{pattern}' matches no trained parameter; {near}")


def _first_match(name: str, patterns: Mapping[str, float], default: float) -> float:
    return next((x for p, x in patterns.items() if fnmatch.fnmatchcase(name, p)), default)


def make_optimizer(
    model: nn.Module,
    config: OptimConfig,
    device: torch.device | None = None,
    wanted: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> torch.optim.Optimizer:
    """The optimiser of a recipe over the trainable parameters of `model` that are `wanted`, which
    will be on `device` (by default the CPU) when it steps.
    """
    groups = parameter_groups(model, config, wanted)
    betas = (config.betas[0], config.betas[1])
    if config.name == "spam":
        return SPAM(
            groups,
            lr=config.lr,
            betas=betas,
            eps=config.eps,
            threshold=config.spam_threshold,
            clip_after=config.spam_clip_after,
            reset_every=config.spam_reset_every,
            warmup_steps=config.spam_warmup_steps,
            density=config.spam_density,
        )
    rest = [group for group in groups if not group["matrices"]]
    adamw = adamw_over(
        rest, device or torch.device("cpu"), lr=config.lr, betas=betas, eps=config.eps
    )
    matrices = [group for group in groups if group["matrices"]]
    if not matrices:
        return adamw
    return MuonAdamW(matrices, adamw, lr=config.lr, momentum=config.muon_momentum)


def adamw_over(
    groups: list[dict[str, Any]], device: torch.device, **settings: Any
) -> torch.optim.AdamW:
    """AdamW for parameters on `device`: one kernel for all of them where there is one."""
    fused = device.type in FUSED
    if not fused:
        _log.warning("torch has no fused AdamW for %s, so steps are slower", device.type)
    return torch.optim.AdamW(groups, **settings, fused=fused)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the rest, as one optimiser.

    Muon orthogonalises the momentum of each matrix [A, B] and scales it by 0.2 sqrt(max(A, B)), so
    that its updates are as large as AdamW's and one learning rate and decay serve both (Jordan et
    al. 2024; Liu et al. 2025, arXiv 2502.16982). Both parts are torch's.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        adamw: torch.optim.AdamW,
        lr: float,
        momentum: float,
    ) -> None:
        self.adamw = adamw
        self.muon = torch.optim.Muon(
            matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        super().__init__([*self.muon.param_groups, *adamw.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, to AdamW's unless they are Muon's already."""
        if "lr" not in param_group:
            self.adamw.add_param_group(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """The groups and the state are the same objects here and in the two parts."""
        self.muon.state = self.adamw.state = self.state
        for part, matrices in ((self.muon, True), (self.adamw, False)):
            part.param_groups = [
                g for g in self.param_groups if g.get("matrices", False) is matrices
            ]


class SPAM(torch.optim.Optimizer):
    """Adam that clips gradient spikes and forgets its moments now and then.

    With m, V the moments before the step and s the steps since the start or the last reset:
    every `reset_every` steps m = V = 0 (the step count of the bias correction goes on); if
    s >= clip_after, entries with g^2 > threshold V become sign(g) sqrt(threshold V); after a
    reset updates are scaled by 1 - d(s), d a cosine from 0.99 to 0 over `warmup_steps`.
    density < 1 keeps moments for, and updates, only a random part of each matrix's entries,
    drawn anew at each reset. Weight decay is decoupled and not scaled by the warm-up.
    Source: Huang et al. 2025, arXiv 2501.06842.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        threshold: float = 5000.0,
        clip_after: int = 20,
        reset_every: int = 500,
        warmup_steps: int = 150,
        density: float = 1.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "threshold": threshold,
            "clip_after": clip_after,
            "reset_every": reset_every,
            "warmup_steps": warmup_steps,
            "density": density,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, (group, parameter) in enumerate(self._trained()):
            self._update(parameter, group, index)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state; torch casts every tensor of it to the parameter's dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "mask" in state:
                state["mask"] = state["mask"].bool()

    def _trained(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield group, parameter

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], index: int) -> None:
        state = self.state[parameter]
        done = int(state.get("step", 0))
        since = done % group["reset_every"]
        if since == 0:
            self._reset(parameter, state, group["density"], seed=done * 1_000_003 + index)
        assert parameter.grad is not None
        mask: Tensor | None = state.get("mask")
        grad = parameter.grad if mask is None else parameter.grad[mask]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if since >= group["clip_after"]:
            limit = group["threshold"] * v
            grad = torch.where(grad.square() > limit, grad.sign() * limit.sqrt(), grad)
        beta1, beta2 = group["betas"]
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = 1.0 if done < group["reset_every"] else reset_scale(since, group["warmup_steps"])
        denominator = (v / (1 - beta2 ** (done + 1))).sqrt_().add_(group["eps"])
        update = m / denominator * (-group["lr"] * scale / (1 - beta1 ** (done + 1)))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if mask is None:
            parameter.add_(update)
        else:
            parameter[mask] += update
        state["step"] = done + 1

    @staticmethod
    def _reset(parameter: Tensor, state: dict[str, Any], density: float, seed: int) -> None:
        kept = parameter
        if density < 1 and parameter.ndim == 2:
            # A generator of its own: a resumed run draws the same masks.
            generator = torch.Generator().manual_seed(seed)
            mask = torch.rand(parameter.shape, generator=generator) < density
            state["mask"] = mask.to(parameter.device)
            kept = parameter[state["mask"]]
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(kept), torch.zeros_like(kept)


def reset_scale(since: int, warmup_steps: int) -> float:
    """Scale of SPAM's update `since` steps after a reset: 0.01 rising to 1 at `warmup_steps`."""
    if since >= warmup_steps:
        return 1.0
    return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / warmup_steps))
