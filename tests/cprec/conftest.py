"""The command line, called in this process."""

from __future__ import annotations

import signal
import sys

import pytest

from cprec.__main__ import main
from cprec.checkpoint import save
from tests.cprec.checkpoints import make


@pytest.fixture
def run(monkeypatch, capfd):
    """Call ``cprec`` in this process; gives exit code, standard output and standard error."""

    def call(*arguments, expect=0):
        monkeypatch.setattr(sys, "argv", ["cprec", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        code, handler = 0, signal.getsignal(signal.SIGTERM)
        try:
            main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = 1 if isinstance(stop.code, str) else int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capfd.readouterr()
        assert code == expect, f"exit {code}\n{out}\n{err}"
        return out, err

    return call


@pytest.fixture(params=["package", "torch alone"])
def reader(request, monkeypatch):
    """Both ways to read: with the safetensors package and without it."""
    if request.param == "torch alone":
        monkeypatch.setitem(sys.modules, "safetensors", None)
    return request.param


@pytest.fixture
def saved(tmp_path):
    """A folder saved by the package, made before ``reader`` may hide it."""
    return save(tmp_path / "model", make(), extra={"training": {"epochs": 3}})
