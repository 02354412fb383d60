"""Phase 2: whether every name in the plan imports and matches the published API (plan 2.2, 2.3)."""

from __future__ import annotations

import dataclasses
import json
import subprocess

from verify import Measure, check, skip
from verify.subject.published import CONFIG_DEFAULTS, NAMES, signature_differs
from verify.subject.subject import Subject


@check(
    "p2.names", gate="hard", plan="2.3",
    cases={f"{name.module.replace('.', '-')}-{name.name}": name for name in NAMES},
    claim="Each published name imports and takes the published parameters, in order, with the published defaults.",
    reason="Existing callers use these names; a missing or reordered argument changes results without an error.",
    remedy="Add the name, or make added parameters keyword-only with defaults.",
)  # fmt: skip
def test_name(case, subject: Subject) -> None:
    found = subject.attribute(case.module, case.name)
    differs = signature_differs(case, found)
    assert not differs, f"{case.module}.{case.name}: {differs}"


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
    "p2.config", gate="hard", plan="3.2", cases="plan_budget",
    claim="The plan's configuration, a budget of 128 tokens without a window size, is accepted.",
    reason="Plan block 3.2 starts with it; a default window as large as the budget must not make the budget invalid.",
    remedy="Derive a window that is not set from the budget; an explicit window may be refused.",
)  # fmt: skip
def test_plan_budget(case: str, subject: Subject) -> None:
    made = subject.attribute("vllm.core.config", "TriAttentionConfig")(
        kv_budget=128, pruning_mode="per_head", score_aggregation="mean", rope_style="half", use_triton_scoring=False,
        head_dim=128, num_kv_heads=4, disable_mlr=False,
    )  # fmt: skip
    assert made.kv_budget == 128, f"the budget became {made.kv_budget}"


@check(
    "p2.context", gate="hard", cases="no_cuda",
    claim="Importing the published modules does not create a CUDA context.",
    reason="A context created by an import breaks forked workers and takes memory on the wrong GPU.",
    remedy="Move the CUDA call out of module level.",
    timeout_s=180,
)  # fmt: skip
def test_no_cuda_context(case: str, subject: Subject) -> None:
    lines = dict.fromkeys(f"import {subject.place(name.module, name.name)[0]}" for name in NAMES)
    program = "\n".join([*lines, "import json, torch", "print(json.dumps(torch.cuda.is_initialized()))"])
    child = subprocess.run(
        [subject.command()[0], "-c", program], capture_output=True, text=True, timeout=150, env=subject.environment()
    )
    last = (child.stderr.strip().splitlines() or ["no output"])[-1]
    assert child.returncode == 0, f"importing the published modules failed: {last}"
    assert json.loads(child.stdout.splitlines()[-1]) is False, "importing the published modules created a CUDA context"


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
