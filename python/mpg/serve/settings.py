"""What a server is told when it starts. Knows no request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpg.options import is_finite

MOST_ATTRIBUTES = 64  # that one request may weigh, contexts among them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits, keys and names of one server; sizes are checked against the models when the engine starts.

    name              of the combination with the recipe's weights, as `model=` has it
    hosts             by one of which requests must call the server; none: by any
    api_keys          one of which a request must bring; none: everybody is let in
    admin_key         that changes of the attributes must bring; none: nothing can be changed
    attribute_folders below which attributes may be added
    max_rows          requests that are decoded at once
    max_length        tokens of a prompt and its answer; default the models' positions, 2048 at most
    max_memory        bytes that cache rows of running requests may take; default a quarter of the device's
    prefill_tokens    of prompts that are read between two rounds of the requests that run, over all prompts and models
    max_kept          bytes that earlier texts may take, kept for those that begin like them; default a sixteenth of
                      the device's
    max_queue         choices that may wait; more are refused with 429
    max_seconds       that a request may take, its wait among them
    stream_interval   seconds from one event of a stream to its next, behind its first: tokens of faster rounds come
                      together, and so do requests begin that come while many others run, .05 s apart at most
    grace             seconds that running requests are left when the server is told to end
    max_body          bytes of a request
    log_prompts       whether the log has what requests say
    """

    name: str = "mpg"
    hosts: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    attribute_folders: tuple[Path, ...] = ()
    max_rows: int = 32
    max_length: int | None = None
    max_memory: int | None = None
    prefill_tokens: int = 256
    max_kept: int | None = None
    max_queue: int = 256
    max_seconds: float = 600.0
    stream_interval: float = 0.05
    grace: float = 30.0
    max_body: int = 4 * 2**20
    max_n: int = 16
    max_prompts: int = 64
    max_stops: int = 16
    max_stop_length: int = 256
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_rows", "prefill_tokens", "max_queue", "max_body", "max_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        for name in ("max_length", "max_memory"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        for name in ("grace", "max_kept", "stream_interval"):
            if (value := getattr(self, name)) is not None and not (is_finite(value) and value >= 0):
                raise ValueError(f"{name}: expected a number, 0 at least, got {value!r}")
        if not all(self.api_keys) or self.admin_key == "":
            raise ValueError("api_key, admin_key: expected some text, got an empty key")
        for folder in self.attribute_folders:
            if not folder.is_dir():
                raise ValueError(f"attribute_folder: expected a folder, got {str(folder)!r}")
