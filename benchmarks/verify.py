"""The gate: no provider is timed before its outputs are right.

On a scaled-down case of the same shape every output is judged by the project's tolerance rule
(:mod:`cprec_kernels.testing.compare`): truth is the provider's formula in fp64, base the same by plain torch in the tested
dtype. The rule holds for what is ours. Peers are not ours to repair: they pass as long as they compute the same function,
and a row says so when its peer is less exact than the rule. At full size, where fp64 would take hours, the loss and the
input's gradient are compared among the providers of a formula.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from benchmarks.registry import Op, Provider, Results, Setting
from cprec_kernels.testing import EPS, assert_accurate, relative_error

# At full size two fp32 sums over up to 10^7 entries are compared with one another, not with the truth.
FULL_SIZE_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
REFEREE_ROWS = 4
# How many times the rule's bound a peer may err: enough for another order of summation, far from another function.
PEER_SLACK = {"float32": 32.0, "bfloat16": 4.0}


def dtype_of(provider: Provider, setting: Setting) -> str:
    """The dtype that a provider computes a setting in."""
    return provider.dtype or setting.dtype


def describe(error: BaseException) -> str:
    """An exception in one line; "failed: " before what is not a comparison's verdict."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, AssertionError) and text else f"failed: {type(error).__name__}: {text}"


def compare_results(ours: Results, base: Results, exact: Results, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Raise AssertionError unless all outputs are there, finite and within ``slack`` times the tolerance rule's bound."""
    if set(ours) != set(exact):
        missing, extra = sorted(set(exact) - set(ours)), sorted(set(ours) - set(exact))
        raise AssertionError(f"outputs missing: {missing}, unexpected: {extra}")
    for name, truth in exact.items():
        if not bool(ours[name].isfinite().all()):
            raise AssertionError(f"{name} is not finite")
        try:
            assert_accurate(ours[name], base[name], truth, dtype, name)
        except AssertionError:
            bound = 2 * relative_error(base[name], truth) + EPS[dtype]
            if not relative_error(ours[name], truth) <= slack * bound:
                raise


@dataclasses.dataclass(frozen=True)
class Verdict:
    """error: "" when the outputs are right, else what is wrong. note: what is right but worth a remark."""

    error: str
    note: str


class Gate:
    """Judges the providers of one setting; truths are computed once per formula and dtype."""

    def __init__(self, op: Op, setting: Setting) -> None:
        self.op = op
        self.problem = op.problem(setting.scaled_down())
        self.setting = setting
        self._truths: dict[tuple[str, str], Results] = {}

    def _truth(self, formula: str, dtype: str) -> Results:
        key = formula, dtype
        if key not in self._truths:
            self._truths[key] = self.op.truth(self.problem, formula, dtype)
        return self._truths[key]

    def judge(self, provider: Provider) -> Verdict:
        """Run a provider on the scaled-down case and compare all of its outputs."""
        dtype = dtype_of(provider, self.setting)
        exact, base = self._truth(provider.formula, "float64"), self._truth(provider.formula, dtype)
        compare = provider.compare or self.op.compare or compare_results
        try:
            prepared = provider.prepare(self.problem)
            with provider.scope():
                prepared.reset()
                prepared.call()
                results = prepared.results()
            try:
                compare(results, base, exact, getattr(torch, dtype), 1.0)
            except AssertionError as error:
                if provider.is_ours:
                    raise
                compare(results, base, exact, getattr(torch, dtype), PEER_SLACK[dtype])
                return Verdict("", f"less exact than our rule: {describe(error).split(' against')[0]}")
            finally:
                prepared.reset()
        except Exception as error:  # a peer may fail in any way; that is a result, not the end of the run
            return Verdict(describe(error), "")
        return Verdict("", "")


def rows_to_judge(summaries: dict[str, Results], formulas: dict[str, str], trusted: list[str]) -> Tensor:
    """Rows for a referee at full size: the first few, and those in which a provider differs most from the yardstick."""
    rows: set[int] = set()
    for name, summary in summaries.items():
        yardstick = summaries.get(_yardstick(name, formulas, trusted), {})
        for key, value in summary.items():
            other = yardstick.get(key)
            if value.dim() == 2 and other is not None and other.shape == value.shape:
                # What is not finite differs most.
                apart = (value.double() - other.double()).norm(dim=1).nan_to_num(nan=math.inf)
                count = min(REFEREE_ROWS, len(apart))
                rows |= {*range(count), *apart.topk(count).indices.tolist()}
    return torch.tensor(sorted(rows), dtype=torch.int64)


def errors_against_referee(summary: Results, rows: Tensor, judged: Results, dtype: str) -> str:
    """How rows (R,) of a full-size summary are off, beyond the tolerance; "" when they are not."""
    for key, value in judged.items():
        if key not in summary:
            continue
        error = relative_error(summary[key][rows], value)
        if not error <= FULL_SIZE_TOLERANCE[dtype]:
            return f"{key} at full size is off by {error:.1e} against fp64"
    return ""


def _yardstick(name: str, formulas: dict[str, str], trusted: list[str]) -> str:
    return next((other for other in trusted if formulas.get(other) == formulas[name]), name)


def disagreements(
    summaries: dict[str, Results], formulas: dict[str, str], dtypes: dict[str, str], trusted: list[str]
) -> dict[str, str]:
    """Provider -> how its outputs at full size differ from those of the first trusted provider of its formula.

    Args:
        summaries: outputs per provider. formulas, dtypes: of every provider.
        trusted: providers in the order in which they may serve as the yardstick.
    """
    found = {}
    for name, summary in summaries.items():
        yardstick = _yardstick(name, formulas, trusted)
        if yardstick not in summaries:
            continue
        bound = max(FULL_SIZE_TOLERANCE[dtypes[name]], FULL_SIZE_TOLERANCE[dtypes[yardstick]])
        for key in summary | summaries[yardstick]:
            both = key in summary and key in summaries[yardstick]
            error = relative_error(summary[key], summaries[yardstick][key]) if both else math.inf
            if not error <= bound:
                found[name] = (
                    f"{key} at full size differs from that of {yardstick} by {error:.1e}, more than {bound:.0e}"
                )
                break
    return found
