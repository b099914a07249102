"""Searches in the harness: the packed index and its approximations, PQTopK, and the place of a target."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.ops import bench_clustered_rank, pqtopk
from benchmarks.ops.bench_clustered_topk import Problem, agreement, judge_agreement, search_work
from benchmarks.registry import Provider, Setting, choose_providers, get_op
from benchmarks.report import losses, summary
from benchmarks.results import Row
from benchmarks.roofline import Roof, Roofs
from benchmarks.run import Options, Provenance, run_setting
from cprec_kernels import available_cpu_isas

pytestmark = pytest.mark.skipif(not available_cpu_isas(), reason="this package was built without native kernels")

FAST = Options(min_rounds=1, budget_s=0.0, peak=False)
HERE = Provenance("a processor", {"torch": "2"}, "abc", "2000-01-01")
# 4000 items, searched for the gate as 2000: what is wrong in one of the two only is seen as well.
CASE = Case.parse("4k-d32-b8")


def run(op_name: str, providers: list[Provider], case: Case = CASE) -> dict[str, Row]:
    op = get_op(op_name)
    roofs = Roofs(measure=lambda isa, threads, quick: Roof(isa, threads, 100.0, 200.0, 10.0, ((1 << 24, 20.0),)))
    return {row.provider: row for row in run_setting(op, Setting(op_name, case, "fwd"), providers, FAST, roofs, HERE)}


def indexes() -> list[Provider]:
    return [provider for provider in get_op("clustered_topk").providers if provider.name.startswith("cprec-index")]


# The index


def test_every_index_is_measured_and_says_how_much_it_met(plain_index):
    rows = run("clustered_topk", [*indexes(), get_op("clustered_topk").provider("torch-adaptive")])
    names = ("float32", "float32-full", "float16", "float16-full", "bfloat16", "int8", "int8-approx")
    assert list(rows)[:-1] == [f"cprec-index-{name}" for name in names]
    for row in rows.values():
        assert row.correct is True, f"{row.provider}: {row.error}"
        assert row.median_ms > 0
    assert rows["cprec-index-float32"].note == "meets 50.0% of the items"
    assert rows["cprec-index-float16-full"].note == "meets 100.0% of the items"
    share = rows["cprec-index-int8-approx"].note.removeprefix("meets 50.0% of the items; ")
    assert share.endswith("% of ids agree")
    assert 90 <= float(share.partition("%")[0]) < 100
    assert rows["cprec-index-int8"].bytes < rows["cprec-index-float16"].bytes < rows["cprec-index-float32"].bytes


def test_without_an_index_its_providers_say_so(monkeypatch):
    monkeypatch.setattr("benchmarks.ops.bench_clustered_topk.missing_kernels", lambda op: f"{op} has no native kernel")
    for row in run("clustered_topk", indexes()).values():
        assert row.error == "skipped: topk_index has no native kernel"
        assert row.correct is None
        assert row.median_ms is None


def planted(monkeypatch, index, change, least_items=0):
    """Indexes over at least so many items give results that went through ``change`` (scores, items)."""
    right = index.topk

    def wrong(self, input, k, **options):
        found = right(self, input, k, **options)
        if self.partition.num_items < least_items:
            return found
        changed = type(found)(change(*found))
        changed.counters = found.counters
        return changed

    monkeypatch.setattr(index, "topk", wrong)


def next_items(scores, items):
    return scores, (items + 1) % 2000


def late_scores(scores, items):
    return scores + 0.1, items


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("float32", next_items, "expected"),
        ("float16", next_items, "expected"),
        ("int8-approx", next_items, "of ids agree with the exact ones, fewer than 90%"),
        ("float32", late_scores, "scores are off by more than"),
        ("float16", late_scores, "float16 rounds by 4.9e-04"),
        ("int8-approx", late_scores, "int8 rounds by 3.9e-03"),
    ],
)
def test_a_wrong_index_gets_no_time(plain_index, monkeypatch, name, change, message):
    planted(monkeypatch, plain_index, change)
    row = run("clustered_topk", [get_op("clustered_topk").provider(f"cprec-index-{name}")])[f"cprec-index-{name}"]
    assert row.correct is False
    assert message in row.error
    assert "failed:" not in row.error
    assert row.median_ms is None


@pytest.mark.parametrize(("name", "message"), [("float16", "scores at full size"), ("int8-approx", "of ids agree")])
def test_an_index_that_is_wrong_at_full_size_only_gets_no_time(plain_index, monkeypatch, name, message):
    planted(monkeypatch, plain_index, next_items, least_items=CASE.num_items)
    op = get_op("clustered_topk")
    rows = run(op.name, choose_providers(op, [f"cprec-index-{name}", "torch-adaptive"]))
    assert rows[f"cprec-index-{name}"].correct is False
    assert message in rows[f"cprec-index-{name}"].error
    assert rows["torch-adaptive"].correct is True


def test_agreement_counts_ids_wherever_they_stand():
    best = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert agreement(torch.tensor([[4, 3, 2, 1], [5, 6, 7, 9]]), best) == 7 / 8
    assert judge_agreement(0.9756) == "97.5% of ids agree"
    assert judge_agreement(0.99999) == "99.9% of ids agree"
    assert judge_agreement(1.0) == "100.0% of ids agree"
    with pytest.raises(AssertionError, match=r"only 87\.5% of ids"):
        judge_agreement(7 / 8)


def test_narrow_weights_count_for_fewer_bytes():
    problem = Problem(Setting("clustered_topk", CASE, "fwd"))
    partition = problem.partition
    numbers = partition.head_size * 32 + sum(
        s * r for s, r in zip(partition.sizes[1:], partition.ranks[1:], strict=True)
    )
    wide, narrow = (search_work(True, False, size)(problem) for size in (4, 1))
    assert wide.bytes - narrow.bytes == 3 * numbers
    assert (wide.flops, wide.exps) == (narrow.flops, narrow.exps)


def test_an_approximate_row_is_never_our_fastest():
    def row(provider, median_ms):
        return Row(
            op="clustered_topk", case="1m-d128-b1", provider=provider, mode="fwd", targets="zipf", device="cpu",
            dtype="float32", isa="avx2", threads=1, machine="m", versions={}, commit="", date="", baseline="torch",
            median_ms=median_ms, p20_ms=median_ms, p80_ms=median_ms,
        )  # fmt: skip

    rows = [row("cprec-index-int8-approx", 1.0), row("cprec-index-int8", 3.0), row("torch", 2.0)]
    assert "| cprec-index-int8 | 3.00 |" in summary(rows)
    setting = "clustered_topk 1m-d128-b1, fwd, zipf, float32, 1 thread, machine A"
    assert losses(rows) == f"- {setting}: torch takes 2.00 ms, cprec-index-int8 3.00 ms"


# PQTopK


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", pqtopk.WAYS)
def test_every_way_of_pqtopk_finds_the_best_sums(name, rows):
    case = dataclasses.replace(CASE, tokens=rows, num_items=500)
    problem = Problem(Setting("clustered_topk", case, "fwd"))
    codes, table = pqtopk.draw_codes(case), pqtopk.draw_sub_embeddings(case).double()
    assert codes.shape == (500, 8)
    assert table.shape == (8, 256, 4)
    # The definition, item by item: code c of sub-id j is numbered j b + c.
    pieces = problem.hidden.double().view(rows, 8, 4)
    expected = torch.stack(
        [sum(pieces[:, j] @ table[j, int(codes[item, j]) - 256 * j] for j in range(8)) for item in range(500)], dim=1
    )
    torch.testing.assert_close(pqtopk.all_scores(problem, torch.float64), expected)
    way, by_column = pqtopk.WAYS[name]
    laid = pqtopk.in_layout(codes, by_column)
    for chunk in (7, 128, 500):  # fewer than k items in the last chunk, and in every chunk
        scores, items = pqtopk.search(problem.hidden, table.float(), laid, 10, way, chunk)
        best = expected.topk(10, dim=1)
        assert torch.equal(items, best.indices)
        torch.testing.assert_close(scores.double(), best.values, rtol=1e-5, atol=1e-6)


def test_pqtopk_needs_a_width_that_divides_and_says_what_it_chose():
    provider = get_op("clustered_topk").provider("pqtopk")
    rows = run("clustered_topk", [provider], Case.parse("1k-d20-b2"))
    assert rows["pqtopk"].error == "skipped: width 20 does not divide into 8 sub-embeddings"
    row = run("clustered_topk", [provider])["pqtopk"]
    assert row.correct is True, row.error
    assert row.note.startswith("8 codes of 256, by ")
    work = pqtopk.work(Problem(Setting("clustered_topk", CASE, "fwd")))
    assert work.flops == 2 * 256 * 32 * 8 + 8 * 4000 * 8
    assert work.exps == 0


# The place of a target


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_rank_is_held_to_the_items_that_do_not_tie(shift):
    op = get_op("clustered_rank")
    good = op.provider("reference")

    def prepare(problem):
        prepared = good.prepare(problem)
        return dataclasses.replace(prepared, results=lambda: {"rank": prepared.results()["rank"] + shift})

    wrong = dataclasses.replace(good, name="cprec-wrong", prepare=prepare)
    rows = run(op.name, [good, wrong])
    assert rows["reference"].correct is True
    assert rows["cprec-wrong"].error.startswith("row 0: rank ")


def test_ties_count_by_id_and_either_way_within_the_band():
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.9, 0.1]], dtype=torch.float64)
    exact = {"all": scores, "target": torch.tensor([1])}
    for rank in (1, 2, 3):
        bench_clustered_rank.compare({"rank": torch.tensor([rank])}, exact, exact, torch.float32, 1.0)
    for rank in (0, 4):
        with pytest.raises(AssertionError, match=rf"row 0: rank {rank}, expected 1\.\.3"):
            bench_clustered_rank.compare({"rank": torch.tensor([rank])}, exact, exact, torch.float32, 1.0)
    with pytest.raises(AssertionError, match="ranks are"):
        bench_clustered_rank.compare({"rank": torch.tensor([1.0])}, exact, exact, torch.float32, 1.0)


def test_the_ranks_of_the_baseline_are_those_of_the_reference():
    op = get_op("clustered_rank")
    problem = op.problem(Setting(op.name, CASE, "fwd"))
    found = []
    for name in ("reference", "torch-adaptive-compare"):
        provider = op.provider(name)
        prepared = provider.prepare(problem)
        with provider.scope():
            prepared.call()
        found.append(prepared.results()["rank"])
    assert (found[0] - found[1]).abs().max() <= 1
    assert found[0].dtype == found[1].dtype == torch.int64
