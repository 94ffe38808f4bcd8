"""`mpg demo`."""

from __future__ import annotations

from mpg.demo.show import COLUMNS


def test_demo_prints_the_table(run):
    done = run("demo", "--questions", 1, "--held-out", 4)
    assert done.exit_code == 0, done.stderr
    header = next(line for line in done.stdout.splitlines() if "E+T direct geometric" in line)
    positions = [header.index(column.title) for column in COLUMNS]
    assert positions == sorted(positions)
    assert "tokens/s" in done.stdout
    assert "Mean trait scores over 4 held-out questions" in done.stdout
