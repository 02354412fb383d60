"""The plugin's environment variables: published names and defaults, older aliases, and what is refused."""

from __future__ import annotations

import os

import pytest

from triattention.errors import TriAttentionError
from triattention.vllm.runtime.settings import enabled, read_settings

PUBLISHED = {
    "KV_BUDGET": 2048, "DIVIDE_LENGTH": 128, "PROTECT_PREFILL": False, "PRUNING_MODE": "per_head", "MODEL_PATH": None,
    "SPARSE_SCORE_AGGREGATION": "mean", "SPARSE_NORMALIZE_SCORES": True, "INCLUDE_PREFILL_IN_BUDGET": True,
    "LAYER_PERHEAD_AGGREGATION": "max", "DISABLE_MLR": False, "DISABLE_TRIG": False, "DISABLE_COMPRESSION": False,
    "LOG_DECISIONS": True, "REQUIRE_TRITON_SCORING": True, "ENABLE_EXPERIMENTAL_KV_COMPACTION": True,
    "ENABLE_EXPERIMENTAL_BLOCK_RECLAIM": True, "PATCH_SCHEDULER": True, "PATCH_WORKER": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("TRIATTN_RUNTIME_", "TRIATTENTION_")):
            monkeypatch.delenv(name)


def test_every_published_variable_has_its_default() -> None:
    settings = read_settings()
    assert {name: getattr(settings, name.lower()) for name in PUBLISHED} == PUBLISHED
    assert settings.window == 128
    assert settings.sparse_stats_path == "auto"
    assert settings.notes() == []


def test_every_variable_is_read_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "KV_BUDGET": "500", "DIVIDE_LENGTH": "10", "WINDOW_SIZE": "7", "PROTECT_PREFILL": "true",
        "SPARSE_STATS_PATH": "f", "PRUNING_MODE": "per_layer_perhead", "SPARSE_SCORE_AGGREGATION": "max",
        "SPARSE_NORMALIZE_SCORES": "0",
        "INCLUDE_PREFILL_IN_BUDGET": "no", "LAYER_PERHEAD_AGGREGATION": "mean", "DISABLE_MLR": "1", "DISABLE_TRIG": "1",
        "DISABLE_COMPRESSION": "true", "LOG_DECISIONS": "false", "PATCH_SCHEDULER": "false", "PATCH_WORKER": "false",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"TRIATTN_RUNTIME_{name}", value)
    settings = read_settings()
    assert {name: getattr(settings, name.lower()) for name in values} == {
        "KV_BUDGET": 500, "DIVIDE_LENGTH": 10, "WINDOW_SIZE": 7, "PROTECT_PREFILL": True, "SPARSE_STATS_PATH": "f",
        "PRUNING_MODE": "per_layer_per_head", "SPARSE_SCORE_AGGREGATION": "max", "SPARSE_NORMALIZE_SCORES": False,
        "INCLUDE_PREFILL_IN_BUDGET": False, "LAYER_PERHEAD_AGGREGATION": "mean", "DISABLE_MLR": True,
        "DISABLE_TRIG": True, "DISABLE_COMPRESSION": True, "LOG_DECISIONS": False, "PATCH_SCHEDULER": False,
        "PATCH_WORKER": False,
    }  # fmt: skip


def test_older_names_work_and_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("KV_BUDGET", "300"), ("DIVIDE_LENGTH", "30"), ("WINDOW_SIZE", "3"), ("STATS_PATH", "old.pt")):
        monkeypatch.setenv(f"TRIATTENTION_{name}", value)
    monkeypatch.setenv("TRIATTENTION_QUIET", "1")
    monkeypatch.setenv("TRIATTN_RUNTIME_DIVIDE_LENGTH", "60")
    settings = read_settings()
    assert (settings.kv_budget, settings.divide_length, settings.window) == (300, 60, 3)
    assert settings.sparse_stats_path == "old.pt"
    assert not settings.log_decisions


def test_a_budget_below_256_leaves_half_of_it_to_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIATTN_RUNTIME_KV_BUDGET", "64")
    assert read_settings().window == 32


def test_a_variable_without_effect_is_accepted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIATTN_RUNTIME_REQUIRE_TRITON_SCORING", "false")
    assert read_settings().notes() == [
        "TRIATTN_RUNTIME_REQUIRE_TRITON_SCORING is accepted but has no effect: keys are always scored by the Triton "
        "kernel on a GPU and by PyTorch elsewhere"
    ]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("TRIATTN_RUNTIME_WINDOW", "3", "TRIATTN_RUNTIME_WINDOW is not a setting of this plugin; the most similar"),
        ("triattn_runtime_kv_bugdet", "3", "the most similar one is TRIATTN_RUNTIME_KV_BUDGET"),
        (
            "TRIATTN_RUNTIME_PRUNING_MODE",
            "union",
            "TRIATTN_RUNTIME_PRUNING_MODE is 'union': Input should be 'per_head'",
        ),
        ("TRIATTENTION_KV_BUDGET", "many", "TRIATTENTION_KV_BUDGET is 'many': Input should be a valid integer"),
        ("TRIATTN_RUNTIME_KV_BUDGET", "0", "the KV budget is 0; it must be at least 1 token"),
        ("TRIATTN_RUNTIME_LAYER_PERHEAD_AGGREGATION", "mean", "is for the mode per_layer_per_head only; unset it"),
    ],
)
def test_what_cannot_be_honoured_names_variable_value_and_next_step(
    name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(TriAttentionError) as caught:
        read_settings()
    assert sentence in str(caught.value)


def test_the_switch_is_on_unless_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENABLE_TRIATTENTION", raising=False)
    assert enabled()
    monkeypatch.setenv("ENABLE_TRIATTENTION", "0")
    assert not enabled()
