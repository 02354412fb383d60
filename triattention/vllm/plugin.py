"""The entry point (group ``vllm.general_plugins``) that vLLM calls in every process once the package is installed.

If the import of this module raises, vLLM only logs the exception and serves without the plugin; if the function raises,
the process ends. So everything is imported inside the function.
"""

from __future__ import annotations


def register_triattention_backend() -> None:
    """Make vLLM compress its KV cache, unless ``ENABLE_TRIATTENTION=0`` (options: README, Serving).

    Raises TriAttentionError, in one sentence, for invalid settings or an unsupported vLLM.
    """
    from triattention.vllm.runtime.integration_monkeypatch import install_from_environment

    install_from_environment()
