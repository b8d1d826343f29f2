"""Shared by all tests: reproducible hypothesis runs, and the shared modules as fixtures."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# Triton chooses compiler or interpreter when it is imported, by whichever test; `make test-gpu` asks for the compiler.
EMULATED = os.environ.get("EMULATE_PTX") == "1"
os.environ.setdefault("TRITON_INTERPRET", "0" if EMULATED else "1")

# A failing example must fail again on the next run, and a slow machine is no failure.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


def load(path: str) -> ModuleType:
    """A module of the test tree, which is no package; loaded once."""
    name = "tests_" + path.replace("/", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def solver_table() -> ModuleType:
    """The table of solvers: tests/solvers/solver_table.py."""
    return load("solvers/solver_table.py")


@pytest.fixture(scope="session")
def codings() -> ModuleType:
    """Codings for calibrated solvers to change: tests/solvers/codings.py."""
    return load("solvers/codings.py")


@pytest.fixture(scope="session")
def records() -> ModuleType:
    """Random records with every optional term, and their slow decoder: tests/format/records.py."""
    return load("format/records.py")


@pytest.fixture(scope="session")
def load_test_module() -> Callable[[str], ModuleType]:
    """Any module of the test tree by its path."""
    return load


@pytest.fixture(scope="session")
def golden_make() -> ModuleType:
    """The script that writes golden files: tests/golden/make.py."""
    return load("golden/make.py")


@pytest.fixture(scope="session", autouse=EMULATED)
def emulated() -> None:
    """GPU kernels as compiled, run by an emulator: tests/kernels/emulated.py."""
    load("kernels/emulated.py").install()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For operations too small to split: on a busy machine threads waiting for each other take minutes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``row`` runs a test over the rows of the solver table, ``case`` over every row at its widths."""
    table = load("solvers/solver_table.py")
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", table.ROWS, ids=[row.label for row in table.ROWS])
    if "case" in metafunc.fixturenames:
        cases = [(row, bits) for row in table.ROWS for bits in row.cases]
        metafunc.parametrize("case", cases, ids=[f"{row.label}-{bits}" for row, bits in cases])
