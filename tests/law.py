"""Run the proofs that samplers sample what they say, and print what they found; the last line is JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest


class Findings:
    """Collects what the tests record about themselves."""

    def __init__(self) -> None:
        self.recorded: dict[str, list[Any]] = {"defect": [], "mutant_flagged": [], "positive_control_rejected": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                self.recorded[name].append(value)


def main() -> int:
    findings = Findings()
    status = pytest.main([str(Path(__file__).parent / "decode"), *sys.argv[1:]], plugins=[findings])
    recorded = findings.recorded
    print(
        json.dumps(
            {
                "worst_defect": max(recorded["defect"], default=None),
                "cases": len(recorded["defect"]),
                "mutants_total": len(recorded["mutant_flagged"]),
                "mutants_flagged": sum(recorded["mutant_flagged"]),
                "positive_control_rejected": recorded["positive_control_rejected"] == [True],
            }
        )
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
