"""Importing is free of side effects, and the plugin is found in whatever order things are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

HEAVY = ("torch", "transformers", "numpy", "safetensors", "rich")
# What a child process says of itself when its imports are done.
REPORT = """
import sys
mapping = getattr(sys.modules.get("transformers.quantizers.auto"), "AUTO_QUANTIZER_MAPPING", {})
print("hf_lowbit" in mapping, "hf_lowbit.plugin" in sys.modules, "torch" in sys.modules)
"""
# Puts a plugin on sys.path before ours that raises as soon as it is imported.
BROKEN_PLUGIN = """
import importlib.abc, importlib.util, sys
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == "hf_lowbit.plugin" else None
    def exec_module(self, module):
        raise ImportError('no such library')
sys.meta_path.insert(0, Broken())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter; nothing of this process's own environment turns the autoload off."""
    clean = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def heavy_imports(statement: str) -> list[str]:
    """Which heavy packages a fresh interpreter holds after ``statement``."""
    done = run(f"{statement}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])")
    return done.stdout.split()


def test_importing_the_package_imports_nothing_heavy():
    assert heavy_imports("import hf_lowbit") == []


def test_the_command_line_parses_without_anything_heavy():
    assert heavy_imports("from hf_lowbit.cli import build_parser; build_parser()") == []


@pytest.mark.parametrize("statement", ["from hf_lowbit.format.spec import Spec", "from hf_lowbit import LowBitConfig"])
def test_the_purity_test_sees_what_it_looks_for(statement):
    assert "torch" in heavy_imports(statement)


def test_importing_prints_nothing():
    done = run("import hf_lowbit")
    assert (done.stdout, done.stderr) == ("", "")


def test_names_are_listed_before_they_are_loaded():
    done = run("import hf_lowbit, sys; print(*dir(hf_lowbit)); assert 'torch' not in sys.modules")
    assert {"LowBitConfig", "LowBitLinear", "SpotDetector", "explain", "quantize", "__version__"} <= set(done.stdout.split())


def test_an_unknown_name_is_an_attribute_error():
    done = run("import hf_lowbit\ntry:\n    hf_lowbit.nothing\nexcept AttributeError as error:\n    print(error)")
    assert "'nothing'" in done.stdout


def test_the_entry_point_is_installed():
    assert "hf_lowbit.autoload:autoload" in [point.value for point in entry_points(group="torch.backends")]


ORDERS = {
    "torch first": "import torch\nimport transformers.quantizers",
    "transformers first": "import transformers\nimport torch\nfrom transformers import modeling_utils",
    "the registry itself first": "from transformers.quantizers import AutoHfQuantizer",
    "hf_lowbit first": "import hf_lowbit\nimport torch\nimport transformers.quantizers",
    "hf_lowbit last": "import transformers.quantizers\nimport hf_lowbit",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
def test_the_method_is_registered_in_any_order(imports):
    done = run(imports + REPORT)
    assert done.stdout.split() == ["True", "True", "True"]
    assert done.stderr == ""


def test_torch_alone_does_not_load_the_plugin():
    assert run("import torch" + REPORT).stdout.split() == ["False", "False", "True"]


def test_without_autoload_the_method_is_known_only_after_the_import():
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    then = "print(flush=True)\nimport hf_lowbit"
    done = run(f"import transformers.quantizers{REPORT}{then}{REPORT}", **off)
    assert done.stdout.split() == ["False", "False", "True", "True", "True", "True"]


def test_a_broken_plugin_warns_and_breaks_nothing():
    use = "import torch, transformers.quantizers\nprint(torch.ones(2).sum().item())"
    done = run(BROKEN_PLUGIN + use)
    assert done.stdout.split() == ["2.0"]
    assert "hf-lowbit could not register itself with transformers: no such library" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_import_of_the_host_that_fails_under_way_keeps_its_own_error(tmp_path):
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("import hf_lowbit\n1 / 0\n")
    use = "try:\n    import transformers.quantizers\nexcept ZeroDivisionError as error:\n    print(error)\n"
    done = run(use + "import sys\nassert 'hf_lowbit.plugin' not in sys.modules", PYTHONPATH=str(tmp_path))
    assert (done.stdout.strip(), done.stderr) == ("division by zero", "")


def test_calling_autoload_again_changes_nothing():
    again = "import sys, hf_lowbit\nfrom hf_lowbit.autoload import autoload, _After\nautoload(); autoload()\n"
    done = run(again + "print(sum(isinstance(finder, _After) for finder in sys.meta_path))")
    assert done.stdout.split() == ["1"]
