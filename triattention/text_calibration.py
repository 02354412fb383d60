"""Calibration on the bundled text or on a text file, and the cache of its results."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from triattention import models, statistics
from triattention.architecture import describe
from triattention.calibration import calibrate
from triattention.embedded import cache_root
from triattention.errors import TriAttentionError

if TYPE_CHECKING:
    from triattention.models import LoadedModel
    from triattention.statistics import Statistics

#: With fewer tokens, about a paragraph, the means are noise.
MIN_TOKENS = 512
#: Tokens per forward pass. Queries are taken before RoPE, so splitting the text only shortens the context.
_CHUNK = 1024
#: Tokens used of a longer text; the means have converged by then.
MAX_LENGTH = 32768
#: The length in characters of the runs that are compared, and the minimum share of distinct ones in a usable text.
#: Prose has nearly 1, code 0.6 and more, a repeated sentence nearly 0.
_RUN, _MIN_DISTINCT = 32, 0.25
#: An upper limit for the average token length, which decides how much of the text is checked for repetition.
_CHARACTERS_PER_TOKEN = 8

_log = logging.getLogger(__name__)


def bundled_text() -> str:
    return (files("triattention") / "data" / "calibration.txt").read_text("utf-8")


def calibrate_on_text(
    loaded: LoadedModel,
    text: str,
    *,
    max_length: int = MAX_LENGTH,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Statistics of an unpatched model over the first ``max_length`` tokens of ``text``.

    ``progress(done, total)`` is called after each forward pass, in tokens. Raises TriAttentionError for a text of
    under 512 tokens, or one that repeats itself.
    """
    ids = loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :max_length]
    if ids.shape[1] < MIN_TOKENS:
        raise TriAttentionError(
            f"the calibration text has {ids.shape[1]} tokens; give at least {MIN_TOKENS}, better several thousand"
        )
    distinct = _distinct_runs(text[: max_length * _CHARACTERS_PER_TOKEN])
    if distinct < _MIN_DISTINCT:
        raise TriAttentionError(
            f"the calibration text repeats itself: {distinct:.1%} of its runs of {_RUN} characters are distinct, but "
            f"at least {_MIN_DISTINCT:.0%} are needed; give coherent text"
        )

    def forward(model: Any) -> None:
        done = 0
        for chunk in ids.to(model.device).split(_CHUNK, dim=1):
            # no logits are needed, and one position is the minimum
            model(input_ids=chunk, use_cache=False, logits_to_keep=1)
            done += chunk.shape[1]
            if progress is not None:
                progress(done, ids.shape[1])

    return calibrate(loaded.model, forward)


def _distinct_runs(text: str) -> float:
    """The share of distinct runs among all runs of 32 characters."""
    n_runs = max(len(text) - _RUN + 1, 1)
    return len({text[i : i + _RUN] for i in range(n_runs)}) / n_runs


def cached_statistics(loaded: LoadedModel) -> Path:
    """The cached statistics file of a model on the bundled text; calibrates if no valid one exists.

    There is one file per model (config.json and weight files), configuration with its overrides, dtype and text. If
    several processes need it, one calibrates and the others wait. Raises TriAttentionError if the cache cannot be
    written.
    """
    text = bundled_text()
    of_text = hashlib.sha256(text.encode()).hexdigest()[:8]
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    of_model = f"{models.fingerprint(loaded.source)}-{describe(loaded.model).identity}"
    name = f"{loaded.source.label}-{of_model}-{dtype}-{of_text}.pt"
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
