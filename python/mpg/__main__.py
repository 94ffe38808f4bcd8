"""The process of `mpg` and `python -m mpg`. So little is imported here that Ctrl-C finds the rest looked after."""

import sys


def main() -> int:
    """The command line of this process. out: its exit status, where no command leaves with one of its own"""
    try:
        from mpg.app.cli.command import run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
