"""``python -m benchmarks.gpu`` without a GPU: its stages on the CPU, and what becomes of failing ones."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu, gpu_stages
from benchmarks.gpu import describe, main, read_rows
from cprec_kernels import get_backend


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
    assert "there are check, bench, all" in err


@pytest.mark.parametrize("stage", gpu_stages.STAGES)
def test_stages_run_and_leave_rows(stage, tmp_path):
    path = tmp_path / "rows.json"
    gpu_stages.run_stage(stage, path, "cpu", (gpu_stages.TINY,))
    rows = read_rows(path)
    assert rows
    assert all(isinstance(describe(row), str) for row in rows)
    assert not [row for row in rows if row.get("correct") is False or "error" in row]
    if stage == "check":
        assert {row["op"] for row in rows} == set(gpu_stages.OPERATIONS)
        assert all("triton" in row["skipped"] for row in rows if row["backend"] == "triton")
        assert all(row["repeats"] for row in rows if "skipped" not in row)


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
    assert verdicts.get("native", False) is False
    assert verdicts["reference"]


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
    assert done == ["machine", "check", "bench"]
    assert "check: 1 rows, 0 bad; the stage failed: CUDA error" in out


def test_a_child_that_takes_too_long_or_dies_is_told(tmp_path):
    assert "stopped after" in gpu.run_in_child("machine", tmp_path / "a.json", 0.01)
    assert "KeyError" in gpu.run_in_child("nothing", tmp_path / "a.json", 120)
