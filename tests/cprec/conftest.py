"""The command line, called in this process."""

from __future__ import annotations

import sys

import pytest

from cprec.__main__ import main


@pytest.fixture
def run(monkeypatch, capfd):
    """Call ``cprec`` in this process; gives exit code, standard output and standard error."""

    def call(*arguments, expect=0):
        monkeypatch.setattr(sys, "argv", ["cprec", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        code = 0
        try:
            main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = 1 if isinstance(stop.code, str) else int(stop.code or 0)
        out, err = capfd.readouterr()
        assert code == expect, f"exit {code}\n{out}\n{err}"
        return out, err

    return call
