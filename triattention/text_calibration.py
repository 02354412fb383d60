"""Calibration on text: the bundled one or a file, with the result kept in the cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from triattention import models, statistics
from triattention.calibration import calibrate
from triattention.embedded import cache_root
from triattention.errors import TriAttentionError

if TYPE_CHECKING:
    from triattention.models import LoadedModel
    from triattention.statistics import Statistics

#: Below this the means are noise: one paragraph, not a language.
MIN_TOKENS = 512
#: Tokens per forward pass. Queries are taken before RoPE, so the cut costs context and nothing else.
_CHUNK = 1024

_log = logging.getLogger(__name__)


def bundled_text() -> str:
    return (files("triattention") / "data" / "calibration.txt").read_text("utf-8")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises TriAttentionError for a file that cannot be read as such."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise TriAttentionError(
            f"cannot read the calibration text {path}: {error.strerror}; give a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise TriAttentionError(
            f"the calibration text {path} is not UTF-8 (byte {error.start}); convert it first"
        ) from error


def calibrate_on_text(
    loaded: LoadedModel, text: str, *, max_length: int = 32768, progress: Callable[[int, int], None] | None = None
) -> Statistics:
    """Statistics of an unpatched model over ``text``. Raises TriAttentionError for a text of under 512 tokens."""
    ids = loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :max_length]
    if ids.shape[1] < MIN_TOKENS:
        raise TriAttentionError(
            f"the calibration text has {ids.shape[1]} tokens; give at least {MIN_TOKENS}, better some thousands"
        )

    def forward(model: Any) -> None:
        done = 0
        for chunk in ids.to(model.device).split(_CHUNK, dim=1):
            done += chunk.shape[1]
            if progress is not None:
                progress(done, ids.shape[1])
            # one position's logits are the fewest that can be asked for; none are needed
            model(input_ids=chunk, use_cache=False, logits_to_keep=1)

    return calibrate(loaded.model, forward)


def cached_statistics(loaded: LoadedModel) -> Path:
    """The cached statistics file of a model on the bundled text; calibrates when there is none that fits.

    One file per model (configuration and weight files), dtype and text. Of several processes one calibrates and the
    others wait. Raises TriAttentionError when the cache cannot be written.
    """
    text = bundled_text()
    of_text = hashlib.sha256(text.encode()).hexdigest()[:8]
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    name = f"{loaded.source.label}-{models.fingerprint(loaded.source)}-{dtype}-{of_text}.pt"
    path = cache_root() / "statistics" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not _fits(path, loaded):
                _log.info("calibrating %s on the bundled text (once; kept in %s)", loaded.source.name, path)
                statistics.save(path, calibrate_on_text(loaded, text))
    except OSError as error:
        raise TriAttentionError(
            f"cannot write the statistics {path}: {error.strerror}; set TRIATTENTION_CACHE or give --stats-path"
        ) from error
    return path


def _fits(path: Path, loaded: LoadedModel) -> bool:
    if not path.is_file():
        return False
    try:
        statistics.load(path).check_model(loaded.model)
    except TriAttentionError as error:
        _log.info("calibrating again: %s", error)
        return False
    return True
