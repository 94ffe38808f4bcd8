"""The log as lines of JSON, those of other libraries too. Knows nothing of what is logged."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import TextIO


class JsonLines(logging.Formatter):
    """A record as one line: its time, level and message, or the fields that it was given as `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(), "level": record.levelname}
        line |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to(stream: TextIO) -> None:
    """Write the log of this process, warnings among it, to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("mpg.serve").setLevel(logging.INFO)
    logging.captureWarnings(True)
