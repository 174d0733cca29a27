"""How weights are updated: the optimizers and schedules that a config names, or one's own.

    {name: adamw, lr: 1e-3, ...}            a built-in, of `OPTIMIZERS`
    {_target_: torch.optim.SGD, lr: 1e-3}   one's own (see `nsa.plugins`)

One's own optimizer is called with what its signature asks for by these names: `params`, the groups
of all parameters (weight_decay=0 in the groups that do not decay), or `model`. One's own
schedule is a function of `step` and `max_steps` that returns the factor of the learning rate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nsa.plugins import ask, find, label

Options = Mapping[str, Any]


def build_optimizer(options: Options, model: nn.Module) -> Optimizer:
    """The optimizer that a config names; AdamW where it names none.

    Raises:
        ValueError: for an unknown name or option, and for a number that cannot be right.
    """
    named = options if "name" in options or "_target_" in options else {"name": "adamw", **options}
    factory = find("optimizer", named, OPTIMIZERS)
    check_rate(factory.keywords.get("lr", 1.0))
    decay, no_decay = (group["params"] for group in parameter_groups(model, 0.0))
    params = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = ask(factory, params=params, model=model)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer: {label(factory)} made {optimizer!r}, not a torch Optimizer")
    return optimizer


def check_rate(lr: Any) -> None:
    if not isinstance(lr, int | float) or lr <= 0:
        raise ValueError(f"optimizer.lr={lr!r} must be a number above 0")


def adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    fused: bool,
) -> AdamW:
    """AdamW (arXiv 1711.05101) over `parameter_groups`; `fused`: one kernel for all parameters."""
    check_betas(betas)
    groups = parameter_groups(model, weight_decay)
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def check_betas(betas: Sequence[float]) -> None:
    if len(betas) != 2:
        raise ValueError(f"optimizer.betas={list(betas)} must be two numbers")


class MuonAdamW(Optimizer):
    """Muon for the hidden matrices and AdamW for all else, as one optimizer.

    Muon (arXiv 2502.16982) makes the update of a matrix orthogonal, and scales it to the size that
    AdamW's has, so that both share one learning rate and weight decay. The hidden matrices are
    those of `parameter_groups` with two dimensions, without the output layer. Group 0 is Muon's.

    Args:
        model: its parameters must be whole on every device (DDP, not FSDP2).
        momentum: of Muon; Nesterov's.
        ns_steps: Newton-Schulz iterations that make an update orthogonal.
        lr, weight_decay: of both.
        betas, eps, fused: of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        ns_steps: int,
        betas: Sequence[float],
        eps: float,
        fused: bool,
    ) -> None:
        check_betas(betas)
        if not 0 <= momentum < 1:
            raise ValueError(f"optimizer.momentum={momentum} must be at least 0 and below 1")
        if not 1 <= ns_steps < 100:
            raise ValueError(f"optimizer.ns_steps={ns_steps} must lie between 1 and 99")
        matrices, others = hidden_matrices(model, weight_decay)
        self._muon = Muon(
            matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            ns_steps=ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = AdamW(others, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
        super().__init__(self._muon.param_groups + self._adamw.param_groups, {})
        self._share()

    def _share(self) -> None:
        """Muon and AdamW both work on the groups and the state of this optimizer."""
        self._muon.param_groups = self.param_groups[:1]
        self._adamw.param_groups = self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Loading a state replaces groups and state."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore
        """A step of Muon and one of AdamW, after one evaluation of the closure."""
        loss = self._muon.step(closure)
        self._adamw.step()
        return loss


def hidden_matrices(
    model: nn.Module, weight_decay: float
) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """What Muon updates, and the groups that are left to AdamW."""
    decay, no_decay = parameter_groups(model, weight_decay)
    head = getattr(getattr(model, "head", None), "weight", None)
    hidden = [p for p in decay["params"] if p.ndim == 2 and p is not head]
    if not hidden:
        raise ValueError("optimizer=muon has no hidden matrix to update: use optimizer=adamw")
    taken = {id(parameter) for parameter in hidden}
    rest = [p for p in decay["params"] if id(p) not in taken]
    return hidden, [{**decay, "params": rest}, no_decay]


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": adamw, "muon": MuonAdamW}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, embeddings, learned positions and memory keys do not.

    A matrix is a parameter of two or more dimensions that its module calls `weight…`, and that is
    no embedding, tied to a head or not.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        called_weight = name.rpartition(".")[2].startswith("weight")
        is_matrix = called_weight and parameter.ndim >= 2 and id(parameter) not in embeddings
        (decay if is_matrix else no_decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def warmup(step: int, warmup_steps: int) -> float:
    """Linear from 1/warmup_steps at the first step to 1 at the last of the warm-up."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def cosine(step: int, *, max_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Warm-up, then half a cosine from 1 to `min_lr_ratio` at `max_steps`."""
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    fall = (1 - math.cos(math.pi * min(1.0, max(0.0, done)))) / 2
    return warmup(step, warmup_steps) * (1 - (1 - min_lr_ratio) * fall)


def wsd(
    step: int, *, max_steps: int, warmup_steps: int, min_lr_ratio: float, decay_fraction: float
) -> float:
    """Warm-up, stable, and a linear decay over the last `decay_fraction` of `max_steps`."""
    decay_steps = decay_fraction * max_steps
    done = (step - (max_steps - decay_steps)) / max(1.0, decay_steps)
    fall = min(1.0, max(0.0, done))
    return warmup(step, warmup_steps) * (1 - (1 - min_lr_ratio) * fall)


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": cosine, "wsd": wsd}


def build_schedule(options: Options) -> Callable[..., float]:
    """The factor of the learning rate as a function of (step, max_steps) alone.

    Raises:
        ValueError: for an unknown name or option, and for a number that cannot be right.
    """
    schedule = find("scheduler", options, SCHEDULES)
    warmup_steps = options.get("warmup_steps", 0)
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(
            f"scheduler.warmup_steps={warmup_steps!r} must be a whole number, 0 or more"
        )
    for key in ("min_lr_ratio", "decay_fraction"):
        if not 0 <= options.get(key, 0) <= 1:
            raise ValueError(f"scheduler.{key}={options[key]} must lie between 0 and 1")
    first = factor_at(schedule, 0, max_steps=1)  # refuses a missing argument
    if not isinstance(first, int | float):
        raise ValueError(f"scheduler: {label(schedule)} returned {first!r}, not a number")
    return partial(factor_at, schedule)


def factor_at(schedule: partial[float], step: int, *, max_steps: int) -> float:
    """What the learning rate is multiplied by after `step` of `max_steps` steps."""
    return ask(schedule, step=step, max_steps=max_steps)


def scheduled(optimizer: Optimizer, schedule: Callable[..., float], max_steps: int) -> LambdaLR:
    """One schedule for all groups, each of which keeps its own rate."""
    return LambdaLR(optimizer, partial(schedule, max_steps=max_steps))
