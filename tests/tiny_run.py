"""A run so small that a real Trainer goes through it in a second: for the tests of callbacks."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks.step_count import count_steps_done
from data.metrics import BITS_PER_BYTE

OF_LIGHTNING = [  # warnings of Lightning 2.6.6 itself, or of what these runs do on purpose
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
VOCAB, SEQ_LEN, ROWS = 11, 8, 2
TOKENS_PER_MICRO_BATCH = ROWS * SEQ_LEN


class TinyModel(nn.Module):
    """The parts of `Transformer` that callbacks use; knows no attention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.embedding = nn.Embedding(VOCAB, 4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, VOCAB)
        self.seq_len = SEQ_LEN

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(ids)))

    def flops_per_token(self, num_tokens: int) -> float:
        return 1000.0 * num_tokens

    @torch.no_grad()
    def sample(
        self, prompt: Tensor, seq_len: int, temperature: float, filter_thres: float
    ) -> Tensor:
        ids = prompt
        while ids.shape[1] < seq_len:
            logits = self(ids)[:, -1] / temperature
            keep = max(1, int((1 - filter_thres) * VOCAB))
            values, indices = logits.topk(keep)
            ids = torch.cat([ids, indices.gather(1, values.softmax(-1).multinomial(1))], dim=1)
        return ids[:, prompt.shape[1] :]


class TinyModule(L.LightningModule):
    """Trains a model."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model or TinyModel()
        self._losses: list[Tensor] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["tokens"]
        return F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self._losses.append(loss.detach())
        self.log("train/loss", loss)
        self.log("train/bpb", loss / 0.6931)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step_losses, self._losses = torch.stack(self._losses), []

    def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), float("inf"))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))
        self.log("val/bpb", self.loss(batch) / 0.6931)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/bpb", self.loss(batch) / 0.6931)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def weights(module: nn.Module) -> Tensor:
    """All parameters in a row."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Windows(Dataset):
    """Row k counts up from k: a pure function of the index."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": (torch.arange(SEQ_LEN + 1) + index) % VOCAB}


class TinyData(L.LightningDataModule):
    """Goes on at the trainer's step, as the project's datamodules do."""

    metric = BITS_PER_BYTE
    micro_batch_size, seq_len = ROWS, SEQ_LEN

    def train_dataloader(self) -> DataLoader:
        trainer: Any = self.trainer
        per_step = ROWS * trainer.accumulate_grad_batches
        ids = list(range(trainer.max_steps * per_step))
        ids = ids[trainer.global_step * per_step :] + ids[: trainer.global_step * per_step]
        return DataLoader(Windows(len(ids)), batch_size=ROWS, sampler=ids)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Windows(4), batch_size=ROWS)

    test_dataloader = val_dataloader

    def encode(self, text: str) -> list[int]:
        return [ord(character) - ord("a") for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + ord("a")) for i in ids)


def tiny_trainer(folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A CPU trainer that validates every 4 steps and logs every 2, in the way of conf/trainer."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "max_epochs": -1,
        "log_every_n_steps": 2,
        "val_check_interval": 4 * options.get("accumulate_grad_batches", 1),
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks),
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    trainer = L.Trainer(callbacks=callbacks, **{**settings, **options})
    count_steps_done(trainer)
    return trainer


def fit(
    folder: Path, *callbacks: L.Callback, module: L.LightningModule | None = None, **options: Any
) -> L.Trainer:
    """Train from scratch, or from `ckpt_path`; the trainer afterwards."""
    ckpt_path = options.pop("ckpt_path", None)
    trainer = tiny_trainer(folder, list(callbacks), **options)
    trainer.fit(module or TinyModule(), TinyData(), ckpt_path=ckpt_path, weights_only=True)
    return trainer
