"""What a run says of itself before it trains, as a table."""

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from data.base import TokenDataModule
from nsa.training.lightning_module import NSALightningModule
from runs.division import Room


def summary(
    module: NSALightningModule,
    datamodule: TokenDataModule,
    trainer: L.Trainer,
    cfg: DictConfig,
    room: Room | None,
) -> str:
    """The table; `room` is what the micro-batch was chosen by."""
    model = module.model
    sequences, seq_len = cfg.batch.sequences_per_step, cfg.model.seq_len
    shares = f"{trainer.world_size} × {datamodule.micro_batch_size} at once"
    shares += f" × {trainer.accumulate_grad_batches} accumulated"
    step = f"{sequences * seq_len:,} ({sequences} sequences of {seq_len:,}: {shares})"
    backends = sorted({getattr(block.attention, "backend", "sdpa") for block in model.layers})
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    products = torch.get_float32_matmul_precision()
    rows = {
        "model": f"{cfg.model.name}, {model.num_params / 1e6:.2f} M parameters",
        "tokens per step": step,
        "recipe": HydraConfig.get().runtime.choices["recipe"],
        "steps": f"{trainer.max_steps:,}",
        "visible tokens": visible_tokens(module, seq_len),
        "device": f"{trainer.world_size} × {name}",
        "memory": room and f"{room.expected / 2**30:.1f} of {room.free / 2**30:.1f} GiB expected",
        "backend": ", ".join(backends),
        "precision": f"{trainer.precision}, float32 products: {products}",
        "cross-entropy": module.cross_entropy,
        "run folder": cfg.run_dir,
    }
    rows |= datamodule.summary(trainer.max_steps * sequences)
    return "\n".join(f"{label:>16}  {value}" for label, value in rows.items() if value)


def visible_tokens(module: NSALightningModule, seq_len: int) -> str:
    """Keys that the last query reads: in the end, and in the stages before."""

    def visible(stage: int | None) -> str:
        with module.sparsity.at(stage):
            return f"{module.model.visible_tokens(seq_len):.0f}"

    stages = [visible(stage) for stage in range(len(module.sparsity.stages))]
    before = f"; in the stages before {', '.join(stages)}" if stages else ""
    return f"{visible(None)} keys per query, of all branches{before}"
