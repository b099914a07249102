"""The documents are true: the README's Python runs, its commands exist, nothing names a place of ours."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_in_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert "instead of 6400000" in capsys.readouterr().out


def test_the_commands_in_the_readme_exist():
    from typer.main import get_command

    from cprec.cli import app

    commands = get_command(app).commands
    lines = re.findall(r"^cprec (\w+)(.*)", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(lines) > 5
    for name, rest in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts + parameter.secondary_opts}
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest.partition("#")[0])) <= known, f"cprec {name}{rest}"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)) <= targets


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md"))),
    ],
)
def test_links_between_documents_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{name} links to {target}"


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "\nmake lint\n" in script
    assert script.rstrip().endswith("make test")


def test_the_gpu_ledger_has_a_row_for_every_gpu_kernel():
    ledger = (ROOT / "docs/gpu-status.md").read_text(encoding="utf-8")
    kernels = [path for path in (ROOT / "cprec_kernels/_triton").glob("*.py") if "_kernel(" in path.read_text("utf-8")]
    assert kernels
    for source in [*(ROOT / "csrc/cuda").glob("*.cu"), *kernels]:
        assert f"{source.relative_to(ROOT)}" in ledger


def test_the_performance_page_is_the_one_its_result_files_give(tmp_path, monkeypatch):
    from benchmarks.report import write_report

    monkeypatch.setattr("benchmarks.report.plot", lambda rows, path, title: path.touch())  # looked for, not looked at
    sources = sorted((ROOT / "benchmarks/results").glob("*.json"))
    page = ROOT / "docs/performance.md"
    assert page.exists() == bool(sources), "docs/performance.md is generated from benchmarks/results/*.json"
    if sources:
        write_report(sources, tmp_path / "performance.md", tmp_path / "images")
        assert page.read_text(encoding="utf-8") == (tmp_path / "performance.md").read_text(encoding="utf-8")
        for image in (tmp_path / "images").glob("*.png"):
            assert (ROOT / "docs/images" / image.name).exists()


def test_the_paper_page_is_the_one_its_tables_give(tmp_path):
    from benchmarks.paper.page import write_page

    tables = ROOT / "benchmarks/results/paper"
    page = ROOT / "docs/paper.md"
    assert page.exists() == bool(list(tables.glob("table-*.json"))), "docs/paper.md is made of benchmarks/results/paper"
    if page.exists():
        write_page(tables, tmp_path / "paper.md")
        assert page.read_text(encoding="utf-8") == (tmp_path / "paper.md").read_text(encoding="utf-8")
        for image in (tmp_path / "images").glob("*.png"):
            assert (ROOT / "docs/images" / image.name).exists()


def test_the_python_on_the_planning_page_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/planning.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "docs/planning.md", "exec"), {})
    assert "times fewer parameters" in capsys.readouterr().out


def test_the_page_of_compiled_kernels_is_the_one_its_record_gives():
    from benchmarks.aot import PAGE, RECORD, page, problems, read_record

    records = read_record(RECORD)
    assert records
    assert PAGE.read_text(encoding="utf-8") == page(records), "python -m benchmarks.aot --record writes the page"
    for record in records.values():
        assert not [(row.key, found) for row in record.rows if (found := problems(row, None))], record.triton


def test_every_dependency_earns_its_line():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        named += extra
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").lower()
    for requirement in named:
        library = re.match(r"[a-z0-9-]+", requirement.lower()).group()
        assert library in page, f"{library} is not in docs/architecture.md"


def test_no_build_product_is_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: an unpacked source archive has nothing to track")
    assert not [name for name in listed.stdout.split() if name.endswith((".so", ".o", ".pyc", "_build_info.json"))]
