"""What may help selection to learn: a loss that teaches its scores, and sparsity by the step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from test_train import ATTENTION, MODEL, Counting, fitted, make_module, make_trainer
from tiny_run import OF_LIGHTNING, weights
from torch import Tensor

from nsa import blocks
from nsa.attention import SparseAttention
from nsa.training.importance_loss import ImportanceLoss, divergence
from nsa.training.sparsity import checked_stages
from runs import notices
from runs.same_run import check_same_run
from runs.strategies import FSDP2Strategy

pytestmark = OF_LIGHTNING
DIM, D, H, G, NUM_TOKENS = 16, 8, 4, 2, 48
# Two of three blocks to choose from:
FREE = ATTENTION | {"num_initial_blocks": 0, "num_local_blocks": 1}


def layer(**options: Any) -> SparseAttention:
    torch.manual_seed(0)
    attn = SparseAttention(
        DIM, D, H, 4, 4, 4, 4, 4, kv_heads=G, compress_mlp_expand_factor=0.5,
        backend="reference", **options,
    )  # fmt: skip
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attn


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_the_divergence_by_hand(shared: bool) -> None:
    attn = layer(query_heads_share_selected_kv=shared)
    tokens, t = torch.randn(1, NUM_TOKENS, DIM), 41
    x = attn._project(tokens)
    total = 0.0
    rank = blocks.priority(NUM_TOKENS, attn.cfg)[t]
    free = [s for s in range(NUM_TOKENS // 4) if rank[s] == blocks.FREE]
    for heads in [[0, 1], [2, 3]] if shared else [[0], [1], [2], [3]]:
        mass, score = torch.zeros(NUM_TOKENS // 4), torch.zeros(NUM_TOKENS // 4)
        for h in heads:
            seen = x.k_slc[0, : t + 1, h // 2]
            p = (seen @ x.q_rot[0, t, h] / D**0.5).softmax(0) / len(heads)
            mass.index_add_(0, torch.arange(t + 1) // 4, p)
            whole = (t + 1) // 4  # compressed blocks are the selection blocks here
            score[:whole] += (x.k_cmp[0, :whole, h // 2] @ x.q[0, t, h] / D**0.5).softmax(0)
        p, s = mass[free], score[free] / score[free].sum()
        total += (p * (p / p.sum() / s).log()).sum()
    found = divergence(attn, tokens, torch.tensor([[t]]))
    torch.testing.assert_close(found, total / (2 if shared else 4))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"num_compressed_mem_kv": 2}])
def test_only_what_makes_the_compressed_keys_learns(options: dict) -> None:
    attn, tokens = layer(**options), torch.randn(2, NUM_TOKENS, DIM, requires_grad=True)
    divergence(attn, tokens.detach(), torch.randint(NUM_TOKENS, (2, 8))).backward()
    learn = {name for name, p in attn.named_parameters() if p.grad is not None and p.grad.any()}
    norm = {"k_norms.0.weight"} if options.get("qk_norm") else set()
    assert learn - norm - {"to_kv.weight"} == {n for n in learn if n.startswith("compress_k")}
    assert norm <= learn and "compress_k.positions" in learn
    rows = attn.to_kv.weight.grad
    assert rows is not None and rows[: G * D].any() and not rows[G * D :].any()


def test_shared_keys_leave_the_projection_alone() -> None:
    attn, tokens = layer(kv_per_branch=False), torch.randn(1, NUM_TOKENS, DIM)
    divergence(attn, tokens, torch.randint(NUM_TOKENS, (1, 8))).backward()
    assert attn.to_kv.weight.grad is None and attn.compress_k.positions.grad.any()


def test_documents_of_a_row_are_compared_apart() -> None:
    attn, tokens = layer(), torch.randn(1, NUM_TOKENS, DIM)
    starts = torch.tensor([[0] * 8 + [8] * 40], dtype=torch.int32)
    at = torch.tensor([[30, 47]])
    packed = divergence(attn, tokens, at, starts)
    torch.testing.assert_close(packed, divergence(attn, tokens[:, 8:], at - 8))


def test_it_teaches_the_layer_to_keep_what_attention_looks_at() -> None:
    attn, tokens = layer(), torch.randn(4, NUM_TOKENS, DIM)
    oracle = layer(selection="oracle").branches(tokens).block_indices

    def misses() -> float:
        return (attn.branches(tokens).block_indices != oracle).float().mean().item()

    before = misses()
    optimizer = torch.optim.Adam(attn.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        divergence(attn, tokens, torch.randint(NUM_TOKENS, (4, 16))).backward()
        optimizer.step()
    assert misses() < 0.7 * before


def test_no_more_queries_are_compared_than_there_are() -> None:
    model = make_module(model=MODEL | {"attention": FREE}).model
    attn, tokens = model.blocks[0].attention, torch.randn(2, 12, MODEL["dim"])
    every = divergence(attn, tokens, torch.arange(12).expand(2, -1))
    assert every > 0
    for num_queries in (12, 10**12):  # the latter fit into no memory
        loss = ImportanceLoss(model, 1.0, num_queries)
        assert torch.equal(loss([tokens] * len(model.blocks)), every)
    some = ImportanceLoss(model, 1.0, num_queries=11)
    assert not torch.equal(some([tokens] * len(model.blocks)), every)


class Sizes(L.Callback):
    """What a run's first layer had in each step, in validations, and in the test."""

    def __init__(self) -> None:
        self.steps, self.validated, self.taught = [], [], []
        self.keeps = lambda module: module.model.layers[0].attention.cfg.num_selected_blocks

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.steps.append(self.keeps(module))
        self.taught.append(trainer.logged_metrics.get("train/importance_loss"))

    def on_validation_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.validated.append(self.keeps(module))


SCHEDULE = [
    {"until": 0.4, "num_selected_blocks": "all"},
    {"until": 0.7, "num_selected_blocks": 1, "selection_block_size": 8},
]


def trained(folder: Path, **options: Any) -> tuple[Sizes, Tensor]:
    sizes = Sizes()
    torch.manual_seed(0)
    module = make_module(**options)
    settings = {"max_steps": 6, "val_check_interval": 2, "check_val_every_n_epoch": None}
    fitted(folder, Counting(), module, callbacks=[sizes], **settings)
    return sizes, weights(module)


def test_sizes_follow_the_step_and_end_as_configured(tmp_path: Path) -> None:
    sizes, _ = trained(tmp_path, sparsity_schedule=SCHEDULE)
    assert sizes.steps == [3, 3, 3, 1, 1, 2]  # all three blocks of 12 tokens, one, two
    assert sizes.validated == [3, 3, 1, 1, 2, 2]
    module = make_module(sparsity_schedule=SCHEDULE)
    attention: Any = module.model.blocks[0].attention
    assert attention.document_alignment == 8 and attention.cfg.selection_block_size == 4


def test_the_densest_stage_is_the_one_of_the_most_work() -> None:
    window = {"until": 0.5, "sliding_window_size": 1}
    for stages, densest in (
        ([], None),
        ([window], None),
        ([window, SCHEDULE[0] | {"until": 0.7}], 1),
    ):
        sparsity = make_module(sparsity_schedule=stages).sparsity
        assert sparsity.densest() == densest and sparsity.now is None


def test_both_change_what_is_learned_and_cost_nothing_when_off(tmp_path: Path) -> None:
    model = MODEL | {"attention": FREE}
    plain, off, taught = (
        trained(tmp_path, model=model, importance_loss=loss)
        for loss in (None, {"num_queries": 3}, {"weight": 0.5, "num_queries": 3})
    )
    assert torch.equal(plain[1], off[1]) and off[0].taught == [None] * 6
    assert all(loss > 0 for loss in taught[0].taught) and not torch.equal(plain[1], taught[1])
    _, dense = trained(tmp_path, model=model, sparsity_schedule=SCHEDULE)
    assert not torch.equal(plain[1], dense)


def impossible() -> Iterator[Any]:
    for stages, message in (
        ([{"num_selected_blocks": 3}], "needs `until`"),
        ([{"until": 1, "num_selected_blocks": 3}], "above the one before, 0, and below 1"),
        ([SCHEDULE[1], SCHEDULE[0]], "above the one before, 0.7"),
        ([{"until": 0.5}], "must set one or more of num_selected_blocks"),
        ([{"until": 0.5, "compress_block_size": 8}], "must set one or more of"),
        ([{"until": 0.5, "num_selected_blocks": 0}], "must be at least 1, or all"),
        ([{"until": 0.5, "selection_block_size": 5}], r"the stage \{.*\}: .* must be a multiple"),
        ([{"until": True, "num_selected_blocks": 3}], "needs `until`"),
    ):
        yield {"sparsity_schedule": stages}, message
    for attention, loss, message in (
        ({}, {"weight": -1.0}, "weight=-1.0 must be a number of at least 0"),
        ({}, {"weight": float("nan")}, "weight=nan must be a number of at least 0"),
        ({}, {"num_queries": 0}, "num_queries=0 must be at least 1"),
        ({"selection": "random"}, {"weight": 1.0}, "no layer of the model selects"),
        ({"importance": "logit_mean"}, {"weight": 1.0}, "importance=probability_sum"),
        ({"kv_per_branch": False, "compress_network": "mean_pool", "compressed_output": False,
          "num_compressed_mem_kv": 0}, {"weight": 1.0}, "has no parameters"),
    ):  # fmt: skip
        model = MODEL | {"attention": ATTENTION | attention}
        yield {"model": model, "importance_loss": loss}, message


@pytest.mark.parametrize("odd", [0.5, "all", [0.5], {"until": 0.5}])
def test_what_is_no_list_of_stages_is_refused(odd: Any) -> None:
    with pytest.raises(ValueError, match="must be a list of stages, as in"):
        checked_stages(odd)


def test_a_schedule_without_a_layer_is_refused() -> None:
    model = MODEL | {"layer_pattern": ["dense", "window"]}
    with pytest.raises(ValueError, match="no layer of the model is NSA"):
        make_module(model=model, sparsity_schedule=SCHEDULE)


def test_sizes_may_be_written_as_other_counts() -> None:
    (stage,) = make_module(
        sparsity_schedule=[{"until": 0.5, "num_selected_blocks": 3e0}]
    ).sparsity.stages
    assert stage == {"until": 0.5, "num_selected_blocks": 3} and isinstance(
        stage["num_selected_blocks"], int
    )


def test_a_run_that_is_made_longer_says_which_stage_comes(caplog: Any) -> None:
    module = make_module(sparsity_schedule=SCHEDULE)
    notices.say_stage({"global_step": 6, "max_steps": 10}, module, 12)  # a stage ends at 7, at 8.4
    notices.say_stage({"global_step": 6}, module, 20)  # an older checkpoint does not say
    assert not caplog.records
    notices.say_stage({"global_step": 6, "max_steps": 8}, module, 20)
    assert (
        "have gone on with the sizes of attention, and goes on with those of stage 1" in caplog.text
    )


@pytest.mark.parametrize(("options", "message"), list(impossible()))
def test_what_cannot_be_meant_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(**options)


def test_fsdp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, trainer = make_module(importance_loss={"weight": 1.0}), make_trainer(tmp_path)
    module.check_trainer(trainer)
    monkeypatch.setattr(trainer, "_accelerator_connector", None, raising=False)
    monkeypatch.setattr(L.Trainer, "strategy", FSDP2Strategy())
    with pytest.raises(ValueError, match="importance_loss reads the weights of a layer"):
        module.check_trainer(trainer)


def test_a_resumed_run_keeps_them() -> None:
    """A checkpoint of the time before them had neither."""
    before = {"model": {"attention": {}}, "optimizer": {}}
    off = {"importance_loss": {"weight": 0.0, "num_queries": 32}, "sparsity_schedule": None}
    for change in (
        off | {"sparsity_schedule": SCHEDULE},
        off | {"importance_loss": {"weight": 1.0}},
    ):
        for stored in (before, before | off):
            check_same_run({"hyper_parameters": stored}, before | off, {})
            with pytest.raises(ValueError, match=r"sparsity_schedule=|importance_loss\.weight=1.0"):
                check_same_run({"hyper_parameters": stored}, before | change, {})
