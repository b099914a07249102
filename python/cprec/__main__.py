"""Entry point of the ``cprec`` command: runs the command line and turns expected failures into one sentence."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from typing import Any

NEEDED = ("typer", "rich", "polars", "lightning", "safetensors", "matplotlib", "tensorboard")


def main() -> None:
    """Run the command line; exits with 0, 1 for a reported failure, 2 for wrong usage, 130 or 143 when stopped."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"cprec: the command line needs {', '.join(missing)}; install with `pip install 'cprec-kernels[app]'`")
    if threading.current_thread() is threading.main_thread():  # no other may
        signal.signal(signal.SIGTERM, _terminate)
    try:
        from cprec.cli import app

        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away: `cprec recommend ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, IndexError, RuntimeError, MemoryError, OverflowError) as error:
        if os.environ.get("CPREC_TRACEBACK"):
            raise
        sys.exit(f"cprec: {error or type(error).__name__}")


def _terminate(number: int, frame: Any) -> None:
    """End as an exception does, so that half-written files are removed. Training ends as Lightning does, which calls this too."""
    if signal.getsignal(signal.SIGTERM) is _terminate:
        sys.exit(128 + number)


if __name__ == "__main__":
    main()
