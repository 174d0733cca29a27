"""How the processes of a run work together: sharded training (FSDP2), and one end for all."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn import Parameter
from torch.optim import Optimizer

from nsa.training import parallel
from runs import checkpoint_faults, checkpoints


class FSDP2Strategy(ModelParallelStrategy):
    """Every rank trains on its own data and holds one shard of the model (`parallel.shard`).

    Lightning's strategy with data parallelism alone, and checkpoints that are whole before they
    can be seen. What fails on one rank fails on all, so that none waits for another in vain.

    Args:
        save_distributed_checkpoint: False gathers a checkpoint on rank zero, into the file that
            one process or DDP would have written. True lets every rank write its shards, into a
            folder: for models whose optimizer outgrows a host's memory. All load both.
        reshard_after_forward: whether a block frees its gathered weights after its forward pass
            and gathers them again for the backward pass; "auto": where they would take too much
            memory otherwise (`parallel.resolve_reshard`).
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        reshard_after_forward: bool | str = "auto",
    ) -> None:
        parallel.check_reshard(reshard_after_forward)
        self.reshard_after_forward = reshard_after_forward
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Lightning numbers parameters by their place in the model, whatever groups they are in."""
        assert self.model is not None
        sharded = self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=not sharded, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return state if sharded or not self.is_global_zero else checkpoints.numbered(state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            self._save_folder(checkpoint, path)
            return
        with self._failing_together(path):
            if self.is_global_zero:
                checkpoints.write(checkpoint, path)

    def _save_folder(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Each rank writes its shards into a draft; rank zero names it once all have."""
        draft = checkpoints.draft_of(path)
        with self._failing_together(path):
            if self.is_global_zero:
                checkpoints.remove_drafts(path.parent)
                draft.mkdir(parents=True)
        states = enumerate(checkpoint.pop("optimizer_states"))
        shards = {f"optimizer_{i}": state for i, state in states}
        shards["state_dict"] = checkpoint.pop("state_dict")
        written: dict[str, Any] = {}
        with self._failing_together(path):
            save(shards, storage_writer=Writer(draft))
            own = list(draft.glob(f"__{self.global_rank}_*"))
            if self.is_global_zero:
                checkpoints.write_through(checkpoint, draft / checkpoint_faults.REST)
                own += [draft / checkpoint_faults.REST, draft / checkpoint_faults.INDEX]
            written = checkpoint_faults.fingerprints(own)
        manifest = {name: file for part in gathered(written) for name, file in part.items()}
        with self._failing_together(path):
            if self.is_global_zero:
                checkpoints.publish(path, manifest)

    @contextmanager
    def _failing_together(self, path: Path) -> Iterator[None]:
        """Raises NotWritten on every rank if writing `path` failed on one."""
        fault = None
        try:
            yield
        except (OSError, RuntimeError) as error:
            fault = checkpoints.reason(error)
        except CheckpointException as error:
            fault = checkpoints.reason(next(iter(error.failures.values()))[0])
        fault = next((found for found in gathered(fault) if found), None)
        if fault is None:
            return
        message = None
        if self.is_global_zero:
            checkpoints.remove_drafts(path.parent)
            message = checkpoints.not_written(path, fault)
        raise checkpoints.NotWritten(self.broadcast(message))

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Whoever wrote it, on however many ranks; plain values and tensors alone."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only=True)
        assert self.model is not None
        content = checkpoint_faults.load_file(path)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, content["state_dict"], options=options)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        states = content["optimizer_states"]
        # Evaluation has no optimizer: there are none to load then.
        for optimizer, state in zip(self.optimizers, states, strict=bool(self.optimizers)):
            state = named(state, optimizer, names)
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return content


class Writer(FileSystemWriter):
    """PyTorch's own, except that all ranks hear the system's message for what failed on one."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise OSError(checkpoints.reason(error)) from error


def named(
    state: Mapping[str, Any], optimizer: Optimizer, names: Mapping[Parameter, str]
) -> dict[str, Any]:
    """The inverse of `checkpoints.numbered`: keyed by the names that `optimizer`'s parameters have.

    Groups correspond, and parameters by their place in them.
    """
    groups, name_of = [], {}
    for stored, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        own_names = [names[parameter] for parameter in own["params"]]
        name_of |= dict(zip(stored["params"], own_names, strict=True))
        groups.append(stored | {"params": own_names})
    return {"state": {name_of[k]: v for k, v in state["state"].items()}, "param_groups": groups}


def gathered(value: Any) -> list[Any]:
    """What each rank has, in their order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def end_together(trainer: Trainer) -> None:
    """After a failure: end the processes that this one launched, which may wait for it in vain.

    A launched process waits for that: Lightning kills rank zero, whatever it has still to say, as
    soon as another one is gone. Ranks that torchrun or srun started are theirs to end.
    """
    launcher = trainer.strategy.launcher
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
        launcher.kill(signal.SIGKILL)
    elif isinstance(environment, LightningEnvironment) and not trainer.is_global_zero:
        time.sleep(60)
