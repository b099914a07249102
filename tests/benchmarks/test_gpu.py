"""``python -m benchmarks.gpu`` without a GPU: its stages on the CPU, and what becomes of failing ones."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from benchmarks import gpu, gpu_gate, gpu_sanitized, gpu_stages
from benchmarks.gpu import describe, main, read_rows
from benchmarks.gpu_floors import Rates, floor_ms, kernel_rows, level_logits
from benchmarks.gpu_tuning import read_tiles
from cprec_kernels import Partition, get_backend, use_backend

TINY_INPUTS = gpu_gate.Inputs.of(gpu_stages.TINY.partition, gpu_stages.TINY.tokens, torch.float32, "cpu")


def call(capsys, *arguments, expect=0):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert int(stop.value.code or 0) == expect, f"{out}\n{err}"
    return out, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_said_in_one_line(tmp_path, capsys):
    _, err = call(capsys, "--out", tmp_path / "run", expect=2)
    assert "there is no CUDA device here" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    _, err = call(capsys, "--out", tmp_path, "--stage", "everything", expect=2)
    assert "there are check, bench, tune, all" in err


@pytest.mark.parametrize("stage", [stage for stage in gpu_stages.STAGES if stage != "execution"])
def test_stages_run_and_leave_rows(stage, tmp_path):
    path = tmp_path / "rows.json"
    gpu_stages.run_stage(stage, path, "cpu", (gpu_stages.TINY,))
    rows = read_rows(path)
    assert rows
    assert all(isinstance(describe(row), str) for row in rows)
    assert not [row for row in rows if row.get("correct") is False or "error" in row]
    if stage == "bench":
        named = {row["provider"] for row in rows if row["op"] == "clustered_cross_entropy fwd+bwd"}
        assert {"torch-adaptive", "torch-linear"} <= named
    if stage == "check":
        assert {row["op"] for row in rows} == set(gpu_stages.OPERATIONS)
        assert all("triton" in row["skipped"] for row in rows if row["backend"] == "triton")
        assert all(row["repeats"] for row in rows if "skipped" not in row)


def test_tiles_that_won_are_told_from_the_tables(tmp_path):
    assert read_tiles(tmp_path) == []
    table = {"block_t": 128, "block_v": 64, "num_warps": 4, "num_stages": 3, "blocks_per_sm": 3, "transposed": False}
    key = {"device": "a GPU", "triton": "3.9.0", "kernel": "weight", "rank": 16, "dtype": "bf16"}
    winners = [{"key": key, "tile": table | change} for change in ({}, {"num_warps": 8})]
    (tmp_path / "triton-tiles.json").write_text(json.dumps({"format": 1, "winners": winners}))
    kept, other = ({"kind": "tile", **row} for row in read_tiles(tmp_path))
    assert describe(kept) == "weight rank 16 bf16: the table's tile"
    assert "'num_warps': 8" in describe(other)


def test_a_wrong_result_is_found(tmp_path, monkeypatch):
    right = gpu_stages.embed

    def wrong(size, dtype, device):
        found = right(size, dtype, device)
        if get_backend() == "native":
            found["output"][0, 0] += 1
        return found

    monkeypatch.setattr(gpu_stages, "OPERATIONS", {"block_embedding": wrong})
    monkeypatch.setattr(gpu_stages, "BACKENDS", ("native", "reference"))
    gpu_stages.run_stage("check", tmp_path / "rows.json", "cpu", (gpu_stages.TINY,))
    verdicts = {row["backend"]: row["correct"] for row in read_rows(tmp_path / "rows.json") if "correct" in row}
    assert verdicts == {"native": False, "reference": True}


def test_wrong_items_with_right_scores_are_found(monkeypatch):
    right = gpu_stages.functional.clustered_topk

    def wrong(*arguments, **options):
        scores, items = right(*arguments, **options)
        return scores, items.zero_() if get_backend() == "native" else items

    monkeypatch.setattr(gpu_stages.functional, "clustered_topk", wrong)
    monkeypatch.setattr(gpu_stages, "OPERATIONS", {"clustered_topk": gpu_stages.topk})
    rows = []
    gpu_stages.check("cpu", (gpu_stages.TINY,), rows.append)
    verdicts = [(row["backend"], row["correct"]) for row in rows if "correct" in row]
    assert verdicts == [("native", False), ("reference", True)] * (len(verdicts) // 2)


GATED = {op for op, name, _ in gpu_stages._providers(TINY_INPUTS, "cpu") if name == "native"}


def results_of(op, given=TINY_INPUTS):
    with use_backend("native"):
        (make,) = (m for o, name, m in gpu_stages._providers(given, "cpu") if (o, name) == (op, "native"))
        return make()()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", sorted(GATED))
def test_what_is_timed_passes_the_gate(op, dtype):
    size = gpu_stages.TINY
    given = gpu_gate.Inputs.of(size.partition, size.tokens, dtype, "cpu")
    assert gpu_gate.problem(op, given, results_of(op, given)) == ""


def test_everything_that_is_timed_has_a_judge():
    assert set(gpu_gate.JUDGES) == GATED


LOSS = "clustered_cross_entropy fwd+bwd"
PLANTED = [  # op, which of its results, what is done to it, what is said
    ("block_embedding fwd", 0, lambda t: t[-1].mul_(1.01), "result 0: error"),
    ("block_embedding fwd+bwd", 1, lambda t: t[0].add_(0.1), "result 1: error"),
    ("block_embedding fwd+bwd", -1, lambda t: t.mul_(1.01), "result 4: error"),
    (LOSS, 0, lambda t: t[-1].mul_(1.01), "result 0: error"),
    (LOSS, 0, lambda t: t[41].zero_(), "do not fit the input's"),
    (LOSS, 1, lambda t: t.mul_(1.01), "do not fit the input's"),
    (LOSS, 2, lambda t: t[7].zero_(), "the rows of d_weight1 do not sum to zero"),
    (LOSS, 3, lambda t: t.mul_(1.01), "level 2's weights and projection do not fit"),
    (LOSS, 3, lambda t: t.copy_(t.flip(0)), "level 2's weights and projection do not fit"),
    (LOSS, -1, lambda t: t.zero_(), "level 2's weights and projection do not fit"),
    (LOSS, -1, lambda t: t.add_(torch.randn_like(t) * 0.01 * t.std()), "do not fit"),
    *[(LOSS, i, lambda t: t[0, 0].fill_(torch.nan), f"gradient {i} is not finite") for i in range(6)],
    *[(LOSS, i, lambda t: t[-1, -1].fill_(torch.inf), f"gradient {i} is not finite") for i in range(6)],
    ("clustered_topk", 0, lambda t: t[-1].add_(0.01), "result 0: error"),
    ("clustered_topk", 1, lambda t: t[0, 9].copy_(t[0, 0]), "an item twice in a row"),
    ("clustered_topk", 1, lambda t: t[-1, 9].fill_(600), "items out of range"),
    ("clustered_topk", 1, lambda t: t.copy_(torch.arange(10).expand_as(t)), "result 1: error"),
    ("clustered_rank", 0, lambda t: t[0].add_(1), "row 0: rank"),
    ("clustered_rank", 0, lambda t: t[-1].sub_(1), "row 89: rank"),
    ("clustered_score", 0, lambda t: t[-1, 2].add_(0.01), "result 0: error"),
]


@pytest.mark.parametrize(("op", "place", "harm", "said"), PLANTED)
def test_the_gate_finds_what_is_wrong(op, place, harm, said):
    results = results_of(op)
    with torch.no_grad():
        harm((results if isinstance(results, tuple) else [results])[place])
    assert said in gpu_gate.problem(op, TINY_INPUTS, results)


def test_the_gate_counts_results():
    assert "5 gradients, expected 6" in gpu_gate.problem(LOSS, TINY_INPUTS, results_of(LOSS)[:-1])
    gradients = results_of("block_embedding fwd+bwd")
    assert "4 results, expected 5" in gpu_gate.problem("block_embedding fwd+bwd", TINY_INPUTS, gradients[:-1])


def test_a_gate_without_memory_costs_no_time(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_stages, "problem", full)
    rows = []
    gpu_stages.bench("cpu", (gpu_stages.TINY,), rows.append)
    ours = [row for row in rows if row["provider"] == "native"]
    assert ours
    assert all("median_ms" in row and "not compared with fp64" in describe(row) for row in ours)


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    right = gpu_stages.functional.clustered_score

    def wrong(*arguments, **options):
        scores = right(*arguments, **options)
        return scores + 1 if get_backend() == "native" else scores

    monkeypatch.setattr(gpu_stages.functional, "clustered_score", wrong)
    gpu_stages.run_stage("bench", tmp_path / "rows.json", "cpu", (gpu_stages.TINY,))
    rows = [row for row in read_rows(tmp_path / "rows.json") if row["provider"] == "native"]
    for row in rows:
        bad = row["op"] == "clustered_score"
        assert gpu.is_bad(row) == bad
        assert ("median_ms" in row) != bad
        assert describe(row).startswith("WRONG clustered_score tiny") == bad
    assert sum(map(gpu.is_bad, rows)) == 2


def test_a_failing_stage_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    done = []

    def child(stage, path, timeout_s):
        done.append(stage)
        if stage == "check":
            path.write_text(json.dumps({"stage": stage, "rows": [{"kind": "copy", "gb_per_s": 1.0}]}))
            return "CUDA error: device-side assert"
        return ""

    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_in_child", child)
    out, _ = call(capsys, "--out", tmp_path, expect=1)
    assert done == list(gpu_stages.STAGES)
    assert "check: 1 rows, 0 bad; the stage failed: CUDA error" in out


@pytest.mark.parametrize(("status", "correct"), [(0, True), (1, False)])
def test_the_execution_stage_tells_what_its_commands_said(status, correct, tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, status, "3 passed\n", "")

    monkeypatch.setattr(gpu_stages.subprocess, "run", run)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None if name == "compute-sanitizer" else name)
    gpu_stages.run_stage("execution", tmp_path / "rows.json", "cpu", ())
    tests, *sanitized = read_rows(tmp_path / "rows.json")
    assert tests["correct"] is correct
    assert "3 passed" in describe(tests)
    assert gpu.is_bad(tests) is not correct
    assert [row["skipped"] for row in sanitized] == ["compute-sanitizer is not installed"] * 2
    assert [command[-1] for command in asked] == ["tests/gpu"]


def test_what_the_sanitizer_watches_runs_every_op():
    gpu_sanitized.main("cpu")


def test_floors_by_hand():
    partition = Partition(1_000, [100, 300], [64, 32, 4], 64)
    targets = [5, 150, 150, 999]
    assert level_logits(partition, targets) == [4 * 102, 2 * 200, 700]
    rates = Rates(flops=1e9, exps=1e8)
    # Two products of 64 columns: 2 * 2 * 64 FLOPs per logit outweigh its exponential; of 4, padded to 16, they do too.
    scan = "clustered_softmax_scan_kernel"
    assert floor_ms(scan, 64, 408, rates) == pytest.approx(1e3 * 408 * 256 / 1e9)
    assert floor_ms(scan, 4, 700, rates) == pytest.approx(1e3 * 700 * 64 / 1e9)
    assert floor_ms(scan, 4, 700, Rates(1e12, 1e8)) == pytest.approx(1e3 * 700 / 1e8)
    rows = kernel_rows([(scan, 1.0), ("copy", 2.0), (scan, 1.0), (scan, 1.0)], partition, targets, rates)
    assert [row["launch"] for row in rows] == [0, 0, 1, 2]
    assert "over_floor" not in rows[1]
    assert rows[0]["over_floor"] == pytest.approx(1.0 / rows[0]["floor_ms"])
    assert all("over_floor" not in row for row in kernel_rows([(scan, 1.0)], partition, targets, None))
    assert Rates.from_rows([{"kind": "copy", "gb_per_s": 1.0}]) is None
    measured = [{"kind": "bf16 product", "tflops": 800.0}, {"kind": "exp2", "g_per_s": 3_700.0}]
    assert Rates.from_rows(measured) == Rates(8e14, 3.7e12)


def test_a_child_that_takes_too_long_or_dies_is_told(tmp_path):
    assert "stopped after" in gpu.run_in_child("machine", tmp_path / "a.json", 0.01)
    assert "KeyError" in gpu.run_in_child("nothing", tmp_path / "a.json", 120)
