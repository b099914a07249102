"""The scripts in examples/ run, and docs/drop-in.md shows them as they are."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PAGE = ROOT / "docs" / "drop-in.md"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs(script, tmp_path, monkeypatch):
    if script.stem == "deploy" and shutil.which("g++") is None:
        pytest.skip("AOTInductor compiles with g++")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert list(tmp_path.iterdir()) == []


def test_the_page_shows_every_script_as_it_is():
    shown = dict(re.findall(r"```python\n# examples/(\w+)\.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    assert set(shown) == {script.stem for script in SCRIPTS}
    for script in SCRIPTS:
        body = script.read_text(encoding="utf-8").split('"""\n', 1)[1].lstrip("\n")
        assert shown[script.stem] == body, f"docs/drop-in.md shows another {script.name}"


def test_the_page_shows_the_cpp_program_as_it_is():
    """tests/build/test_serving_library.py compiles it by the page's command and runs it."""
    program = (ROOT / "examples" / "serve.cpp").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```cpp\n// examples/serve\.cpp\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown == program[program.index("#include") :], "docs/drop-in.md shows another serve.cpp"
