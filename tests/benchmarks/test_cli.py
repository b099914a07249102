"""``python -m benchmarks``: runs, tables, plots, the generated page, and what wrong usage leads to."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.errors import BenchmarkError
from benchmarks.plots import plot
from benchmarks.report import losses, merge, roofs_table, scaling, summary, write_report
from benchmarks.results import Row, Run, fill_ratios, ratio_spread, read_run, write_run
from benchmarks.table import cells, main_baseline, markdown_table, number, remarks
from cprec_kernels import available_cpu_isas

pytestmark = pytest.mark.skipif(not available_cpu_isas(), reason="this package was built without native kernels")
ROOT = Path(__file__).parents[2]


def call(capfd, *arguments, expect=0):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert int(stop.value.code or 0) == expect, f"{out}\n{err}"
    return out, err


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.fixture
def result(tmp_path, capfd, monkeypatch):
    """A JSON file of one tiny run."""
    from benchmarks import roofline

    measured = roofline.measure
    monkeypatch.setattr(
        "benchmarks.run.Roofs", lambda quick: roofline.Roofs(measure=lambda i, t, q: measured(i, t, True))
    )
    path = tmp_path / "run.json"
    out, _ = call(
        capfd, "run", "--op", "clustered_softmax", "--case", "tiny-d32-t64", "--case", "2k-d32-t32", "--providers",
        "reference,torch-adaptive", "--no-memory", "--min-rounds", 1, "--budget-s", 0, "--json", path,
        "--plot", tmp_path / "run.png",
    )  # fmt: skip
    assert "speed-up over torch-adaptive" in out
    assert "2k-d32-t32" in out
    return path


def test_a_run_leaves_json_plot_and_table(result, tmp_path, capfd):
    values = json.loads(result.read_text())
    assert len(values["rows"]) == 4
    wanted = {
        "op", "case", "provider", "mode", "targets", "device", "dtype", "isa", "threads", "median_ms", "p20_ms", "p80_ms",
        "rounds", "peak_mb", "flops", "bytes", "roofline_fraction", "ratio_to_baseline", "correct", "error", "machine",
        "versions", "commit",
    }  # fmt: skip
    for row in values["rows"]:
        assert wanted <= set(row)
        assert row["correct"] is True
    assert {roof["threads"] for roof in values["roofs"]} == {1}
    assert {roof["machine"] for roof in values["roofs"]} == {values["rows"][0]["machine"]}
    assert png_size(tmp_path / "run.png")[0] > 1000
    out, _ = call(capfd, "table", result)
    assert out.count("baseline") == 2


def test_the_page_is_made_of_the_files_alone(result, tmp_path, capfd):
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    call(capfd, "report", result, "--out", page)
    text = page.read_text()
    rows = json.loads(result.read_text())["rows"]
    for row in rows:
        assert f"| {row['provider']} | {number(row['median_ms'])} |" in text
    assert rows[0]["machine"] in text
    image = page.parent / "images" / "performance-clustered-softmax-fwd-bwd-zipf-float32-1t.png"
    assert f"](images/{image.name})" in text
    assert png_size(image)[1] > 100
    call(capfd, "report", result, "--out", page)
    assert page.read_text() == text, "the same files must give the same page"


def row(provider, median_ms, **values):
    defaults = {
        "op": "clustered_softmax", "case": "1m-d128-t512", "mode": "fwd_bwd", "targets": "zipf", "device": "cpu",
        "dtype": "float32", "isa": "avx2", "threads": 1, "machine": "a processor", "versions": {"torch": "2"},
        "commit": "abc", "date": "2000-01-01", "baseline": "torch-adaptive",
    }  # fmt: skip
    times = {} if median_ms is None else {"median_ms": median_ms, "p20_ms": 0.9 * median_ms, "p80_ms": 1.2 * median_ms}
    return Row(provider=provider, **defaults | times | values)


def test_the_page_tells_where_we_lose_and_what_failed(tmp_path):
    rows = [
        row("cprec-avx2", 10.0, roofline_fraction=0.5, correct=True, rounds=3),
        row("torch-adaptive", 40.0, roofline_fraction=0.2, correct=True, rounds=3),
        row("torch-linear-ce", 5.0, roofline_fraction=0.9, correct=True, rounds=3),
        row("cprec-avx512", None, correct=False, error="loss: error 1 exceeds 0"),
        row("faiss-flat-ip", None, error="skipped: faiss-cpu is not importable"),
        row("cprec-avx2", 5.0, threads=2, roofline_fraction=0.5),
    ]
    source = tmp_path / "rows.json"
    write_run(source, Run([], rows))
    write_report([source], tmp_path / "performance.md", tmp_path / "images")
    text = (tmp_path / "performance.md").read_text()
    assert "torch-linear-ce takes 5.00 ms, cprec-avx2 10.0 ms" in text
    assert "| 4.00x |" in text
    assert "WRONG: loss: error 1 exceeds 0" in text
    assert "skipped: faiss-cpu is not importable" in text
    assert "| 2 | 2.00x |" in text  # one thread to two
    assert losses(rows[:2]) == "In no setting above."


def test_of_two_files_the_later_setting_counts_whole():
    old = Run([], [row("cprec-avx2", 9.0), row("torch-adaptive", 9.0)])
    new = Run([], [row("cprec-avx2", 3.0)])
    (kept,) = merge([old, new]).rows
    assert kept.median_ms == 3.0
    assert kept.ratio_to_baseline is None, "a ratio must not span two runs"


def test_the_page_says_which_machine_a_row_and_a_roof_are_of(tmp_path):
    def roof(isa, gflops, **machine):
        rates = {"fma_gflops": gflops, "bf16_gflops": 2.0, "exp_gexps": 3.0, "read_gbps": [[1 << 20, 4.0]]}
        return {"isa": isa, "threads": 1, **rates, **machine}

    slow = [row("cprec-avx2", 9.0, machine="slow one"), row("torch-adaptive", 18.0, machine="slow one")]
    fast = [row("cprec-avx2", 1.0, machine="fast one"), row("torch-adaptive", 0.5, machine="fast one")]
    runs = [
        Run([roof("avx2", 11.0)], slow),  # as older files have them: of the machine of the rows
        Run([roof("avx2", 22.0, machine="fast one")], fast),
        Run([roof("avx512", 33.0)], [slow[0], fast[0]]),  # nobody knows whose
    ]
    sources = [tmp_path / f"{index}.json" for index in range(3)]
    for source, run in zip(sources, runs, strict=True):
        write_run(source, run)
    write_report(sources[:2], tmp_path / "performance.md", tmp_path / "images")
    text = (tmp_path / "performance.md").read_text()
    assert "- **A**: slow one\n    - torch 2; commit abc, 2000-01-01\n- **B**: fast one\n" in text
    setting = "clustered_softmax 1m-d128-t512, fwd_bwd, zipf, float32, 1 thread"
    assert f"| {setting} | A | cprec-avx2 | 9.00 | 2.00x |" in text
    assert f"| {setting} | B | cprec-avx2 | 1.00 | 0.500x |" in text
    assert f"- {setting}, machine B: torch-adaptive takes 0.500 ms, cprec-avx2 1.00 ms" in text
    assert "**1m-d128-t512** (machine A, commit abc, 2000-01-01)" in text
    assert "| A | avx2 | 1 | 11.0 |" in text
    assert "| B | avx2 | 1 | 22.0 |" in text
    assert all(roof["isa"] == "avx2" for roof in merge(list(map(read_run, sources))).roofs)


def test_a_row_says_what_was_measured_in_the_order_of_its_columns():
    one = row(
        "cprec-avx2", 10.0, rounds=3, roofline_fraction=0.5, ratio_to_baseline=4.0, peak_mb=30.0, extra_mb=5.0,
        correct=True, note="a note",
    )  # fmt: skip
    assert cells(one, "torch-adaptive") == (
        "cprec-avx2", "10.0", "9.00 .. 12.0", "3", "4.00x", "50%", "30.0", "5.00", "a note"
    )  # fmt: skip
    assert cells(one, "torch-linear-ce")[-1] == "a note; against torch-adaptive"
    assert [number(value) for value in (None, 0.1234, 1.0, 9.996, 10.0, 99.94, 100.0, 1234.5)] == [
        "", "0.123", "1.00", "10.00", "10.0", "99.9", "100", "1,234"
    ]  # fmt: skip


def test_wrong_and_failed_rows_say_so_once():
    assert remarks(row("a", None, correct=False, error="loss is not finite"), "b") == "WRONG: loss is not finite"
    failed = "failed: RuntimeError: out of luck"
    assert remarks(row("a", None, correct=False, error=failed), "b") == failed


def test_the_title_names_the_baseline_of_most_rows():
    rows = [row("a", 1.0, baseline="x-long-name"), row("b", 1.0, baseline="y"), row("c", 1.0, baseline="y")]
    assert main_baseline(rows) == "y"


def test_bars_in_cells_do_not_end_them():
    assert markdown_table(["a", "b"], [["x|y", "2"]], [1]) == "| a | b |\n| --- | ---: |\n| x\\|y | 2 |"


def test_the_summary_has_our_fastest_exact_row():
    rows = [
        row("cprec-avx2", 10.0, roofline_fraction=0.25), row("cprec-avx512", 5.0, roofline_fraction=0.5),
        row("cprec-index-approx", 1.0), row("torch-adaptive", 40.0),
    ]  # fmt: skip
    fill_ratios(rows)
    line = summary(rows).splitlines()[-1]
    assert line.endswith("| A | cprec-avx512 | 5.00 | 8.00x | torch-adaptive | 50% |")
    assert losses([*rows, row("torch-linear-ce", 3.0)]).endswith("torch-linear-ce takes 3.00 ms, cprec-avx512 5.00 ms")


def test_threads_are_compared_on_one_machine():
    rows = [row("cprec-avx2", 8.0, machine="slow"), row("cprec-avx2", 2.0, threads=2, machine="fast")]
    assert scaling(rows) == ""
    assert (
        scaling([*rows, row("cprec-avx2", 3.0, machine="fast")]).splitlines()[-1].endswith("| cprec-avx2 | 2 | 1.50x |")
    )


def test_roofs_are_those_of_machines_with_rows_in_units_that_the_header_names():
    roof = {"isa": "avx2", "threads": 1, "fma_gflops": 11.0, "bf16_gflops": 22.0, "exp_gexps": 3.0}
    roof |= {"read_gbps": [[1 << 20, 44.0], [3 << 19, 5.0]]}
    run = merge([Run([roof | {"machine": "a processor"}, roof | {"machine": "unused"}], [row("cprec-avx2", 1.0)])])
    assert [found["machine"] for found in run.roofs] == ["a processor"]
    head, _, body = roofs_table(run.roofs, {"a processor": "A"}).splitlines()
    assert head.endswith("| FMA GFLOP/s | bf16 GFLOP/s | exp G/s | read 1 MiB, GB/s | read 1.5 MiB, GB/s |")
    assert body == "| A | avx2 | 1 | 11.0 | 22.0 | 3.00 | 44.0 | 5.00 |"


def test_plots_lie_beside_or_below_the_page(tmp_path):
    source = tmp_path / "rows.json"
    write_run(source, Run([], [row("cprec-avx2", 10.0)]))
    with pytest.raises(BenchmarkError, match=r"the plots in images must lie beside or below the page p\.md"):
        write_report([source], tmp_path / "docs" / "p.md", tmp_path / "images")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows.json"]


def test_a_spread_of_ratios_holds_the_ratio():
    ours, theirs = row("cprec-avx2", 10.0), row("torch-adaptive", 40.0)
    assert ratio_spread(ours, [ours, theirs]) == (pytest.approx(36 / 12), pytest.approx(48 / 9))
    assert ratio_spread(ours, [ours]) is None


def test_a_plot_needs_a_timed_row(tmp_path):
    with pytest.raises(BenchmarkError, match="no timed row"):
        plot([row("a", None)], tmp_path / "x.png")
    plot([row("cprec-avx2", 2.0)], tmp_path / "x.png")  # a baseline that was not run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--op", "nope"], "unknown op 'nope'; there are clustered_softmax, block_embedding"),
        (["run", "--op", "clustered_softmax", "--case", "big"], "unknown case 'big'; a name is SIZE-dWIDTH-tTOKENS"),
        (
            ["run", "--op", "clustered_softmax", "--providers", "x"],
            "unknown provider of clustered_softmax 'x'; there are",
        ),
        (["run", "--op", "train_step", "--mode", "fwd"], "unknown mode of train_step 'fwd'; there are step"),
        (["run", "--op", "train_step", "--dtype", "int8"], "unknown dtype 'int8'; there are float32, bfloat16"),
        (["run", "--op", "train_step", "--targets", "all"], "unknown targets 'all'; there are zipf, uniform"),
        (["run", "--op", "train_step", "--device", "tpu"], "device 'tpu' is not measured"),
        (["run", "--op", "train_step", "--threads", "0"], "--threads 0 is not a number in 1.."),
        (["run", "--op", "train_step", "--json", "no/such/folder.json"], "no such directory to write folder.json in"),
        (["table", "no-such.json"], "no-such.json cannot be read"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(capfd, arguments, message):
    _, err = call(capfd, *arguments, expect=2)
    assert message in err
    assert err.startswith("benchmarks: ")
    assert err.count("\n") == 1


def test_help_and_list_teach(capfd):
    out, _ = call(capfd, "--help")
    for command in ("run", "trained", "list", "table", "report", "quick"):
        assert command in out
    out, _ = call(capfd, "run", "--help")
    assert "1m-b1" in out
    out, _ = call(capfd, "list")
    for words in (
        "clustered_rank",
        "pqtopk",
        "cprec-index-float16-full",
        "1m-b1 is 1m-d128-b1",
        "clustered_topk",
        "torch-adaptive-input-sparse",
        "10m-d256-t4096",
        "baseline torch-fused-adam",
    ):
        assert words in out


def test_cprec_bench_hands_over(capfd, monkeypatch):
    from cprec import bench
    from cprec.__main__ import main as cprec

    monkeypatch.setattr(sys, "argv", ["cprec", "bench", "run", "--op", "nope"])
    with pytest.raises(SystemExit) as stop:
        cprec()
    assert stop.value.code == 2
    assert "benchmarks: unknown op 'nope'" in capfd.readouterr().err
    monkeypatch.setattr(bench, "find_benchmarks", lambda: False)
    with pytest.raises(FileNotFoundError, match="part of the source checkout"):
        bench.run_bench([])


def test_pytest_benchmark_drives_the_same_cases():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:cacheprovider", "-k"]
    # What tells pytest-benchmark that it runs under xdist, where it measures nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [*command, "clustered_topk and (reference or adaptive)"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
    assert "clustered_topk 5k-d64-b8 fwd zipf float32 1 thread" in result.stdout
