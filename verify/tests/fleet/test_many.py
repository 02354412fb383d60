"""The requests of fleet runs, and what is made of what the nodes hand over. No cluster is needed."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from verify.cli import main
from verify.errors import ConfigurationError, Exit
from verify.fleet import link
from verify.fleet.many import FleetRequest, Shown
from verify.fleet.results import exit_code, taken
from verify.record.absences import read
from verify.run.request import RunRequest
from verify.tests.fleet.pretended import main as pretend

ADDRESS = "10.0.0.5:6379"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "sm91"], "'sm91' is not a GPU architecture that this suite covers"),
        (["--subject", "../mine"], "--subject ../mine is a path, which means nothing on another machine"),
        (["--phases", "9"], "'9' is not a phase"),
        (["--wait", "-1"], "--wait -1 and --limit 360 must be"),
        (["--limit", "0"], "--wait 60 and --limit 0 must be"),
        (["--seed", "-1"], "seed -1 is out of range"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fleet", "run", "--address", ADDRESS, *words]) == Exit.CANNOT
    assert sentence in capsys.readouterr().err


def test_a_node_is_given_the_options_of_the_run(tmp_path: Path) -> None:
    asked = RunRequest(
        phases=(1, 4), expression="hard", subject="module:theirs", profile="scorer", seed=5, out=tmp_path
    )
    request = FleetRequest(ADDRESS, asked, ("sm90", "emulated"))
    own = ["--phases", "1,4", "-m", "hard", "--profile", "scorer", "--subject", "module:theirs", "--seed", "5"]
    assert request.command("sm90") == ["-m", "verify", "run", "--expect", "sm90", *own]
    assert request.command("emulated") == ["-m", "verify", "run", "--device", "cpu", *own]
    assert [request.job(target)["gpus"] for target in request.gpus] == [1, 0]


@pytest.mark.parametrize(
    ("address", "place"),
    [("10.0.0.5:6379", ("10.0.0.5", 6379)), ("head", ("head", 6379)), ("ray://head", ("head", 10001))],
)
def test_an_address_has_a_host_and_a_port(address: str, place: tuple[str, int]) -> None:
    assert link._place(address) == place


@pytest.mark.parametrize("address", ["", "a/b", "head:port", "head:70000", "http://head:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="use HOST:PORT, ray://HOST:PORT, or local"):
        link._place(address)


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([0, 1], 1), ([1, 3], 1), ([0, 3], 3), ([1, 2, 3], 2), ([0, 4], 4), ([0, -9], 3), ([], 3)],
)
def test_the_exit_code_is_the_worst(codes: list[int], code: int) -> None:
    assert exit_code(codes) == code


def _result(folder: Path, code: int = 0) -> dict[str, Any]:
    files = {
        path.relative_to(folder).as_posix(): base64.b64encode(path.read_bytes()).decode()
        for path in folder.glob("*/*.json")
    }
    return {"code": code, "files": files, "tail": "one\nthe last line"}


def test_a_sound_record_is_kept(tmp_path: Path) -> None:
    pretend("sm90", 0, tmp_path, tmp_path / "node")
    ended = taken("sm90", _result(tmp_path / "node", 1), tmp_path / "out")
    assert (ended.code, ended.folder) == (1, tmp_path / "out" / "20261101T031700Z-sm90-beef")
    assert [path.name for path in ended.folder.iterdir()] == ["record.json"]


def test_a_record_that_is_refused_is_an_absence(tmp_path: Path) -> None:
    pretend("sm90", 0, tmp_path, tmp_path / "node")
    (path,) = (tmp_path / "node").glob("*/record.json")
    whole = json.loads(path.read_text())
    other = taken("sm120", _result(tmp_path / "node"), tmp_path / "other")
    assert other.said == "sm120: INVALID, the record of the job was refused: it is a record of sm90"
    path.write_text(json.dumps({**whole, "results": whole["results"][1:]}))
    ended = taken("sm90", _result(tmp_path / "node"), tmp_path / "out")
    assert ended.code == Exit.CANNOT
    assert "must-pass on sm90 and has no result" in ended.said
    assert [path.name for path in (tmp_path / "out").glob("*/*")] == ["absence.json"]


@pytest.mark.parametrize(
    ("code", "why"),
    [(3, "verify run ended with exit code 3: the last line"), (None, "verify run took longer than its limit")],
)
def test_a_run_without_a_record_is_an_absence_with_its_last_line(code: int | None, why: str, tmp_path: Path) -> None:
    ended = taken("sm90", {"code": code, "files": {}, "tail": "one\nthe last line"}, tmp_path)
    (absence,), problems = read(tmp_path.glob("*/absence.json"))
    assert (absence.absence, absence.target, absence.why, problems) == ("NO_RECORD", "sm90", why, [])
    assert (ended.code, ended.folder) == (Exit.CANNOT, next(tmp_path.iterdir()))


def test_a_file_outside_its_run_is_refused(tmp_path: Path) -> None:
    content = base64.b64encode(b"{}").decode()
    result = {"code": 0, "files": {"../record.json": content}, "tail": ""}
    with pytest.raises(ConfigurationError, match="which is not one of a run"):
        taken("sm90", result, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_is_shown_when_the_phase_changes_and_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    time_s = 0.0
    shown = Shown(lambda: time_s)

    def say(words: str, *notes: str) -> str:
        shown.show({"words": {"sm90": words}, "notes": [*notes], "done": []})
        return capsys.readouterr().out

    assert say("node 1: phase 4, 1 of 9") == "sm90: node 1: phase 4, 1 of 9\n"
    time_s = 29.0
    assert say("node 1: phase 4, 5 of 9") == ""
    time_s = 31.0
    assert say("node 1: phase 4, 6 of 9", "one") == "note: one\nsm90: node 1: phase 4, 6 of 9\n"
    assert say("node 1: phase 5, 7 of 9", "one") == "sm90: node 1: phase 5, 7 of 9\n"
