"""A run that is killed and goes on ends as one that was never interrupted; what cannot, says so."""

import csv
import os
import re
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked_runs import Signal, finished, run
from omegaconf import OmegaConf
from squares import squares

import generate
from runs import checkpoint_faults, checkpoints, command_line, resume
from runs.same_run import check_same_run

LEARNING = (
    *("trainer=cpu", "trainer.max_steps=24", "trainer.log_every_n_steps=2", "val_every_n_steps=8"),
    *("model.dim=32", "model.depth=1", "model.heads=2", "model.dim_head=16", "model.seq_len=32"),
    *("model.dropout=0.3", "batch.sequences_per_step=4", "batch.micro_batch_size=2"),
    *("callbacks.samples.new_tokens=4", "data=text", "data.paths=[corpus.txt]", "test=false"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a corpus, one run from end to end, and one killed at step 14."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "corpus.txt").write_text(squares(1500))
    finished(run(folder, [*LEARNING, "name=whole"]), folder)
    killed = Signal(signal.SIGKILL, rank=0, step=14)
    assert run(folder, [*LEARNING, "name=killed"], sent=killed) == [-signal.SIGKILL]
    return folder


def only(paths: Iterator[Path]) -> Path:
    (path,) = paths
    return path


def test_a_killed_run_ends_as_one_never_interrupted(folder: Path) -> None:
    whole, killed = only(folder.glob("outputs/whole/*")), only(folder.glob("outputs/killed/*"))
    assert sorted(path.name for path in (killed / "checkpoints").glob("step_*")) == ["step_8.ckpt"]
    wandb_id = (killed / "wandb_id.txt").read_text()
    finished(run(folder, ["ckpt_path=last", "name=killed"]), folder)
    assert only(folder.glob("outputs/killed/*")) == killed  # the same folder
    assert (killed / "wandb_id.txt").read_text() == wandb_id
    assert len(list((killed / "wandb").glob(f"offline-run-*-{wandb_id.strip()}"))) == 2

    ends = [load(path / "checkpoints" / "last.ckpt") for path in (whole, killed)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 24
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name]), name
    rows = [learned(path / "metrics.csv") for path in (whole, killed)]
    assert rows[0] == rows[1]
    steps = [int(row["step"]) for row in rows[0]]
    assert steps == sorted(set(steps))


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def learned(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without what the clock says."""
    rows = csv.DictReader(path.read_text().splitlines())
    return [{name: row[name] for name in row if not name.startswith("perf/")} for row in rows]


def test_a_checkpoint_holds_plain_values(folder: Path) -> None:
    checkpoint = load(only(folder.glob("outputs/whole/*")) / "checkpoints" / "last.ckpt")
    settings = checkpoint["hyper_parameters"]
    assert settings["model"]["dropout"] == 0.3
    assert settings["model"]["attention"]["num_selected_blocks"] == 4
    assert "_target_" not in str(settings)


def test_a_checkpoint_is_all_that_generate_needs(folder: Path) -> None:
    path = only(folder.glob("outputs/whole/*")) / "checkpoints" / "last.ckpt"
    text = generate.generate(generate.Options(ckpt=str(path), prompt=["7 squared"], seq_len=20))
    assert text.startswith("7 squared") and len(text) > len("7 squared")


def test_a_sweep_cannot_go_on() -> None:
    for where in ("ckpt_path=last", "run_dir=a", "resume=a"):
        with pytest.raises(ValueError, match=f"{where} and -m: .*without -m"):
            resume.arguments(["-m", where])


def test_last_is_the_newest_run_of_what_was_typed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="runs with checkpoints: none"):
        resume.find_last(tmp_path, {})
    make_run(tmp_path / "a" / "1", age=3, model="nsa_tiny")
    make_run(tmp_path / "b" / "2", age=2, model="dense_tiny", overrides=["name=b"])
    make_run(tmp_path / "sweeps" / "now" / "0", age=0, model="nsa_tiny")

    def last(*typed: str) -> str:
        return resume.find_last(
            tmp_path, {o.key_or_group: o for o in command_line.parse(typed)}
        ).name

    assert last() == "2"
    assert last("model=nsa_tiny", "trainer.max_steps=9") == "1"
    assert last("model=nsa_tiny", "trainer=fsdp", "logger=csv") == "1"
    assert last("name=b") == "2"
    with pytest.raises(FileNotFoundError, match=r"runs with checkpoints: a, b"):
        last("model=nsa_tiny", "name=b")


def test_a_run_goes_on_with_what_it_was_started_with(tmp_path: Path) -> None:
    run = tmp_path / "a" / "1"
    path = make_run(run, age=1, model="nsa_tiny", overrides=["seed=1", "+x.y=2", "resume=never"])
    resumed = resume.arguments(["ckpt_path=last", "x.y=3"], tmp_path)
    there = [f"ckpt_path='{path}'", *named(run), "hydra.output_subdir=null"]
    assert resumed == ["seed=1", "x.y=3", *there]
    again = resume.arguments(resumed, tmp_path)  # as a rank that Lightning starts does
    assert sorted(again) == sorted(resumed)
    assert resume.arguments(["x.y=3"], tmp_path) == ["x.y=3"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resume.arguments(["ckpt_path=nowhere.ckpt"], tmp_path)


def test_a_named_folder_is_begun_or_gone_on_with(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    command = ["seed=1", f"run_dir={run}"]
    assert resume.arguments(command) == ["seed=1", *named(run)]
    assert resume.arguments([*command, "resume=never"]) == ["seed=1", *named(run)]
    path = make_run(run, age=1, model="nsa_tiny", overrides=["seed=1"])
    there = [f"ckpt_path='{path}'", *named(run), "hydra.output_subdir=null"]
    assert resume.arguments(command) == ["seed=1", *there]
    for place in (run, path.parent, path):
        assert resume.arguments([f"resume={place}"]) == ["seed=1", *there]
    with pytest.raises(ValueError, match="resume=never would write over: name another"):
        resume.arguments([*command, "resume=never"])


def test_a_run_can_branch_off_into_a_folder_of_its_own(tmp_path: Path) -> None:
    path = make_run(tmp_path / "one", age=1, model="nsa_tiny", overrides=["seed=1"])
    other = tmp_path / "other"
    branched = resume.arguments([f"resume={path}", f"run_dir={other}"])
    assert branched == ["seed=1", f"ckpt_path='{path}'", *named(other)]


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        (["ckpt_path=last", "resume=never"], "both say where to go on from"),
        (["ckpt_path=a.ckpt", "resume=b.ckpt"], "both say where to go on from"),
        (["ckpt_path=last", "run_dir=a"], "the one looks for a run, the other names it"),
    ],
)
def test_contradictions_are_refused(typed: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        resume.arguments(typed)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = [
    (truncated, "damaged"),
    (flipped, r"record step_3/data/\d+ is damaged"),
    (lambda content: b"", "empty"),
    (lambda content: b"hello", "not a checkpoint"),
]


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES)
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_names_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, complaint: str
) -> None:
    run = tmp_path / "mine"
    older, newest = make_run(run, age=2, model="nsa_tiny"), run / "checkpoints" / "step_3.ckpt"
    content = {key: {} for key in checkpoint_faults.ENTRIES} | {
        "state_dict": {"w": torch.ones(9000)}
    }
    torch.save(content, newest)
    (run / "checkpoints" / "last.ckpt").symlink_to("step_3.ckpt")
    assert f"ckpt_path='{newest}'" in resume.arguments([f"run_dir={run}"])
    newest.write_bytes(damage(newest.read_bytes()))
    assert f"ckpt_path='{older}'" in resume.arguments([f"run_dir={run}"])
    warned = capsys.readouterr().err
    assert re.search(f"passed over {newest}: .*{complaint}.*; going on from {older}", warned)
    older.write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)no checkpoint of .* is whole:.*it is empty"):
        resume.arguments([f"run_dir={run}"])


def test_ranks_started_from_outside_share_a_named_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume.arguments(["seed=1"]) == ["seed=1"]  # Lightning starts the others itself
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="must share one run folder: name it"):
        resume.arguments(["seed=1"])
    own = ["hydra.output_subdir=null", "hydra.job.name=train_rank_1"]
    assert resume.arguments([f"run_dir={tmp_path}"]) == [*named(tmp_path), *own]
    monkeypatch.setenv("RANK", "0")
    assert resume.arguments([f"run_dir={tmp_path}"]) == named(tmp_path)


def named(run: Path) -> list[str]:
    """The overrides that put a run into a folder."""
    return [f"run_dir='{run}'", f"hydra.run.dir='{run}'"]


def make_run(run: Path, *, age: int, model: str, overrides: list[str] | None = None) -> Path:
    """A run folder with one checkpoint, so many seconds old."""
    path = run / "checkpoints" / "step_1.ckpt"
    path.parent.mkdir(parents=True)
    (run / ".hydra").mkdir()
    torch.save({key: {} for key in checkpoint_faults.ENTRIES}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    groups = {"model": model, "trainer": "ddp", "logger": "default"}
    choices = {"hydra": {"runtime": {"choices": groups}}}
    OmegaConf.save(OmegaConf.create(choices), run / ".hydra" / "hydra.yaml")
    OmegaConf.save(OmegaConf.create(overrides or []), run / ".hydra" / "overrides.yaml")
    return path


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_an_older_one_offered(
    tmp_path: Path, damage, complaint: str
) -> None:
    content = {key: {} for key in checkpoint_faults.ENTRIES} | {
        "state_dict": {"w": torch.ones(9000)}
    }
    for step in (1, 2, 3):
        path = tmp_path / f"step_{step}.ckpt"
        torch.save(content, path)
        os.utime(path, (1e9 + step, 1e9 + step))
    (tmp_path / "last.ckpt").symlink_to("step_3.ckpt")
    assert checkpoints.check(tmp_path / "last.ckpt").keys() == content.keys()
    path.write_bytes(damage(path.read_bytes()))
    os.utime(path, (1e9 + 3, 1e9 + 3))
    with pytest.raises(ValueError, match=complaint) as refusal:
        checkpoints.check(tmp_path / "last.ckpt")
    assert str(tmp_path / "last.ckpt") in str(refusal.value)
    assert str(refusal.value).endswith(f"ckpt_path={tmp_path / 'step_2.ckpt'}")


def test_a_foreign_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"no hyper_parameters.*no older one is whole"):
        checkpoints.check(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match=r"foreign\.ckpt cannot be used"):
        checkpoints.check(path)


def test_a_resumed_run_keeps_its_order_of_samples() -> None:
    settings = {"model": {"dim": 8}, "optimizer": {"lr": 0.1}}
    order = {"seed": 0, "seq_len": 8, "sequences_per_step": 32}
    checkpoint = {"hyper_parameters": settings, "Corpus": {"sample_order": order}}
    now = order | {"pack": "stream", "document_alignment": 1}  # which older checkpoints do not say
    check_same_run(checkpoint, settings, now)
    with pytest.raises(ValueError, match="sequences_per_step=16, the checkpoint has 32"):
        check_same_run(checkpoint, settings, now | {"sequences_per_step": 16})
    with pytest.raises(ValueError, match="pack=documents, the checkpoint has stream"):
        check_same_run(checkpoint, settings, now | {"pack": "documents"})


def test_an_option_that_a_checkpoint_lacks_was_at_its_default() -> None:
    checkpoint = {"hyper_parameters": {"model": {"attention": {}}, "optimizer": {}}}

    def check(**options: object) -> None:
        check_same_run(checkpoint, {"model": {"attention": options}, "optimizer": {}}, {})

    check(selection="learned", qk_norm=False, rope_scaling=None, rope_base=10_000.0)
    with pytest.raises(ValueError, match="qk_norm=True, the checkpoint has False"):
        check(qk_norm=True)
    with pytest.raises(ValueError, match=r"rope_scaling\.type=yarn, the checkpoint has None"):
        check(rope_scaling={"type": "yarn", "factor": 4.0})


def test_a_resumed_run_keeps_its_model_and_optimizer() -> None:
    model = {"dim": 8, "dropout": 0.1, "attention": {"backend": "auto", "kv_per_branch": True}}
    settings = {"model": model, "optimizer": {"lr": 0.1, "fused": True}}
    checkpoint = {"hyper_parameters": settings}
    free = {"model": model | {"dropout": 0.0}, "optimizer": {"lr": 0.1, "fused": True}}
    check_same_run(checkpoint, free, {})
    changed = {"lr": 0.2, "fused": False}  # the optimizer's state brings its own
    other = {"model": model | {"attention": {"kv_per_branch": False}}, "optimizer": changed}
    with pytest.raises(ValueError) as refusal:
        check_same_run(checkpoint, other, {})
    assert "model.attention.kv_per_branch=False, the checkpoint has True" in str(refusal.value)
    assert "optimizer.lr=0.2, the checkpoint has 0.1" in str(refusal.value)
    assert "optimizer.fused=False, the checkpoint has True" in str(refusal.value)
