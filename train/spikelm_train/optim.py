"""Parameter groups, optimisers, and learning-rate schedules as pure functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.neurons import Neuron
from spikelm_train.config import OptimConfig


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
    weight_decay: float,
    neuron_lr: float = 1.0,
    wanted: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> list[dict[str, Any]]:
    """Projection weights with decay; embeddings, norms, biases, convolutions and neurons without.

    A row of the embedding gets a gradient only when its token occurs, so decay would shrink rare
    tokens; a head tied to it goes with it. Parameters without gradient are left out, and those
    that are not `wanted`. Neurons have a group of their own, with an "lr_factor", where
    `neuron_lr` is not 1.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    neurons: list[nn.Parameter] = []
    modules = model.modules() if neuron_lr != 1 else ()
    apart = {id(p) for module in modules if isinstance(module, Neuron) for p in module.parameters()}
    # A tied weight is named once, as the embedding's.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and wanted(parameter):
            group = decayed if name.endswith("linear.weight") else others
            (neurons if id(parameter) in apart else group).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": neurons, "weight_decay": 0.0, "lr_factor": neuron_lr},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module,
    config: OptimConfig,
    wanted: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> torch.optim.Optimizer:
    """The optimiser of a recipe over the trainable parameters of `model` that are `wanted`."""
    groups = parameter_groups(model, config.weight_decay, config.neuron_lr, wanted)
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
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
