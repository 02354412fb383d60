"""How the published compressor is called: what counts as refused, and what its result must look like."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from verify.errors import Refused, SubjectLacks
from verify.judge.compressing import Compressor
from verify.judge.compressor import Caches, make_caches
from verify.judge.problems import OFFSETS_17
from verify.subject.subject import Subject

_USUAL = """
class TriAttentionCompressor:
    def __init__(self, config):
        self.config = config

    def compress(self, keys, values, cache_positions=None, layer_idx=0):
        {body}
        kept = torch.arange(48)
        return keys[:, :, :48], values[:, :, :48], {indices}
"""


@pytest.fixture
def subject(tmp_path: Path) -> Iterator[Callable[..., Subject]]:
    """Makes a subject with only a compressor, which keeps the first 48 tokens."""
    package = f"compressing_{tmp_path.name}".replace("-", "_")

    def make(body: str = "pass", indices: str = "kept", config: str = "", source: str = _USUAL) -> Subject:
        core = tmp_path / package / "vllm" / "core"
        core.mkdir(parents=True)
        for folder in (core, core.parent, core.parent.parent):
            (folder / "__init__.py").touch()
        (core / "compressor.py").write_text("import torch\n" + source.format(body=body, indices=indices))
        if config:
            (core / "config.py").write_text(textwrap.dedent(config))
        found = Subject(name=str(tmp_path), root=tmp_path, source="checkout:x", package=package)
        found.activate()
        return found

    yield make
    sys.path.remove(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _caches(tmp_path: Path, rows: int = 1, group: int = 2) -> Caches:
    folder = tmp_path / "caches"
    folder.mkdir(exist_ok=True)
    return make_caches(folder, 0, "cpu", tokens=64, rows=rows, group=group)


def test_a_subject_without_configuration_gets_the_published_fields(subject: Callable, tmp_path: Path) -> None:
    caches = _caches(tmp_path)
    kept = Compressor.of(subject("assert self.config.kv_budget == 48"), caches).compress(
        caches.keys[0], caches.values[0]
    )
    assert kept.count == 48
    assert kept.mask(0)[:, :48].all()


def test_no_compressor_or_no_such_option_is_absent(subject: Callable, tmp_path: Path) -> None:
    config = """
    class TriAttentionConfig:
        def __init__(self, kv_budget=2048, divide_length=128):
            self.kv_budget = kv_budget
    """
    found, caches = subject(config=config), _caches(tmp_path)
    assert Compressor.of(found, caches).compress(caches.keys[0], caches.values[0]).count == 48
    with pytest.raises(SubjectLacks, match="TriAttentionConfig takes no parameter disable_mlr"):
        Compressor.of(found, caches, disable_mlr=True)
    with pytest.raises(SubjectLacks, match="no method reset"):
        Compressor.of(found, caches).reset()


def test_a_refusal_counts_if_the_plain_call_is_accepted(subject: Callable, tmp_path: Path) -> None:
    found = subject("if keys.shape[0] > 1: raise ValueError('one row only')")
    caches = _caches(tmp_path, rows=2)
    with pytest.raises(Refused, match=r"rows=2: refused at .*one row only") as refused:
        Compressor.of(found, caches).compress(caches.keys[0], caches.values[0])
    assert refused.value.aspect == "rows=2"


def test_what_refuses_everything_refuses_nothing(subject: Callable, tmp_path: Path) -> None:
    caches = _caches(tmp_path, rows=2)
    with pytest.raises(ValueError, match="never"):
        Compressor.of(subject("raise ValueError('never')"), caches).compress(caches.keys[0], caches.values[0])


def test_a_crash_is_no_refusal(subject: Callable, tmp_path: Path) -> None:
    found, caches = subject("keys.reshape(1, -1, 7)"), _caches(tmp_path, rows=2)
    with pytest.raises(RuntimeError, match="shape"):
        Compressor.of(found, caches).compress(caches.keys[0], caches.values[0])


def test_groups_of_query_heads_may_be_refused(subject: Callable, tmp_path: Path) -> None:
    body = "if len(torch.load(self.config.stats_path)['stats']) > 4: raise ValueError('no groups')"
    found = subject(body)
    for options in ({}, {"disable_mlr": True}):
        caches = _caches(tmp_path)
        with pytest.raises(Refused) as refused:
            Compressor.of(found, caches, **options).compress(caches.keys[0], caches.values[0])
        assert refused.value.aspect == "group=2"


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"g": (1, 4)}, "g=2"), ({"b": (2,)}, "b=1"), ({"d": (128,)}, "d=64"),
        ({"dtype": ("bfloat16",)}, "dtype=float32"), ({"strides": ("sliced",)}, "strides=contiguous"),
        ({"offsets": (OFFSETS_17,)}, "7 offsets"), ({"aggregation": ("mean",)}, "aggregation=max"),
    ],
)  # fmt: skip
def test_caches_outside_what_is_declared_are_refused_and_never_scored(
    declared: dict[str, tuple[Any, ...]], told: str, subject: Callable, tmp_path: Path
) -> None:
    found, caches = replace(subject("raise AssertionError('called')"), narrowed=declared), _caches(tmp_path)
    with pytest.raises(Refused) as refused:
        Compressor.of(found, caches, score_aggregation="max").compress(caches.keys[0], caches.values[0])
    assert refused.value.aspect == told


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        ("kept[:40]", r"48 keys came back with indices of shape \[40\]"),
        ("kept + 17", "the indices are from 17 to 64, but there are 64 tokens"),
        ("kept.clamp(min=1)", "row 0, KV head 0 keeps a token twice"),
        ("kept.expand(3, 48)", r"the indices have shape \[3, 48\], expected \[1, 2, 48\]"),
        ("list(range(48))", "compress returned Tensor, Tensor, list"),
    ],
)
def test_a_result_that_does_not_fit_together_is_told(
    indices: str, told: str, subject: Callable, tmp_path: Path
) -> None:
    caches = _caches(tmp_path)
    with pytest.raises(AssertionError, match=told):
        Compressor.of(subject(indices=indices), caches).compress(caches.keys[0], caches.values[0])


@pytest.mark.parametrize("indices", ["kept", "kept.expand(1, 48)", "kept.expand(2, 48)", "kept.expand(1, 2, 48)"])
def test_indices_may_be_shared_by_heads(indices: str, subject: Callable, tmp_path: Path) -> None:
    caches = _caches(tmp_path)
    kept = Compressor.of(subject(indices=indices), caches).compress(caches.keys[0], caches.values[0])
    assert torch.equal(kept.indices, torch.arange(48).expand(1, 2, 48))
