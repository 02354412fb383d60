"""A conversation as an agent's client (OpenClaw) sends it, turn after turn, and the answers that it must get.

Such a client always streams and requests usage in the stream, limits the answer by ``max_completion_tokens``, sends
``store: false`` and tools with ``strict: false``, and repeats its own tool calls with ``content: null``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verify.serving.server import Answer, Server

_SYSTEM = "You are a personal assistant with tools. " + " ".join(
    f"Rule {n}: before you answer, read what was said about point {n} and keep to it in a few plain words."
    for n in range(1, 17)
)

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": "Read a file of the workspace.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
            "strict": False,
        },
    }
]

_CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "notes.md"}'}}
    ],
}

#: The messages before each answer: user turns, and between the first two a tool call and its result.
_TURNS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "What did I write about the train?"}],
    [_CALLED, {"role": "tool", "tool_call_id": "call_1", "content": "The train leaves at noon. Bring the blue bag."}],
    [{"role": "user", "content": "Which bag, and what else should I not forget?"}],
)


def converse(server: Server, max_tokens: int) -> Iterator[Answer]:
    """The answers of the conversation, each greedy and streamed.

    Raises AssertionError for a stream without a finish reason, without usage, or with chunks after its end.
    """
    messages: list[dict[str, Any]] = []
    for turn in _TURNS:
        messages += turn
        body = {
            "messages": messages, "stream_options": {"include_usage": True}, "store": False, "tools": _TOOLS,
            "max_completion_tokens": max_tokens, "temperature": 0, "return_token_ids": True, "logprobs": True,
        }  # fmt: skip
        answer = assembled(list(server.stream("/v1/chat/completions", body)))
        yield answer
        messages.append({"role": "assistant", "content": answer.text})


def assembled(chunks: list[dict[str, Any]]) -> Answer:
    """One answer from the chunks of a stream that was asked to include usage."""
    *parts, last = chunks
    assert last.get("usage"), f"the last chunk of the stream has no usage: {last}"
    prompt, tokens, log_probs, text, reason = [], [], [], "", None
    for part in parts:
        assert len(part["choices"]) == 1, f"a chunk has {len(part['choices'])} choices"
        choice = part["choices"][0]
        assert reason is None, f"a chunk came after the one that finished with {reason!r}"
        delta = choice.get("delta") or {}
        text += (delta.get("content") if "delta" in choice else choice.get("text")) or ""
        prompt = prompt or part.get("prompt_token_ids") or choice.get("prompt_token_ids") or []
        tokens += choice.get("token_ids") or []
        log_probs += [one["logprob"] for one in (choice.get("logprobs") or {}).get("content") or []]
        reason = choice.get("finish_reason")
    assert reason, "no chunk has a finish_reason"
    return Answer(last["id"], prompt, tokens, text, reason, last["usage"], log_probs)
