"""Phase 7: the vLLM plugin on the real engine (plan 5.1 to 5.3)."""

from __future__ import annotations

from typing import Never

from verify import check, skip

_COMMON = {
    "reason": "Serving is where compression pays, and where a plugin that does nothing is hardest to notice.",
    "remedy": "Verify the serving path by hand until the suite does.",
}


@check("p7.engine", gate="soft", cases="imports", plan="5.1", claim="vLLM imports and is new enough.", **_COMMON)
def test_engine(case: str) -> Never:
    skip("NOT_IMPLEMENTED", "the suite does not drive vLLM yet")


@check(
    "p7.plugin", gate="soft", cases="activates", plan="5.2", claim="vLLM starts with the plugin activated.", **_COMMON
)
def test_plugin(case: str) -> Never:
    skip("NOT_IMPLEMENTED", "the suite does not drive vLLM yet")


@check(
    "p7.server", gate="soft", cases="answers", plan="5.3", claim="The server lists its model and answers.", **_COMMON
)
def test_server(case: str) -> Never:
    skip("NOT_IMPLEMENTED", "the suite does not drive vLLM yet")
