"""What is wrong at full size alone, where no truth is at hand, is not timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.ops import bench_clustered_topk
from benchmarks.registry import Setting, get_op
from benchmarks.roofline import Roof, Roofs
from benchmarks.run import Options, Provenance, run_setting
from cprec_kernels import available_cpu_isas

pytestmark = pytest.mark.skipif(not available_cpu_isas(), reason="this package was built without native kernels")

FAST = Options(min_rounds=2, budget_s=0.0, peak=False, quick_roofs=True)
HERE = Provenance("a processor", {"torch": "2"}, "abc", "2000-01-01")


def fake_roofs():
    return Roofs(measure=lambda isa, threads, quick: Roof(isa, threads, 100.0, 200.0, 10.0, ((1 << 24, 20.0),)))


def test_fp64_is_asked_of_the_rows_that_differ():
    """Ours that is wrong beyond the first rows is not acquitted by these."""
    op = get_op("clustered_softmax")
    good = op.provider("reference")

    def prepare(problem):
        prepared = good.prepare(problem)

        def summary():
            found = dict(prepared.summary())
            found["d_input"] = found["d_input"].clone()
            found["d_input"][50:52] = 0
            return found

        return prepared if problem.setting.case.num_items < 3000 else dataclasses.replace(prepared, summary=summary)

    setting = Setting(op.name, Case("3k-d32-t64", 3000, 32, 64), "fwd_bwd")
    ours = dataclasses.replace(good, name="cprec-overflow", prepare=prepare)
    rows = run_setting(op, setting, [ours, op.provider("torch-adaptive")], FAST, fake_roofs(), HERE)
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
    setting = Setting(op.name, Case("3k-d32-b8", 3000, 32, 8), "fwd")
    rows = run_setting(op, setting, [wrong, op.provider("torch-adaptive")], FAST, fake_roofs(), HERE)
    assert "scores of the items at full size differs from that of torch-adaptive" in rows[0].error
    assert rows[1].median_ms is not None


def test_a_step_that_does_not_step_is_noticed_at_full_size():
    op = get_op("train_step")
    good = op.provider("torch-adam")

    def prepare(problem):
        prepared = good.prepare(problem)
        if problem.setting.case.num_items < 3000:
            return prepared
        weights = [leaf.detach().clone() for leaf in prepared.leaves]

        def call():
            prepared.call()
            with torch.no_grad():
                for leaf, before in zip(prepared.leaves, weights, strict=True):
                    leaf.copy_(before)

        return dataclasses.replace(prepared, call=call)

    idle = dataclasses.replace(good, name="cprec-overflow", prepare=prepare)
    setting = Setting(op.name, Case("3k-d32-t64", 3000, 32, 64), "step")
    rows = run_setting(op, setting, [idle, op.provider("torch-fused-adam")], FAST, fake_roofs(), HERE)
    assert "loss_after at full size differs from that of torch-fused-adam" in rows[0].error
