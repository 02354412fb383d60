"""A child process of the command line: calls the function named by one JSON line on its standard input.

It exits when that input is closed, because its parent is then gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module

from triattention.cli import guarded


def main() -> int:
    # unbuffered, because a thread that waits in a buffered reader would prevent the interpreter from exiting
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        call = json.loads(stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, name = call["function"].partition(":")
    return guarded(lambda: getattr(import_module(module), name)(**call["arguments"]))


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
