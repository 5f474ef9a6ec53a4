"""`kvlab` and `python -m kvlab`: Ctrl-C ends with the exit code 130, also during slow imports."""

import sys


def run() -> None:
    """Import the command line, and run it."""
    try:
        from kvlab.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
