"""The ``refused`` fixture: a command that must fail cleanly. Test files load this module by its path."""

from __future__ import annotations

import pytest

from hf_lowbit.cli import main


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command that must fail: one line on stderr with all ``parts`` in it, nothing on stdout, nothing left behind."""

    def run(code: int, arguments: list, *parts: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("hf-lowbit: ")
        assert len(last) < 1000
        for part in parts:
            assert part in last
        assert sorted(tmp_path.rglob("*")) == before

    return run
