"""Options of ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cprec benchmarks")
    group.addoption("--cprec-case", action="append", default=[], help="case to measure, e.g. 1m-d128-t512; repeatable")
    group.addoption("--cprec-all", action="store_true", help="every case that the ops list (hours)")
    group.addoption("--cprec-threads", type=int, default=1, help="torch threads (default 1)")
