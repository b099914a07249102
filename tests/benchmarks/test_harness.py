"""The benchmark harness: what the gate catches, what is skipped, how rounds interleave, what the models count."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import platform

import pytest
import torch

from benchmarks import machine, memory, timing, verify
from benchmarks.cases import Case, draw_items, tokens_per_cluster
from benchmarks.errors import BenchmarkError
from benchmarks.ops.bench_block_embedding import AdaptiveInput, adaptive_input
from benchmarks.ops.bench_clustered_softmax import make_work
from benchmarks.registry import OPS, Prepared, Setting, Work, choose_providers, get_op
from benchmarks.results import Run, read_run, write_run
from benchmarks.roofline import Roof, Roofs
from benchmarks.run import Options, Provenance, memory_refusals, run_setting
from cprec_kernels import available_cpu_isas, functional
from cprec_kernels.testing import make_embedding
from cprec_kernels.testing import roofline as probes

pytestmark = pytest.mark.skipif(not available_cpu_isas(), reason="this package was built without native kernels")

FAST = Options(min_rounds=2, budget_s=0.0, peak=False, quick_roofs=True)
HERE = Provenance("a processor", {"torch": "2"}, "abc", "2000-01-01")
OF_ROWS = ("clustered_topk", "clustered_rank", "residual_stack")
TINY = {name: Case.parse("tiny-d32-b8" if name in OF_ROWS else "tiny-d32-t64") for name in OPS}
FAKE_ROOF = Roof("avx2", 1, 100.0, 200.0, 10.0, ((1 << 20, 50.0), (1 << 24, 20.0)))


def fake_roofs():
    return Roofs(measure=lambda isa, threads, quick: dataclasses.replace(FAKE_ROOF, isa=isa, threads=threads))


def setting_of(name, **values):
    return Setting(name, TINY[name], get_op(name).modes[0], **values)


def run_tiny(op, providers, **values):
    return {
        row.provider: row for row in run_setting(op, setting_of(op.name, **values), providers, FAST, fake_roofs(), HERE)
    }


def may_be_skipped(provider, op, dtype):
    """All but ours, which are there unless the processor lacks the instructions, or the op the dtype."""
    isas = {word for word in provider.split("-") if word.startswith("avx")}
    has_kernel = op not in ("residual_stack", "conv_norm_relu") or dtype == "float32"
    return not provider.startswith("cprec-") or not has_kernel or not isas <= set(available_cpu_isas())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["zipf", "uniform"])
@pytest.mark.parametrize("name", OPS)
def test_every_provider_that_runs_here_passes_its_gate(name, targets, dtype):
    op = get_op(name)
    providers = [provider for provider in choose_providers(op, (), dtype) if provider.name != "cut-cross-entropy"]
    rows = run_tiny(op, providers, targets=targets, dtype=dtype)
    assert list(rows) == [provider.name for provider in providers]
    for row in rows.values():
        if row.error.startswith("skipped: "):
            assert may_be_skipped(row.provider, name, dtype), row.error
            assert row.correct is None
            assert row.median_ms is None
        elif row.provider == "torch-adaptive" and dtype == "bfloat16":
            # nn.AdaptiveLogSoftmaxWithLoss mixes dtypes under autocast; the row has to say so and the run to go on.
            assert row.correct is not None
        else:
            assert row.correct is True, f"{row.provider}: {row.error}"
            assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
            assert row.rounds == 2
            assert row.roofline_fraction > 0
            assert row.ratio_to_baseline > 0
            assert row.bytes > 0
    timed = [row for row in rows.values() if row.provider == row.baseline and row.median_ms is not None]
    assert timed, "no baseline was timed"
    assert all(row.ratio_to_baseline == 1.0 for row in timed)


@pytest.mark.parametrize("name", ["clustered_softmax", "block_embedding"])
def test_forward_alone_is_measured_too(name):
    op = get_op(name)
    setting = dataclasses.replace(setting_of(name), mode="fwd")
    for row in run_setting(op, setting, choose_providers(op, ["reference", op.baseline]), FAST, fake_roofs(), HERE):
        assert row.correct is True, row.error


def planted(provider, name, change):
    """A provider whose results pass through ``change``."""

    def prepare(problem):
        prepared = provider.prepare(problem)
        return dataclasses.replace(
            prepared,
            results=lambda: change(prepared.results()),
            summary=lambda: {
                key: value for key, value in change(prepared.results()).items() if key in prepared.summary()
            },
        )

    return dataclasses.replace(provider, name=name, prepare=prepare)


def scaled(key, factor):
    return lambda results: results | {key: results[key] * factor}


@pytest.mark.parametrize("key", ["loss", "d_input", "d_weights[2]", "d_projections[0]"])
def test_a_wrong_output_gets_no_time(key):
    op = get_op("clustered_softmax")
    good, peer = op.provider("reference"), op.provider("torch-adaptive")
    wrong = [planted(good, "cprec-wrong", scaled(key, 1 + 3e-5)), planted(peer, "peer-wrong", scaled(key, 1 + 1e-3))]
    rows = run_tiny(op, [good, *wrong])
    assert rows["reference"].correct is True
    for name in ("cprec-wrong", "peer-wrong"):
        assert rows[name].correct is False
        assert key in rows[name].error
        assert rows[name].median_ms is None


def test_what_is_missing_not_finite_or_raises_is_wrong():
    op = get_op("clustered_softmax")
    good = op.provider("torch-adaptive")

    def boom(problem):
        raise RuntimeError("out of luck\nsecond line")

    rows = run_tiny(
        op,
        [
            planted(good, "without", lambda results: {"loss": results["loss"]}),
            planted(good, "nan", scaled("loss", math.nan)),
            dataclasses.replace(good, name="boom", prepare=boom),
            good,
        ],
    )
    assert "outputs missing: ['d_input'" in rows["without"].error
    assert rows["nan"].error == "loss is not finite"
    assert rows["boom"].error == "failed: RuntimeError: out of luck"
    assert rows["torch-adaptive"].correct is True


def test_a_peer_may_be_less_exact_but_its_row_says_so():
    op = get_op("clustered_softmax")
    peer = planted(op.provider("torch-adaptive"), "rough", scaled("d_input", 1 + 3e-6))
    rows = run_tiny(op, [peer])
    assert rows["rough"].correct is True
    assert rows["rough"].note.startswith("less exact than our rule: d_input")


def test_disagreements_compare_within_a_formula_only():
    one, two = {"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)}
    formulas, dtypes = {"a": "x", "b": "y"}, {"a": "float32", "b": "float32"}
    assert verify.disagreements({"a": one, "b": two}, formulas, dtypes, ["a", "b"]) == {}
    assert set(verify.disagreements({"a": one, "b": two}, formulas | {"b": "x"}, dtypes, ["a", "b"])) == {"b"}


def test_missing_packages_and_memory_are_skipped_by_name(monkeypatch):
    op = get_op("clustered_topk")
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    rows = run_tiny(op, choose_providers(op, ["faiss-flat-ip", "torch-adaptive"]))
    assert rows["faiss-flat-ip"].error.startswith("skipped: faiss-cpu is not importable")
    assert rows["faiss-flat-ip"].correct is None
    assert rows["torch-adaptive"].correct is True

    softmax = get_op("clustered_softmax")
    setting = Setting("clustered_softmax", Case.parse("10m-d128-t4096"), "fwd_bwd")
    chosen = choose_providers(softmax, ["cprec-avx2", "torch-adaptive", "torch-linear-ce"])
    refused = memory_refusals(softmax, setting, chosen, 24 * 10**9)
    assert set(refused) == {"torch-adaptive", "torch-linear-ce"}
    assert refused["torch-linear-ce"].startswith("skipped: needs 5")
    assert "GB, 24.0 GB are free" in refused["torch-linear-ce"]


def test_rounds_are_interleaved_and_gradients_dropped_outside_the_timed_part():
    log, now = [], [0.0]

    def provider(name, cost_s):
        leaf = torch.zeros(2, requires_grad=True)

        def call():
            assert leaf.grad is None
            log.append(name)
            now[0] += cost_s
            leaf.grad = torch.ones(2)

        @contextlib.contextmanager
        def scope():
            now[0] += 100.0  # choosing an instruction set is not timed
            yield

        base = get_op("clustered_softmax").provider("reference")
        prepared = Prepared(call, [leaf], dict, dict)
        return dataclasses.replace(base, name=name, scope=scope), prepared

    runnable = {name: provider(name, cost) for name, cost in (("a", 0.001), ("b", 0.002), ("c", 0.004))}
    found = timing.time_interleaved(runnable, 3, 0.0, clock=lambda: now[0])
    assert [sorted(log[first : first + 3]) for first in (0, 3, 6)] == [["a", "b", "c"]] * 3
    assert [round(found[name].median_ms, 6) for name in "abc"] == [1.0, 2.0, 4.0]
    assert all(prepared.leaves[0].grad is None for _, prepared in runnable.values())
    log.clear()
    found = timing.time_interleaved(runnable, 1, 0.018, clock=lambda: now[0])
    assert [found[name].rounds for name in "abc"] == [6, 3, 1]  # 6 ms each


def test_a_slow_spell_meets_all_providers_alike():
    """A busy machine for most of the time: a slow provider with few calls must not have them all in there, a fast one few."""
    now, end = [0.0], [1e9]
    base = get_op("clustered_softmax").provider("reference")

    def provider(name, cost_s):
        def call():
            now[0] += cost_s * (2.0 if now[0] < end[0] else 1.0)

        return dataclasses.replace(base, name=name, scope=contextlib.nullcontext), Prepared(call, [], dict, dict)

    runnable = {name: provider(name, cost) for name, cost in (("slow", 1.0), ("fast", 0.1))}
    end[0] = 0.0
    quiet = timing.time_interleaved(runnable, 5, 8.0, clock=lambda: now[0])
    assert [quiet[name].rounds for name in ("slow", "fast")] == [5, 40]
    now[0], end[0] = 0.0, 12.0  # of some 15 s with the spell
    found = timing.time_interleaved(runnable, 5, 16.0, clock=lambda: now[0])
    assert found["slow"].median_ms / found["fast"].median_ms == pytest.approx(10.0)


def test_no_provider_always_follows_the_same_one():
    orders = [timing.order_of_round(["a", "b", "c"], index) for index in range(600)]
    assert orders == [timing.order_of_round(["a", "b", "c"], index) for index in range(600)]
    before = collections.Counter(one + other for order in orders for one, other in itertools.pairwise(order))
    assert len(before) == 6
    assert all(150 < count < 250 for count in before.values())
    assert timing.order_of_round([], 3) == []


def test_percentiles_keep_outliers():
    found = timing.summarise([1.0, 2.0, 3.0, 4.0, 5.0, 1000.0])
    assert (found.p20_ms, found.median_ms, found.p80_ms, found.rounds) == (2.0, 3.5, 5.0, 6)
    assert timing.summarise([7.0]) == timing.Timing(7.0, 7.0, 7.0, 1)


def test_cases_are_what_their_names_say():
    case = Case.parse("1m-d128-t512")
    assert (case.num_items, case.width, case.tokens) == (1_000_000, 128, 512)
    assert case.partition.cutoffs == (20_000, 200_000)
    assert case.partition.ranks == (128, 32, 8)
    assert Case.parse("10m-d64-b1").tokens == 1
    assert Case.parse("1m-d128-t512").scaled_down().num_items == 20_000
    assert Case.parse("tiny-d32-t64").scaled_down().num_items == 1_000
    # Without a width it is 128, and results are called by the whole name: one setting, whichever was typed.
    assert Case.parse("1m-b1") == Case.parse("1m-d128-b1")
    assert (Case.parse("100k-b32").name, Case.parse("tiny-t64").name) == ("100k-d128-b32", "tiny-d128-t64")
    for wrong in (
        "1m",
        "1m-d128",
        "1m-d-b1",
        "1m-128-b1",
        "1m-b",
        "1g-d128-t512",
        "1m-d8-t5",
        "50-d64-t5",
        "1m-d128-t0",
    ):
        with pytest.raises(BenchmarkError, match="case"):
            Case.parse(wrong)


def test_targets_follow_their_law():
    items = draw_items(1000, 20_000, "zipf", 0)
    harmonic = sum(1 / (i + 1) for i in range(1000))
    assert abs(float((items == 0).double().mean()) - 1 / harmonic) < 0.01
    counts = tokens_per_cluster(Case.parse("tiny-d32-t64").partition, torch.tensor([0, 19, 20, 199, 200, 999]))
    assert counts == [2, 2, 2]
    uniform = draw_items(1000, 20_000, "uniform", 0)
    assert 0.45 < float((uniform < 500).double().mean()) < 0.55


def test_the_model_of_work_counts_products_and_exponentials():
    levels = [(100, 16, 8), (50, 4, 2)]
    assert make_work(levels[:1], 16, "recompute", False) == Work(2 * 100 * 16 * 8, 800, 4.0 * (1600 + 8 * 16))
    forward = make_work(levels, 16, "recompute", False)
    assert forward.flops == 2 * 100 * 16 * 8 + 2 * 50 * 4 * 2 + 2 * 4 * 16 * 2
    backward = make_work(levels, 16, "recompute", True)
    assert backward.flops == 4 * (2 * 100 * 16 * 8 + 2 * 50 * 4 * 2) + 3 * 2 * 4 * 16 * 2
    assert backward.exps == 2 * forward.exps == 2 * 900
    stored = make_work(levels, 16, "stored", True)
    assert stored.bytes - backward.bytes == 4 * 7 * 900
    assert stored.flops < backward.flops


def test_least_time_is_the_larger_of_compute_and_memory():
    assert FAKE_ROOF.least_ms(Work(1e9, 1e8, 0), "float32") == pytest.approx(10 + 10)
    assert FAKE_ROOF.least_ms(Work(1e6, 0, 5e5), "float32") == pytest.approx(0.01)
    assert FAKE_ROOF.least_ms(Work(0, 0, 2e9), "float32") == pytest.approx(
        100
    )  # beyond every measured set: the largest
    assert FAKE_ROOF.least_ms(Work(1e9, 1e8, 0), "bfloat16") == pytest.approx(5 + 10)
    assert Roof.from_dict(FAKE_ROOF.to_dict()) == FAKE_ROOF


def test_probes_measure_something():
    effort = {"trials": 1, "trial_s": 1e-4}
    assert probes.fma_gflops(**effort) > 0
    assert probes.bf16_gflops(**effort) > 0
    assert probes.exp_gexps(**effort) > 0
    assert probes.read_gbps(1 << 16, 2, **effort) > 0
    with pytest.raises(ValueError, match="too small"):
        probes.read_gbps(16)


def test_the_adaptive_input_of_the_peers_is_the_same_function():
    partition = Case.parse("tiny-d32-t64").partition
    tables, projections = make_embedding(partition)
    ids = torch.tensor([999, 0, 19, 20, 20, 199, 200])
    expected = functional.block_embedding(ids, tables, projections)
    torch.testing.assert_close(adaptive_input(ids, tables, projections, partition.cutoffs), expected)
    fairseq = AdaptiveInput(tables, projections, partition.cutoffs, sparse=False)
    torch.testing.assert_close(fairseq(ids), expected)
    fairseq(ids).sum().backward()
    assert fairseq.projections[0].grad.abs().sum() > 0, "the first cluster's projection has a gradient to be paid for"


def test_peak_memory_of_a_child_counts_the_call_alone():
    op = get_op("clustered_softmax")
    setting = Setting(op.name, Case.parse("20k-d64-t512"), "fwd_bwd")
    peak = memory.measure_in_child(setting, op.provider("torch-linear-ce"))
    logits_mb, table_mb = 20_000 * 512 * 4 / 1e6, 20_000 * 64 * 4 / 1e6
    assert peak.gradients_mb == pytest.approx(table_mb + 512 * 64 * 4 / 1e6)
    assert 2 * logits_mb < peak.peak_mb < 4 * logits_mb + 3 * table_mb
    with pytest.raises(RuntimeError, match="memory failed"):
        memory.measure_in_child(setting, dataclasses.replace(op.provider("reference"), name="no-such"))


def test_results_survive_a_round_trip_and_a_failed_write(tmp_path):
    op = get_op("clustered_topk")
    rows = list(run_tiny(op, choose_providers(op, ["torch-adaptive"])).values())
    path = tmp_path / "rows.json"
    write_run(path, Run([FAKE_ROOF.to_dict()], rows))
    before = path.read_bytes()
    assert read_run(path).rows == rows
    with pytest.raises(TypeError):
        write_run(path, Run([{"not": object()}], rows))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]
    path.write_text('{"schema": 99}')
    with pytest.raises(BenchmarkError, match="was not written by"):
        read_run(path)


def test_a_processor_is_named_with_its_numbers(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD  EPYC\n\nprocessor\t: 1\nmodel\t: 9\n"
    )
    assert machine.processor(file) == "AMD EPYC (family 26, model 2)"
    file.write_text("model name: A CPU\n")
    assert machine.processor(file) == "A CPU"
    file.write_text("Hardware: a board\n")
    assert machine.processor(file) == machine.processor(tmp_path / "missing") == platform.machine()
