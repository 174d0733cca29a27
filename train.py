"""Train a model: compose, seed, build, fit, test, and leave the result in the run folder.

    python train.py model=nsa_small data=enwik8               train
    python train.py -m attention.num_selected_blocks=4,8,16   sweep, one job after another
    python train.py ckpt_path=last                            go on where the newest run stopped

conf/train.yaml lists what can be set.
"""

import sys
import warnings

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from callbacks.signals import leave_on_signals
from runs import resume
from runs.output import outlive_readers

NOT_FOR_USERS = (
    r".*isinstance.treespec, LeafSpec.* is deprecated",  # in Lightning, under PyTorch 2.13
    r".*your dataloader is not resumable",  # the datamodule's sampler starts at the trainer's step
    r"Checkpoint directory .* exists and is not empty",  # as it should where a run goes on
    r".*distributed.nn.functional.all_gather is deprecated",  # in Lightning, likewise
    r".*does not have many workers",  # data.num_workers is chosen by the corpus
)


def sweeping() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | list[float] | None:
    # Here, since they bring torch in: help and a mistyped key are answered without it.
    from callbacks.preemption import Preempted
    from runs.run import run_alone
    from runs.sweep import run_job

    for warning in NOT_FOR_USERS:  # here: every process that runs jobs of a sweep has its own
        warnings.filterwarnings("ignore", message=warning)
    leave_on_signals()  # likewise
    try:
        return run_job(cfg) if sweeping() else run_alone(cfg)
    except Preempted as told:
        sys.exit(told.exit_code)


if __name__ == "__main__":
    leave_on_signals()
    outlive_readers()
    try:
        sys.argv[1:] = resume.arguments(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    main()
