"""Is what the probe says of NSA layers true, and does looking leave training as it is?"""

import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from test_callbacks import transformer, weights_after
from tiny_run import OF_LIGHTNING, TinyModule, fit
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import probe_plot
from callbacks.attention_probe import AttentionProbe
from callbacks.csv_logger import RunCSVLogger, read_rows
from callbacks.wandb_logger import RunWandbLogger
from nsa.attention import SparseAttention
from nsa.probe import probe, tile_starts

pytestmark = OF_LIGHTNING
NUM_TOKENS, BLOCK, WINDOW, KEPT = 41, 4, 6, 4


def layer(**options: Any) -> SparseAttention:
    """Four heads in two groups, with gates and scores that differ."""
    sizes = {"sliding_window_size": WINDOW, "compress_block_size": 4} | options
    attention = SparseAttention(
        16, 8, 4, compress_block_sliding_stride=2, selection_block_size=BLOCK,
        num_selected_blocks=options.pop("n", KEPT), kv_heads=2, backend="reference",
        **{name: value for name, value in sizes.items() if name != "n"},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.5)
    return attention


@pytest.fixture(scope="module")
def looked() -> tuple[SparseAttention, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    attention, tokens = layer(), torch.randn(1, NUM_TOKENS, 16)
    return attention, tokens, probe(attention, tokens)


def mean(values: list[float]) -> Any:
    return pytest.approx(sum(values) / len(values), abs=1e-5)


def test_gates_and_what_the_branches_add(looked):
    attention, tokens, figures = looked
    with torch.no_grad():
        found = attention.branches(tokens)
    outputs = torch.stack(found[:3], dim=-1) * found.gates[..., None, :]
    norms = outputs.norm(dim=3)[0]
    shares = (norms / norms.sum(-1, keepdim=True)).mean(0)
    for number, branch in enumerate(("compressed", "selected", "sliding")):
        torch.testing.assert_close(
            figures[f"gate_{branch}"].float(), found.gates[0, ..., number].mean(0)
        )
        torch.testing.assert_close(figures[f"share_{branch}"].float(), shares[:, number])


@torch.no_grad()
def test_selection_by_brute_force(looked):
    attention, tokens, figures = looked
    for head in range(4):
        for name, values in by_hand(attention, tokens, head).items():
            assert figures[name][head].item() == mean(values), name
    for count in (16, 32):
        kept = kept_blocks(attention, tokens, group=1)
        starts = range(0, NUM_TOKENS - count + 1, count)
        unions = [len(set().union(*kept[start : start + count])) for start in starts]
        assert figures[f"distinct_{count}"][3].item() == mean([float(union) for union in unions])
    assert figures["distinct_64"].isnan().all()  # the sequence is shorter
    assert (figures["mass_own_oracle"] >= figures["mass_oracle"] - 1e-6).all()


def by_hand(attention: SparseAttention, tokens: torch.Tensor, head: int) -> dict[str, list[float]]:
    """Figures of each query, in loops and sets."""
    group, found = head // 2, defaultdict(list)
    kept, theirs = (kept_blocks(attention, tokens, each) for each in (group, 1 - group))
    before: set[int] | None = None
    for t in range(NUM_TOKENS):
        own = t // BLOCK
        forced, mine = {0, own, max(0, own - 1)}, kept[t]
        inside = [b == own or t - b * BLOCK < WINDOW for b in mine]
        found["kept_in_window"].append(sum(inside) / len(mine))
        if own + 1 <= KEPT:  # it keeps all there are
            continue
        of_token = dense(attention, tokens, head, t)
        mass, partner = per_block(of_token), per_block(dense(attention, tokens, head ^ 1, t))
        free = [b for b in range(own + 1) if b not in forced]
        picks, slots = mine - forced, KEPT - len(forced)
        best = set(sorted(free, key=lambda b: -mass[b] - partner[b])[:slots])
        chance, others = slots / len(free), theirs[t] - forced
        figures = {
            "mass_kept": sum(mass[b] for b in mine),
            "mass_oracle": sum(mass[b] for b in best | forced),
            "mass_recent": sum(mass[b] for b in {*free[-slots:]} | forced),
            "mass_random": sum(m * (1 if b in forced else chance) for b, m in enumerate(mass)),
            "mass_visible": sum(
                m for s, m in enumerate(of_token) if s // BLOCK in mine or t - s < WINDOW
            ),
            "recall": len(best & picks) / len(best),
            "recall_random": chance,
            "distance": sum(t - b * BLOCK - BLOCK + 1 for b in picks) / len(picks),
            "picks_beyond_8": sum(t - b * BLOCK - BLOCK + 1 >= 8 for b in picks) / len(picks),
            "overlap_heads": len(picks & others) / len(picks | others),
        }
        if before is not None:
            figures["overlap_neighbours"] = len(picks & before) / len(picks | before)
        before = picks
        for name, value in figures.items():
            found[name].append(value)
    return found


def kept_blocks(attention: SparseAttention, tokens: torch.Tensor, group: int) -> list[set[int]]:
    lists = attention.branches(tokens).block_indices[0, :, group].tolist()
    return [set(blocks) - {-1} for blocks in lists]


def dense(attention: SparseAttention, tokens: torch.Tensor, head: int, t: int) -> list[float]:
    """What dense attention gives each token that query t may see."""
    x = attention.compress_and_rotate(attention.split_heads(tokens))
    scores = x.q_rot[0, t, head] @ x.k_slc[0, : t + 1, head // 2].T / math.sqrt(8)
    return scores.softmax(-1).tolist()


def per_block(of_token: list[float]) -> list[float]:
    return [sum(of_token[start : start + BLOCK]) for start in range(0, len(of_token), BLOCK)]


@pytest.mark.parametrize(
    ("options", "num_tokens"),
    [
        ({}, 130), ({}, 5), ({}, 1), ({"n": 0}, 70), ({"n": 64}, 70),
        ({"query_heads_share_selected_kv": False}, 70),
        ({"num_compressed_mem_kv": 2}, 70), ({"use_diff_topk": True}, 70), ({"causal": False}, 70),
    ],
)  # fmt: skip
def test_every_kind_of_layer_can_be_looked_at(options, num_tokens):
    figures = probe(layer(**options), torch.randn(2, num_tokens, 16))
    assert all(len(values) == 4 for values in figures.values())
    chosen = num_tokens > 5 and not options.get("n") and options.get("n") != 0
    assert figures["recall"].isfinite().all() == chosen
    total = sum(figures[f"share_{branch}"] for branch in ("compressed", "selected", "sliding"))
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64))


def test_documents_of_a_row_are_looked_at_apart():
    attention, tokens = layer(num_compressed_mem_kv=1), torch.randn(1, 128, 16)
    starts = torch.tensor([[0] * 64 + [64] * 64], dtype=torch.int32)
    packed = probe(attention, tokens, document_starts=starts)
    for name, figures in probe(attention, tokens.view(2, 64, 16)).items():
        torch.testing.assert_close(packed[name], figures, equal_nan=True)


def test_picks_inside_a_wide_window_are_wasted():
    tokens = torch.randn(1, 64, 16)
    assert (probe(layer(sliding_window_size=64), tokens)["picks_in_window"] == 1).all()
    assert (probe(layer(sliding_window_size=1), tokens)["picks_in_window"] == 0).all()


def test_tiles_are_spread_up_to_the_end():
    assert tile_starts(8192, 4) == [1984, 4032, 6080, 8128]
    assert tile_starts(200, 8) == [0, 64, 128]
    assert tile_starts(7, 8) == [0]


@torch.no_grad()
def test_of_a_task_the_questions_alone_count():
    attention, tokens = layer(), torch.randn(1, 200, 16)
    answers = {70: 3, 101: 50, 127: 90, 195: 190}  # the last one's own tile is cut short
    evidence = torch.full((1, 200), -1)
    evidence[0, list(answers)] = torch.tensor(list(answers.values()))
    assert tile_starts(200, 8, evidence[0]) == [64, 192]
    figures = probe(attention, tokens, evidence=evidence)
    found, all_queries = attention.branches(tokens), probe(attention, tokens)
    gates = found.gates[0, list(answers)].mean(0)[:, 1]
    torch.testing.assert_close(figures["gate_selected"].float(), gates)
    for head in range(4):
        kept = [set(found.block_indices[0, t, head // 2].tolist()) for t in answers]
        of_answers = [e // BLOCK for e in answers.values()]
        assert float(figures["evidence_kept"][head]) == mean(
            [float(block in blocks) for block, blocks in zip(of_answers, kept, strict=True)]
        )
        # Two blocks are forced: the first and the own one. The others are drawn from what is left.
        chances = [
            float(block in blocks) if block in (0, t // BLOCK - 1, t // BLOCK) else None
            for (t, _), block, blocks in zip(answers.items(), of_answers, kept, strict=True)
        ]
        assert chances[0] == 1 and chances[1:3] == [None, None]
        assert 0 < float(figures["evidence_random"][head]) < 1
    assert "evidence_kept" not in all_queries


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that comes into being."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return out


def test_memory_grows_with_the_sequence_and_not_with_its_square():
    largest = []
    for num_tokens in (512, 1024):
        with Largest() as mode:
            probe(layer(), torch.randn(1, num_tokens, 16), num_tiles=2)
        largest.append(mode.numbers)
    assert largest[1] < 1024 * 1024 and largest[1] <= 2 * largest[0]


def test_autocast_changes_the_layer_and_not_the_arithmetic():
    attention, tokens = layer(), torch.randn(1, 128, 16)
    with torch.autocast("cpu", torch.bfloat16):
        figures = probe(attention, tokens)
    exact = probe(attention, tokens)
    torch.testing.assert_close(figures["mass_kept"], exact["mass_kept"], atol=0.05, rtol=0.1)
    assert not torch.equal(figures["mass_kept"], exact["mass_kept"])


# The callback


@pytest.fixture
def empty_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds."""
    for name in ("heads", "curves"):
        monkeypatch.setattr(probe_plot, name, lambda rows: Figure())


@pytest.mark.usefixtures("empty_pictures")
def test_the_callback_leaves_training_as_it_is(tmp_path):
    runs = [
        weights_after(tmp_path, *callbacks, model=transformer(dropout=0.5))
        for callbacks in ([], [AttentionProbe(3)])
    ]
    assert torch.equal(*runs)


def test_what_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images: list[Any] = []
    monkeypatch.setattr(RunWandbLogger, "log_image", lambda _, *image: images.append(image))
    loggers = [RunCSVLogger(tmp_path), RunWandbLogger(tmp_path)]
    module = TinyModule(transformer())
    fit(tmp_path, AttentionProbe(4), module=module, logger=loggers, max_steps=6)
    rows = read_rows(tmp_path / "metrics.csv")
    named = {name for row in rows for name in row if name.startswith("probe/")}
    assert {name.split("/")[1] for name in named} == {"layer_0", "layer_2"}  # layer 1 is dense
    table = read_rows(tmp_path / "attention_probe" / "heads.csv")
    places = [(row["step"], row["layer"], row["head"]) for row in table]
    assert places == [(s, lay, h) for s in ("4", "6") for lay in ("0", "2") for h in ("0", "1")]
    by_step = {row["step"]: row for row in rows}
    for name in ("gate_selected", "share_sliding", "grad_compress_keys", "grad_layer"):
        heads = [float(row[name]) for row in table if (row["step"], row["layer"]) == ("4", "2")]
        assert float(by_step["4"][f"probe/layer_2/{name}"]) == mean(heads)
    for picture in ("heads.png", "curves.png"):
        assert (tmp_path / "attention_probe" / picture).stat().st_size > 10_000
    assert [(key, step) for key, _, step in images] == [
        ("attention_probe", 4), ("attention_probe", 6),
    ]  # fmt: skip
    assert not module.model.layers[0].attention._forward_pre_hooks


class Clipped(TinyModule):
    """Clips gradients to almost nothing, and notes how large those of one φ were."""

    def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
        super().configure_gradient_clipping()
        phi = self.model.layers[2].attention.compress_k  # type: ignore[union-attr]
        squares = [p.grad.square().sum() for p in phi.parameters() if p.grad is not None]
        self.norm_of_phi = float(sum(squares)) ** 0.5
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-3)


@pytest.mark.usefixtures("empty_pictures")
def test_gradients_are_those_before_clipping(tmp_path):
    logger, module = RunCSVLogger(tmp_path), Clipped(transformer())
    fit(tmp_path, AttentionProbe(8), module=module, logger=logger)
    row = read_rows(logger.path)[-1]
    assert sum("/grad_" in name for name in row) == 6
    assert module.norm_of_phi > 0
    found = float(row["probe/layer_2/grad_compress_keys"])
    assert found == pytest.approx(module.norm_of_phi, rel=1e-3)


@pytest.mark.usefixtures("empty_pictures")
def test_a_run_that_goes_on_forgets_what_it_will_write_again(tmp_path):
    fit(tmp_path, AttentionProbe(2), module=TinyModule(transformer()), max_steps=8)
    path = tmp_path / "attention_probe" / "heads.csv"
    assert {row["step"] for row in read_rows(path)} == {"2", "4", "6", "8"}
    fit(
        tmp_path,
        AttentionProbe(3),
        module=TinyModule(transformer()),
        max_steps=3,
        val_check_interval=3,
    )
    assert {row["step"] for row in read_rows(path)} == {"3"}  # it began anew, at step 0


def test_a_model_without_nsa_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, AttentionProbe(4))
    assert "the model has no NSA layer" in caplog.text
    assert not (tmp_path / "attention_probe").exists()


@pytest.mark.parametrize("name", ["every_n_steps", "num_sequences", "num_tiles"])
def test_numbers_below_one_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name}=0 of AttentionProbe"):
        AttentionProbe(**{name: 0})
