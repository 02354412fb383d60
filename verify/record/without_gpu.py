"""The rules for records that were made without the target's GPU: compilations ahead of time, and simulations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from verify.checks import Check, CheckSpec
from verify.record.simulation import MODES, UNSUPPORTED

Json = dict[str, Any]
Found = Iterator[tuple[str, str]]

_SHA256, _WORD = re.compile(r"[0-9a-f]{64}"), re.compile(r"(0x)?[0-9a-fA-F]+")


#: The phases with checks that launch kernels and need nothing else of a GPU.
SIMULATED_PHASES = frozenset({3, 4, 5, 6})
#: The checks of phase 6 among them: a few rounds of tiny models.
_ROUNDS = frozenset({"p6.rope", "p6.bfloat16"})


def can_be_simulated(spec: CheckSpec) -> bool:
    """Whether a simulated run selects a check."""
    return spec.phase in SIMULATED_PHASES and not spec.needs_gpu and (spec.phase != 6 or spec.family in _ROUNDS)


def must_have(spec: CheckSpec, kind: str, phases: Collection[int], *, gap: bool = False) -> bool:
    """Whether a record of this kind of evidence must have a result of a must-pass check of its target.

    A compilation must have those of phase 3, unless there is a ``gap`` in its toolchain; a simulation those that can be
    simulated, of the ``phases`` that it has results of; any other record must have all.
    """
    if kind == "compiled":
        return not gap and spec.phase == 3
    return kind != "simulated" or (can_be_simulated(spec) and spec.phase in phases)


def kind_of(record: Json) -> str:
    """The evidence that a record was made for."""
    if record.get("compilation"):
        return "compiled"
    if record.get("simulation"):
        return "simulated"
    return "emulated" if record["target"] == "emulated" else "hardware"


def bad_digest(name: str, value: str) -> Found:
    if not _SHA256.fullmatch(value) or len(set(value)) == 1:
        yield "", f"{name} {value!r} is not a SHA-256"


def without_gpu(record: Json) -> Iterator[str]:
    """Whether a record that no GPU made names none, and is for the architecture of its target."""
    for part, what in (("compilation", "compiled"), ("simulation", "simulated")):
        if not (made := record.get(part)):
            continue
        if (gpu := record["environment"]["gpu"]) is not None:
            yield f"was {what} without a GPU, but the environment has the GPU {gpu['name']}"
        if f"sm{made['sm']}" != record["target"]:
            yield f"target is {record['target']}, but the {part} is for sm{made['sm']}"


def builds(record: Json, known: Mapping[str, Check]) -> Found:
    """Whether the results of a compilation follow from its builds."""
    compilation = record.get("compilation")
    if not compilation:
        return
    for build in compilation["builds"]:
        built = build["verdict"] == "OK"
        if built != bool(build["resources"] and build["cubin_sha256"] and build["ptx_sha256"]):
            yield (
                "",
                f"the build of {build['kernel']} for {build['variants'][0]} is {build['verdict']} but has "
                + ("no digest or no resources" if built else "a digest or resources"),
            )
    for result in record["results"]:
        one = known.get(result["id"])
        if one is None or one.spec.ahead_of_time or result["verdict"] != "PASS":
            continue
        own = [build for build in compilation["builds"] if one.case in build["variants"]]
        for kernel in {build["kernel"] for build in own} or {None}:
            # the autotuner drops a configuration that does not build if another one does
            verdicts = {build["verdict"] for build in own if build["kernel"] == kernel}
            if "OK" not in verdicts or one.case in compilation["unlaunched"]:
                yield one.id, f"PASS, but {kernel or 'a kernel'} of {one.case} was not built"


def simulation(record: Json, known: Mapping[str, Check]) -> Found:
    """Whether a simulation executed kernels and says how, and whether only its results claim that."""
    made = record.get("simulation")
    for result in record["results"]:
        if result["code"] == UNSUPPORTED:
            if not made:
                yield result["id"], "SKIP(SIM_UNSUPPORTED), but the record has no simulation"
            elif not result["message"]:
                yield result["id"], "SKIP(SIM_UNSUPPORTED) without a message that names the instruction"
    if not made:
        return
    if record.get("compilation"):
        yield "", "has both a compilation and a simulation"
    yield from bad_digest("simulation.simulator_sha256", made["simulator_sha256"])
    if not made["modes"] or not {*made["modes"]} <= {*MODES}:
        yield "", f"simulation.modes is {made['modes']}, but must name one or more of {', '.join(MODES)}"
    if bad := [word for word in made["poisons"] if not _WORD.fullmatch(word)]:
        yield "", f"simulation.poisons has {bad[0]!r}, which is not a hexadecimal word"
    if not made["not_executed"]:
        yield "", "simulation.not_executed is empty, but no simulation executes ptxas or the card"
    for one in made["kernels"]:
        yield from bad_digest(f"the digest of the PTX of {one['kernel']}", one["ptx_sha256"])
        if (one.get("census") is None) != bool(one.get("uncounted")):
            yield "", f"{one['kernel']} must have either a census or the reason why it is uncounted"
    times = Counter((one["kernel"], one["ptx_sha256"]) for one in made["kernels"])
    yield from (("", f"the simulation has {name} {number} times") for (name, _), number in times.items() if number > 1)
    executed = sum(one["thread_instructions"] for one in made["kernels"])
    for result in record["results"]:
        if result["evidence"] == "simulated" and result["code"] != UNSUPPORTED and not made["kernels"]:
            yield result["id"], "is simulated, but the simulation has no kernel"
        elif result["evidence"] == "simulated" and result["verdict"] == "PASS" and not executed:
            yield result["id"], "PASS, but the simulation executed no instruction"
