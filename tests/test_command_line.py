"""A run does what its command line says, whatever stands in it and wherever it stands."""

import shutil
from pathlib import Path

import pytest
from forked_runs import finished, rows_of, run
from hydra._internal.utils import get_args_parser
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from squares import squares

from runs import command_line, counts
from runs.run import root

TINY = (
    *("trainer=cpu", "model.dim=16", "model.depth=1", "model.heads=2", "model.dim_head=8"),
    *("model.seq_len=32", "batch.micro_batch_size=4", "batch.sequences_per_step=4.0"),
    *("trainer.max_steps=6e0", "val_every_n_steps=3.0", "trainer.log_every_n_steps=1"),
    *("trainer.limit_val_batches=2", "scheduler.warmup_steps=2", "callbacks.samples.new_tokens=2"),
    *("data=text", "data.num_workers=0", "data.paths=[plain.txt]", "logger=csv", "test=false"),
    "callbacks.loss_plot=null",
)
PATIENCE = "callbacks.early_stopping.patience=1"
NAMED = "run_dir=runs/${name}-s${seed}"
MINE = Path("runs", "nsa_tiny-text-s0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with two corpora and a run of six steps."""
    folder = tmp_path_factory.mktemp("command_line")
    (folder / "plain.txt").write_text(squares(1500))
    lines = squares(1500).splitlines(keepends=True)
    (folder / "other.txt").write_text("".join(reversed(lines)))
    finished(run(folder, [*TINY, NAMED]), folder)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The run's folder in another place: files without their times, the older one touched."""
    shutil.copytree(folder / MINE, tmp_path / "copy", symlinks=True, copy_function=shutil.copyfile)
    (tmp_path / "copy" / "checkpoints" / "step_3.ckpt").touch()
    return tmp_path / "copy"


def started(folder: Path, *words: str, environment: dict[str, str] | None = None) -> str:
    """What `train.py WORDS` says, with its exit code in front."""
    log = folder / "run.log"
    log.unlink(missing_ok=True)
    (code,) = run(folder, words, environment=environment)
    return f"{code} {log.read_text() if log.exists() else ''}"


def steps(run_folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows_of(run_folder)]


# Where a run lies, and from where it goes on


def test_the_folder_is_the_one_that_hydra_ends_up_with(folder: Path) -> None:
    assert [path.name for path in (folder / "runs").iterdir()] == [MINE.name]
    before = steps(folder / MINE)
    saved = {path.name for path in (folder / MINE / "checkpoints").glob("step_*")}
    assert saved == {"step_3.ckpt", "step_6.ckpt"}  # 3.0 steps are 3
    said = started(folder, *TINY, NAMED)
    assert said.startswith("0") and "this run is finished: 6 of trainer.max_steps=6" in said
    assert steps(folder / MINE) == before


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("runs/${model.name}", "runs/nsa_tiny"),
        (r"runs/lr\=3e-4", "runs/lr=3e-4"),
        ("runs/lr=3e-4", "runs/lr=3e-4"),
        ("runs/it's", "runs/it's"),
        ("'a b/c'", "a b/c"),
        ("a,b", "a,b"),
        ("a(b)", "a(b)"),
    ],
)
def test_the_value_of_a_folder_is_meant_not_its_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, typed: str, found: str
) -> None:
    from runs.resume import arguments

    monkeypatch.chdir(folder)
    words = arguments([f"run_dir={typed}"])
    config, unfit = command_line.compose({}, words)
    assert not unfit and config.run_dir == config.hydra.run.dir == str(folder / found)


def test_a_moved_folder_goes_on_from_its_most_steps_with_its_best(copy: Path, folder: Path) -> None:
    shutil.rmtree(copy / ".hydra")
    said = started(folder, *TINY, f"run_dir={copy}", "trainer.max_steps=9")
    assert said.startswith("0") and "checkpoints/step_6.ckpt" in said
    assert "the schedule changes: after step 6 the learning rate was" in said
    names = {path.name[:6] for path in (copy / "checkpoints").iterdir()}
    assert names == {"best_s", "step_6", "step_9", "last.c"}
    assert len([*(copy / "checkpoints").glob("best_*")]) == 1


def test_a_group_typed_anew_wins_and_what_no_longer_fits_is_named(copy: Path, folder: Path) -> None:
    said = started(folder, f"run_dir={copy}", "callbacks=none", "trainer.max_steps=7")
    assert said.startswith("0") and "dropped callbacks.samples.new_tokens=2" in said
    assert "7 steps" in said


def test_another_corpus_is_refused_until_it_is_meant(copy: Path, folder: Path) -> None:
    other = [f"run_dir={copy}", "data.paths=[other.txt]", "trainer.max_steps=7"]
    said = started(folder, *other)
    assert said.startswith("1") and "corpus=" in said and "the checkpoint has" in said
    assert "allow_other_corpus=true" in said
    assert started(folder, *other, "allow_other_corpus=true").startswith("0")


def test_nothing_begins_anew_in_a_folder_with_checkpoints(folder: Path, copy: Path) -> None:
    kept = sorted(path.name for path in (copy / "checkpoints").iterdir())
    again = ["-m", f"hydra.sweep.dir={copy.parent}", f"hydra.sweep.subdir={copy.name}"]
    said = started(folder, *TINY, *again)
    assert "holds checkpoints of another run, as step_6.ckpt" in said
    assert kept == sorted(path.name for path in (copy / "checkpoints").iterdir())


def test_a_refused_run_leaves_no_folder(folder: Path) -> None:
    said = started(folder, *TINY, "trainer.max_steps=abc", "run_dir=refused/a")
    assert said.startswith("1 trainer.max_steps=abc must be a whole number")
    assert not (folder / "refused").exists()


# Flags of Hydra


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--cfg", "job", "run_dir=outputs/mine"], "outputs/mine"),
        ([f"run_dir={MINE}", "--cfg", "job"], "ckpt_path: /"),
        (["--cfg=job", f"ckpt_path={MINE}"], "step_6.ckpt"),
        ([f"run_dir={MINE}", "--config-dir", "extra", "--cfg", "job"], "step_6.ckpt"),
        (["--config-dir", "extra", "data=mine", "--cfg", "job", "run_dir=x"], "name: of_mine"),
        (["-cd", "extra", "--config-name", "mine", "-c", "job", "run_dir=x"], "name: by_mine"),
        (["run_dir=x", "--config-path", "conf", "-c", "job"], "/x"),
        (["--cfg", "job", "seed=1", "--resolve", "run_dir=x"], "save_dir: /"),
        (["run_dir=x", "-c", "job", "--package", "optimizer", "seed=1"], "# @package optimizer"),
        (["--info", "run_dir=x"], "Config search path"),
        (["run_dir=x", "--info", "searchpath"], "Config search path"),
        (["run_dir=x", "--help"], "run_dir"),
        (["run_dir=x", "--hydra-help"], "Hydra"),
        (["--version", "run_dir=x"], "Hydra 1."),
        (["--shell-completion", "install=bash"], "complete"),
        (["run_dir=x", "--run", "model.dim=a"], "model.dim=a must be a whole number"),
        (["run_dir=x", "--multirun"], "run_dir=x and -m: a sweep"),
        (["run_dir=x", "--experimental-rerun", "nope.pickle"], "nope.pickle does not exist"),
        (["", "seed=1"], "'' is not an option: write key=value"),
    ],
    ids=" ".join,
)
def test_every_flag_works_in_any_place(folder: Path, words: list[str], shown: str) -> None:
    for name, text in (("data/mine", "of"), ("mine", "by")):
        path = folder / "extra" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        base = "text" if text == "of" else "train"
        path.write_text(f"defaults: [{base}, _self_]\nname: {text}_mine\n")
    assert shown in started(folder, *words)


def test_no_flag_is_left_out() -> None:
    known = {action.dest for action in get_args_parser()._actions} - {"overrides"}
    assert known == {
        *("help", "hydra_help", "version", "cfg", "resolve", "package", "run", "multirun"),
        *("shell_completion", "config_path", "config_name", "config_dir", "info"),
        "experimental_rerun",
    }


def test_an_option_written_as_a_flag_is_explained() -> None:
    with pytest.raises(ValueError, match=r"written without hyphens, as optimizer\.lr=0\.1"):
        command_line.read(["seed=1", "--optimizer.lr=0.1"])
    assert command_line.read(["--config-d=extra"]).flags == {"config_dir": "extra"}


def test_a_search_without_a_sweep_is_refused(folder: Path) -> None:
    assert "add -m, or leave it out" in started(folder, "hparams_search=sparsity")


# Counts


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("trainer.max_steps", 1e3, 1000),
        ("model.depth", 2.0, 2),
        ("callbacks.samples.every_n_steps", None, None),
        ("trainer.limit_val_batches", 0.5, 0.5),
        ("trainer.limit_val_batches", 3.0, 3),
        ("optimizer.lr", 1.0, 1.0),
        ("trainer.devices", "auto", "auto"),
    ],
)
def test_a_count_becomes_a_whole_number(path: str, value: object, expected: object) -> None:
    found = counts.whole(path, value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("trainer.max_steps", 2.5), ("model.depth", True), ("seed", "abc")),
        *(("data.val_tokens", 1.5), ("callbacks.checkpoint_last.save_top_k", float("inf"))),
        *(("trainer.max_steps", None), ("trainer.limit_val_batches", 2.5)),
    ],
)
def test_what_is_no_count_is_refused_by_name(path: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{path}={value} must be a whole number"):
        counts.whole(path, value)


def test_a_micro_batch_may_be_chosen() -> None:
    assert counts.whole("batch.micro_batch_size", "auto") == "auto"
    with pytest.raises(ValueError, match="micro_batch_size=Auto must be a whole number, or auto"):
        counts.whole("batch.micro_batch_size", "Auto")


def test_a_count_has_its_limits() -> None:
    assert counts.whole("callbacks.checkpoint_last.save_top_k", -1) == -1
    for path, value, limit in (
        ("attention.compress_block_size", -1.0, "at least 0"),
        ("trainer.max_steps", -2, "at least -1"),
        ("seed", 2**32, "at most 4294967295"),
    ):
        with pytest.raises(ValueError, match=f"{path}={int(value)} must be {limit}"):
            counts.whole(path, value)


def test_options_of_another_kind_are_all_named(folder: Path) -> None:
    words = ("optimizer.betas=1.5", "model.dropout=abc", "data.val_fraction=null", "+model.foo=1")
    said = started(folder, *TINY, "name=odd", *words)
    assert said.startswith("1") and "Traceback" not in said
    for line in (
        "optimizer.betas=1.5 must be a list",
        "model.dropout=abc must be a number",
        "data.val_fraction=null must be a number",
        "model.foo=1 is not among the options of model",
    ):
        assert line in said
    assert "callbacks.loss_plot" not in said  # null drops it
    assert not (folder / "outputs" / "odd").exists()


# What is said


def test_only_the_wrapping_of_hydra_is_taken_off() -> None:
    ours = ValueError("corpus.gz is damaged")
    ours.__cause__ = OSError("Not a gzipped file")
    assert root(ours) is ours
    wrapped = InstantiationException("Error in call to target")
    wrapped.__cause__ = ours
    assert root(wrapped) is ours


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scheduler.warmup_steps=500"], "scheduler.warmup_steps=500 is more than"),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.min_delta=9", PATIENCE],
            "training ended after step 6 of 9: early stopping, since val/bpb got no better than",
        ),
        (["logger=none"], "9 steps"),
        (["trainer.max_time=00:00:00:00"], "trainer.max_time is over, which counts the whole run"),
        (["max_time_per_start=soon"], "must have the form DD:HH:MM:SS"),
        (["sparsity_schedule={until: 0.5}"], "must be a list of stages, as in [{until: 0.25, num"),
        (["importance_loss.weight=true"], "importance_loss.weight=True must be a number of at"),
    ],
)
def test_what_ends_or_changes_a_run_is_said(folder: Path, words: list[str], said: str) -> None:
    assert said in started(folder, *TINY, "trainer.max_steps=9", *words)


def test_a_limit_of_each_start_saves_and_goes_on(folder: Path) -> None:
    limit = ["max_time_per_start=00:00:00:01", "trainer.max_steps=5000"]
    said = started(folder, *TINY, "run_dir=limited", *limit)
    assert said.startswith("143") and "told to end: saved after step" in said


def test_an_agents_id_is_taken(folder: Path) -> None:
    agent = {"WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": "agents1", "WANDB_MODE": "offline"}
    words = [*TINY, "logger=wandb", "run_dir=agent", "trainer.max_steps=3"]
    said = started(folder, *words, environment=agent)
    assert said.startswith("0"), said[-2000:]
    assert (folder / "agent" / "wandb_id.txt").read_text() == "agents1\n"
    assert "add logger.wandb.offline=false" in said


def test_the_name_of_a_folder_holds_no_folder() -> None:
    config, _ = command_line.compose({}, ["data=hf", "data.name=/home/me/data"])
    assert OmegaConf.to_container(config, resolve=False)["name"].startswith("${model.name}-")
    assert config.name == "nsa_tiny-data"
