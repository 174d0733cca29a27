"""How a Transformer is trained: the steps of the loop, and what they log.

Letters: B batch, T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from nsa.training import cuda_graphs, optimizers, parallel, scores, trainer_checks
from nsa.training.broken_steps import breaking_its_gradient, skip_if_broken
from nsa.training.counts import restate_progress
from nsa.training.importance_loss import ImportanceLoss
from nsa.training.label_sums import resolve_cross_entropy
from nsa.training.label_weights import divide_by_share, positions_of
from nsa.training.losses import Losses
from nsa.training.seeds import micro_batch_seed, seed_generators
from nsa.training.sparsity import SparsitySchedule
from nsa.transformer import Transformer


class NSALightningModule(L.LightningModule):
    """Next-token training of a `Transformer`.

    A batch is `{"tokens": [B, T+1]}`: inputs are all but the last token, labels all but the first.
    A label of −1, which pads the end of a window, is not scored. `{"scored": bool [B, T]}` in the
    batch says which of the others are; without it, all are. A step learns from the mean over the
    scored labels of all its micro-batches and ranks (`label_weights`).
    `{"document_starts": int32 [B, T]}` keeps documents of a row apart (`nsa.documents`).
    `{"corpus": int64 [B]}` numbers the corpus of each row among the datamodule's `corpora`: their
    losses are logged, too, as `val/<name>/loss` and `train/<name>/loss` (of the steps since the
    last log).

    Logged: `train/loss`, `val/loss` and `test/loss` in nats per scored label, each with the data's
    `metric` under its name; `train/importance_loss`, unweighed, where it has a weight; `optim/lr`
    and `optim/grad_norm` (before clipping).

    A step whose loss on any rank, or whose gradient, is not finite updates nothing; it counts as
    done. `step_losses` [A], of this rank's micro-batches, and `grad_norm` [], of all ranks, are the
    latest step's, on the device.

    What a step draws at random comes from generators of PyTorch, NumPy and Python that are seeded
    by (seed, rank, micro-batch). So a resumed run needs no generator's state to repeat it.

    Args:
        model: arguments of `Transformer`, and `name`.
        optimizer: one of `optimizers.OPTIMIZERS` by `name`, or one's own, and its arguments.
        scheduler: one of `optimizers.SCHEDULES` by `name`, or one's own, and its arguments.
        compile: one of `parallel.COMPILE`: whether to compile the Transformer's blocks when
            training starts, and to replay micro-batches as CUDA graphs; "auto" chooses.
        activation_checkpointing: what the backward pass recomputes; one of `parallel.KEPT`.
        cross_entropy: one of `label_sums.CROSS_ENTROPIES`; "auto" chooses by the vocabulary.
        importance_loss: arguments of `ImportanceLoss`; None: of no weight.
        sparsity_schedule: the stages of a `SparsitySchedule`, or None.

    Raises:
        ValueError: if a schedule or a mode is unknown by name, or a size is impossible.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        compile: bool | str = False,
        activation_checkpointing: str = "none",
        cross_entropy: str = "auto",
        importance_loss: Mapping[str, Any] | None = None,
        sparsity_schedule: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer_options = dict(optimizer)
        self.schedule = optimizers.build_schedule(scheduler)
        parallel.check_compile(compile)
        self.compile_option = compile
        parallel.check_activation_checkpointing(activation_checkpointing)
        self.activation_checkpointing = activation_checkpointing
        self.cross_entropy = resolve_cross_entropy(cross_entropy, model["vocab_size"])
        self.seed = torch.initial_seed()
        self.model = Transformer(**{key: model[key] for key in model if key != "name"})
        self.sparsity = SparsitySchedule(self.model, sparsity_schedule)
        teaching = ImportanceLoss(self.model, **importance_loss or {})
        self.losses = Losses(self.model, self.cross_entropy, teaching)
        self.step_losses = self.grad_norm = torch.zeros(0)
        self.replays_graphs = False  # whether a micro-batch is one CUDA graph, gradients included
        self._learn_at_once: cuda_graphs.Learn | None = None  # the graph, once it is recorded
        self._gradients: cuda_graphs.GradientBuffer | None = None  # what the graph adds to
        self._micro_totals: list[Tensor] = []  # `totals` of micro-batches since the last step
        self._positions: int | None = None  # of the last micro-batch, see `label_weights`
        self._corpus_totals = torch.zeros(())  # of training's corpora, since they were logged
        self._split_totals: list[Tensor] = []  # `totals` of the batches of an evaluation
        self.evaluated_step: int | None = None  # the step of the last whole validation

    def configure_model(self) -> None:
        """Parameters keep their names; called again for evaluation, it finds all of it done."""
        parallel.checkpoint_activations(self.model, self.activation_checkpointing)
        compiles = self.compile_mode
        parallel.compile_blocks(self.model, compiles)
        if compiles == parallel.REPLAYED:
            self._ask_for_graphs()
        if self.device_mesh is not None:
            gathered = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            reshard = getattr(self.trainer.strategy, "reshard_after_forward", "auto")
            parallel.shard(self.model, self.device_mesh["data_parallel"], gathered, reshard)

    # Training

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss. Where graphs are replayed, its gradients have been added as well."""
        learn = self._recorded(batch) if self.replays_graphs else None
        if self._gradients is not None and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._gradients.zero()
        seed_generators(micro_batch_seed(self.seed, self.global_rank, batch_idx))
        self._positions = positions_of(batch)
        if learn is not None:
            found = learn(batch)
            self._micro_totals.append(found)
            return found[0] / found[1].clamp(min=1)
        loss, found = self.losses.learn(batch, **self._counted)
        self._micro_totals.append(found)
        return breaking_its_gradient(loss)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Sizes of the step's stage."""
        self._set_stage(self.global_step)

    def _set_stage(self, step: int) -> None:
        if self.sparsity.set_stage(step, self.trainer.max_steps):
            self._learn_at_once = None  # a graph holds the sizes that it was recorded with
            if self.compile_mode:
                parallel.allow_programs(self.model.blocks)

    def _learn(self, batch: dict[str, Tensor]) -> Tensor:
        """Add a micro-batch's share of the step's gradient; returns its `totals`."""
        loss, found = self.losses.learn(batch, **self._counted)
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        with torch.autocast(self.device.type, enabled=False):  # Lightning's is for the forward pass
            (breaking_its_gradient(loss) / micro_batches).backward()
        return found

    def _ask_for_graphs(self) -> None:
        recomputes = self.activation_checkpointing != "none"
        draws = any(map(cuda_graphs.draws, self.model.blocks))
        why = cuda_graphs.obstacle(self.trainer, recomputes=recomputes, draws=draws)
        self.replays_graphs = why is None
        if why is not None and self.trainer.state.fn == TrainerFn.FITTING:
            cuda_graphs.say_not_replayed(why)

    def _recorded(self, batch: dict[str, Tensor]) -> cuda_graphs.Learn:
        """What learns from a micro-batch; recorded at the first one."""
        if self._learn_at_once is None:
            self._gradients = cuda_graphs.GradientBuffer(self.parameters())
            self._gradients.zero()
            self._learn_at_once = cuda_graphs.record(self._learn, batch)
        return self._learn_at_once

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Does nothing where the graph holds the backward pass."""
        if not self.replays_graphs:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(
        self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Not where graphs are replayed: this comes too late for a backward pass within one."""
        if not self.replays_graphs:
            optimizer.zero_grad()

    def on_train_end(self) -> None:
        """Free the graph's memory: evaluation needs its own."""
        self._learn_at_once = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._gradients is not None and self.trainer.world_size > 1:
            self._gradients.sum_over_ranks()
        totals, taught = self.losses.split_off(torch.stack(self._micro_totals))
        self._micro_totals = []
        of_all, of_corpora = scores.split_totals(totals, self._datamodule)
        self.step_losses = of_all[:, 0] / of_all[:, 1].clamp(min=1)
        self._corpus_totals = self._corpus_totals + of_corpora.sum(dim=0)
        if self._positions is None and not self._logs_this_step:
            return
        nats, labels, *correct = self.trainer.strategy.reduce(of_all.sum(dim=0), reduce_op="sum")
        if self._positions is not None:
            positions = self._positions * len(of_all) * self.trainer.world_size
            divide_by_share(self.parameters(), labels, positions)
        if not self._logs_this_step:
            return
        share = correct[0] / labels if correct else None
        self.log_dict(scores.label_scores("train", nats / labels, share, self._datamodule))
        if taught is not None:
            mean = self.trainer.strategy.reduce(taught.mean(), reduce_op="mean")
            self.log("train/importance_loss", mean)
        self.log("optim/lr", optimizer.param_groups[0]["lr"])
        self._log_corpora_of_training()

    def _log_corpora_of_training(self) -> None:
        if scores.corpora_of(self._datamodule):
            of_ranks = self.trainer.strategy.reduce(self._corpus_totals, reduce_op="sum")
            self.log_dict(scores.corpus_scores("train", of_ranks, self._datamodule))
        self._corpus_totals = torch.zeros_like(self._corpus_totals)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all parameters; Lightning's own clipping refuses a fused AdamW."""
        norm = clip_grad_norm_(self.parameters(), gradient_clip_val or math.inf)
        self.grad_norm = parallel.full(norm)
        skip_if_broken(optimizer, self.grad_norm)
        if self._logs_this_step:
            self.log("optim/grad_norm", self.grad_norm)

    def configure_optimizers(self) -> Any:
        self.check_trainer(self.trainer)
        optimizer = optimizers.build_optimizer(self.optimizer_options, self.model)
        schedule = optimizers.scheduled(optimizer, self.schedule, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def check_trainer(self, trainer: L.Trainer) -> None:
        """See `trainer_checks.check_trainer`."""
        trainer_checks.check_trainer(trainer, self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stages and learning rates of a run hang on its length."""
        checkpoint["max_steps"] = self.trainer.max_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches: restate the count for this run's accumulation."""
        if self._trainer is None:  # loaded for its weights alone
            return
        restate_progress(checkpoint, self._trainer.accumulate_grad_batches)

    # Evaluation: exact means over every scored label of a split, over all ranks

    def on_validation_start(self) -> None:
        self._set_stage(self.global_step)

    def on_test_start(self) -> None:
        """The test is of the model as it is configured, whatever the step."""
        self._set_stage(self.trainer.max_steps)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # The sanity check before training must not compile programs that are not needed yet.
        checking = self.trainer.sanity_checking
        with torch.compiler.set_stance("force_eager") if checking else nullcontext():
            self._split_totals.append(self.losses.evaluate(batch, **self._counted)[1])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._split_totals.append(self.losses.evaluate(batch, **self._counted)[1])

    def on_validation_epoch_end(self) -> None:
        self._log_split("val")
        if not self.trainer.sanity_checking:
            self.evaluated_step = self.global_step

    def on_test_epoch_end(self) -> None:
        self._log_split("test")

    def _log_split(self, split: str) -> None:
        batches, self._split_totals = self._split_totals, []
        total = torch.zeros(scores.num_totals(self._datamodule), dtype=torch.float64)
        if batches:
            total += torch.stack(batches).cpu().double().sum(dim=0)
        if self.trainer.world_size > 1:
            total = self.trainer.strategy.reduce(total.to(self.device), reduce_op="sum")
        self.log_dict(scores.split_scores(split, total, self._datamodule), sync_dist=True)

    @property
    def metric(self) -> Any:
        """What the data are judged by, a `data.metrics.Metric`."""
        return self._datamodule.metric

    @property
    def _counted(self) -> dict[str, Any]:
        return scores.counted(self._datamodule)

    @property
    def _datamodule(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def compile_mode(self) -> bool | str:
        """What `compile` comes to on the trainer's devices."""
        return parallel.resolve_compile(self.compile_option, self.trainer.strategy.root_device)

    @property
    def _logs_this_step(self) -> bool:
        trainer: Any = self.trainer
        return (self.global_step + 1) % trainer.log_every_n_steps == 0
