"""Do the callbacks measure, write and refuse what they say, in a run of a real Trainer?"""

import io
import json
import math
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import (
    OF_LIGHTNING,
    SEQ_LEN,
    TinyData,
    TinyModel,
    TinyModule,
    fit,
    tiny_trainer,
    weights,
)

from callbacks import loss_plot, provenance
from callbacks.attention_statistics import AttentionStatistics, is_free
from callbacks.csv_logger import RunCSVLogger, read_rows
from callbacks.every_n_steps import EveryNSteps, aside
from callbacks.guard import Guard
from callbacks.loss_plot import LossPlot, curve, smooth
from callbacks.loss_spikes import LossSpikes
from callbacks.progress_bar import StepProgressBar, clock, human
from callbacks.provenance import Provenance, git_state
from callbacks.samples import Samples
from callbacks.throughput import Throughput, peak_flops_of
from data.metrics import BITS_PER_BYTE
from nsa import blocks
from nsa.config import NSAConfig
from nsa.transformer import Transformer

pytestmark = OF_LIGHTNING


class Counter(EveryNSteps):
    """Notes the steps it was called at."""

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)
        self.steps: list[int] = []

    def on_nth_step(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        self.steps.append(trainer.global_step)


def weights_after(folder: Path, *callbacks: Callback, model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    module = TinyModule(model)
    fit(folder, *callbacks, module=module)
    return weights(module)


# every n steps


@pytest.mark.parametrize("accumulate", [1, 3])
def test_nth_steps_are_optimizer_steps(tmp_path, accumulate):
    counter, follower = Counter(3), Counter()
    fit(tmp_path, counter, follower, accumulate_grad_batches=accumulate)
    assert counter.steps == [3, 6]
    assert follower.steps == [2, 4, 6, 8]  # log_every_n_steps


def test_the_step_that_a_run_goes_on_from_is_not_counted_again(tmp_path):
    saver, counter = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=4), Counter(4)
    options: Any = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    fit(tmp_path, saver, max_steps=4, **options)
    fit(tmp_path, saver, counter, ckpt_path=tmp_path / "saved.ckpt", **options)
    assert counter.steps == [8]


def test_a_dry_run_leaves_no_file(tmp_path):
    callbacks = [
        Samples(1),
        AttentionStatistics(1),
        Provenance(),
        LossPlot(),
        Throughput(),
        LossSpikes(),
        Guard(),
    ]
    fit(tmp_path, *callbacks, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_aside_runs_a_compiled_model_uncompiled():
    """Or hooks would not fire, and every length of a growing sample would compile anew."""
    lengths, hooked = [], []
    module = TinyModule(TinyModel(dropout=0.5))

    def backend(graph, inputs):
        lengths.append(inputs)
        return graph.forward

    ids = torch.zeros(1, SEQ_LEN, dtype=torch.long)
    module.model.compile(backend=backend)
    module.model(ids)
    module.model.head.register_forward_pre_hook(lambda layer, inputs: hooked.append(layer))
    compiled = len(lengths)
    plugin = SimpleNamespace(forward_context=nullcontext)
    with aside(SimpleNamespace(precision_plugin=plugin), module):  # type: ignore[arg-type]
        first, second = module.model(ids[:, :3]), module.model(ids[:, :3])
    assert torch.equal(first, second) and not first.requires_grad
    assert len(hooked) == 2 and len(lengths) == compiled and module.training


def test_every_n_steps_below_one_is_refused():
    with pytest.raises(ValueError, match="every_n_steps=0 of Samples must be at least 1"):
        Samples(every_n_steps=0)


# throughput


@pytest.fixture
def hands(monkeypatch):
    """A clock that only stands where the test puts it."""
    hands = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: hands.now)
    return hands


class TimedModule(TinyModule):
    """A step takes 1 s, the first one 50; a validation batch 1000."""

    def __init__(self, hands: SimpleNamespace) -> None:
        super().__init__()
        self.hands = hands

    def training_step(self, batch, batch_idx):
        self.hands.now += 50 if batch_idx == 0 else 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.hands.now += 1000
        return super().validation_step(batch, batch_idx)


class SlowCounter(Counter):
    def __init__(self, every_n_steps: int, hands: SimpleNamespace) -> None:
        super().__init__(every_n_steps)
        self.hands = hands

    def on_nth_step(self, trainer, pl_module, batch):
        self.hands.now += 300


def test_throughput_counts_training_time_only(tmp_path, hands):
    throughput = Throughput(skip_steps=1, peak_flops=1e6)
    logger = RunCSVLogger(tmp_path)
    callbacks = [throughput, SlowCounter(2, hands)]
    trainer = fit(tmp_path, *callbacks, module=TimedModule(hands), logger=logger)
    rows = read_rows(logger.path)
    speeds = curve(rows, "perf/tokens_per_second")
    expected = [(2, 32 / 51), (4, 16.0), (6, 16.0), (8, 16.0)]
    assert speeds == [(step, pytest.approx(speed)) for step, speed in expected]
    assert curve(rows, "perf/mfu")[-1] == (8, pytest.approx(16 * 1000 * SEQ_LEN / 1e6))
    assert 0.05 < curve(rows, "perf/memory_gib")[-1][1] < 100
    assert trainer.callback_metrics["perf/tokens_per_second"] == pytest.approx(16)
    hands.now += 1e6
    trainer.validate(TinyModule(), TinyData(), verbose=False)
    assert throughput.tokens_per_second == pytest.approx(16)


@pytest.mark.parametrize(("skip_steps", "mean"), [(0, 8 * 16 / 57), (3, 16), (8, None)])
def test_the_mean_leaves_the_first_steps_out(tmp_path, hands, skip_steps, mean):
    throughput = Throughput(skip_steps)
    fit(tmp_path, throughput, module=TimedModule(hands))
    assert throughput.tokens_per_second == (mean and pytest.approx(mean))


def test_throughput_follows_its_own_cadence_and_a_cpu_has_no_peak_to_speak_of(tmp_path, caplog):
    logger = RunCSVLogger(tmp_path)
    fit(tmp_path, Throughput(every_n_steps=5), logger=logger)
    rows = read_rows(logger.path)
    assert [step for step, _ in curve(rows, "perf/tokens_per_second")] == [5]
    assert curve(rows, "perf/mfu") == []
    assert "perf/mfu" not in caplog.text


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peak_flops_by_name(name, tflops):
    assert peak_flops_of(name) == (tflops and tflops * 1e12)


def test_a_negative_skip_is_refused():
    with pytest.raises(ValueError, match="skip_steps=-1"):
        Throughput(skip_steps=-1)


# samples


def test_samples_are_written_every_n_steps_and_at_the_end(tmp_path):
    fit(tmp_path, Samples(3, prompt_tokens=5, new_tokens=7))
    files = sorted(tmp_path.glob("samples/*"))
    assert [file.name for file in files] == ["step_3.txt", "step_6.txt", "step_8.txt"]
    lines = files[0].read_text().splitlines()
    assert lines[:4] == ["step 3", "", "--- prompt, 5 tokens", "abcde"]  # of the validation split
    assert lines[5] == "--- sample, 7 tokens, temperature 1.0, filter_thres 0.9, seed 0"
    assert len(lines[6]) == 7


class Attentive(TinyModel):
    """Notes how, and how often, it was asked to sample."""

    times = 0

    def sample(self, prompt, seq_len, temperature, filter_thres):
        self.times += 1
        self.asked = (prompt.tolist(), seq_len, temperature, filter_thres)
        self.stood = (self.training, torch.is_grad_enabled())
        return super().sample(prompt, seq_len, temperature, filter_thres)


def test_samples_pass_their_options_on(tmp_path):
    module = TinyModule(Attentive())
    fit(tmp_path, Samples(8, "cab", 5, 7, 0.5, 0.25), module=module)
    assert module.model.asked == ([[2, 0, 1]], 10, 0.5, 0.25)
    assert module.model.stood == (False, False) and module.model.times == 1
    assert module.training


def test_samples_depend_on_their_seed_alone(tmp_path):
    texts = []
    for run, seed in enumerate((0, 0, 1)):
        torch.manual_seed(3)
        model = TinyModel()
        torch.manual_seed(run)
        fit(tmp_path, Samples(8, filter_thres=0.0, seed=seed), module=TinyModule(model))
        texts.append((tmp_path / "samples" / "step_8.txt").read_text().splitlines()[-1])
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_without_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prompt='' of Samples encodes to no token"):
        fit(tmp_path, Samples(1, prompt=""))


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens"])
def test_no_tokens_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        Samples(**{name: 0})


def test_samples_leave_training_as_it_is(tmp_path):
    """Dropout draws from the generator that sampling must not touch."""
    torch.manual_seed(0)
    start = TinyModel(dropout=0.5).state_dict()
    runs = []
    for callbacks in ([], [Samples(1)]):
        model = TinyModel(dropout=0.5)
        model.load_state_dict(start)
        runs.append(weights_after(tmp_path, *callbacks, model=model))
    assert torch.equal(*runs)


# attention statistics

SIZES = {
    "sliding_window_size": 2,
    "compress_block_size": 2,
    "compress_block_sliding_stride": 2,
    "selection_block_size": 2,
    "num_selected_blocks": 3,
    "num_initial_blocks": 1,
    "num_local_blocks": 1,
    "compress_network": "mean_pool",
    "compress_mlp_expand_factor": 1.0,
    "gate_bias": [0.0, 1.0, -1.0],
    "backend": "reference",
}


def transformer(dropout: float = 0.0, **sizes: Any) -> Transformer:
    torch.manual_seed(0)
    attention = SIZES | sizes
    pattern = ["nsa", "dense", "nsa"]
    return Transformer(
        11, 8, 3, 2, 4, seq_len=SEQ_LEN, attention=attention, layer_pattern=pattern, dropout=dropout
    )


def test_attention_statistics(tmp_path):
    logger = RunCSVLogger(tmp_path)
    module = TinyModule(transformer())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    fit(tmp_path, AttentionStatistics(4), module=module, logger=logger)
    rows = read_rows(logger.path)
    assert [step for step, _ in curve(rows, "attn/layer_0/gate_sliding")] == [4, 8]
    assert not any(name.startswith("attn/layer_1/") for row in rows for name in row)  # dense
    for layer in (0, 2):
        for branch, bias in (("compressed", 0.0), ("selected", 1.0), ("sliding", -1.0)):
            gate = 1 / (1 + math.exp(-bias))
            found = curve(rows, f"attn/layer_{layer}/gate_{branch}")
            assert found[0][1] == pytest.approx(gate, abs=1e-6)
        share = curve(rows, f"attn/layer_{layer}/free_selected_share")[0][1]
        assert share == pytest.approx(expected_share(module, layer), abs=1e-6)
    assert (tmp_path / "attention_gates.png").stat().st_size > 5000
    assert not module.model.layers[0].attention._forward_pre_hooks


def expected_share(module: TinyModule, layer: int) -> float:
    """Free blocks over selected blocks, counted one by one, of the last batch at lr 0."""
    batch = torch.arange(SEQ_LEN + 1)[None] + 6  # rows 6 and 7 make up the fourth micro-batch
    caught = {}
    attention: Any = module.model.layers[layer].attention
    handle = attention.register_forward_pre_hook(lambda _, inputs: caught.update(x=inputs[0]))
    with torch.no_grad():
        module.model(batch[:, :-1] % 11)
        indices = attention.branches(caught["x"]).block_indices
    handle.remove()
    free = [
        block
        for t, kept in enumerate(indices[0].tolist())
        for block in kept[0] + kept[1]
        if block > 0
        and block != t // 2
        and not any(0 <= t - s < 2 for s in (2 * block, 2 * block + 1))
    ]
    return len(free) / (indices >= 0).sum().item()


def test_layers_that_select_nothing_have_no_share(tmp_path):
    logger = RunCSVLogger(tmp_path)
    module = TinyModule(transformer(num_selected_blocks=0))
    fit(tmp_path, AttentionStatistics(8), module=module, logger=logger)
    names = {name for row in read_rows(logger.path) for name in row if name.startswith("attn/")}
    assert names == {
        f"attn/layer_{i}/gate_{b}" for i in (0, 2) for b in ("compressed", "selected", "sliding")
    }


def test_attention_statistics_leave_training_as_it_is(tmp_path):
    runs = [
        weights_after(tmp_path, *callbacks, model=transformer(dropout=0.5))
        for callbacks in ([], [AttentionStatistics(1)])
    ]
    assert torch.equal(*runs)


def test_attention_statistics_look_at_num_sequences(tmp_path):
    seen = []
    module = TinyModule(transformer())

    def look(layer, inputs):
        if not torch.is_grad_enabled():
            seen.append(len(inputs[0]))

    module.model.embedding.register_forward_pre_hook(look)
    for num_sequences in (1, 2):
        fit(tmp_path, AttentionStatistics(8, num_sequences), module=module, limit_val_batches=0)
    assert seen == [1, 2]
    with pytest.raises(ValueError, match="num_sequences=0"):
        AttentionStatistics(num_sequences=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 4, 5, 9])
@pytest.mark.parametrize("num_tokens", [1, 17, 24])
def test_free_blocks_by_brute_force(num_tokens, window, causal):
    cfg = NSAConfig(
        sliding_window_size=window,
        compress_block_size=4,
        compress_block_sliding_stride=2,
        selection_block_size=4,
        causal=causal,
    )
    num_blocks = blocks.num_selection_blocks(num_tokens, cfg)
    every = torch.arange(-1, num_blocks).expand(1, num_tokens, 1, num_blocks + 1)
    free = is_free(every, cfg)[0, :, 0]
    inside = blocks.sliding_window(num_tokens, cfg)
    assert not free[:, 0].any()  # -1 is no block
    for t in range(num_tokens):
        for block in range(num_blocks):
            rank = blocks.priority(num_tokens, cfg)[t, block]
            touched = inside[t, block * 4 : block * 4 + 4].any()
            assert free[t, block + 1] == (rank == blocks.FREE and not touched)


# progress bar


def test_progress_is_lines_where_there_is_no_terminal(tmp_path, capsys):
    fit(tmp_path, Throughput(), StepProgressBar())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        f"step {step}/8"
        for step in (0, 2, 4, 4, 6, 8, 8)  # 4 and 8: with the validation's result
    ]
    assert lines[0] == "step 0/8  training begins, a line every 2 steps"
    assert "val bpb" not in lines[2] and "val bpb" in lines[3]
    for part in ("loss ", "bpb ", " tokens/s", "ETA 0:00"):
        assert part in lines[-1]
    assert "\r" not in "".join(lines)


def test_progress_is_a_bar_on_a_terminal(tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    fit(tmp_path, StepProgressBar(4))
    shown = screen.getvalue()
    assert "100% |" in shown and "\r" in shown and "step 8/8  loss" in shown
    assert "step 4/8  validating" in shown and "step 2/8" not in shown


@pytest.mark.parametrize(
    ("test", "times"),
    [
        (True, ["0:08", "0:06", "1:06:44", "1:06:42", "1:06:40", "33:20"]),
        (False, ["0:07", "0:05", "33:24", "33:22", "33:20", "0:00"]),
    ],
)
def test_the_time_left_has_the_validations_and_the_test_to_come(
    tmp_path, hands, capsys, test, times
):
    """Two validations and a test, of 2 batches each; a batch takes 1000 times as long as a step."""
    bar = StepProgressBar(test=test)
    trainer = fit(tmp_path, bar, module=TimedModule(hands))
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert [line.rpartition("ETA ")[2] for line in lines] == times
    trainer.test(TinyModule(), TinyData(), verbose=False)
    assert capsys.readouterr().out == "step 8/8  testing, 2 batches\n"


def test_a_disabled_bar_is_silent(tmp_path, capsys):
    bar = StepProgressBar()
    bar.disable()
    fit(tmp_path, bar)
    bar.print("nothing")
    assert capsys.readouterr().out == ""
    bar.enable()
    bar.print("some", "thing")
    assert capsys.readouterr().out == "some thing\n"


def test_numbers_and_times_for_people():
    assert [human(n) for n in (3.0, 41234.0, 1.2345e6, 5e9)] == ["3", "41.2k", "1.23M", "5G"]
    assert [clock(s) for s in (0, 62.4, 3723)] == ["0:00", "1:02", "1:02:03"]


# provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with a changed file and an untracked one."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    (folder / "a.py").write_text("old\n")
    git(folder, "add", "a.py")
    git(folder, "commit", "-q", "-m", "first")
    (folder / "a.py").write_text("new\n")
    (folder / "b.py").write_text("untracked\n")
    monkeypatch.setattr(provenance, "PROJECT", folder)
    return folder


def test_provenance(tmp_path, project):
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text("seed: 3\ndata:\n  seed: ${seed}\n")
    fit(run, Provenance())
    assert (run / "config.yaml").read_text() == "seed: 3\ndata:\n  seed: 3\n"
    assert json.loads((run / "git.json").read_text()) == {
        "commit": git(project, "rev-parse", "HEAD").strip(),
        "branch": "trunk",
        "changed": True,
        "untracked": ["b.py"],
    }
    patch = (run / "diff.patch").read_text()
    assert "-old\n+new" in patch
    found = json.loads((run / "versions.json").read_text())
    assert found["packages"]["torch"] == version("torch") and found["python"][:2] == "3."
    command = (run / "command.txt").read_text().splitlines()
    assert command[0] == f"cd {Path.cwd()}" and command[1].startswith(sys.executable)


def test_a_run_that_goes_on_keeps_the_first_files(tmp_path, project):
    fit(tmp_path, Provenance())
    first = (tmp_path / "git.json").read_bytes()
    git(project, "commit", "-q", "-a", "-m", "second")
    fit(tmp_path, Provenance())
    fit(tmp_path, Provenance())
    assert (tmp_path / "git.json").read_bytes() == first
    for n in (1, 2):
        folder = tmp_path / f"resume_{n}"
        assert json.loads((folder / "git.json").read_text())["changed"] is False
        assert not (folder / "diff.patch").exists()


def test_provenance_is_of_training_alone(tmp_path):
    tiny_trainer(tmp_path, [Provenance()]).validate(TinyModule(), TinyData(), verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_commit_is_stated(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "not a git repository" in git_state(tmp_path)["error"]
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == {"commit": None, "error": "git is not installed"}


# loss plot


def test_loss_plot_is_drawn_after_validations_and_at_the_end(tmp_path, monkeypatch):
    calls = []
    draw = loss_plot.draw
    monkeypatch.setattr(loss_plot, "draw", lambda *args: calls.append(args) or draw(*args))
    options = {"logger": RunCSVLogger(tmp_path), "accumulate_grad_batches": 2}
    fit(tmp_path, LossPlot(smoothing=0.5), **options)
    found = [([s for s, _ in train], [s for s, _ in val], *rest) for train, val, _, *rest in calls]
    per_step = 2 * 2 * SEQ_LEN
    assert found == [
        ([2, 4], [4], 0.5, per_step),
        ([2, 4, 6, 8], [4, 8], 0.5, per_step),
        ([2, 4, 6, 8], [4, 8], 0.5, per_step),
    ]
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_smooth_curve_is_a_mean_of_neighbours_from_the_first_point_on():
    points = [(10, 4.0), (20, 0.0), (30, 2.0), (40, 6.0)]
    assert smooth(points, 0.0) == points
    assert smooth(points, 0.5) == [(10, 2.0), (20, 3.0), (30, 3.0), (40, pytest.approx(8 / 3))]
    line = [(step, float(step)) for step in range(40)]
    assert smooth(line, 0.5)[20] == (20, 20.0)  # 5 points on each side: a quarter of 20
    assert smooth(line, 0.5)[38] == (38, sum(range(28, 40)) / 12)  # 10 (of 9.5) before, one after


@pytest.mark.parametrize(("per_step", "unit"), [(100, "thousand"), (100_000, "million")])
def test_the_plot_counts_tokens_too(per_step, unit):
    figure = loss_plot.draw([(10, 4.0), (20, 3.0)], [], BITS_PER_BYTE, 0.1, per_step)
    (above,) = figure.axes[0].child_axes
    assert above.get_xlabel() == f"{unit} tokens"


def test_a_curve_passes_over_the_steps_that_were_skipped():
    rows = [{"step": "1", "train/bpb": "2"}, {"step": "2", "train/bpb": "nan"}, {"step": "3"}]
    assert curve(rows, "train/bpb") == [(1, 2.0)]


def test_loss_plot_needs_the_csv_logger(tmp_path, caplog):
    fit(tmp_path, LossPlot())
    assert "loss.png is not drawn" in caplog.text and not (tmp_path / "loss.png").exists()
    with pytest.raises(ValueError, match=r"smoothing=1.0 .* below 1"):
        LossPlot(smoothing=1.0)
