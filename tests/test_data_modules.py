"""The datamodules: what they serve, on any layout, and what they refuse."""

import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import zstandard
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor

from data.datamodule import StdlibDataModule, TextDataModule, TokenDataModule
from data.tokenizer import ByteTokenizer

SIZES: dict[str, Any] = {"vocab_size": 256, "seq_len": 16, "micro_batch_size": 4}
LETTERS = bytes(range(97, 123)) * 40  # 1,040 bytes

# Python 3.12 warns where a process with threads forks, which is how loader workers start
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NSA_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def letters(tmp_path: Path) -> str:
    (tmp_path / "letters.txt").write_bytes(LETTERS)
    return str(tmp_path / "letters.txt")


def text(**options: Any) -> TextDataModule:
    return TextDataModule(**{"name": "text"} | SIZES | options)


def ready(module: TokenDataModule) -> TokenDataModule:
    module.prepare_data()
    module.setup()
    return module


def contents(module: TokenDataModule) -> dict[str, bytes]:
    return {n: bytes(s.read(0, len(s)).tolist()) for n, s in module.splits.items()}


def attach(
    module: TokenDataModule, step: int = 0, steps: int = 6, accumulate: int = 1, rank=0, world=1
) -> None:
    """Give a datamodule what it reads of a trainer."""
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=step,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        global_rank=rank,
        local_rank=rank,
        world_size=world,
    )


def windows_by_step(
    make: Callable[[int], TokenDataModule],
    layout: tuple[int, int, int],
    check: Callable[[dict[str, Tensor]], None],
    start: int = 0,
    steps: int = 6,
) -> list[list[Any]]:
    """The windows of each step of 8, sorted, for (micro batch, accumulate, ranks).

    `make` is given the micro batch; every batch is checked.
    """
    micro, accumulate, world = layout
    found: list[list[Any]] = [[] for _ in range(start, steps)]
    for rank in range(world):
        module = make(micro)
        attach(module, start, steps, accumulate, rank, world)
        for i, batch in enumerate(module.train_dataloader()):
            check(batch)
            found[i // accumulate] += batch["tokens"].tolist()
    return [sorted(step) for step in found]


def steps_of(path: str, layout: tuple[int, int, int], start: int = 0, **options: Any) -> list[Any]:
    """`windows_by_step` of letters."""

    def check(batch: dict[str, Tensor]) -> None:
        assert list(batch) == ["tokens"]
        assert batch["tokens"].shape == (layout[0], 17)
        assert batch["tokens"].dtype == torch.int64

    def make(micro: int) -> TokenDataModule:
        return ready(text(paths=path, micro_batch_size=micro, **options))

    return windows_by_step(make, layout, check, start)


@pytest.mark.parametrize("layout", [(4, 2, 1), (4, 1, 2), (2, 2, 2)])
def test_a_step_is_the_same_on_any_layout(letters: str, layout: tuple[int, int, int]) -> None:
    assert steps_of(letters, layout) == steps_of(letters, (8, 1, 1))


def test_workers_change_nothing(letters: str) -> None:
    assert steps_of(letters, (4, 2, 1), num_workers=2) == steps_of(letters, (8, 1, 1))


@pytest.mark.parametrize("layout", [(8, 1, 1), (2, 2, 2)])
def test_a_later_start_gives_the_later_steps(letters: str, layout: tuple[int, int, int]) -> None:
    assert steps_of(letters, layout, start=4) == steps_of(letters, (8, 1, 1))[4:]


@pytest.mark.parametrize("layout", [(4, 1, 1), (2, 3, 2)])
def test_the_samples_of_a_step_are_those_the_loader_gives(
    letters: str, layout: tuple[int, int, int]
) -> None:
    micro, accumulate, world = layout
    per_step = micro * accumulate * world
    module = ready(text(paths=letters, micro_batch_size=micro))
    seen = []
    for rank in range(world):
        attach(module, step=2, accumulate=accumulate, rank=rank, world=world)
        for i, batch in enumerate(module.train_dataloader()):
            step, micro_batch = divmod(i, accumulate)
            samples = module.samples_of(2 + step + 1, rank, micro_batch)
            texts = [bytes(window).decode() for window in batch["tokens"].tolist()]
            assert [module.text_of(sample) for sample in samples] == texts
            seen += samples
    attach(module, rank=1, accumulate=accumulate, world=world)  # whoever asks, from whatever step
    assert sorted(seen) == list(range(2 * per_step, 6 * per_step))
    assert module.samples_of(3, 0, 0) == seen[:micro]


def test_the_seed_moves_the_order_and_not_the_shards(letters: str, cache: Path) -> None:
    assert steps_of(letters, (8, 1, 1), seed=1) != steps_of(letters, (8, 1, 1), seed=2)
    assert len(list(cache.glob("*/"))) == 1


def test_an_epoch_takes_every_byte_once(tmp_path: Path) -> None:
    corpus = bytes(random.Random(0).choices(range(128), k=1120))
    (tmp_path / "random.bin").write_bytes(corpus)
    module = ready(text(paths="random.bin", val_fraction=0.1, test_fraction=0.1))
    ring = contents(module)["train"]
    assert len(ring) == 896 == 14 * 4 * 16
    attach(module, steps=14)
    windows = torch.cat([batch["tokens"] for batch in module.train_dataloader()]).tolist()
    starts = [(ring + ring).index(bytes(window)) for window in windows]
    assert sorted(s - starts[0] % 16 for s in starts) in (
        list(range(0, 896, 16)),
        list(range(-16, 880, 16)),
    )
    assert starts != sorted(starts)


def test_a_loader_leaves_the_global_random_numbers_alone(letters: str) -> None:
    module = ready(text(paths=letters))
    attach(module)
    before = torch.get_rng_state()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        next(iter(loader))
    assert (torch.get_rng_state() == before).all()


def test_steps_must_be_counted(letters: str) -> None:
    module = ready(text(paths=letters))
    attach(module, steps=-1)
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        module.train_dataloader()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_scores_each_byte_once(letters: str, world: int) -> None:
    labels: list[int] = []
    module = ready(text(paths=letters, val_fraction=0.3, micro_batch_size=3))
    for rank in range(world):
        attach(module, rank=rank, world=world)
        for batch in module.val_dataloader():
            assert batch["tokens"].shape == (3, 17)
            labels += batch["tokens"][:, 1:].flatten().tolist()
    scored = [label for label in labels if label >= 0]
    assert sorted(scored) == sorted(contents(module)["val"][1:])


def test_limits_are_of_validation_and_test_each(letters: str) -> None:
    module = ready(text(paths=letters, val_tokens=40, test_tokens=21))
    for loader, limit in ((module.val_dataloader(), 40), (module.test_dataloader(), 21)):
        labels = torch.cat([batch["tokens"][:, 1:] for batch in loader])
        assert (labels >= 0).sum() == limit - 1


def test_text_is_split_in_order_by_fractions(letters: str) -> None:
    module = ready(text(paths=[letters], val_fraction=0.1, test_fraction=0.2))
    assert contents(module) == {
        "train": LETTERS[:728],
        "val": LETTERS[728:832],
        "test": LETTERS[832:],
    }
    assert module.bytes_per_token("train") == 1.0


def test_files_of_all_kinds_are_read_as_one_stream(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(LETTERS)
    (tmp_path / "b.gz").write_bytes(gzip.compress(LETTERS.upper()))
    (tmp_path / "c.xz").write_bytes(lzma.compress(b"0" * 100))
    (tmp_path / "d.zst").write_bytes(zstandard.compress(b"1" * 100))
    module = ready(text(paths=["[a-b].*", "c.xz"], val_paths="d.zst"))
    found = contents(module)
    assert found["train"] + found["test"] == LETTERS + LETTERS.upper() + b"0" * 100
    assert found["val"] == b"1" * 100


def test_a_changed_file_makes_new_shards(letters: str) -> None:
    ready(text(paths=letters))
    Path(letters).write_bytes(LETTERS.upper() * 2)
    assert contents(ready(text(paths=letters)))["train"].startswith(b"ABC")


def test_bytes_that_are_no_text_are_kept(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    (tmp_path / "latin.bin").write_bytes(data)
    assert b"".join(contents(ready(text(paths="latin.bin"))).values()) == data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": []}, r"data\.paths is empty"),
        ({"paths": ["nowhere.txt"]}, r"data\.paths: 'nowhere\.txt': there is no such file"),
        ({"paths": ["*.csv"]}, r"data\.paths: '\*\.csv': the glob matches no file"),
        ({"val_paths": ["x"]}, r"data\.val_paths: 'x': there is no such file"),
        ({"val_paths": ["letters.txt"]}, r"data\.val_paths: .*letters\.txt is in data\.paths, too"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, r"data\.val_fraction=0\.6 .* less than 1"),
        ({"val_fraction": -0.1}, r"data\.val_fraction=-0\.1"),
        ({"seq_len": 0}, r"model\.seq_len=0 must be .* at least 1"),
        ({"micro_batch_size": 0}, r"batch\.micro_batch_size=0"),
        ({"num_workers": -1}, r"data\.num_workers=-1"),
        ({"val_tokens": 1}, r"data\.val_tokens=1 must be .* at least 2"),
        ({"test_tokens": 1.5}, r"data\.test_tokens=1\.5 must be a whole number"),
        ({"vocab_size": 300}, r"data\.vocab_size=300 must be 256 for bytes"),
        ({"tokenizer": "train"}, r"data\.vocab_size=256 must be at least 257"),
    ],
)
def test_impossible_options_are_refused_at_once(letters: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text(**{"paths": letters} | options)


def test_a_split_shorter_than_a_window_is_refused_with_its_numbers(letters: str) -> None:
    module = text(paths=letters, seq_len=52)
    module.prepare_data()
    with pytest.raises(
        ValueError, match=r"val split has 52 tokens.* needs 53.* data\.val_fraction"
    ):
        module.setup()
    assert ready(text(paths=letters, seq_len=51)).splits


def test_tokens_that_are_not_prepared_are_not_opened(letters: str) -> None:
    with pytest.raises(ValueError, match=r"index\.json cannot be used: it is missing"):
        text(paths=letters).setup()


def test_bytes_encode_and_decode() -> None:
    tokenizer = ByteTokenizer()
    for string in ("plain", "grüße 世界 🌍", "", "\x00\n", "argv \udcff"):
        assert bytes(tokenizer.encode(string)) == string.encode(errors="surrogateescape")
    assert tokenizer.decode(tokenizer.encode("grüße 世界")) == "grüße 世界"
    assert tokenizer.decode([255, 97, 0xE4]) == "\ufffda\ufffd"
    assert tokenizer.decode(torch.tensor([104, 105])) == "hi"


def test_stdlib_is_three_splits_of_python_and_the_same_each_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ready(StdlibDataModule(**{"name": "stdlib"} | SIZES))
    sizes = {name: len(split) for name, split in module.splits.items()}
    assert sum(sizes.values()) > 5_000_000
    assert 0.03 < sizes["val"] / sum(sizes.values()) < 0.08
    assert 0.03 < sizes["test"] / sum(sizes.values()) < 0.08
    assert b"def " in contents(module)["val"]
    digests = [f.read_bytes() for f in sorted(cache.glob("stdlib-*/*.bin"))]
    monkeypatch.setenv("NSA_DATA_DIR", str(cache / "again"))
    ready(StdlibDataModule(**{"name": "stdlib"} | SIZES))
    assert [f.read_bytes() for f in sorted(cache.glob("again/stdlib-*/*.bin"))] == digests


class Recorder(L.LightningModule):
    """Trains one number, and keeps the windows it saw at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list]] = []
        self.scored = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.trainer.global_step, batch["tokens"].tolist()))
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.scored += int((batch["tokens"][:, 1:] >= 0).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path: str, folder: Path, ckpt: str | None = None) -> Recorder:
    """Six steps of two micro-batches, with a checkpoint and a validation each third."""
    model = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=6,
        max_epochs=-1,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)],
    )
    trainer.fit(model, datamodule=text(paths=path, num_workers=1), ckpt_path=ckpt)
    return model


@pytest.mark.filterwarnings("ignore")  # of Lightning, about the number of workers
def test_a_resumed_run_sees_what_the_whole_run_saw(letters: str, tmp_path: Path) -> None:
    whole = fit(letters, tmp_path / "whole")
    assert [step for step, _ in whole.seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert whole.scored == 2 * 51  # two passes over 52 bytes
    resumed = fit(letters, tmp_path / "resumed", str(tmp_path / "whole" / "step=3.ckpt"))
    assert resumed.seen == whole.seen[6:]


@pytest.mark.parametrize("name", ["enwik8", "stdlib", "text", "hf", "mix"])
def test_a_config_names_every_option_and_makes_its_datamodule(name: str, letters: str) -> None:
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        sizes = ["model.seq_len=64", "batch.micro_batch_size=8", "seed=3"]
        config: Any = compose("train", [*sizes, f"data={name}"])
    OmegaConf.set_struct(config, False)
    of_text = {"_target_": "data.datamodule.TextDataModule", "name": "text", "paths": [letters]}
    given = {"text": {"paths": [letters]}, "hf": {"name": "some/dataset"}}.get(name, {})
    given |= {"corpora": {"letters": of_text}} if name == "mix" else {}
    config.data.update(given)
    module = instantiate(config.data)
    assert isinstance(module, TokenDataModule)
    assert (module.seq_len, module.micro_batch_size, module.seed) == (64, 8, 3)
    assert (module.name, module.vocab_size) == (given.get("name", name), 256)
    parameters = constructor_options(type(module))
    assert parameters == set(config.data) - {"_target_", "_convert_", "_recursive_"}
    if name in ("text", "hf"):
        with pytest.raises(Exception, match=r"data\.(paths is empty|name is missing)"):
            config.data.update({"text": {"paths": []}, "hf": {"name": None}}[name])
            instantiate(config.data)


def constructor_options(datamodule: type) -> set[str]:
    """The keyword arguments of a datamodule and of what it inherits from."""
    names: set[str] = set()
    for cls in datamodule.__mro__[: datamodule.__mro__.index(TokenDataModule) + 1]:
        code = cls.__init__.__code__
        names |= set(code.co_varnames[1 : 1 + code.co_kwonlyargcount])
    return names
