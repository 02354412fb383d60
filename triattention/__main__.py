"""``python -m triattention``."""

from __future__ import annotations

import sys

try:
    from triattention.cli import main
except ModuleNotFoundError as error:
    print(
        f"triattention: {error.name} is not installed; `make setup` or triattention-verify[hf] brings it",
        file=sys.stderr,
    )
    raise SystemExit(3) from None

if __name__ == "__main__":
    sys.exit(main())
