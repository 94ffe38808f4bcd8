"""Docstrings of the package as Markdown: their tables, columns of plain text, stay columns. Loaded by mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

IS_TABLE = re.compile(r"^ |\S {2,}\S|^\w+: {2,}|^>>> |^out: |^\w+ = ", re.MULTILINE)


class PlainTables(Extension):
    """Paragraphs with columns become blocks of text."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(
                f"```text\n{paragraph}\n```" if IS_TABLE.search(paragraph) else paragraph for paragraph in paragraphs
            )
