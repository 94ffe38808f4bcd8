"""The process of `mpg` and `python -m mpg`. So little is imported here that Ctrl-C finds the rest looked after."""

import os
import signal
import sys
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or leave from within an import: packages take it for a failure of theirs, or go on."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> int:
    """The command line of this process. out: its exit status, where no command leaves with one of its own"""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, in the background
            signal.signal(signal.SIGINT, _interrupt)
        from mpg.app.cli.command import run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
