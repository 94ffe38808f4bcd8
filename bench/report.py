"""What the op bench ran on and what came out: a table for people, one JSON object, a file under bench/results.

Knows no op and no clock.
"""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from mpg.models.timings import processor

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Report:
    def __init__(self, device: str, so_far: Path | None = None) -> None:
        """so_far: a file that has what is measured as soon as it is"""
        self.device, self.so_far = device, so_far
        self.machine: Row = {
            "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "load_average": os.getloadavg()[0],
        }
        self.rows: list[Row] = []  # name, value, goal, pass: what is asked of the ops
        self.times: list[Row] = []  # one for each measurement

    def add(self, times: Row) -> None:
        self.times.append(times)
        if self.so_far is not None:
            self.so_far.write_text(json.dumps(self.everything(), indent=1) + "\n")

    def everything(self) -> Row:
        return {"machine": self.machine, "rows": rounded(self.rows), "times": rounded(self.times)}

    def write(self, save: bool) -> None:
        self.machine["load_average_after"] = os.getloadavg()[0]
        everything = self.everything()
        print("", self.machine, *self.time_table(), "", *self.goal_table(), "", sep="\n")
        if save:
            name = re.sub(r"\W+", "-", self.machine["device"].lower())
            path = RESULTS / f"{'gpu' if self.device == 'cuda' else 'cpu'}-ops-{name}.json"
            path.write_text(json.dumps(everything, indent=1) + "\n")
            print(f"written to {path}")
        print(json.dumps(everything))

    def time_table(self) -> list[str]:
        columns = ["us", "plain_us", "compiled_us", "replayed_us", "plain_replayed_us"]
        columns = [column for column in columns if any(column in row for row in self.times)]
        lines = [f"{'':46}" + "".join(f"{c:>18}" for c in columns) + f"{'speedup':>10}{'of floor':>10}"]
        for row in self.times:
            times = "".join(f"{row[c]:18.1f}" if c in row else " " * 18 for c in columns)
            lines.append(f"{row['name']:46}{times}{row['speedup']:10.2f}{row['floor_share']:10.2f}")
        return lines

    def goal_table(self) -> list[str]:
        verdicts = {True: "reached", False: "missed", None: "not measured here"}
        lines = []
        for row in self.rows:
            value = "" if row["value"] is None else f"{row['value']:.2f}"
            lines.append(f"{row['name']:78}{value:>10}  goal {row['goal']:>4}  {verdicts[row['pass']]}")
        return lines


def rounded(rows: list[Row]) -> list[Row]:
    """Rows with four digits a number, more than a clock is good for."""
    return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
