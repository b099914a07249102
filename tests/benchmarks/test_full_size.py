"""What is wrong at full size alone, where no truth is at hand, is not timed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.ops import bench_clustered_topk, bench_train_step
from benchmarks.registry import Setting, get_op
from benchmarks.roofline import Roof, Roofs
from benchmarks.run import Options, Provenance, run_setting
from cprec_kernels import available_cpu_isas

pytestmark = pytest.mark.skipif(not available_cpu_isas(), reason="this package was built without native kernels")

FAST = Options(min_rounds=2, budget_s=0.0, peak=False, quick_roofs=True)
HERE = Provenance("a processor", {"torch": "2"}, "abc", "2000-01-01")


def fake_roofs():
    return Roofs(measure=lambda isa, threads, quick: Roof(isa, threads, 100.0, 200.0, 10.0, ((1 << 24, 20.0),)))


def differing(provider, name, change, call=None):
    """A provider whose summary, or call, is another one from 3000 items on, which the gate's smaller case has not."""

    def prepare(problem):
        prepared = provider.prepare(problem)
        if problem.setting.case.num_items < 3000:
            return prepared
        if call is not None:
            prepared = dataclasses.replace(prepared, call=call(prepared))
        return dataclasses.replace(prepared, summary=lambda: prepared.summary() | change(prepared.summary()))

    return dataclasses.replace(provider, name=name, prepare=prepare)


def run_full_size(op, providers, tokens="t64"):
    setting = Setting(op.name, Case.parse(f"3k-d32-{tokens}"), op.modes[0])
    return run_setting(op, setting, providers, FAST, fake_roofs(), HERE)


def test_a_loss_that_is_wrong_at_full_size_only_gets_no_time():
    op = get_op("clustered_softmax")
    wrong = differing(op.provider("reference"), "cprec-overflow", lambda right: {"loss": right["loss"] * 1.01})
    rows = run_full_size(op, [wrong, op.provider("torch-adaptive")])
    assert rows[0].correct is False
    assert "loss at full size differs from that of torch-adaptive" in rows[0].error
    assert rows[1].median_ms is not None


def test_fp64_decides_who_is_off_at_full_size():
    """A peer that loses digits in long sums keeps its time, with the error beside it; ours would not."""
    op = get_op("clustered_softmax")
    good = op.provider("reference")

    def off(right):
        return {"d_input": right["d_input"] * 1.01}

    rows = run_full_size(op, [good, differing(good, "torch-adaptive", off)])
    assert rows[0].correct
    assert rows[0].median_ms is not None
    assert "d_input at full size is off by 1.0e-02 against fp64" in rows[1].note
    rows = run_full_size(op, [differing(good, "cprec-overflow", off), op.provider("torch-adaptive")])
    assert rows[0].correct is False
    assert "against fp64" in rows[0].error


def test_fp64_is_asked_of_the_rows_that_differ():
    """Ours that is wrong beyond the first rows is not acquitted by these."""
    op = get_op("clustered_softmax")

    def off(right):
        return {"d_input": right["d_input"].index_fill(0, torch.tensor([50, 51]), 0.0)}

    wrong = differing(op.provider("reference"), "cprec-overflow", off)
    rows = run_full_size(op, [wrong, op.provider("torch-adaptive")])
    assert rows[0].correct is False
    assert rows[1].median_ms is not None


def test_right_scores_of_wrong_items_do_not_pass_at_full_size():
    op = get_op("clustered_topk")

    def prepare(problem):
        module, last = problem.module, problem.setting.case.num_items - 1

        def search():
            scores, items = module.topk(problem.hidden, bench_clustered_topk.K_BEST)
            return scores, last - items if last >= 2999 else items

        own = bench_clustered_topk.own_log_prob(problem)
        return bench_clustered_topk.prepare_search(search, "float32", own=own)

    wrong = dataclasses.replace(op.provider("reference"), name="cprec-overflow", prepare=prepare)
    rows = run_full_size(op, [wrong, op.provider("torch-adaptive")], "b8")
    assert "scores of the items at full size differs from that of torch-adaptive" in rows[0].error
    assert rows[1].median_ms is not None


def test_a_step_that_does_not_step_is_noticed_at_full_size():
    op = get_op("train_step")

    def without_step(prepared):
        weights = [leaf.detach().clone() for leaf in prepared.leaves]

        def call():
            prepared.call()
            with torch.no_grad():
                for leaf, before in zip(prepared.leaves, weights, strict=True):
                    leaf.copy_(before)

        return call

    idle = differing(op.provider("torch-adam"), "cprec-overflow", lambda right: {}, without_step)
    rows = run_full_size(op, [idle, op.provider("torch-fused-adam")])
    assert "loss_after at full size differs from that of torch-fused-adam" in rows[0].error


def test_a_step_counts_the_work_of_its_own_targets():
    """Tails cost what their targets are many, and the loss's own benchmark draws others."""
    step = bench_train_step.Problem(Setting("train_step", Case.parse("3k-d32-t64"), "step"))
    tails = bench_train_step.loss_of(step).compressed_levels()[1:]
    offsets = step.partition.offsets
    counts = [int(((step.target >= lo) & (step.target < hi)).sum()) for lo, hi in itertools.pairwise(offsets)]
    assert [tokens for _, _, tokens in tails] == counts[1:]
