"""What ends or changes a run is said: nobody should have to find it in a curve."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

from callbacks.early_stopping import MetricEarlyStopping

log = logging.getLogger(__name__)

NOTICED = 0.01  # relative change of the learning rate


def say_what_changes(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], module: Any, trainer: Trainer
) -> None:
    """Of a run that goes on: that it is over already, or that a schedule is another one now."""
    step, last = checkpoint["global_step"], trainer.max_steps
    if step >= last:
        log.warning(
            "this run is finished: %s of trainer.max_steps=%s steps are done. Nothing is trained, "
            "it is only measured again; a larger trainer.max_steps goes on",
            f"{step:,}",
            f"{last:,}",
        )
        return
    say_time_left(checkpoint, settings["trainer"].get("max_time"), trainer)
    say_stage(checkpoint, module, last)
    for state in checkpoint.get("lr_schedulers", ())[:1]:
        before = state["_last_lr"][0]
        now = state["base_lrs"][0] * module.schedule(step, max_steps=last)
        if abs(now - before) > NOTICED * max(now, before):
            log.warning(
                "the schedule changes: after step %s the learning rate was %.3g, and goes on at "
                "%.3g, since trainer.max_steps=%s or scheduler.* is another than before",
                f"{step:,}",
                before,
                now,
                f"{last:,}",
            )


def say_stage(checkpoint: Mapping[str, Any], module: Any, last: int) -> None:
    """Stages of sparsity_schedule end at shares of the steps: in a longer run, at later ones."""
    step, before = checkpoint["global_step"], checkpoint.get("max_steps", last)
    was, now = (module.sparsity.stage_of(step, steps) for steps in (before, last))
    if was != now:
        log.warning(
            "sparsity_schedule: after step %s the run would have gone on with %s, and goes on with "
            "%s, since trainer.max_steps=%s was %s",
            f"{step:,}",
            stage_name(was),
            stage_name(now),
            f"{last:,}",
            f"{before:,}",
        )


def stage_name(stage: int | None) -> str:
    return "the sizes of attention" if stage is None else f"those of stage {stage + 1}"


def say_time_left(checkpoint: Mapping[str, Any], max_time: Any, trainer: Trainer) -> None:
    """trainer.max_time counts the whole run, however often it is started."""
    states = (s for key, s in checkpoint.get("callbacks", {}).items() if key.startswith("Timer"))
    passed = next((state["time_elapsed"]["train"] for state in states), None)
    limit = next((c._duration for c in callbacks(trainer) if isinstance(c, Timer)), None)
    if passed is not None and limit is not None and passed >= limit:
        log.warning(
            "trainer.max_time=%s counts the whole run, of which %.0f s are over: nothing is "
            "trained. Raise it; max_time_per_start= limits each start instead",
            max_time,
            passed,
        )


def say_warmup(settings: Mapping[str, Any]) -> None:
    """A run that ends inside its warm-up never reaches the learning rate it asks for."""
    warmup, last = settings["scheduler"].get("warmup_steps", 0), settings["trainer"]["max_steps"]
    if warmup > last > 0:
        log.warning(
            "scheduler.warmup_steps=%s is more than trainer.max_steps=%s: the learning rate ends "
            "at %.0f %% of optimizer.lr. Lower scheduler.warmup_steps",
            f"{warmup:,}",
            f"{last:,}",
            100 * last / warmup,
        )


def say_why_it_ended(trainer: Trainer) -> None:
    """Of a run that ends before its last step."""
    if trainer.global_step >= trainer.max_steps:
        return
    reasons = [reason for c in callbacks(trainer) if (reason := reason_to_end(c))]
    log.warning(
        "training ended after step %s of %s: %s",
        f"{trainer.global_step:,}",
        f"{trainer.max_steps:,}",
        "; ".join(reasons) or "a callback stopped it",
    )


def reason_to_end(callback: Any) -> str | None:
    """Why a callback ended the training, if it did."""
    if isinstance(callback, MetricEarlyStopping) and callback.stopping_reason_message:
        return f"early stopping, since {callback.why()}"
    if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
        reason = callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
        return f"early stopping. {reason}"
    if isinstance(callback, Timer) and (callback.time_remaining() or 0) <= 0:
        return "trainer.max_time is over, which counts the whole run"
    return None


def callbacks(trainer: Any) -> list[Any]:
    """All of them, Lightning's own included."""
    return trainer.callbacks
