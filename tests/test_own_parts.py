"""What CONTRIBUTING.md shows as one's own trains through train.py, named by `_target_` alone."""

import re
from pathlib import Path

import pytest
import torch
from forked_runs import ROOT, finished, run
from test_resume_matrix import TRAIN, layout

TABLE = (ROOT / "CONTRIBUTING.md").read_text()


def test_ones_own_phi_importance_and_layer_kind_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.txt").write_text("".join(f"{i} is a number\n" for i in range(800)))
    (code,) = re.findall(r"```python\n(.*?)```", TABLE, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("attention.importance=", "attention.compress_network=", "model.layer_pattern=")
    own = [next(w for w in re.findall(r"`'(.*?)'`", TABLE) if w.startswith(word)) for word in words]
    command = [*TRAIN, *layout(1, 0, 1), *own, "trainer.max_steps=1", "attention.backend=torch"]
    finished(run(tmp_path, [*command, f"run_dir={tmp_path / 'run'}"]), tmp_path)
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 1
    assert content["hyper_parameters"]["model"]["attention"]["compress_network"] == {
        "_target_": "mine.LastToken"
    }
    parts = {name.removeprefix("model.") for name in content["state_dict"]}
    assert "layers.1.attention.to_out.bias" in parts  # the running mean's
    assert not any("compress" in name and "mlp" in name for name in parts), parts
