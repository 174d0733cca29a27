"""Every page of conf/ composes, is read by something, and says what it claims to say."""

import dataclasses
import inspect
from functools import cache
from pathlib import Path

import forked_runs
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from nsa.attention import SparseAttention
from nsa.compress_networks import BlockCompressor
from nsa.config import NSAConfig
from nsa.training.lightning_module import NSALightningModule
from nsa.training.optimizers import OPTIMIZERS, SCHEDULES
from nsa.transformer import Transformer
from runs import command_line

CONF = Path(__file__).parent.parent / "conf"
SIZES = ("tiny", "small", "medium")
KINDS = ("nsa", "dense", "window")


def options(group: str) -> list[str]:
    """The choices of a group; base is what others are made of."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml") if p.stem != "base")


GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, "run_dir=."])


def plain(cfg: DictConfig) -> dict:
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_every_group_composes(group: str) -> None:
    for option in options(group):
        assert "???" not in str(OmegaConf.to_container(composed(f"{group}={option}")))


def test_every_model_goes_with_every_corpus() -> None:
    """Each page takes what both must agree on from the other, whichever that is."""
    pages = [composed(f"model={model}") for model in options("model")]
    pages += [composed(f"data={data}") for data in options("data")]
    for cfg in pages:
        agreed = OmegaConf.to_container(cfg, resolve=False)
        assert agreed["data"]["seq_len"] == "${model.seq_len}"
        assert agreed["model"]["vocab_size"] == "${data.vocab_size}"
        assert cfg.data.seq_len == cfg.model.seq_len
        assert cfg.model.vocab_size == cfg.data.vocab_size


def test_a_model_brings_its_attention_and_the_command_line_has_the_last_word() -> None:
    assert composed("model=nsa_small").attention.sliding_window_size == 64
    assert composed("model=nsa_medium").attention.sliding_window_size == 512
    cfg = composed("model=nsa_small", "attention=paper", "attention.num_selected_blocks=3")
    assert cfg.model.attention.sliding_window_size == 512
    assert cfg.model.attention.num_selected_blocks == 3
    assert composed("model=nsa_small", "trainer=debug").trainer.max_steps == 4


def test_a_model_brings_its_recipe_and_the_command_line_chooses_another() -> None:
    own, other = composed("model=dense_small"), composed("model=dense_small", "recipe=tiny")
    assert (own.trainer.max_steps, other.trainer.max_steps) == (10000, 300)
    assert (own.optimizer.lr, other.optimizer.lr) == (1e-3, 3e-3)
    assert own.batch.sequences_per_step == 32 and other.batch.sequences_per_step == 8
    assert own.model == other.model
    one = composed("recipe=tiny", "optimizer.lr=1", "trainer=debug")  # and both below have more
    assert (one.optimizer.lr, one.trainer.max_steps) == (1, 4)


def test_a_recipe_is_all_that_a_model_does_not_say() -> None:
    for model in options("model"):
        keys = set(OmegaConf.load(CONF / "model" / f"{model}.yaml")) - {"defaults"}
        assert keys == {"model"}, model
    for recipe in options("recipe"):
        assert "model" not in OmegaConf.load(CONF / "recipe" / f"{recipe}.yaml")


def test_the_defaults_of_conf_are_those_of_nsa_config() -> None:
    attention = plain(composed("attention=paper").attention)
    for field in dataclasses.fields(NSAConfig):
        if field.name in attention:
            assert attention[field.name] == field.default, field.name
    defaults = inspect.signature(SparseAttention).parameters
    for key, value in attention.items():
        if key in defaults and defaults[key].default is not inspect.Parameter.empty:
            assert value == defaults[key].default, key


@pytest.mark.parametrize("size", [*SIZES, "large"])
@pytest.mark.parametrize("kind", ["dense", "window"])
def test_twins_differ_in_nothing_but_their_layers(kind: str, size: str) -> None:
    twin, nsa = (plain(composed(f"model={k}_{size}", "logger=csv")) for k in (kind, "nsa"))
    assert twin["model"].pop("name") == f"{kind}_{size}"
    assert nsa["model"].pop("name") == f"nsa_{size}"
    assert twin["model"].pop("layer_pattern") == [kind]
    assert nsa["model"].pop("layer_pattern") == ["nsa"]
    assert twin.pop("name") != nsa.pop("name")
    assert twin == nsa


@pytest.mark.parametrize("size", SIZES)
def test_phi_of_the_presets_is_under_three_percent(size: str) -> None:
    settings = plain(composed(f"model=nsa_{size}").model)
    model = Transformer(**{k: settings[k] for k in settings if k not in ("name", "weights")})
    compressors = [m for m in model.modules() if isinstance(m, BlockCompressor)]
    phi = sum(p.numel() for m in compressors for p in m.parameters())
    assert 0 < phi < 0.03 * model.num_params
    expected = {"tiny": 1e6, "small": 25e6, "medium": 125e6}[size]
    assert model.num_params == pytest.approx(expected, rel=0.1)


def test_the_large_model_has_350_million_parameters_and_groups_heads_as_the_paper_does() -> None:
    settings = plain(composed("experiment=bpe_documents").model)
    with torch.device("meta"):
        model = Transformer(**{k: settings[k] for k in settings if k not in ("name", "weights")})
    assert model.num_params == pytest.approx(350e6, rel=0.05)
    assert settings["heads"] == 16 * settings["kv_heads"] and settings["dim_head"] == 128


ARMS: dict[str, tuple[list[str], dict]] = {  # layers, and options of the attention
    "dense": (["dense"], {}),
    "dense_gated": (["dense"], {}),
    "window": (["window"], {}),
    "nsa": (["nsa"], {"selection": "learned"}),
    "random": (["nsa"], {"selection": "random"}),
    "oracle": (["nsa"], {"selection": "oracle"}),
    "none": (["nsa"], {"selection": "none"}),
    "dense_first": (["nsa"], {}),
    "taught": (["nsa"], {}),
    "dense_first_taught": (["nsa"], {}),
    "gates_on_window": (["nsa"], {"gate_bias": [-2.0, -2.0, 2.0]}),
    "gates_on_selection": (["nsa"], {"gate_bias": [-2.0, 2.0, -2.0]}),
    "diff_topk": (["nsa"], {"use_diff_topk": True}),
    "qk_norm": (["nsa"], {"qk_norm": True}),
    "dense_and_nsa": (["dense", "nsa"], {}),
    "window_and_dense": (["window", "dense"], {}),
    "window_and_nsa": (["window", "nsa"], {}),
    "window_and_random": (["window", "nsa"], {"selection": "random"}),
    "window_and_none": (["window", "nsa"], {"selection": "none"}),
}


def test_arms_of_a_comparison_differ_in_what_they_say_alone() -> None:
    assert options("arm") == sorted(ARMS)
    plain_attention = plain(composed("experiment=recall_scattered").model)["attention"]
    for arm, (pattern, attention) in ARMS.items():
        cfg = plain(composed("experiment=recall_scattered", f"arm={arm}", "logger=csv"))
        assert cfg["model"]["layer_pattern"] == pattern
        assert cfg["model"]["attention"] == plain_attention | attention
        assert cfg["model"]["dense_output_gate"] == (arm == "dense_gated")
        assert (cfg["importance_loss"]["weight"] > 0) == ("taught" in arm)
        assert bool(cfg["sparsity_schedule"]) == ("dense_first" in arm)


@pytest.mark.parametrize("name", [name for name in options("experiment") if "recall" in name])
def test_a_recall_experiment_is_not_solved_by_windows_or_by_chance(name: str) -> None:
    """Windows cannot hand the answer on, and random picks seldom read it in any head."""
    cfg = composed(f"experiment={name}")
    sizes = cfg.attention
    assert cfg.data.min_distance > cfg.model.depth * (sizes.sliding_window_size - 1)
    forced = sizes.num_initial_blocks + sizes.num_local_blocks
    free = cfg.model.seq_len // sizes.selection_block_size - forced
    missed = 1 - (sizes.num_selected_blocks - forced) / free
    assert 1 - missed**cfg.model.kv_heads < 0.5


def nodes_with_target(node: object, path: str = "") -> list[tuple[str, dict]]:
    if not isinstance(node, dict):
        return []
    own = [(path, node)] if "_target_" in node else []
    return own + [found for k, v in node.items() for found in nodes_with_target(v, f"{path}.{k}")]


@pytest.mark.parametrize("group", ["data", "trainer", "callbacks", "logger"])
def test_every_key_of_a_target_is_one_of_its_arguments(group: str) -> None:
    for option in options(group):
        cfg = OmegaConf.to_container(composed(f"{group}={option}")[group], resolve=False)
        for path, node in nodes_with_target(cfg, f"{group}={option}"):
            target = get_class(node["_target_"])
            parameters = inspect.signature(target).parameters
            if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                continue
            unread = [key for key in node if not key.startswith("_") and key not in parameters]
            assert not unread, f"{path}: {target.__name__} takes no {unread}"


def test_everything_in_conf_is_read() -> None:
    """Options are arguments of functions; what else there is, train.py or another entry reads."""
    cfg = composed()
    parameters = {
        "model": {"name", "weights", *inspect.signature(Transformer).parameters},
        "attention": {"compress_network", *inspect.signature(SparseAttention).parameters},
    }
    for part, known in parameters.items():
        assert set(cfg[part]) <= known, part
    for part, builtins in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULES)):
        assert set(options(part)) == {*builtins, "own"}
        for name, factory in builtins.items():
            page = composed(f"{part}={name}")[part]
            assert page.name == name
            assert set(page) <= {"name", *inspect.signature(factory).parameters}, name
    module = inspect.signature(NSALightningModule).parameters
    text = "".join(path.read_text() for path in (CONF.parent / "runs").glob("*.py"))
    text += "".join(path.read_text() for path in CONF.rglob("*.yaml"))
    for key in set(cfg) - set(command_line.PATHS):
        assert key in module or f"cfg.{key}" in text or f"${{{key}" in text, key
    for key in cfg.batch:
        assert f"batch.{key}" in text, key


@pytest.mark.parametrize(
    "mistake", ["attention.windw_size=3", "optimzer.lr=1", "model=nsa_smal", "scheduler.decay=1"]
)
def test_mistyped_keys_are_refused(mistake: str) -> None:
    with pytest.raises(HydraException, match=mistake.split("=")[0].split(".")[-1]):
        composed(mistake)


COUNTED = """
import runpy, sys
from hydra._internal.config_loader_impl import ConfigLoaderImpl as Loader
load, composed = Loader.load_configuration, []
Loader.load_configuration = lambda *args, **options: composed.append(0) or load(*args, **options)
program, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as refused:
    print(refused, len(composed))
"""


def test_a_start_composes_for_the_folder_and_for_the_run_alone(tmp_path: Path) -> None:
    command = [str(command_line.PROGRAM), "trainer=cpu", "val_every_n_steps=0"]
    done = forked_runs.python(COUNTED, *command, cwd=tmp_path)
    assert "val_every_n_steps=0 must be" in done.stdout and done.stdout.endswith(" 2\n"), done
