"""A checkpoint is whole or not there, and everything that trains goes on from it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from parallel_runs import ROOT, results
from torch.distributed.checkpoint import save

import generate
from runs import checkpoint_faults, checkpoints, resume, run
from runs.folder import newest_first
from runs.strategies import FSDP2Strategy

RESUMED = (
    *("ddp_to_fsdp", "fsdp_to_ddp", "fsdp_to_one", "one_to_fsdp"),
    *("folder_to_fsdp", "folder_to_fsdp_of_one", "folder_to_ddp", "folder_to_one"),
)
FULL_DISK = ("full_disk_one", "full_disk_fsdp", "full_disk_folder")
RUNS = ("one", "ddp", "fsdp", "fsdp_folder", "retained", *RESUMED, *FULL_DISK, "killed", "goes_on")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs lie, a folder each."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Any]:
    return results(place, RUNS)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Written by one, read by another


@pytest.mark.parametrize("run", RESUMED)
def test_who_wrote_it_does_not_matter(runs: dict[str, Any], run: str) -> None:
    assert list(runs[run]["steps"]) == ["3", "4"]
    for step, numbers in runs[run]["steps"].items():
        assert numbers == pytest.approx(runs["one"]["steps"][step], abs=1e-6, rel=1e-6), step


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp_folder"])
def test_all_hold_the_same_in_the_same_form(place: Path, kind: str) -> None:
    one, other = (checkpoints.check(place / k / "step_2.ckpt") for k in ("one", kind))
    assert one.keys() == other.keys()
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, atol=1e-6, rtol=1e-4)
    (state,), (others,) = one["optimizer_states"], other["optimizer_states"]
    assert [g["params"] for g in state["param_groups"]] == [
        g["params"] for g in others["param_groups"]
    ]
    assert state["state"].keys() == others["state"].keys()
    for number, moments in state["state"].items():
        for name, value in moments.items():
            found = others["state"][number][name]
            torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("runs")
def test_text_can_be_generated_from_a_folder(place: Path) -> None:
    paths = [str(place / kind / "last.ckpt") for kind in ("one", "fsdp_folder")]
    options = [
        generate.Options(ckpt=path, prompt=["\1\2"], seq_len=9, stop=False) for path in paths
    ]
    texts = [generate.generate(option) for option in options]
    assert texts[0] == texts[1] and len(texts[0]) == 9


@pytest.mark.usefixtures("runs")
def test_what_a_run_was_is_read_without_its_weights(place: Path, monkeypatch) -> None:
    monkeypatch.delattr(checkpoints, "_load_distributed_checkpoint")
    found = checkpoints.check_metadata(place / "fsdp_folder" / "last.ckpt")
    assert found["global_step"] == 4 and found["hyper_parameters"]["model"]["name"] == "test"
    assert "state_dict" not in found


# Whole, or not there


@pytest.mark.parametrize("run", FULL_DISK)
def test_a_full_disk_leaves_the_former_checkpoint_and_says_so(
    runs: dict[str, Any], place: Path, run: str
) -> None:
    folder = place / run
    for message in runs[run]:  # of every rank
        assert message.startswith(f"checkpoint {folder / 'step_4.ckpt'} was not written: File too")
        assert "GiB are free" in message
        assert message.endswith(f"is whole: ckpt_path={folder / 'step_2.ckpt'}")
    assert names(folder) == ["last.ckpt", "step_2.ckpt"]
    assert checkpoint_faults.find_fault(folder / "last.ckpt") is None


def test_a_killed_save_is_never_seen_and_swept_up_by_the_next(
    runs: dict[str, Any], place: Path
) -> None:
    assert sorted(runs["goes_on"]) == [".step_4.ckpt.part", "last.ckpt", "step_2.ckpt"]
    assert names(place / "killed") == ["last.ckpt", "step_2.ckpt", "step_4.ckpt"]


def test_folders_are_kept_by_number_and_linked_to(runs: dict[str, Any], place: Path) -> None:
    best, *others = runs["retained"]
    assert best.startswith("best_step=") and others == ["last.ckpt", "step_3.ckpt"]
    assert (place / "retained" / "last.ckpt").readlink() == Path("step_3.ckpt")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: truncate(folder / "__1_0.distcp"), r"its file __1_0\.distcp has [\d,]+ b"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), r"its file __0_0\.distcp is missing"),
        (lambda folder: flip(folder / "__1_0.distcp"), r"its file __1_0\.distcp is damaged"),
        (lambda folder: flip(folder / ".metadata"), r"its file \.metadata is damaged"),
        (lambda folder: (folder / "x.pt").write_text("x"), r"x\.pt is not one of its files"),
        (lambda folder: (folder / "manifest.json").unlink(), r"no readable manifest\.json"),
        (lambda folder: truncate(folder / "manifest.json"), r"no readable manifest\.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "no readable manifest"),
    ],
)
def test_a_damaged_folder_is_refused_by_name_and_the_one_before_offered(
    place: Path, tmp_path: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    for step in (2, 4):
        name = f"step_{step}.ckpt"
        shutil.copytree(place / "fsdp_folder" / name, tmp_path / name)
    damage(tmp_path / "step_4.ckpt")
    os.utime(tmp_path / "step_2.ckpt", (1e9, 1e9))
    with pytest.raises(ValueError, match=complaint) as refusal:
        checkpoints.check(tmp_path / "step_4.ckpt")
    assert str(refusal.value).startswith(f"checkpoint {tmp_path / 'step_4.ckpt'} cannot be used")
    assert str(refusal.value).endswith(f"ckpt_path={tmp_path / 'step_2.ckpt'}")


# Files and names


def content() -> dict[str, Any]:
    return {key: {} for key in checkpoint_faults.ENTRIES} | {"state_dict": {"w": torch.ones(9)}}


def test_a_checkpoint_is_written_beside_its_place(tmp_path: Path, monkeypatch) -> None:
    seen: list[Path] = []
    save = torch.save

    def watched(saved: object, file: Any) -> None:
        seen.append(Path(file.name))
        save(saved, file)

    monkeypatch.setattr(torch, "save", watched)
    checkpoints.WholeCheckpointIO().save_checkpoint(content(), tmp_path / "new" / "a.ckpt")
    assert seen[0].parent == tmp_path / "new" and seen[0].name != "a.ckpt"
    assert names(tmp_path / "new") == ["a.ckpt"]


def test_drafts_are_no_checkpoints_and_go_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".12.step_9.ckpt").write_text("half of a file")
    (tmp_path / ".step_8.ckpt.part").mkdir()
    (tmp_path / ".step_8.ckpt.part" / "meta.pt").write_text("half of a folder")
    assert newest_first(tmp_path) == []
    checkpoints.WholeCheckpointIO().save_checkpoint(content(), tmp_path / "step_1.ckpt")
    assert names(tmp_path) == ["step_1.ckpt"]


def test_a_file_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    (path / "deep").mkdir(parents=True)
    checkpoints.WholeCheckpointIO().save_checkpoint(content(), path)
    assert checkpoints.check(path).keys() == content().keys()
    assert names(tmp_path) == ["a.ckpt"]


def test_files_folders_and_links_are_removed(tmp_path: Path) -> None:
    files = checkpoints.WholeCheckpointIO()
    (tmp_path / "file.ckpt").write_text("")
    (tmp_path / "folder.ckpt" / "deep").mkdir(parents=True)
    (tmp_path / "link.ckpt").symlink_to("folder.ckpt")
    files.remove_checkpoint(tmp_path / "link.ckpt")
    assert names(tmp_path) == ["file.ckpt", "folder.ckpt"]
    for path in [*tmp_path.iterdir(), tmp_path / "never.ckpt"]:
        files.remove_checkpoint(path)
    assert names(tmp_path) == []


def test_only_plain_values_are_loaded(tmp_path: Path) -> None:
    torch.save({"path": tmp_path}, tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.WholeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)


class Code:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("where", ["index", "value"])
def test_nothing_in_a_folder_can_run(tmp_path: Path, where: str) -> None:
    folder, trace = tmp_path / "step_1.ckpt", tmp_path / "trace"
    values = {"rate": 0.5, "weight": torch.ones(3)}
    code = {"rate": Code(trace)} if where == "value" else {}
    save(values | code, checkpoint_id=folder, no_dist=True)
    torch.save(content(), folder / checkpoint_faults.REST)
    if where == "index":
        (folder / checkpoint_faults.INDEX).write_bytes(pickle.dumps(Code(trace)))
    written = checkpoint_faults.fingerprints(list(folder.iterdir()))
    (folder / checkpoint_faults.MANIFEST).write_text(json.dumps(written))
    with pytest.raises(ValueError, match="it holds more than plain values"):
        checkpoints.check(folder)
    assert not trace.exists()


def test_where_nothing_can_be_written_the_reason_is_given(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoints.NotWritten, match="no older one is whole") as failure:
        checkpoints.WholeCheckpointIO().save_checkpoint(content(), tmp_path / "file" / "a.ckpt")
    assert "File exists" in str(failure.value) or "Not a directory" in str(failure.value)


# train.py


@pytest.mark.parametrize("trainer", ["cpu", "fsdp"])
def test_trainers_write_whole_checkpoints(tmp_path: Path, trainer: str) -> None:
    overrides = [f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=1"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*overrides, "callbacks=none", "logger=csv", f"run_dir={tmp_path}"])
    strategy = run.build_trainer(cfg).strategy
    assert isinstance(strategy.checkpoint_io, checkpoints.WholeCheckpointIO)
    assert isinstance(strategy, FSDP2Strategy) == (trainer == "fsdp")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_message(
    monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise checkpoints.NotWritten("no space")

    trainer = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(launcher=None))
    monkeypatch.setattr(run, "build", lambda _: SimpleNamespace(trainer=trainer))
    monkeypatch.setattr(run, "train", fail)
    with pytest.raises(SystemExit, match="1"):
        run.run_alone(OmegaConf.create())
    assert capsys.readouterr().err == "no space\n"


def test_a_folder_can_go_on_without_the_strategy_that_wrote_it(tmp_path: Path) -> None:
    before = ["trainer=fsdp", "trainer.strategy.save_distributed_checkpoint=true", "seed=1"]
    folder = tmp_path / "checkpoints" / "step_1.ckpt"
    folder.mkdir(parents=True)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(before), tmp_path / ".hydra" / "overrides.yaml")
    typed = ["trainer=cpu", "trainer.strategy=auto", f"ckpt_path={folder}"]
    assert resume.arguments(typed)[:3] == ["seed=1", *typed[:2]]
