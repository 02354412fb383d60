"""Phase 2: whether every name in the plan imports and matches the published API (plan 2.2, 2.3)."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from typing import Any

from verify import Measure, check, skip
from verify.errors import SubjectLacks, SubjectNeeds
from verify.subject.offered import unwritten
from verify.subject.published import CONFIG_DEFAULTS, NAMES, Name, signature_differs
from verify.subject.refusal import refusable
from verify.subject.subject import Subject

_BY_CASE = {name.full.replace(".", "-"): name for name in NAMES}


@check(
    "p2.names", gate="hard", plan="2.3", cases=_BY_CASE,
    capability={case: name.capability for case, name in _BY_CASE.items()},
    claim="Each published name imports and takes the published parameters, in order, with the published defaults.",
    reason="Existing callers use these names; a missing or reordered argument changes results without an error.",
    remedy="Add the name, or make added parameters keyword-only with defaults.",
)  # fmt: skip
def test_name(case: Name, subject: Subject) -> None:
    found = subject.attribute(case.module, case.name)
    if unwritten(found):
        raise SubjectLacks(f"not implemented ({case.full} only raises NotImplementedError)")
    differs = signature_differs(case, found)
    assert not differs, f"{case.full}: {differs}"


@check(
    "p2.defaults", gate="hard", plan="2.3", cases={module.replace(".", "-"): module for module in CONFIG_DEFAULTS},
    claim="Each configuration class has the published options with the published defaults.",
    reason="Nearly every run uses the defaults; a different default is a different algorithm.",
    remedy="Restore the published default, or document the deviation in the subject's documentation and here.",
)  # fmt: skip
def test_defaults(case: str, subject: Subject) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(subject.attribute(case, "TriAttentionConfig"))}
    differs = {
        name: fields.get(name, "absent")
        for name, default in CONFIG_DEFAULTS[case].items()
        if fields.get(name, "absent") != default
    }
    assert not differs, f"{case}.TriAttentionConfig differs from the published defaults in {differs}"


@check(
    "p2.config", gate="hard", plan="3.2", cases="plan_budget", capability="plan",
    claim="The plan's configuration, a budget of 128 tokens without a window size, is accepted.",
    reason="Plan block 3.2 starts with it; a default window as large as the budget must not make the budget invalid.",
    remedy="Derive a window that is not set from the budget; an explicit window may be refused.",
)  # fmt: skip
def test_plan_budget(case: str, subject: Subject) -> None:
    configuration = subject.attribute("vllm.core.config", "TriAttentionConfig")

    def with_budget(tokens: int) -> Any:
        return configuration(
            kv_budget=tokens, pruning_mode="per_head", score_aggregation="mean", rope_style="half",
            use_triton_scoring=False, head_dim=128, num_kv_heads=4, disable_mlr=False,
        )  # fmt: skip

    with refusable(subject, "kv_budget=128 without a window", lambda: with_budget(2048)):
        made = with_budget(128)
    assert made.kv_budget == 128, f"the budget became {made.kv_budget}"


#: Imports modules in a child, apart from those that are absent; a module counts as absent if it, or a package that
#: should hold it, does not exist. Says what was imported, and which packages of others are missing.
_IMPORT = """
import importlib, json, sys
own, imported, needs = sys.argv[1].split(","), [], {}
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not any(f"{error.name}.".startswith(f"{one}.") for one in own):
            needs[name] = error.name
        elif not f"{name}.".startswith(f"{error.name}."):
            raise
    else:
        imported.append(name)
import torch
print(json.dumps({"imported": imported, "needs": needs, "context": torch.cuda.is_initialized()}))
"""


@check(
    "p2.context", gate="hard", cases="no_cuda",
    claim="Importing the published modules does not create a CUDA context.",
    reason="A context created by an import breaks forked workers and takes memory on the wrong GPU.",
    remedy="Move the CUDA call out of module level.",
    timeout_s=180,
)  # fmt: skip
def test_no_cuda_context(case: str, subject: Subject) -> None:
    modules = dict.fromkeys(subject.place(name.module, name.name)[0] for name in NAMES)
    command = [subject.command()[0], "-c", _IMPORT, ",".join((subject.package, *subject.sources)), *modules]
    child = subprocess.run(command, capture_output=True, text=True, timeout=150, env=subject.environment())
    last = (child.stderr.strip().splitlines() or ["no output"])[-1]
    assert child.returncode == 0, f"importing the published modules failed: {last}"
    found = json.loads(child.stdout.splitlines()[-1])
    if not found["imported"]:
        for name, package in found["needs"].items():
            raise SubjectNeeds(f"{name} needs the package {package}, which is not installed")
        raise SubjectLacks("the subject has none of the published modules")
    assert not found["context"], f"importing {', '.join(found['imported'])} created a CUDA context"


@check(
    "p2.flash_attn", gate="soft", cases="small_call", plan="2.2", needs_gpu=True,
    claim="flash-attn imports, and one small causal call is correct.",
    reason="A build for another architecture imports, but fails at the first launch.",
    tolerance="Output and probabilities are each rounded to bf16 (2^-8 relative): 2^-7 of the largest value.",
    remedy="Use attn_implementation sdpa, or build flash-attn from source with CUDA 12.8 or newer.",
)  # fmt: skip
def test_flash_attn(case: str, seed: int, measure: Measure) -> None:
    import importlib.util

    import torch

    if importlib.util.find_spec("flash_attn") is None:
        skip("PKG_MISSING", "flash-attn is not installed")
    from flash_attn import flash_attn_func

    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 64, 2, 64, generator=draw).to("cuda", torch.bfloat16) for _ in range(3))
    got = flash_attn_func(q, k, v, causal=True).double()
    exact_q, exact_k, exact_v = (x.double().transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(exact_q, exact_k, exact_v, is_causal=True).transpose(1, 2)
    measure("error", float((got - want).abs().max()), 2.0**-7 * float(v.abs().max()))
