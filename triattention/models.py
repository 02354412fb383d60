"""Finding and loading a model: the embedded model, a directory, or a hub name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triattention.embedded import embedded_directory
from triattention.errors import TriAttentionError
from triattention.files import expanded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
ATTENTION = ("sdpa", "eager", "flash_attention_2")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


#: What transformers raises for weights or a configuration that it cannot use, beside errors of its own.
_UNLOADABLE = (
    OSError, ValueError, ImportError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError,
    AssertionError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as the user named it, and its ``location`` for transformers: a directory or a hub name.

    ``revision`` is of a hub model. The configuration comes from ``config_location`` if there is one, and ``overrides``
    replaces entries of it, as vLLM's options ``--hf-config-path`` and ``--hf-overrides`` do.
    """

    name: str
    location: str
    revision: str | None = None
    config_location: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        return Path(self.location).is_dir()

    @property
    def label(self) -> str:
        """The last part of the name, usable in file names."""
        last = expanded(self.name).resolve().name if self.local and self.name != EMBEDDED else self.name
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in last)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource


def find_source(
    name: str,
    *,
    revision: str | None = None,
    config_path: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ModelSource:
    """Resolve ``embedded``, a directory or a hub name, without loading weights or using the network.

    Converts the embedded model if needed. Raises TriAttentionError for a directory without a configuration or
    weights, and for a path that does not exist.
    """
    found = _config_location(config_path)
    if revision is not None and (name == EMBEDDED or expanded(name).is_dir()):
        raise TriAttentionError(f"--revision {revision} is of a hub model, but {name} is a directory; leave it out")
    return ModelSource(name, _location(name, configured=found is not None), revision, found, dict(overrides or {}))


def _location(name: str, *, configured: bool) -> str:
    if name == EMBEDDED:
        return str(embedded_directory())
    path = expanded(name)
    if name and path.is_dir():
        _check_directory(path, configured=configured)
        return str(path)
    if path.is_file():
        raise TriAttentionError(f"--model {name} is a file; give the directory that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise TriAttentionError(
            f"--model {name or repr(name)} does not exist; give a model directory, a hub name or 'embedded'"
        )
    return name


def _config_location(name: str | None) -> str | None:
    if name is None:
        return None
    path = expanded(name)
    if (path / "config.json").is_file():
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise TriAttentionError(
            f"--hf-config-path {name or repr(name)} has no config.json; give a directory that has one"
        )
    return name


def _check_directory(path: Path, *, configured: bool) -> None:
    if not configured and not (path / "config.json").is_file():
        raise TriAttentionError(
            f"model directory {path} has no config.json; give a directory in the transformers format"
        )
    if not _weight_files(path):
        raise TriAttentionError(f"model directory {path} has no weights (*.safetensors or *.bin); download them again")


def _weight_files(path: Path) -> list[Path]:
    return sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])


def fingerprint(source: ModelSource) -> str:
    """16 hex digits over the model's config.json and weight files (names, sizes, times): changes when the model does.

    What overrides the configuration is not in it, but in the identity of the model's ``Architecture``.

    A hub model must have been loaded before, so that its files are in the local hub cache.
    """
    if source.local:
        directory = Path(source.location)
    else:
        from transformers.utils import cached_file

        found = cached_file(source.location, "config.json", local_files_only=True, revision=source.revision)
        directory = Path(found).parent
    own = directory / "config.json"
    digest = hashlib.sha256(own.read_bytes() if own.is_file() else b"")
    for file in _weight_files(directory):
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def fetch(source: ModelSource) -> Path:
    """The directory of a model; a hub model is downloaded into the hub's cache. Raises TriAttentionError on failure."""
    if source.local:
        return Path(source.location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(
            snapshot_download(
                source.location, revision=source.revision, allow_patterns=wanted, ignore_patterns=["original/*"]
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise _cannot_load(source, error) from error


def choose_device(device: str) -> torch.device:
    """``auto`` is the GPU if torch sees one. Raises TriAttentionError for ``cuda`` if it does not."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise TriAttentionError("--device cuda, but torch sees no GPU here; use --device cpu, or fix the driver first")
    return torch.device(device)


def _choose_dtype(config: Any, dtype: str, attention: str) -> torch.dtype:
    import torch

    if dtype != "auto":
        chosen = getattr(torch, dtype)
    else:
        chosen = config.dtype or torch.float32
        if attention == "flash_attention_2" and chosen == torch.float32:
            chosen = torch.bfloat16
    if attention == "flash_attention_2" and chosen == torch.float32:
        raise TriAttentionError("flash_attention_2 has no float32 kernels; use --dtype bfloat16 or --dtype float16")
    return chosen


def load(source: ModelSource, *, dtype: str = "auto", device: str = "auto", attention: str = "sdpa") -> LoadedModel:
    """Load model and tokenizer for inference.

    ``dtype="auto"`` is the dtype of the checkpoint (bfloat16 for a float32 one under flash_attention_2, which has no
    float32 kernels). Raises TriAttentionError, in one sentence, if transformers cannot load it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from triattention.configuration import read_configuration  # it imports torch

    where = choose_device(device)
    if attention == "flash_attention_2":
        _check_flash_attention(where)
    try:
        config = read_configuration(
            source.config_location or source.location, source.overrides, name=source.name, revision=source.revision
        )
        options = {"local_files_only": source.local, "revision": source.revision}
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=_choose_dtype(config, dtype, attention),
            attn_implementation=attention,
            output_loading_info=True,
            **options,
        )
        model = model.to(where).eval()
    except TriAttentionError:
        raise
    except (*_UNLOADABLE, StrictDataclassError, SafetensorError) as error:
        raise _cannot_load(source, error) from error
    if missing := sorted(info["missing_keys"]):
        # transformers would initialise them randomly and continue
        raise _cannot_load(
            source, ValueError(f"{len(missing)} of its weights are not in its files (one: {missing[0]})")
        )
    return LoadedModel(model, tokenizer, source)


def _check_flash_attention(device: torch.device) -> None:
    if device.type != "cuda":
        raise TriAttentionError(
            "flash_attention_2 needs a GPU, but this run is on the CPU; use --attn-implementation sdpa"
        )
    try:
        metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        raise TriAttentionError(
            "flash_attention_2 needs the package flash-attn, which is not installed; "
            "install it (pip install flash-attn --no-build-isolation) or use --attn-implementation sdpa"
        ) from None


def _cannot_load(source: ModelSource, error: Exception) -> TriAttentionError:
    options = [f"--hf-overrides {json.dumps(source.overrides)}"] if source.overrides else []
    options += [f"--hf-config-path {source.config_location}"] if source.config_location else []
    hint = "download it again" if source.local else "check the name and the network, or give a local directory"
    if options:
        hint = "correct them" if source.overrides else "give the directory of another config.json"
    chosen = f" with {' and '.join(options)}" if options else ""
    return TriAttentionError(f"cannot load model {source.name}{chosen}: {_reason(error)}; {hint}")


def _reason(error: Exception) -> str:
    """The first sentence of an error of transformers."""
    if "ignore_mismatched_sizes" in str(error):
        return "the weights in its files have other shapes"
    if isinstance(error, LookupError):
        return repr(error)
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    if first.endswith(":") and more:
        first = f"{first} {more[0].strip()}"
    return first.split(". ")[0].rstrip(".")
