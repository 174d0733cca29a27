"""Loss, optimizer, schedule and clipping, by hand-made numbers; then train.py from end to end."""

import csv
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forked_runs
import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from data.metrics import ACCURACY, BITS_PER_BYTE
from nsa.training.label_sums import label_sums
from nsa.training.lightning_module import NSALightningModule
from nsa.training.optimizers import adamw, build_schedule, cosine, parameter_groups, wsd
from nsa.training.seeds import micro_batch_seed, seed_generators
from nsa.transformer import Transformer
from runs import run
from runs.results import FIGURES

pytestmark = [  # of Lightning 2.6.6 itself, under PyTorch 2.13
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

ROOT = Path(__file__).parent.parent
SEQ_LEN, VOCAB, BYTES_PER_TOKEN = 12, 7, 2.0

ATTENTION = {
    "sliding_window_size": 4,
    "compress_block_size": 4,
    "compress_block_sliding_stride": 2,
    "selection_block_size": 4,
    "num_selected_blocks": 2,
    "num_compressed_mem_kv": 1,
    "compress_network": "grouped_mlp",
    "compress_mlp_expand_factor": 0.25,
    "backend": "reference",
}
MODEL = {
    "name": "test",
    "vocab_size": VOCAB,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_head": 8,
    "seq_len": SEQ_LEN,
    "layer_pattern": ["nsa", "dense"],
    "attention": ATTENTION,
}
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "fused": True}
COSINE = {"name": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1}


def make_module(**changes: object) -> NSALightningModule:
    options = {"model": MODEL, "optimizer": ADAMW, "scheduler": COSINE} | changes
    return NSALightningModule(**options)


class Later(Sampler[int]):
    """Numbers from `start` to `total`; as long as if it began at 0, as Lightning counts."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))


class Counting(L.LightningDataModule):
    """Sequences that count up modulo V; sample k starts at k, so that a step's data are known."""

    metric = BITS_PER_BYTE

    def __init__(self, micro_batch_size: int = 4, val_sizes: tuple[int, ...] = (3, 1)) -> None:
        super().__init__()
        self.micro_batch_size, self.val_sizes = micro_batch_size, val_sizes

    @staticmethod
    def sequences(first: int, count: int) -> Tensor:
        return (torch.arange(first, first + count)[:, None] + torch.arange(SEQ_LEN + 1)) % VOCAB

    def train_dataloader(self) -> DataLoader:
        size, accumulate = self.micro_batch_size, self.trainer.accumulate_grad_batches
        total = self.trainer.max_steps * accumulate
        data = [{"tokens": self.sequences(i * size, size)} for i in range(total)]
        sampler = Later(self.trainer.global_step * accumulate, total)
        return DataLoader(data, batch_size=None, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([{"tokens": t} for t in self.split()], batch_size=None)

    def split(self) -> list[Tensor]:
        """Batches of unequal size, the last of which ends in labels that are not scored."""
        batches = [self.sequences(i, size) for i, size in enumerate(self.val_sizes)]
        batches[-1][-1, 5:] = -1
        return batches

    def bytes_per_token(self, split: str) -> float:
        return BYTES_PER_TOKEN


def make_trainer(folder: Path, **options: object) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed = {"accelerator": "cpu", "max_epochs": -1, "enable_model_summary": False}
    options = {"max_steps": 3, "log_every_n_steps": 1, "num_sanity_val_steps": 0} | options
    return L.Trainer(default_root_dir=folder, **quiet | fixed | options)


def fitted(
    folder: Path, data: Counting, module: NSALightningModule, **options: object
) -> L.Trainer:
    trainer = make_trainer(folder, **options)
    trainer.fit(module, datamodule=data)
    return trainer


# Loss


def test_labels_of_minus_one_are_not_scored() -> None:
    model = make_module().model
    tokens = Counting.sequences(0, 2)
    tokens[1, 4:] = -1
    nats, count, *_ = label_sums(model, tokens)
    logits = model(tokens[:, :-1].clamp(min=0)).log_softmax(dim=-1)
    scored = [(b, t) for b in range(2) for t in range(SEQ_LEN) if tokens[b, t + 1] >= 0]
    by_hand = -sum(logits[b, t, tokens[b, t + 1]] for b, t in scored)
    assert count == len(scored) == SEQ_LEN + 3
    torch.testing.assert_close(nats, by_hand)


def test_scored_labels_may_stand_anywhere_and_the_input_stays_whole() -> None:
    model = make_module().model
    tokens = Counting.sequences(0, 2)
    scored = torch.zeros(2, SEQ_LEN, dtype=torch.bool)
    scored[0, 3] = scored[1, 0] = scored[1, 7] = True
    nats, count, correct, *_ = label_sums(model, tokens, scored, counts_correct=True)
    logits = model(tokens[:, :-1])
    places = scored.nonzero().tolist()
    by_hand = -sum(logits.log_softmax(-1)[b, t, tokens[b, t + 1]] for b, t in places)
    torch.testing.assert_close(nats, by_hand)
    assert count == 3
    assert correct == sum(int(logits[b, t].argmax() == tokens[b, t + 1]) for b, t in places)


class Judged(Counting):
    """Every third label is scored, and the model is judged by how many it finds."""

    metric = ACCURACY

    def split(self) -> list[dict[str, Tensor]]:
        batches = [self.sequences(i, size) for i, size in enumerate(self.val_sizes)]
        scored = (torch.arange(SEQ_LEN) % 3 == 0).expand(len(batches[0]), -1)
        return [{"tokens": t, "scored": scored[: len(t)]} for t in batches]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.split(), batch_size=None)


def test_the_data_name_the_metric(tmp_path: Path) -> None:
    module, data = make_module(), Judged()
    logged = fitted(tmp_path, data, module).callback_metrics
    assert not any("bpb" in name for name in logged)
    assert 0 <= logged["train/accuracy"] <= 1
    model = module.model.eval()
    sums = [label_sums(model, **batch, counts_correct=True) for batch in data.split()]
    share = sum(s.correct.item() for s in sums) / sum(s.labels.item() for s in sums)
    assert logged["val/accuracy"] == pytest.approx(share)


def test_the_loss_is_float32_whatever_the_logits_are() -> None:
    def model(ids: Tensor) -> Tensor:
        return F.one_hot(ids, VOCAB).bfloat16()

    assert label_sums(model, Counting.sequences(0, 1)).nats.dtype == torch.float32


def test_validation_is_the_exact_mean_over_scored_tokens(tmp_path: Path) -> None:
    data, module = Counting(), make_module()
    trainer = make_trainer(tmp_path)
    logged = trainer.validate(module, datamodule=data, verbose=False)[0]
    sums = [label_sums(module.model.eval(), tokens) for tokens in data.split()]
    loss = sum(nats.item() for nats, *_ in sums) / sum(count.item() for _, count, *_ in sums)
    assert logged["val/loss"] == pytest.approx(loss, rel=1e-6)
    assert logged["val/bpb"] == pytest.approx(loss / math.log(2) / BYTES_PER_TOKEN, rel=1e-6)


def test_training_logs_what_it_says(tmp_path: Path) -> None:
    module = make_module()
    trainer = fitted(tmp_path, Counting(), module, gradient_clip_val=1.0)
    logged = trainer.callback_metrics
    in_bits = logged["train/loss"] / math.log(2) / BYTES_PER_TOKEN
    torch.testing.assert_close(logged["train/bpb"], in_bits)
    factor = cosine(2, max_steps=3, warmup_steps=2, min_lr_ratio=0.1)
    assert logged["optim/lr"] == pytest.approx(ADAMW["lr"] * factor)
    assert logged["optim/grad_norm"] > 0
    assert module.evaluated_step == trainer.global_step


# Optimizer, schedule, clipping


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(tied: bool) -> None:
    settings = {key: value for key, value in MODEL.items() if key != "name"}
    model = Transformer(**settings | {"tie_embeddings": tied})
    decay, no_decay = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [id(parameter) for group in (decay, no_decay) for parameter in group["params"]]
    assert sorted(grouped) == sorted(names)
    stays = {names[id(parameter)] for parameter in no_decay["params"]}
    for name in names.values():
        last = name.rpartition(".")[2]
        expected = "norm" in name or "bias" in last or name == "embedding.weight"
        expected |= last in ("positions", "mem_k", "mem_v")
        assert (name in stays) == expected, name


def test_adamw_decays_matrices_alone(tmp_path: Path) -> None:
    module = make_module(optimizer=ADAMW | {"weight_decay": 0.5})
    module.trainer = make_trainer(tmp_path)
    optimizer = module.configure_optimizers()["optimizer"]
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {n for n, p in module.model.named_parameters() if not torch.equal(p, before[n])}
    assert "head.weight" in shrunk and "layers.0.attention.to_q.weight" in shrunk
    assert not shrunk & {"norm.weight", "embedding.weight", "layers.0.attention.mem_k"}


def test_cosine_warms_up_and_ends_at_its_floor() -> None:
    def factor(step: int) -> float:
        return cosine(step, max_steps=100, warmup_steps=10, min_lr_ratio=0.1)

    assert [factor(0), factor(4), factor(9), factor(10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert factor(55) == pytest.approx(0.55)
    assert [factor(100), factor(1000)] == pytest.approx([0.1, 0.1])


def test_wsd_is_flat_then_falls_in_a_line() -> None:
    def factor(step: int, decay_fraction: float = 0.2) -> float:
        options = {"warmup_steps": 10, "min_lr_ratio": 0.0, "decay_fraction": decay_fraction}
        return wsd(step, max_steps=100, **options)

    assert [factor(0), factor(9), factor(50), factor(80)] == pytest.approx([0.1, 1, 1, 1])
    assert [factor(90), factor(100)] == pytest.approx([0.5, 0])
    assert [factor(80, 0.0), factor(99, 0.0)] == pytest.approx([1, 1])


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"scheduler='linear' is unknown: choose one of cosine, wsd"
    ):
        build_schedule({"name": "linear"})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("optimizer", {"lr": -1.0}, r"optimizer\.lr=-1\.0 must be a number above 0"),
        ("optimizer", {"betas": [0.9]}, r"optimizer\.betas=\[0\.9\] must be two numbers"),
        ("scheduler", {"warmup_steps": -3}, r"scheduler\.warmup_steps=-3"),
        ("scheduler", {"min_lr_ratio": 5}, r"scheduler\.min_lr_ratio=5 must lie between 0 and 1"),
    ],
)
def test_impossible_numbers_are_refused(
    tmp_path: Path, part: str, change: dict, message: str
) -> None:
    options = {"optimizer": ADAMW, "scheduler": COSINE}
    with pytest.raises(ValueError, match=message):
        make_module(**{part: options[part] | change}).check_trainer(make_trainer(tmp_path))


def test_adamw_takes_its_numbers_from_the_config() -> None:
    (group, _) = adamw(nn.Linear(2, 2), **ADAMW | {"betas": [0.7, 0.8], "eps": 1e-5}).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.7, 0.8), 1e-5)


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_steps=-1"):
        fitted(tmp_path, Counting(), make_module(), max_steps=-1, limit_train_batches=1)


def test_options_that_could_not_be_honoured_are_refused(tmp_path: Path, monkeypatch) -> None:
    by_value = make_trainer(tmp_path, gradient_clip_algorithm="value")
    with pytest.raises(ValueError, match="gradient_clip_algorithm"):
        make_module().check_trainer(by_value)
    monkeypatch.setattr(L.Trainer, "precision", "16-mixed")
    with pytest.raises(ValueError, match=r"optimizer\.fused=false"):
        make_module().check_trainer(make_trainer(tmp_path))
    make_module(optimizer=ADAMW | {"fused": False}).check_trainer(make_trainer(tmp_path))


def test_flex_is_refused_on_a_cpu_before_training(tmp_path: Path) -> None:
    model = MODEL | {"attention": MODEL["attention"] | {"backend": "flex"}}
    with pytest.raises(ValueError, match=r"attention\.backend=flex cannot train on a CPU"):
        make_module(model=model).check_trainer(make_trainer(tmp_path))


def test_clipping_at_zero_does_not_clip(tmp_path: Path) -> None:
    plain, zero = make_module(), make_module()
    zero.load_state_dict(plain.state_dict())
    fitted(tmp_path, Counting(), plain)
    fitted(tmp_path, Counting(), zero, gradient_clip_val=0.0)
    assert torch.equal(weights(plain), weights(zero))
    with pytest.raises(ValueError, match=r"gradient_clip_val=-1\.0 must be at least 0"):
        make_module().check_trainer(make_trainer(tmp_path, gradient_clip_val=-1.0))


def test_gradients_are_clipped_by_their_norm(tmp_path: Path) -> None:
    class Watched(NSALightningModule):
        def on_train_batch_end(self, *_: object) -> None:
            norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

    norms: list[float] = []
    options = {"model": MODEL, "optimizer": ADAMW, "scheduler": COSINE}
    trainer = fitted(tmp_path, Counting(), Watched(**options), gradient_clip_val=0.01)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    assert trainer.callback_metrics["optim/grad_norm"] > 0.02  # before clipping


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    ends = []
    for micro_batch_size, accumulate in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        module = make_module()
        data = Counting(micro_batch_size)
        fitted(tmp_path, data, module, accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
        ends.append(weights(module))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_accumulation_may_change_where_a_run_goes_on(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    options = {"max_steps": 6, "callbacks": [saver], "enable_checkpointing": True}
    whole = make_module()
    fitted(tmp_path, Counting(), whole, **options)
    resumed = make_module()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2, **options)
    trainer.fit(resumed, datamodule=Counting(2), ckpt_path=tmp_path / "step=3.ckpt")
    torch.testing.assert_close(weights(resumed), weights(whole), atol=1e-5, rtol=1e-4)


# Chance


def test_chance_is_a_function_of_seed_rank_and_micro_batch() -> None:
    seeds = [micro_batch_seed(s, r, m) for s in (0, 1, 2) for r in (0, 1, 2) for m in (0, 1, 2**31)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(micro_batch_seed(2**32 - 1, 10_000, 10**9))


def test_chance_of_every_kind_repeats() -> None:
    draws = []
    for seed in (3, 3, 1 << 40):
        seed_generators(seed)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


def test_dropout_repeats_whatever_was_drawn_in_between(tmp_path: Path) -> None:
    class Noisy(Counting):
        def val_dataloader(self) -> DataLoader:
            torch.rand(7)
            return super().val_dataloader()

    ends = []
    for data in (Counting(), Noisy()):
        torch.manual_seed(0)
        module = make_module(model=MODEL | {"dropout": 0.5})
        options = {"val_check_interval": 1, "check_val_every_n_epoch": None}
        fitted(tmp_path, data, module, reload_dataloaders_every_n_epochs=1, **options)
        ends.append(weights(module))
    assert torch.equal(*ends)


# train.py, as typed

TINY = (
    *("trainer=cpu", "model.dim=32", "model.depth=1", "model.heads=2", "model.dim_head=16"),
    *("model.seq_len=32", "batch.micro_batch_size=8", "val_every_n_steps=10"),
    *("trainer.log_every_n_steps=1", "scheduler.warmup_steps=5", "optimizer.lr=1e-2"),
    *("callbacks.samples.new_tokens=8", "callbacks.loss_plot=null"),
    *("data=text", "data.paths=[corpus.txt]"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty place to work in, with a corpus."""
    words = ["quick", "brown", "foxes", "jump", "over", "a", "lazy", "dog", "and", "run"]
    text = " ".join(words[(i * i + i // 7) % len(words)] for i in range(4000))
    (tmp_path / "corpus.txt").write_text(text)
    return tmp_path


def run_train(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit code and output of train.py, in a process forked from one that has imported it."""
    (code,) = forked_runs.run(cwd, arguments)
    return code, (cwd / "run.log").read_text()


def test_a_sweep_trains_every_job_it_can_and_leaves_a_table(folder: Path) -> None:
    sweep = ("-m", *TINY, "trainer.max_steps=30", "attention.num_selected_blocks=0,2,-1")
    code, output = run_train(*sweep, "logger=csv", cwd=folder)
    assert code == 0, output
    (outputs,) = (folder / "outputs" / "sweeps").iterdir()
    results = [json.loads((outputs / job / "result.json").read_text()) for job in ("0", "1")]
    for job, result in enumerate(results):
        rows = forked_runs.rows_of(outputs / str(job))
        losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
        assert len(losses) == 30
        assert losses[-1] < 0.75 * losses[0]
        assert 0 < result["val_bpb"] < 8 and 0 < result["test_bpb"] < 8
        assert result["steps"] == 30 and result["tokens_per_second"] > 0
        assert f"attention.num_selected_blocks={2 * job}" in result["overrides"]
    assert results[0]["visible_tokens"] < results[1]["visible_tokens"]
    assert results[0]["num_params"] < results[1]["num_params"]  # keys and values of a third branch
    assert (outputs / "sweep.md").is_file() and (outputs / "sweep.png").is_file()
    for line in ("parameters", "tokens per step", "visible tokens", "backend  torch"):
        assert line in output
    assert "recipe  tiny" in output
    assert set(results[0]) == {"val_bpb", "test_bpb", *FIGURES, "overrides", "metric", "better"}
    command = (outputs / "1" / "command.txt").read_text()  # of this job alone
    assert "train.py trainer=cpu" in command and "attention.num_selected_blocks=2 " in command
    refused = json.loads((outputs / "2" / "result.json").read_text())
    assert "num_selected_blocks=-1 must be at least 0" in refused["error"]
    assert "Traceback" not in output


def test_jobs_side_by_side_outlive_a_refused_one_and_have_a_wandb_run_each(folder: Path) -> None:
    optuna = ("hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=3")
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    search = ("attention.num_selected_blocks=choice(0,2,-1)", "trainer.max_steps=2")
    typed = [sys.executable, str(ROOT / "train.py"), "-m", *TINY, *optuna, *joblib, *search]
    environment = os.environ | {"NSA_DATA_DIR": str(folder / "data"), "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "text": True, "capture_output": True}
    done = subprocess.run([*typed, "data.num_workers=1"], **options)  # joblib's own processes
    assert done.returncode == 0, done.stdout + done.stderr
    (outputs,) = (folder / "outputs" / "sweeps").iterdir()
    with (outputs / "sweep.csv").open(newline="") as file:
        errors = {row["overrides"].split()[0]: row["error"] for row in csv.DictReader(file)}
    refused = errors.pop("attention.num_selected_blocks=-1")
    assert refused.startswith("attention.num_selected_blocks=-1 must be at least 0")
    assert list(errors.values()) == ["", ""]
    assert (outputs / "sweep.md").is_file() and (outputs / "sweep.png").is_file()
    runs = [path.read_text().strip() for path in outputs.glob("*/wandb_id.txt")]
    assert len(set(runs)) == 2
    for path in outputs.glob("*/wandb_id.txt"):
        (log,) = path.parent.glob(f"wandb/offline-run-*/run-{path.read_text().strip()}.wandb")
        assert outputs.name.encode() in log.read_bytes()  # its group
    assert "#0 " in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_what_cannot_run_is_refused_in_one_message(folder: Path) -> None:
    code, output = run_train(*TINY, "attention.selection_block_size=6", cwd=folder)
    assert code == 1
    assert "selection_block_size=6" in output
    assert "Traceback" not in output and "tokens per step" not in output


def test_validation_counts_optimizer_steps_and_the_test_can_be_left_out(folder: Path) -> None:
    steps = ("trainer.max_steps=4", "val_every_n_steps=2", "trainer.num_sanity_val_steps=0")
    code, output = run_train(
        *TINY, *steps, "batch.micro_batch_size=4", "test=false", "logger=csv", cwd=folder
    )
    assert code == 0, output
    (result,) = folder.glob("outputs/*/*/result.json")
    assert json.loads(result.read_text())["test_bpb"] is None
    rows = forked_runs.rows_of(result.parent)
    assert [int(row["step"]) for row in rows if row["val/bpb"]] == [2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": {"sequences_per_step": 0}}, "sequences_per_step=0"),
        ({"batch": {"micro_batch_size": 0}}, "micro_batch_size=0 must be at least 1, or auto"),
        ({"batch": {"micro_batch_size": "all"}}, "micro_batch_size=all must be at least 1, or a"),
        ({"val_every_n_steps": 0}, "val_every_n_steps=0 must be at least 1"),
        ({"model": {"vocab_size": 100}}, "vocab_size=100 must be at least data.vocab_size=256"),
        ({"compile": "off"}, "compile=off is text"),
        ({"float32_matmul_precision": "tf32"}, "precision=tf32 must be one of highest, high, medi"),
        ({"objective": "bpb"}, "objective=bpb must be one or a list of val_bpb, test_bpb"),
    ],
)
def test_settings_nothing_else_would_notice_are_refused(change: dict, message: str) -> None:
    batch = {"sequences_per_step": 1, "micro_batch_size": 1}
    good = {"batch": batch, "val_every_n_steps": 1, "model": {"vocab_size": 256}}
    data = {"_target_": "data.datamodule.TextDataModule", "vocab_size": 256}
    good |= {"data": data, "compile": False, "objective": "val_bpb"}
    good |= {"float32_matmul_precision": "high"}
    run.check_settings(good)
    bad = good | {k: good[k] | v if isinstance(v, dict) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        run.check_settings(bad)


def test_automatic_precision_is_bf16_where_the_gpu_has_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert run.resolve_precision("auto", "auto") == "bf16-mixed"
    assert run.resolve_precision("auto", "cpu") == "32-true"
    assert run.resolve_precision("16-mixed", "auto") == "16-mixed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert run.resolve_precision("auto", "auto") == "32-true"


COMPILED = """
import sys, torch, test_train
from pathlib import Path
from torch import nn

calls, compile_in_place = [], nn.Module.compile
def counted(module, **options):
    calls.append(type(module).__name__)
    compile_in_place(module, backend="aot_eager", **options)
nn.Module.compile = counted

ends = []
for switch in (False, True):
    torch.manual_seed(0)
    model = test_train.MODEL | {"layer_pattern": ["dense"]}  # what compiles fastest
    module = test_train.make_module(model=model, compile=switch)
    once = {"max_steps": 2, "limit_val_batches": 0}
    test_train.fitted(Path(sys.argv[1]), test_train.Counting(), module, **once)
    ends.append(module.state_dict())
assert calls == ["Block", "Block"], calls
assert ends[0].keys() == ends[1].keys()
for name, weight in ends[0].items():
    torch.testing.assert_close(weight, ends[1][name])
"""


def test_compile_changes_neither_names_nor_values(tmp_path: Path) -> None:
    """In a process of its own: the shape checks of the test run are not for a compiler."""
    done = forked_runs.python(COMPILED, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
