"""What the wheel holds: the package, its embedded model, and nothing else of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import hf_lowbit

ROOT = Path(__file__).parent.parent
EMBEDDED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def _can_build() -> bool:
    try:
        return int(version("setuptools").split(".")[0]) >= 77 and bool(version("build"))
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _can_build(), reason="needs setuptools>=77 and build, as pip install -e '.[dev]' brings")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout, which stays clean; the copy has tests and eval, so that they could slip in."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "shared")
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "out"), str(folder / "copy")],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (folder / "out").iterdir()
    return file


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def read(wheel: Path, end: str) -> str:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(end))
    return archive.read(name).decode()


def test_it_is_for_any_python_of_this_platform(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"hf_lowbit-{hf_lowbit.__version__}-py3-none-{platform}.whl"


@pytest.mark.skipif(shutil.which("g++") is None, reason="without a compiler the wheel holds no kernels")
def test_the_compiled_kernels_are_there_and_their_sources_are_not(names):
    assert "hf_lowbit/kernels/_lowbit_cpu.so" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o"))]


def test_only_the_package_is_at_the_top(names):
    tops = {name.split("/")[0] for name in names}
    (info,) = tops - {"hf_lowbit"}
    assert info.startswith("hf_lowbit-") and info.endswith(".dist-info")


def test_every_module_is_there_and_no_test(names):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_lowbit").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert not [name for name in names if "test" in name or name.startswith("eval") or "/eval/" in name]


def test_the_embedded_model_its_text_and_the_type_marker_are_there(names, wheel):
    for file in (*EMBEDDED, "held_out.txt", "calibration.txt"):
        assert f"hf_lowbit/embedded/{file}" in names
        stored = zipfile.ZipFile(wheel).getinfo(f"hf_lowbit/embedded/{file}").file_size
        assert stored == (ROOT / "hf_lowbit" / "embedded" / file).stat().st_size
    assert "hf_lowbit/py.typed" in names


def test_it_is_small(wheel):
    assert wheel.stat().st_size < 12e6


def test_command_and_autoload_are_entry_points(wheel):
    lines = read(wheel, "entry_points.txt").splitlines()
    assert "hf-lowbit = hf_lowbit.cli:main" in lines[lines.index("[console_scripts]") :]
    assert lines[lines.index("[torch.backends]") + 1] == "hf_lowbit = hf_lowbit.autoload:autoload"


def test_the_metadata_names_the_licence_and_the_runtime_needs_only(wheel):
    metadata = read(wheel, "METADATA")
    assert "License-Expression: Apache-2.0" in metadata
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert {re.split(r"[ ><=]+", need)[1] for need in needs} == {
        "torch",
        "transformers",
        "safetensors",
        "rich",
        "numpy",
        "filelock",
    }


def test_an_unpacked_wheel_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    use = (
        "import hf_lowbit, hf_lowbit.demo as d; print(hf_lowbit.__file__, (d.embedded_model() / 'config.json').is_file()); "
    )
    use += "from hf_lowbit.kernels.cpu_library import instruction_sets; print(*instruction_sets())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {use}"],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
    )  # fmt: skip
    first, second, *kernels = done.stdout.split()
    assert [first, second] == [str(tmp_path / "hf_lowbit" / "__init__.py"), "True"]
    assert ("portable" in kernels) == (shutil.which("g++") is not None)


@pytest.mark.parametrize("how", ["no compiler", "switched off"])
def test_the_package_builds_without_a_compiler_and_says_why_it_is_slow(how, tmp_path):
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so", "embedded")
    shutil.copytree(ROOT / "hf_lowbit", tmp_path / "hf_lowbit", ignore=left_out)
    shutil.copy(ROOT / "setup.py", tmp_path)
    change = {"CC": "/no/such/cc", "CXX": "/no/such/c++"} if how == "no compiler" else {"HF_LOWBIT_NO_COMPILE": "1"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        build, cwd=tmp_path, env=os.environ | change, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hf-lowbit: " in done.stderr
    use = "from hf_lowbit.kernels import cpu_library as c; print(c.library(), c.instruction_sets(), c.trouble())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {use}"],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.startswith("None [] the compiled kernels are not here"), done.stderr[-2000:]
