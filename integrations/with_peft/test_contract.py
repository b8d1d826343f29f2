"""The contract with PEFT and the Trainer: the recipe runs offline, and PEFT still calls what our side wraps."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="peft is not installed: pip install 'hf-lowbit[peft]'")
RECIPE = Path(__file__).with_name("finetune.py")


def recipe():
    spec = importlib.util.spec_from_file_location("with_peft_finetune", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_we_wrap_is_called_by_peft():
    """Each wrapped name must be looked up by PEFT where it was put; a renamed one would be wrapped in vain."""
    import inspect

    from peft.tuners import tuners_utils
    from peft.tuners.lora import model as lora_model
    from peft.tuners.miss import model as miss_model

    assert lora_model.dispatch_hqq.__module__ == "hf_lowbit.plugin.adapters.register"
    assert "dispatch_hqq," in inspect.getsource(lora_model.LoraModel._create_new_module)
    assert miss_model._get_tuner_layer_class.__module__ == "hf_lowbit.plugin.adapters.register"
    assert "_get_tuner_layer_class(" in inspect.getsource(miss_model.MissModel._create_new_module)
    assert tuners_utils._maybe_include_all_linear_layers.__module__ == "hf_lowbit.plugin.adapters.register"
    assert "_maybe_include_all_linear_layers(" in inspect.getsource(tuners_utils.BaseTuner)


@pytest.mark.parametrize("init", ["loftq", pytest.param("none", marks=pytest.mark.slow)])
def test_the_recipe_trains_a_two_bit_model_offline(tmp_path, init, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "adapter"
    small = ["--method", "rtn", "--steps", "4", "--length", "32", "--batch", "2", "--characters", "4000"]
    held_out = tmp_path / "text.txt"
    held_out.write_text(Path(recipe().held_out_text()).read_text(encoding="utf-8")[:4000], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(RECIPE), "--init", init, "--text", str(held_out), "--out", str(out), *small],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "perplexity" in line]
    before, after = (float(line.split()[-1]) for line in lines)
    assert after < before
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    assert (tmp_path / "adapter-base" / "model.safetensors").exists()


def test_an_optimizer_of_bitsandbytes_without_bitsandbytes_says_so(monkeypatch):
    tune = recipe()
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None)
    args = tune.parser().parse_args(["--optimizer", "adamw_8bit"])
    with pytest.raises(SystemExit, match="--optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes"):
        tune.train(None, [], args)
