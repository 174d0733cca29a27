"""One run: built from its config, trained, measured, and its result left in the run folder."""

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf

from callbacks.preemption import Preempted
from callbacks.step_count import count_steps_done
from callbacks.throughput import Throughput
from callbacks.wandb_logger import RunWandbLogger
from data.base import TokenDataModule
from nsa.training.lightning_module import NSALightningModule
from runs import checkpoints, counts, lock, notices, ranks, record, results, strategies, time_limit
from runs import export as exported
from runs.division import Room, StepDivision, check_batch, share_of
from runs.document_alignment import document_alignment
from runs.folder import CHECKPOINTS, newest_first, write_json
from runs.kinds import naming_odd_options
from runs.same_run import check_same_run, flatten
from runs.summary import summary

log = logging.getLogger(__name__)

MATMUL_PRECISIONS = ("highest", "high", "medium")  # PyTorch's names

OF_MODULE = (  # what the LightningModule is made of
    *("model", "optimizer", "scheduler"),
    *("compile", "activation_checkpointing", "cross_entropy"),
    *("importance_loss", "sparsity_schedule"),
)
REFUSALS = (ValueError, OSError, InstantiationException)  # of a config, before training


class Run(NamedTuple):
    module: NSALightningModule
    datamodule: TokenDataModule
    trainer: L.Trainer


@naming_odd_options
def build(cfg: DictConfig) -> Run:
    """Make everything, from the seed on; whatever can be refused is refused here."""
    refuse_to_begin_again(Path(cfg.run_dir), cfg.ckpt_path)
    counts.make_whole(cfg)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    check_settings(settings)
    weights = settings["model"].pop("weights")  # not of the model: where a run starts from
    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    module = NSALightningModule(**{part: settings[part] for part in OF_MODULE})
    trainer = build_trainer(cfg)
    module.check_trainer(trainer)
    time_limit.limit_start(cfg.max_time_per_start, trainer)
    # Until runs.division knows better: one sequence at once.
    trainer.accumulate_grad_batches = share_of(cfg.batch.sequences_per_step, trainer.world_size)
    datamodule = instantiate(cfg.data, micro_batch_size=1)
    datamodule.document_alignment = document_alignment(module, datamodule.pack)
    # On every rank, before any waits for another: the first one prepares, however long it takes.
    datamodule.prepare_data(verify=trainer.local_rank == 0)
    datamodule.setup("fit")
    if trainer.local_rank == 0:
        datamodule.prepare_rest()
    if weights and not cfg.ckpt_path:
        exported.load_weights(module.model, Path(weights), datamodule.tokenizer)
    if cfg.ckpt_path and trainer.local_rank == 0:
        checkpoint = checkpoints.check_metadata(Path(cfg.ckpt_path))
        micro_batches = trainer.accumulate_grad_batches * trainer.world_size
        order = datamodule.sample_order(micro_batches, checkpoint["global_step"])
        check_same_run(checkpoint, settings, order, allow_other_corpus=cfg.allow_other_corpus)
        if trainer.is_global_zero:
            notices.say_what_changes(checkpoint, settings, module, trainer)
            record.remember(Path(cfg.run_dir), cfg, HydraConfig.get())
    if trainer.is_global_zero:
        notices.say_warmup(settings)
    return Run(module, datamodule, trainer)


def refuse_to_begin_again(run: Path, ckpt_path: str | None) -> None:
    """Whatever the way here: what another run saved is gone on from, not written over.

    Raises:
        ValueError: if the folder holds checkpoints, and this run does not go on from one of them.
    """
    folder = (run / CHECKPOINTS).absolute()
    goes_on = ckpt_path is not None and Path(ckpt_path).absolute().parent == folder
    if not goes_on and (saved := newest_first(folder)):
        raise ValueError(
            f"run folder {run} holds checkpoints of another run, as {saved[0].name}, and this one "
            f"would write over them: go on with run_dir={run}, name another folder, or delete it"
        )


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse what nothing else in the program would notice.

    Raises:
        ValueError: naming the value, what it must be, and the way out.
    """
    check_batch(**settings["batch"])
    if settings["val_every_n_steps"] < 1:
        raise ValueError(
            f"val_every_n_steps={settings['val_every_n_steps']} must be at least 1; a number above "
            "trainer.max_steps validates at the end alone"
        )
    results.check_objective(settings["objective"], results.metric_of(settings["data"]).name)
    precision = settings["float32_matmul_precision"]
    if precision not in MATMUL_PRECISIONS:
        raise ValueError(
            f"float32_matmul_precision={precision} must be one of {', '.join(MATMUL_PRECISIONS)}"
        )
    model, data = settings["model"]["vocab_size"], settings["data"]["vocab_size"]
    if model < data:
        raise ValueError(f"model.vocab_size={model} must be at least data.vocab_size={data}")
    for path, value in flatten(settings, ""):
        if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "maybe"):
            raise ValueError(f"{path}={value} is text, which counts as true: write true or false")


def build_trainer(cfg: DictConfig) -> L.Trainer:
    """The trainer with its callbacks and loggers."""
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback]
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger]
    logging.getLogger("lightning").handlers.clear()  # the root logger prints what it would
    notices = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    notices.setLevel(logging.WARNING)  # the summary tells what they tell
    trainer = instantiate(
        cfg.trainer,
        precision=resolve_precision(cfg.trainer.precision, cfg.trainer.accelerator),
        callbacks=[*callbacks, time_limit.WaitLimit()],
        logger=loggers,
        plugins=plugins(),
    )
    notices.setLevel(logging.INFO)
    count_steps_done(trainer)
    return trainer


def plugins() -> list[Any]:
    """Checkpoints are whole; under srun callbacks.preemption saves, no handler of Lightning's."""
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return [checkpoints.WholeCheckpointIO(), *slurm]


def resolve_precision(precision: str, accelerator: str) -> str:
    """What `auto` means: bf16-mixed on a GPU that has it, 32-true elsewhere."""
    if precision != "auto":
        return precision
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    has_bf16 = on_gpu and torch.cuda.get_device_capability(rank) >= (8, 0)
    return "bf16-mixed" if has_bf16 else "32-true"


def train(run: Run, cfg: DictConfig) -> dict[str, Any]:
    """Fit, validate and test with the last weights; returns what result.json holds."""
    started = time.monotonic()
    module, datamodule, trainer = run

    def announce(room: Room | None) -> None:
        if trainer.is_global_zero:
            print(summary(module, datamodule, trainer, cfg, room), flush=True)

    division = StepDivision(**cfg.batch, val_every_n_steps=cfg.val_every_n_steps, announce=announce)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, division)  # before any that asks how a step is divided
    trainer.fit(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    if trainer.is_global_zero:
        notices.say_why_it_ended(trainer)
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    evaluations = []
    if module.evaluated_step != trainer.global_step:  # no validation was due at the last step
        evaluations += trainer.validate(module, datamodule=datamodule, verbose=False)
    if cfg.test:
        evaluations += trainer.test(module, datamodule=datamodule, verbose=False)
    for evaluation in evaluations:
        metrics |= evaluation
    name, better = datamodule.metric.name, datamodule.metric.better
    measured = {f"{s}_{name}": finite(metrics.get(f"{s}/{name}")) for s in results.SPLITS}
    result = measured | figures(run, cfg, time.monotonic() - started)
    result |= {"metric": name, "better": better}
    if trainer.is_global_zero:
        report(result, cfg)
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.summarize(result)
    return result


def finite(value: Any) -> float | None:
    """A measured value as a number; None where there is none."""
    return float(value) if value is not None and math.isfinite(value) else None


def figures(run: Run, cfg: DictConfig, seconds: float) -> dict[str, Any]:
    """What there is to know of a run besides its metric."""
    model, trainer = run.module.model, run.trainer
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    speeds = [c.tokens_per_second for c in callbacks if isinstance(c, Throughput)]
    with run.module.sparsity.at(None):
        visible = model.visible_tokens(cfg.model.seq_len)
    return {
        "num_params": model.num_params,
        "visible_tokens": visible,
        "tokens_per_second": speeds[0] if speeds else None,
        "steps": trainer.global_step,
        "overrides": list(HydraConfig.get().overrides.task),
        "seconds": round(seconds, 1),
    }


def report(result: dict[str, Any], cfg: DictConfig) -> None:
    """Write result.json, which the table of a sweep is made of, and print what counts."""
    write_json(Path(cfg.run_dir, "result.json"), result)
    names = [f"{split}_{result['metric']}" for split in results.SPLITS]
    measured = [f"{name} {result[name]:.4f}" for name in names if result[name] is not None]
    measured += [f"{result['steps']:,} steps", f"{result['seconds']:.0f} s", cfg.run_dir]
    print("  ".join(measured))


def run_alone(cfg: DictConfig) -> None:
    """One run; what ends it before its time ends the program with the reason."""
    ranks.end_with_leader()
    try:
        run = build(cfg)
    except REFUSALS as error:
        if ranks.is_zero():
            lock.remove_if_empty(Path(cfg.run_dir))
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        sys.exit(f"{root(error)}\nHYDRA_FULL_ERROR=1 shows where")
    leads = run.trainer.is_global_zero
    try:
        train(run, cfg)
    except Preempted as told:
        if leads:
            log.warning("%s; it goes on with run_dir=%s", told, cfg.run_dir)
        wandb.finish()
        run.trainer.strategy.barrier()  # Lightning would kill rank zero if another left first
        raise
    except BaseException as error:
        known = isinstance(error, FloatingPointError | OSError)
        known = known and "HYDRA_FULL_ERROR" not in os.environ
        if known and leads:
            print(error, file=sys.stderr, flush=True)
        wandb.finish(exit_code=1)
        strategies.end_together(run.trainer)
        if known:
            sys.exit(1)
        raise
    wandb.finish()


def root(error: Exception) -> BaseException:
    """What a part refused itself with, in place of Hydra's word that it could not be made."""
    cause = error.__cause__
    wrapped = isinstance(error, InstantiationException)
    return cause if wrapped and isinstance(cause, ValueError | OSError) else error
