"""The same cases and providers for people who prefer pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Small cases unless --cprec-case or --cprec-all says otherwise. The gate comes first here too. Providers cannot be interleaved
under pytest-benchmark, so compare numbers of one quiet machine only; ``python -m benchmarks`` does not have that limit.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Case
from benchmarks.memory import available_bytes
from benchmarks.registry import OPS, Provider, Setting, choose_providers, get_op
from benchmarks.run import memory_refusals
from benchmarks.timing import torch_threads
from benchmarks.verify import Gate

SMALL = {"clustered_softmax": "5k-d64-t128", "block_embedding": "5k-d64-t1024", "train_step": "5k-d64-t128"}
SMALL["conv_norm_relu"] = "5k-d64-t128"
OF_ROWS = ("clustered_topk", "clustered_rank", "residual_stack")
SMALL |= dict.fromkeys(OF_ROWS, "5k-d64-b8")
ROUNDS, WARM_UP_ROUNDS = 5, 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    parameters = []
    for name in OPS:
        op = get_op(name)
        letter = "b" if name in OF_ROWS else "t"
        named = [case for case in config.getoption("--cprec-case") if f"-{letter}" in case]
        cases = op.cases if config.getoption("--cprec-all") else named or [SMALL[name]]
        for case in cases:
            for provider in choose_providers(op, ()):
                setting = Setting(name, Case.parse(case), op.modes[0], threads=config.getoption("--cprec-threads"))
                parameters.append(pytest.param(setting, provider, id=f"{name}-{case}-{provider.name}"))
    metafunc.parametrize(("setting", "provider"), parameters)


def test_provider(benchmark: Any, setting: Setting, provider: Provider) -> None:
    op = get_op(setting.op)
    reason = provider.missing(setting) or memory_refusals(op, setting, [provider], available_bytes()).get(provider.name)
    if reason:
        pytest.skip(reason)
    benchmark.group = setting.label()
    with torch_threads(setting.threads):
        error = Gate(op, setting).judge(provider).error
        assert not error, error
        with provider.scope():
            prepared = provider.prepare(op.problem(setting))
            benchmark.pedantic(prepared.call, setup=prepared.reset, rounds=ROUNDS, warmup_rounds=WARM_UP_ROUNDS)
