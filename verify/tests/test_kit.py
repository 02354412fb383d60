"""The kit for machines without a network: how it is made, and how it starts."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ci.kit import build, start
from ci.kit.build import KitError, needed, target_environment
from verify import files
from verify.errors import ConfigurationError
from verify.record.reading import read_record
from verify.tests.samples import REPOSITORY

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_a_kit_has_what_a_run_needs_but_neither_torch_nor_the_libraries_of_cuda() -> None:
    found = needed(["triattention-verify[verify,hf]"], target_environment("3.12", "x86_64"), ("torch", "triton"))
    assert {"pytest", "pytest-timeout", "pydantic", "rich", "transformers", "nvidia-ml-py", "gguf"} <= found.keys()
    assert {"torch", "triton"}.isdisjoint(found)
    smaller = needed(["triattention-verify[verify,hf]"], target_environment("3.12", "x86_64"), ("torch", "datasets"))
    assert found.keys() - smaller.keys() >= {"datasets", "pyarrow", "pandas"}
    assert [name for name in found if name.startswith("nvidia-")] == ["nvidia-ml-py"]


def test_the_markers_of_the_other_machine_decide() -> None:
    for machine, version in (("x86_64", "3.11"), ("aarch64", "3.13")):
        markers = target_environment(version, machine)
        assert (markers["platform_machine"], markers["python_version"]) == (machine, version)


def test_a_package_that_is_not_installed_here_is_named() -> None:
    with pytest.raises(KitError, match=r"no-such-package is not installed here, .*; run make setup"):
        needed(["no-such-package"], target_environment("3.12", "x86_64"), ())


def test_parts_are_no_larger_than_asked_and_join(tmp_path: Path) -> None:
    whole = tmp_path / "kit.tar"
    whole.write_bytes(os.urandom(2500))
    parts = [*build._split(whole, 1000)]
    assert [path.stat().st_size for path in parts] == [1000, 1000, 500]
    assert b"".join(path.read_bytes() for path in sorted(tmp_path.glob("kit.tar.part*"))) == whole.read_bytes()


def test_a_kit_over_its_limit_names_the_largest_packages(tmp_path: Path) -> None:
    (tmp_path / "large.whl").write_bytes(bytes(2 * 2**20))
    with pytest.raises(KitError, match=r"take 2 MiB, the limit is 1; largest: large\.whl 2"):
        build._must_be_small(tmp_path, 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--python", "2.7"], "--python 2.7 is not a Python that the suite runs on; use 3.11 or newer"),
        (["--part-mib", "0"], "--part-mib 0 is no size; use 1 or more"),
    ],
)
def test_a_kit_that_cannot_be_made_says_why(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(words) == 3
    assert capsys.readouterr().err == f"kit: {told}\n"


def test_uncommitted_changes_would_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True, timeout=60)
    (tmp_path / "new.py").touch()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(KitError, match=r"would not have the uncommitted change of new\.py; commit it"):
        build._commit()


#: A suite that prints what it was asked, or a variable of its environment.
_ASKED = """\
import os, sys, small
print(small.WORD, sys.argv[1:] if sys.argv[1] != "doctor" else {name: os.environ.get(name) for name in sys.argv[2:]})
"""


def _kit(folder: Path, **about: object) -> Path:
    """A kit with one small package for this interpreter, and a suite that prints what it was asked."""
    (folder / "wheels").mkdir(parents=True)
    (folder / "source" / "verify").mkdir(parents=True)
    (folder / "source" / "verify" / "__main__.py").write_text(_ASKED)
    (folder / "source" / "verify" / "__init__.py").touch()
    small, own = "small-1.0-py3-none-any.whl", "own-1.0-py3-none-any.whl"
    for name in (small, own):
        _write_wheel(folder / "wheels" / name)
    (pip,) = (path for path in (Path(_ensured()) / "_bundled").glob("pip-*.whl"))
    (folder / "wheels" / pip.name).write_bytes(pip.read_bytes())
    sums = {path.name: build._sha256(path) for path in (folder / "wheels").iterdir()}
    whole = {"python": HERE, "machine": os.uname().machine, "torch": "pinned", "pip": pip.name, "project": own}
    (folder / "kit.json").write_text(json.dumps({**whole, "wheels": sums, **about}))
    (folder / "python-version").write_text(f"{HERE}\n")
    for name in ("run", "start.py"):
        (folder / name).write_bytes((REPOSITORY / "ci" / "kit" / name).read_bytes())
    (folder / "run").chmod(0o755)
    return folder


def _ensured() -> str:
    module: ModuleType = importlib.import_module("ensurepip")
    assert module.__file__ is not None
    return str(Path(module.__file__).parent)


def _write_wheel(path: Path) -> None:
    name = path.name.partition("-")[0]
    files = {
        f"{name}.py": "WORD = 'small is here'\n",
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{name}-1.0.dist-info/RECORD"] = "".join(f"{one},,\n" for one in files)
    with zipfile.ZipFile(path, "w") as content:
        for one, text in files.items():
            content.writestr(one, text)


def _started(kit: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(kit / "run"), *words], env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def used() -> Iterator[Path]:
    """A kit that has installed its packages, in a folder with a short path, as the sockets in it need."""
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as folder:
        kit = _kit(Path(folder) / "kit")
        assert _started(kit, "gates").returncode == 0
        yield kit


def test_a_kit_installs_itself_once_whatever_pip_is_set_to_and_passes_on_what_it_is_asked(tmp_path: Path) -> None:
    kit = _kit(tmp_path / "a kit")
    (tmp_path / "constraints.txt").write_text("small==2.0\n")
    (tmp_path / "pip.conf").write_text("[install]\nuser = true\n")
    # which are of no concern to a kit
    settings = {"PIP_CONSTRAINT": str(tmp_path / "constraints.txt"), "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    first = _started(kit, "-m", "hard", PIP_USER="1", PIP_REQUIRE_VIRTUALENV="1", **settings)
    second = _started(kit, "gate", "--contract", "npd")
    records = str(kit / "records")
    assert first.stdout == f"small is here {['run', '-m', 'hard', '--out', records]}\n"
    assert first.stderr == "kit: installing its packages\n"
    assert (second.stdout, second.stderr) == ("small is here ['gate', '--contract', 'npd']\n", "")
    (site,) = _sites(kit)
    assert (site / "own-1.0.dist-info").is_dir()
    assert not (site / "own.py").exists()
    assert _started(kit, "report", "--records", "x").stdout == "small is here ['report', '--records', 'x']\n"


def _sites(kit: Path) -> list[Path]:
    return sorted(path for path in kit.glob("site*") if path.is_dir())


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n\n",
            "Could not install packages due to an OSError: [Errno 28] No space left on device; free some disk space",
        ),
        ("ERROR: x.whl is not a supported wheel on this platform.\nnote\n", "; make a kit for this machine"),
        ("[Errno 30] Read-only file system: '/kit'", "; copy the kit to a folder that you can write"),
        ("ERROR: bad", "its packages cannot be installed: bad; carry the kit again, or make it again"),
        ("", "pip said nothing; carry the kit again"),
    ],
)
def test_the_next_step_fits_what_pip_says(said: str, told: str) -> None:
    assert told in start._complaint(said)


def test_each_interpreter_has_packages_of_its_own(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"wheels": {}, "pip": "", "project": ""}
    monkeypatch.setattr(start, "_install", lambda about, wanted, site, places: site.mkdir())
    first = start._installed(about, {})
    (first / "in use").touch()
    monkeypatch.setattr(sys, "prefix", "/another")
    other = start._installed(about, {})
    assert _sites(kept) == sorted([first, other])
    assert (first / "in use").exists()
    assert start._installed({**about, "wheels": {"a.whl": "0"}}, {}) not in (first, other)


def test_nothing_of_the_kit_is_written_by_another_user(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"wheels": {}, "pip": "", "project": ""}
    monkeypatch.setattr(start, "_install", lambda about, wanted, site, places: site.mkdir())
    site = start._installed(about, {})
    _may_only_read(monkeypatch)
    assert start._places() == {}
    assert start._installed(about, {}) == site
    assert start._with_records(["run", "--out", "mine"]) == ["run", "--out", "mine"]
    with pytest.raises(
        start.KitError, match=r"records cannot be written; name a folder of yours: \./run run --out DIR"
    ):
        start._with_records(["run"])
    monkeypatch.setattr(sys, "prefix", "/another")
    with pytest.raises(
        start.KitError, match=r"are not installed for .* yet, .*; let its owner call \./run doctor once"
    ):
        start._installed(about, {})


def _may_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who may write anywhere."""

    def refused(path: Path, *rest: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(start, "_writable", lambda folder: False)


def test_a_verb_that_needs_no_records_makes_no_folder_for_them(kept: Path) -> None:
    for words in (["gates"], ["explain", "p1"], ["run", "--out", "mine"], ["run", "--help"], ["report", "--records=x"]):
        assert start._with_records(words) == words
    with pytest.raises(start.KitError, match=r"records has no records yet; run the checks first, or name a folder: "):
        start._with_records(["report"])
    assert not (kept / "records").exists()
    assert start._with_records(["run"]) == ["run", "--out", str(kept / "records")]
    assert start._with_records(["explain", "p1"]) == ["explain", "p1", "--records", str(kept / "records")]


def test_the_id_of_a_run_is_found_below_the_records(kept: Path) -> None:
    run = kept / "records" / "20260801T1"
    run.mkdir(parents=True)
    for verb in ("check", "pack", "export"):
        assert start._with_records([verb, run.name]) == [verb, str(run)]
        for other in ("another", f"x/{run.name}", ""):
            assert start._with_records([verb, other]) == [verb, other]
    assert start._with_records(["diff", run.name]) == ["diff", str(run), "--records", str(run.parent)]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit's folder, in which the functions of ``start`` work in this process."""
    for name in ("RECORDS", "CACHE", "_TEMPORARY", "KIT"):
        monkeypatch.setattr(start, name, tmp_path / getattr(start, name).relative_to(start.KIT))
    return tmp_path


def test_what_a_run_leaves_is_below_the_kit_unless_the_user_names_a_place(used: Path, tmp_path: Path) -> None:
    names = [*start._CACHES, "TMPDIR", "TRIATTENTION_ROOT"]
    clean = {name: value for name, value in os.environ.items() if name not in names}
    told = subprocess.run(
        [str(used / "run"), "doctor", *names], env={**clean, "PYTHON": sys.executable, "TRITON_CACHE_DIR": "mine"},
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    ).stdout  # fmt: skip
    found = ast.literal_eval(told.removeprefix("small is here "))
    assert found.pop("TRITON_CACHE_DIR") == "mine"
    assert found.pop("TRIATTENTION_ROOT") == str(used / "source")
    assert Path(found["TMPDIR"]).is_dir()
    assert [name for name, place in found.items() if not Path(place).is_relative_to(used)] == []


def test_the_temporary_folder_is_elsewhere_where_a_socket_in_it_would_have_too_long_a_path(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(start, "_TEMPORARY", kept / ("x" * start._TEMPORARY_LENGTH))
    assert "TMPDIR" not in start._places()


def test_neither_a_kit_nor_its_children_use_the_suite_of_the_current_folder(used: Path, tmp_path: Path) -> None:
    for place in ("verify", "small"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "__init__.py").write_text("WORD = 'another'\n")
    child = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'verify', 'as a child'], check=True)"
    (used / "source" / "verify" / "parent.py").write_text(child)
    asked = {**os.environ, **start._environment(used / "none", {}), "PYTHON": sys.executable}
    ended = subprocess.run(
        [str(used / "run"), "gates"], env=asked, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout == "small is here ['gates']\n"
    (site,) = _sites(used)
    asked["PYTHONPATH"] = os.pathsep.join([str(used / "source"), str(site)])
    ended = subprocess.run(
        [sys.executable, "-m", "verify.parent"], env=asked, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout == "small is here ['as a child']\n"


def test_the_root_is_the_one_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "named"):
        (tmp_path / name / "phases").mkdir(parents=True)
        (tmp_path / name / "phases" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert files.repository_root() == tmp_path / "here"
    monkeypatch.setenv(files.ROOT_VARIABLE, str(tmp_path / "named"))
    assert files.repository_root() == tmp_path / "named"
    monkeypatch.setenv(files.ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"TRIATTENTION_ROOT is .*, which has no phases/; name a checkout"):
        files.repository_root()


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"python": "3.99"}, rf"its packages are for Python 3\.99, and .* is {HERE}"),
        ({"machine": "riscv64"}, "its packages are for riscv64, and this is .*; make one with MACHINE="),
        ({"torch": "installed"}, "it has no torch, and neither has .*; name the Python that has it: PYTHON="),
    ],
    ids=["python", "machine", "torch"],
)
def test_a_kit_that_does_not_fit_the_machine_says_so(tmp_path: Path, about: dict[str, object], told: str) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=60)
    ended = _started(_kit(tmp_path / "kit", **about), PYTHON=str(bare / "bin" / "python"), PYTHONPATH="")
    assert ended.returncode == 3
    assert ended.stderr.startswith("kit: ")
    assert len(ended.stderr.splitlines()) == 1
    assert re.search(told, ended.stderr)


def test_an_interpreter_may_have_spaces_in_its_path(used: Path, tmp_path: Path) -> None:
    python = tmp_path / "my python" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert _started(used, "gates", PYTHON=str(python)).stdout == "small is here ['gates']\n"


def test_another_python_is_asked_for(tmp_path: Path) -> None:
    kit = _kit(tmp_path / "kit")
    (kit / "python-version").write_text("3.99\n")
    ended = _started(kit)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "its packages are for Python 3.99, which" in ended.stderr
    assert ended.stderr.endswith("name one: PYTHON=/path/to/python3.99 ./run\n")


def test_a_damaged_wheel_is_named_and_nothing_is_installed(tmp_path: Path) -> None:
    kit = _kit(tmp_path / "kit")
    (kit / "wheels" / "small-1.0-py3-none-any.whl").write_bytes(b"cut off")
    ended = _started(kit)
    assert ended.returncode == 3
    assert "wheels/small-1.0-py3-none-any.whl is missing or damaged; carry the kit again" in ended.stderr
    assert not _sites(kit)


@pytest.mark.slow
def test_a_real_kit_runs_without_a_network(tmp_path: Path) -> None:
    """Carried in parts, joined, and run where no interface is up, with ``TRIATTENTION_KIT_PYTHON`` (an interpreter with
    torch and Triton, of any version that the suite runs on) or else with this interpreter's.
    """
    python = os.environ.get("TRIATTENTION_KIT_PYTHON", sys.executable)
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.run([python, "-c", asked], capture_output=True, text=True, timeout=60, check=True).stdout
    assert build.main(["--python", version.strip(), "--part-mib", "50", "--out", str(tmp_path)]) == 0
    parts = sorted(tmp_path.glob("*.tar.part*"))
    assert len(parts) > 1
    assert max(path.stat().st_size for path in parts) <= 50 * 2**20
    joined = parts[0].with_suffix("")
    with joined.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    subprocess.run(["sha256sum", "--quiet", "--check", joined.with_suffix(".sha256").name], cwd=tmp_path, check=True)
    subprocess.run(["tar", "xf", joined.name], cwd=tmp_path, check=True, timeout=120)
    kit = joined.with_suffix("")
    alone = ["unshare", "--net", "--map-root-user", str(kit / "run")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    clean |= {"PYTHON": python}
    options = {"env": clean, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 1800}
    run = subprocess.run([*alone, "--device", "cpu", "-m", "hard"], **options)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = (kit / "records").glob("*/record.json")
    record = read_record(path)
    assert record.environment.python.startswith(version.strip())
    assert not record.subject.dirty
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert record.subject.git_sha == commit.stdout.strip()
    checked = subprocess.run([*alone, "check", str(path)], **options)
    assert checked.returncode == 0, checked.stdout
