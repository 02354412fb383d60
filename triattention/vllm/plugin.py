"""The entry point that vLLM calls by itself, in every process, after ``pip install`` (group ``vllm.general_plugins``).

vLLM only logs an exception that the import of this module raises, and then serves without the plugin; one that the
function raises ends the process. So everything is imported inside it.
"""

from __future__ import annotations


def register_triattention_backend() -> None:
    """Make vLLM compress its KV cache, unless ``ENABLE_TRIATTENTION=0`` (facts and options: README, Serving).

    Raises TriAttentionError, in one sentence, for settings that cannot be honoured and a vLLM that is not supported.
    """
    from triattention.vllm.runtime.integration_monkeypatch import install_from_environment

    install_from_environment()
