"""Everything that this plugin changes in vLLM: two functions are wrapped, and of each model runner three or four.

Modules that this process has not imported yet are patched when they are imported, so the API server imports nothing
extra.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from triattention.errors import TriAttentionError
from triattention.vllm.runtime import hook_targets, metrics, start
from triattention.vllm.runtime.settings import PREFIX, SWITCH, RuntimeSettings, enabled, read_settings

_log = logging.getLogger("vllm.triattention")

_V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_MARK = "_triattention"
#: The name of the plugin's entry point, which VLLM_PLUGINS may exclude.
_ENTRY_POINT = "triattention"


def install_from_environment() -> None:
    """Called by the entry point: install as set by ``TRIATTN_RUNTIME_PATCH_SCHEDULER`` and ``..._PATCH_WORKER``."""
    if not enabled():
        return
    settings = read_settings()
    install_vllm_integration_monkeypatches(patch_scheduler=settings.patch_scheduler, patch_worker=settings.patch_worker)


def install_vllm_integration_monkeypatches(*, patch_scheduler: bool = True, patch_worker: bool = True) -> None:
    """Make the vLLM of this process and its children compress; call it before creating an ``LLM``. Idempotent.

    ``ENABLE_TRIATTENTION=0`` overrides it. Raises TriAttentionError for invalid settings, and for a vLLM whose hook
    targets differ.
    """
    if not enabled():
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _ENTRY_POINT not in allowed.split(","):
        raise TriAttentionError(
            f"VLLM_PLUGINS is {allowed!r}, so vLLM's other processes would not load this plugin; "
            f"add {_ENTRY_POINT} to it"
        )
    # the other processes read these from the environment
    os.environ[f"{PREFIX}PATCH_SCHEDULER"] = str(patch_scheduler)
    os.environ[f"{PREFIX}PATCH_WORKER"] = str(patch_worker)
    settings = read_settings()
    hook_targets.require_supported()
    importlib.import_module("vllm.logger")  # configures vllm's loggers, which the API server has not done yet
    if settings.disable_compression or not (patch_scheduler or patch_worker):
        _log.info("[TriAttention] compression is off (DISABLE_COMPRESSION is set, or neither half is patched)")
        return
    if not (patch_scheduler and patch_worker):
        raise TriAttentionError(
            f"patch_scheduler={patch_scheduler} and patch_worker={patch_worker} would evict nothing, or lose tokens; "
            f"patch both, or set {SWITCH}=0"
        )
    for note in settings.notes():
        _log.info("[TriAttention] %s", note)
    _choose_runner()
    metrics.expose()
    _when_imported("vllm.engine.arg_utils", functools.partial(_patch_arguments, settings=settings))
    _when_imported("vllm.config.scheduler", functools.partial(_patch_scheduler, settings=settings))
    _when_imported("vllm.v1.worker.gpu_model_runner", functools.partial(_patch_v1_runner, settings=settings))
    _when_imported("vllm.v1.worker.gpu.model_runner", functools.partial(_patch_v2_runner, settings=settings))
    what = f"patch_scheduler={patch_scheduler} patch_worker={patch_worker}"
    _log.info("[TriAttention] Runtime (V2) plugin activated: %s", what)


def _choose_runner() -> None:
    """Select the V1 model runner unless the user chose: rounds in the V2 runner have not been tested on a GPU yet."""
    if os.environ.setdefault(_V2_RUNNER, "0").strip().lower() in ("0", "false"):
        _log.info("[TriAttention] the V1 model runner is used (%s=0)", _V2_RUNNER)


def _patch_arguments(module: ModuleType, settings: RuntimeSettings) -> None:
    """Check the configuration when the command line is read, before any engine process is started."""

    def create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        start.refuse(config, settings)
        return config

    _wrap(module.EngineArgs, "create_engine_config", create_engine_config)


def _patch_scheduler(module: ModuleType, settings: RuntimeSettings) -> None:
    """Subclass the scheduler that vLLM chooses, so that vLLM still chooses between sync and async."""

    @functools.cache
    def evicting(base: type) -> type:
        class TriAttentionScheduler(base):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self._triattention = start.build_evictor(self, settings)

            def schedule(self, *args: Any, **kwargs: Any) -> Any:
                rounds = self._triattention.plan(self)
                output = super().schedule(*args, **kwargs)
                output.triattention = self._triattention.drop_absent(rounds, self.running)
                return output

        return TriAttentionScheduler

    def get_scheduler_cls(original: Callable[..., Any], self: Any) -> type:
        return evicting(original(self))

    _wrap(module.SchedulerConfig, "get_scheduler_cls", get_scheduler_cls)


def _patch_v1_runner(module: ModuleType, settings: RuntimeSettings) -> None:
    """Rounds before a step, then physical lengths and slots for attention."""
    from triattention.vllm.runtime.runners import V1Runner

    def _update_states(original: Callable[..., Any], self: Any, output: Any) -> Any:
        # not before execute_model: copies of the previous step's block table may still be in progress until here
        self.triattention.before_step(output)
        return original(self, output)

    def _prepare_inputs(original: Callable[..., Any], self: Any, output: Any, scheduled: Any, *rest: Any) -> Any:
        result = original(self, output, scheduled, *rest)
        self.triattention.after_inputs(scheduled)
        return result

    for wrapper in (_with_rounds(V1Runner, settings), _update_states, _prepare_inputs):
        _wrap(module.GPUModelRunner, wrapper.__name__, wrapper)


def _patch_v2_runner(module: ModuleType, settings: RuntimeSettings) -> None:
    """As for V1, and logical lengths again before the runner samples."""
    from triattention.vllm.runtime.runners import V2Runner

    def update_requests(original: Callable[..., Any], self: Any, output: Any) -> Any:
        self.triattention.before_step(output)
        return original(self, output)

    def prepare_attn(original: Callable[..., Any], self: Any, batch: Any) -> Any:
        return self.triattention.shorten(batch, original(self, batch))

    def sample(original: Callable[..., Any], self: Any, hidden: Any, batch: Any, grammar: Any) -> Any:
        self.triattention.lengthen(batch)
        return original(self, hidden, batch, grammar)

    for wrapper in (_with_rounds(V2Runner, settings), update_requests, prepare_attn, sample):
        _wrap(module.GPUModelRunner, wrapper.__name__, wrapper)


def _with_rounds(kind: Callable[[Any, Any], Any], settings: RuntimeSettings) -> Callable[..., Any]:
    """A wrapper that builds a runner's compactor when its KV cache is there."""

    def initialize_kv_cache(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not (kwargs.get("is_profiling") or args[1:2] == (True,)):
            self.triattention = kind(self, start.build_compactor(self, settings))
        return result

    return initialize_kv_cache


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by ``wrapper``, whose first argument is the original; an already wrapped method is kept."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Patches a module right after its import."""

    def __init__(self) -> None:
        self.patches: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self.patches.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if patch else None
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                self.patches.pop(fullname)(module)

            spec.loader.exec_module = execute_and_patch
        return spec


def _when_imported(name: str, patch: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:
        patch(sys.modules[name])
        return
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _AfterImport)), None)
    if finder is None:
        finder = _AfterImport()
        sys.meta_path.insert(0, finder)
    finder.patches[name] = patch
