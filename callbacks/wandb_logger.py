"""Weights & Biases: offline by default, one W&B run for a run folder, however often it goes on."""

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests
import wandb
import wandb.errors as wandb_errors
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from runs.folder import write_text

log = logging.getLogger(__name__)

MAX_NAME = 128  # characters that W&B shows a run by; it refuses more
PATIENCE = 5  # seconds to wait for W&B's answer before training
WAY_OUT = (
    "Check the network and WANDB_API_KEY, or train offline, with logger.wandb.offline=true, and "
    "send the run later with `wandb sync`"
)


class RunWandbLogger(WandbLogger):
    """Lightning's `WandbLogger` for a run folder.

    The run's id is kept in <save_dir>/wandb_id.txt: a run that goes on uses it again. An agent of a
    W&B sweep (`wandb agent`) gives the id itself, in WANDB_RUN_ID, which wins. Offline, no account
    is needed and nothing leaves the machine; `wandb sync <save_dir>/wandb/offline-run-*` uploads
    it later. The environment variable WANDB_MODE (offline, online, disabled) wins over
    `offline`. Runs are grouped by the folder that holds the run folder: the jobs of a sweep are
    one group, and so are the runs of one name.

    Args:
        save_dir: the run's folder; W&B's files go to its wandb/.
        name: shown for the run.
        offline: False sends everything to W&B while it happens; needs an account.
        project, entity, tags, notes: as in `wandb.init`.
        quiet: leave out W&B's summary of the run at its end.
        login_timeout: seconds to wait for a key at a terminal, so that nothing hangs.

    Raises:
        ConnectionError: if the run is to be sent to W&B at once, and W&B does not answer.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str | None = None,
        offline: bool = True,
        project: str = "nsa",
        entity: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        quiet: bool = True,
        login_timeout: int = 60,
    ) -> None:
        folder = Path(save_dir).absolute()
        self._id_file = folder / "wandb_id.txt"
        goes_on = self._id_file.exists()
        given = os.environ.get("WANDB_RUN_ID")  # by `wandb agent`, which waits for this run
        mode = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
        if mode == "offline" and "WANDB_SWEEP_ID" in os.environ:
            log.warning(
                "a W&B sweep sees nothing of a run that is offline: add logger.wandb.offline=false"
            )
        if mode == "online":
            refuse_if_unreachable()
        options: dict[str, Any] = {
            "mode": mode,
            "group": folder.parent.name,
            "entity": entity,
            "tags": tags,
            "notes": notes,
            "resume": "allow" if mode == "online" else None,
            "settings": {"quiet": quiet, "login_timeout": login_timeout},
        }
        super().__init__(
            name=None if goes_on or not name else name.strip()[:MAX_NAME],  # it keeps the first
            save_dir=folder,
            id=given or (self._id_file.read_text().strip() if goes_on else secrets.token_hex(4)),
            project=project,
            **options,
        )
        del self._wandb_init["anonymous"]  # W&B warns of it, whatever its value

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun on first use.

        Raises:
            ConnectionError: if W&B refuses it, as for a wrong key.
            RuntimeError: if another run is still open in this process, which Lightning would
                log into.
        """
        if self._experiment is None:
            write_text(self._id_file, f"{self._id}\n")
        try:
            run = super().experiment
        except wandb_errors.Error as error:
            raise ConnectionError(f"W&B refuses this run: {error.message}\n{WAY_OUT}") from error
        if getattr(run, "id", None) not in (self._id, None, "dummy"):
            raise RuntimeError(
                f"W&B run {run.id} of an earlier job is still open: call wandb.finish() after "
                "every job"
            )
        return run

    def summarize(self, result: Mapping[str, Any]) -> None:
        """Put a run's result.json into the summary that W&B's tables of runs show."""
        if self._experiment is not None:
            known = {name: value for name, value in result.items() if value is not None}
            self._experiment.summary.update(known)


@rank_zero_only
def refuse_if_unreachable() -> None:
    """Whether W&B answers at all, whatever it answers: W&B itself would retry for two minutes.

    Raises:
        ConnectionError: if not, within `PATIENCE` seconds.
    """
    url = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
    try:
        requests.head(url, timeout=PATIENCE)
    except requests.RequestException as error:
        kind = type(error).__name__
        raise ConnectionError(f"W&B does not answer at {url} ({kind}). {WAY_OUT}") from error
