"""Text that the model writes while it trains."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from callbacks.every_n_steps import EveryNSteps, aside
from nsa.sampling import Draw
from runs.folder import run_folder, write_text


class Samples(EveryNSteps):
    """Continues a prompt every n steps and at the end: samples/step_<n>.txt, and a table in W&B.

    Every rank samples, since a sharded model needs them all; rank zero writes. Sampling has its own
    random numbers, the same at every step, and leaves training's untouched.

    Args:
        every_n_steps: optimizer steps between samples.
        prompt: text to go on from; None takes the first tokens of the validation split.
        prompt_tokens: how many of them.
        new_tokens: how many to write.
        temperature, filter_thres: as in `Transformer.sample`.
        seed: of the draws.

    Raises:
        ValueError: if a number of tokens is below 1, or `prompt` encodes to none.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        prompt: str | None = None,
        prompt_tokens: int = 64,
        new_tokens: int = 128,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps)
        self.check_at_least(1, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        Draw(temperature=temperature, filter_thres=filter_thres)  # refuses what is out of range
        self.prompt = None if prompt is None else str(prompt)  # Hydra reads 7 as a number
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self.temperature = temperature
        self.filter_thres = filter_thres
        self.seed = seed
        self._prompt_ids: list[int] = []
        self._sampled_at = -1

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        parts: Any = trainer  # Lightning sets its datamodule from outside the class
        self._sampled_at = trainer.global_step
        with aside(trainer, pl_module):
            self._prompt_ids = self._prompt_ids or self._encode_prompt(parts.datamodule)
            ids = torch.tensor([self._prompt_ids], device=pl_module.device)
            torch.manual_seed(self.seed)
            new = self._continue(pl_module, ids)[0].tolist()
        if trainer.is_global_zero:
            decode = parts.datamodule.decode
            self._publish(trainer, decode(self._prompt_ids), decode(new))

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if self._sampled_at != trainer.global_step and not trainer.fast_dev_run:
            self.on_nth_step(trainer, pl_module, batch=None)

    def _continue(self, pl_module: LightningModule, ids: Tensor) -> Tensor:
        model: Any = pl_module.model
        length = ids.shape[1] + self.new_tokens
        return model.sample(ids, length, self.temperature, self.filter_thres)

    def _encode_prompt(self, datamodule: Any) -> list[int]:
        if self.prompt is None:
            batch = next(iter(datamodule.val_dataloader()))
            return batch["tokens"][0, : self.prompt_tokens].clamp(min=0).tolist()
        if not (ids := list(datamodule.encode(self.prompt))):
            raise ValueError(f"prompt={self.prompt!r} of Samples encodes to no token: lengthen it")
        return ids

    def _publish(self, trainer: Trainer, prompt: str, sample: str) -> None:
        step = trainer.global_step
        how = f"temperature {self.temperature}, filter_thres {self.filter_thres}, seed {self.seed}"
        text = (
            f"step {step}\n\n--- prompt, {len(self._prompt_ids)} tokens\n{prompt}\n\n"
            f"--- sample, {self.new_tokens} tokens, {how}\n{sample}\n"
        )
        write_text(Path(run_folder(trainer), "samples", f"step_{step}.txt"), text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = ["step", "prompt", "sample"]
                logger.log_text("samples", columns=columns, data=[[str(step), prompt, sample]])
