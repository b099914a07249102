"""Progress bars: on a terminal's standard error alone."""

from __future__ import annotations

import pytest

from cprec.progress import progress_bar, staged_progress


@pytest.mark.parametrize(("terminal", "show"), [(True, True), (False, True), (True, False)])
def test_bars_are_for_terminals(terminal, show, capfd, monkeypatch):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for one
    with progress_bar("counting", 3, show) as advance:
        for _ in range(3):
            advance(1)
    with staged_progress(show) as tell:
        tell("sorting", 1, 2)
    out, err = capfd.readouterr()
    assert out == ""
    drawn = terminal and show
    assert ("counting" in err) == drawn
    assert ("3/3" in err) == drawn
    assert ("sorting" in err) == drawn
