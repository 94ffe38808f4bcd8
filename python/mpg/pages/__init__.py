"""The pages that the package ships, each filled into one file that asks for no other. Knows no model and no server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def fill(name: str, data: Any) -> str:
    """A page with the styles and scripts that it names, `{{tokens.css}}`, in their places, and `data` where it has
    `{{data}}`: JSON that holds no "<", so that no text in it is ever markup."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.*s")}
    texts["data"] = json.dumps(data).replace("<", "\\u003c")
    page = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r"{{([a-z.]+)}}", lambda found: texts[found[1]], page)
