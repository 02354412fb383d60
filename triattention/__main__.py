"""``python -m triattention``."""

from __future__ import annotations

import sys

from triattention.cli import main

if __name__ == "__main__":
    sys.exit(main())
