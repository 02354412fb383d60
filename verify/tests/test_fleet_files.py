"""The files for fleet tools, the action and the container recipe: each by its own schema, and every command exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from verify.arguments import parser
from verify.fleet.contracts import WIDTH
from verify.tests.samples import REPOSITORY, record, result, write
from verify.tests.test_bootstrap import bootstrap

FLEET, ACTION, CONTAINER = (REPOSITORY / "ci" / name for name in ("fleet", "action", "Containerfile"))
SCRIPTS = [FLEET / "slurm-prolog.sh", FLEET / "slurm-array.sbatch", ACTION / "verify.sh"]

#: An image by its content. In a file of a fleet it is filled in by its owner; until then its digest is zeros.
_BY_DIGEST = re.compile(r"[\w.:/-]+@sha256:[0-9a-f]{64}")
_TO_FILL_IN = "sha256:" + "0" * 64

#: What stands for a variable of a script.
_VARIABLES = {
    "$gpu": "0", "$EXPECT": "sm90", "$WITHIN_S": "45", "$out": "out", "$checkout": "theirs", "$target": "sm90",
    "${options[@]}": "--strict-soft",
}  # fmt: skip


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Condition(Model):
    """A condition of node-problem-detector, as its configuration is read (pkg/types)."""

    type: str
    reason: str
    message: str


class Rule(Model):
    type: Literal["temporary", "permanent"]
    condition: str = ""
    reason: str
    path: str
    args: list[str] = []
    timeout: str
    invoke_interval: str | None = None


class PluginConfig(Model):
    invoke_interval: str
    timeout: str
    max_output_length: int
    concurrency: int
    enable_message_change_based_condition_update: bool = False
    skip_initial_status: bool = False


class Plugin(Model):
    """The configuration of a custom plugin of node-problem-detector (pkg/custompluginmonitor/types)."""

    plugin: Literal["custom"]
    plugin_config: PluginConfig = Field(alias="pluginConfig")
    source: str
    metrics_reporting: bool = Field(alias="metricsReporting")
    conditions: list[Condition]
    rules: list[Rule]


class Variable(Model):
    name: str
    value: str


class Resources(Model):
    cpu: str = ""
    memory: str = ""


class Validator(Model):
    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")  # part of a Job's name
    phase: Literal["deployment", "performance", "conformance"]
    description: str
    image: str = Field(min_length=1)
    timeout: str
    args: list[str]
    env: list[Variable]
    resources: Resources | None = None


class Metadata(Model):
    name: str
    version: str


class Catalogue(Model):
    """The catalogue of validators of NVIDIA AICR (pkg/validator/catalog)."""

    api_version: Literal["aicr.nvidia.com/v1"] = Field(alias="apiVersion")
    kind: Literal["ValidatorCatalog"]
    metadata: Metadata
    validators: list[Validator]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((FLEET / name).read_text("utf-8"))


def seconds(duration: str) -> float:
    """A duration as Go writes it."""
    parts = re.findall(r"(\d+)([hms])", duration)
    assert "".join(map("".join, parts)) == duration
    names = {"h": "hours", "m": "minutes", "s": "seconds"}
    return sum((timedelta(**{names[unit]: int(number)}) for number, unit in parts), timedelta()).total_seconds()


def within(arguments: list[str]) -> float:
    return parser().parse_args(arguments).within


def container_arguments() -> Iterator[tuple[str, list[str]]]:
    """What containers are given, whose entry point is ``triattention-verify``."""
    yield "aicr-catalog.yaml", read_yaml("aicr-catalog.yaml")["validators"][0]["args"]
    yield "nvsentinel-preflight.yaml", read_yaml("nvsentinel-preflight.yaml")["preflight"]["initContainers"][0]["args"]
    yield "job.yaml", read_yaml("job.yaml")["spec"]["template"]["spec"]["containers"][0]["args"]
    yield "Containerfile", json.loads(re.findall(r"^CMD (.*)$", CONTAINER.read_text("utf-8"), re.MULTILINE)[0])


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the suite in a file for fleets, as words after its name."""
    yield from container_arguments()
    (rule,) = json.loads((FLEET / "node-problem-detector.json").read_text("utf-8"))["rules"]
    yield "node-problem-detector.json", rule["args"]
    for script in SCRIPTS:
        found = re.findall(
            r'(?:-m verify|"\$VERIFY") (.*?)(?: *(?:[&|>]|\)?$))', script.read_text("utf-8"), re.MULTILINE
        )
        assert found, script
        for words in map(shlex.split, found):
            yield script.name, [_VARIABLES.get(word, word) for word in words]


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=f"{name}-{words[0]}-{number}") for number, (name, words) in enumerate(commands())]
)
def test_every_command_is_one_that_there_is(words: list[str]) -> None:
    # a variable that is not known here would be taken for a value
    assert not any("$" in word for word in words)
    parser().parse_args(words)


def test_no_file_is_left_out() -> None:
    named = {name for name, _ in commands()}
    assert {path.name for path in FLEET.iterdir()} <= named


def test_the_container_runs_the_suite() -> None:
    assert 'ENTRYPOINT ["triattention-verify"]' in CONTAINER.read_text("utf-8")


def test_no_file_takes_a_package_of_the_current_folder_for_the_suite() -> None:
    script = "/opt/triattention-verify/bin/triattention-verify"
    (rule,) = json.loads((FLEET / "node-problem-detector.json").read_text("utf-8"))["rules"]
    assert rule["path"] == script
    texts = {path.name: path.read_text("utf-8") for path in FLEET.iterdir()}
    assert not [name for name, text in texts.items() if "-m verify" in text or '"-m"' in text]
    assert [name for name, text in sorted(texts.items()) if f"VERIFY={script}" in text] == [
        "slurm-array.sbatch", "slurm-prolog.sh"
    ]  # fmt: skip


def test_what_the_image_needs_travels_and_what_is_made_here_does_not() -> None:
    ignored = {line for line in Path(REPOSITORY / ".dockerignore").read_text("utf-8").splitlines() if line[:1] != "#"}
    made = {line.strip("/") for line in (REPOSITORY / ".gitignore").read_text("utf-8").splitlines()}
    assert {".git", *made} <= {name.removeprefix("**/") for name in ignored}
    copied = {
        word
        for line in re.findall(r"^COPY (.*) \S+$", CONTAINER.read_text("utf-8"), re.MULTILINE)
        for word in line.split()
    }
    assert copied >= {"verify", "reports", "ci"}
    assert not copied & ignored


def test_node_problem_detector_reads_its_plugin() -> None:
    plugin = TypeAdapter(Plugin).validate_json((FLEET / "node-problem-detector.json").read_text("utf-8"))
    overall = plugin.plugin_config
    assert overall.max_output_length == WIDTH
    for rule in plugin.rules:
        # a permanent rule needs the condition that it changes, and its time must be within the overall one
        assert rule.condition in {one.type for one in plugin.conditions}
        assert within(rule.args) < seconds(rule.timeout) <= seconds(overall.timeout)
        assert seconds(overall.timeout) < seconds(overall.invoke_interval)


def test_aicr_reads_its_catalogue() -> None:
    catalogue = TypeAdapter(Catalogue).validate_json(json.dumps(read_yaml("aicr-catalog.yaml")))
    (one,) = catalogue.validators
    assert within(one.args) < seconds(one.timeout)
    assert one.args[1:3] == ["--contract", "aicr"]


def test_kubernetes_reads_the_job() -> None:
    job = read_yaml("job.yaml")
    kubernetes_validate.validate(job, "1.36", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["argz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.36", strict=True)


def test_kubernetes_reads_what_nvsentinel_makes_of_its_values() -> None:
    (one,) = read_yaml("nvsentinel-preflight.yaml")["preflight"]["initContainers"]
    # as the chart and the webhook do it
    assert isinstance(one.pop("defaultEnabled"), bool)
    one["image"] = "{repository}:{tag}".format(**one.pop("image"))
    one["resources"]["limits"]["nvidia.com/gpu"] = 1
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "theirs"},
        "spec": {"initContainers": [one], "containers": [{"name": "theirs", "image": "theirs"}]},
    }
    kubernetes_validate.validate(pod, "1.36", strict=True)
    assert _BY_DIGEST.fullmatch(one["image"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_read_by_bash(script: Path) -> None:
    child = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stderr) == (0, "")


@pytest.mark.parametrize("name", ["aicr-catalog.yaml", "job.yaml", "nvsentinel-preflight.yaml"])
def test_an_image_is_named_by_its_content(name: str) -> None:
    text = (FLEET / name).read_text("utf-8")
    # nobody has published an image yet, so none may look as if it were one
    assert text.count("registry.example.com/") == text.count(_TO_FILL_IN) == 1


PROLOG = """\
#!/bin/bash
# stands in for the suite: card 1 is wrong, card 2 takes a while, for card 3 an option is refused, for card 4 it dies
while [[ $# -gt 0 ]]; do
    if [[ $1 == --gpu ]]; then gpu=$2; fi
    shift
done
if [[ $gpu == 1 ]]; then echo "[node_problem] triattention: wrong"; exit 1; fi
if [[ $gpu == 3 ]]; then echo "[user_problem] triattention: --expect"; exit 3; fi
if [[ $gpu == 4 ]]; then exit 127; fi
sleep 0.2
echo "OK triattention: right"
"""


@pytest.mark.parametrize(
    ("gpus", "code", "reason"),
    [
        ("", 0, ""),
        ("0", 0, ""),
        ("0,2", 0, ""),
        ("0,1", 1, "[node_problem] triattention: wrong (GPU 1)"),
        ("MIG-0/1/2,0", 0, ""),
        ("3,2", 0, ""),
        ("4", 1, "[node_problem] PROGRAM ended with code 127 and gave no reason (GPU 4)"),
    ],
)
def test_the_prolog_drains_a_node_for_the_gpus_of_its_job(tmp_path: Path, gpus: str, code: int, reason: str) -> None:
    text = (FLEET / "slurm-prolog.sh").read_text("utf-8")
    tools = {
        "program": PROLOG,
        "logger": "#!/bin/bash\n",
        "scontrol": f'#!/bin/bash\nprintf "%s\\n" "$@" >> {tmp_path}/drained\n',
    }
    for name, content in tools.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    text = text.replace("/opt/triattention-verify/bin/triattention-verify", str(tmp_path / "program"))
    text = text.replace("export PATH=", f"export PATH={tmp_path}:")
    (tmp_path / "prolog.sh").write_text(text)
    child = subprocess.run(
        ["/bin/bash", str(tmp_path / "prolog.sh")], capture_output=True, text=True, timeout=60, env={
            "SLURMD_NODENAME": "node1", "SLURM_JOB_GPUS": gpus, "TMPDIR": str(tmp_path)
        },
    )  # fmt: skip
    refused = "triattention-verify: nothing was tried: [user_problem] triattention: --expect (GPU 3)\n"
    assert (child.returncode, child.stderr) == (code, refused if "3" in gpus else "")
    drained = tmp_path / "drained"
    told = drained.read_text().splitlines() if drained.exists() else []
    reason = reason.replace("PROGRAM", str(tmp_path / "program"))
    assert told == (["update", "NodeName=node1", "State=DRAIN", f"Reason={reason}"] if reason else [])
    # nothing is left behind
    assert not any(one.is_dir() for one in tmp_path.iterdir())


PYTHON = """\
#!/bin/bash
# stands in for the suite's python: its run leaves the record that is given, or none, and ends with 1
echo "$*" >> "{asked}"
if [[ $3 != run ]]; then PYTHONPATH={repository} exec {python} "$@"; fi
while [[ $# -gt 0 ]]; do
    if [[ $1 == --out ]]; then out=$2; fi
    shift
done
if [[ -n "{record}" ]]; then mkdir "$out/run"; cp "{record}" "$out/run/record.json"; fi
exit {code}
"""


def act(
    folder: Path, record_file: str, code: int, **inputs: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """The last step of the action and its outputs; the run inside ends with ``code`` and leaves ``record_file``."""
    (folder / "ci" / "action").mkdir(parents=True)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "ci" / "action" / "verify.sh").write_bytes((ACTION / "verify.sh").read_bytes())
    stub = folder / ".venv" / "bin" / "python"
    stub.write_text(
        PYTHON.format(
            repository=REPOSITORY, python=sys.executable, record=record_file, code=code, asked=folder / "asked"
        )
    )
    stub.chmod(0o755)
    variables = {"SUBJECT": ".", "DEVICE": "cpu", "PHASES": "", "PROFILE": "", "RUNNER_TEMP": str(folder)} | inputs
    variables |= {name: str(folder / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "TRIATTENTION_CACHE")}
    command = ["bash", str(folder / "ci" / "action" / "verify.sh")]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | variables)
    lines = (folder / "GITHUB_OUTPUT").read_text().splitlines()
    return child, dict(line.split("=", 1) for line in lines)


def test_the_action_annotates_a_failure_and_ends_with_its_code(tmp_path: Path) -> None:
    failed = result("p1.bf16_matmul.smoke", "FAIL", "emulated", gate="hard")
    made = record("emulated", [failed])
    theirs = made.subject.model_copy(update={"source": "checkout:theirs", "profile": "scorer"})
    record_file = write(made.model_copy(update={"subject": theirs}), tmp_path)
    child, outputs = act(tmp_path, str(record_file), 1)
    assert child.returncode == 1, child.stderr
    assert child.stdout.startswith("::error title=emulated%3A ")
    assert child.stdout.splitlines()[-1].startswith("::notice title=TriAttention::")
    assert outputs["verdict"] == "EMULATED FAIL"
    assert Path(outputs["record"]).read_bytes() == record_file.read_bytes()
    assert (tmp_path / "GITHUB_STEP_SUMMARY").read_text().startswith("# emulated: EMULATED FAIL")


def test_the_action_ends_as_a_run_that_cannot_begin(tmp_path: Path) -> None:
    child, outputs = act(tmp_path, "", 3)
    assert (child.returncode, child.stdout) == (3, "")
    assert outputs == {"verdict": "NO RECORD", "record": ""}
    assert "--expect" not in (tmp_path / "asked").read_text()


def test_the_action_asks_for_the_gpu_that_the_runner_must_have(tmp_path: Path) -> None:
    step = yaml.safe_load((ACTION / "action.yml").read_text("utf-8"))
    assert step["inputs"]["expect"]["default"] == ""
    assert step["runs"]["steps"][-1]["env"]["EXPECT"] == "${{ inputs.expect }}"
    act(tmp_path, "", 3, DEVICE="auto", EXPECT="sm90")
    assert (tmp_path / "asked").read_text().endswith(" --device auto --expect sm90\n")


def bases(recipe: str) -> list[str]:
    """The images that a recipe is built from, with the defaults of its arguments; a stage of its own is none."""
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", recipe.partition("\nFROM ")[0], re.MULTILINE))
    images, stages = [], set()
    for image, _, stage in re.findall(r"^FROM (?:--\S+ )*(\S+)( AS (\S+))?$", recipe, re.MULTILINE | re.IGNORECASE):
        named = re.sub(r"\$\{?(\w+)\}?", lambda one: defaults.get(one[1], ""), image)
        images += [named] if named not in stages else []
        stages.add(stage)
    return images


def test_every_image_of_the_recipe_is_pinned_by_its_digest() -> None:
    (base,) = bases(CONTAINER.read_text("utf-8"))
    assert _BY_DIGEST.fullmatch(base)
    assert not base.endswith(_TO_FILL_IN)


@pytest.mark.parametrize(
    "recipe",
    [
        "FROM python:3.12",
        "ARG BASE=python:3.12\nFROM ${BASE} AS base",
        "ARG BASE\nFROM $BASE",
        "FROM --platform=linux/amd64 python@sha256:0123",
        f"FROM a@{_TO_FILL_IN} AS a\nFROM a AS b\nFROM c",
    ],
)
def test_an_image_without_a_digest_is_found(recipe: str) -> None:
    assert not all(_BY_DIGEST.fullmatch(one) for one in bases(recipe))


def test_a_stage_is_none_of_the_images() -> None:
    assert bases(f"ARG F=a\nFROM x@{_TO_FILL_IN} AS a\nFROM a AS b\nFROM ${{F}}") == [f"x@{_TO_FILL_IN}"]


def test_the_recipe_has_both_flavours_with_the_pinned_torch() -> None:
    recipe = CONTAINER.read_text("utf-8")
    assert {"cpu", "cuda"} <= set(re.findall(r"^FROM \S+ AS (\w+)$", recipe, re.MULTILINE))
    assert set(re.findall(r"torch==([\d.]+)", recipe)) == {bootstrap.TORCH}
