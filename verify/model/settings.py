"""The prompts of phase 6, and settings so small that a short run has several rounds."""

from __future__ import annotations

#: The recommended setting, small enough that a short run has several rounds.
BUDGET, DIVIDE = 64, 16
RECOMMENDED = {
    "per_head_pruning": True, "normalize_scores": True, "use_slack_trigger": True, "count_prompt_tokens": True,
    "divide_length": DIVIDE,
}  # fmt: skip

#: What a check needs whose subject patches a model.
PATCHED = ("p1.identity", "p6.patch")

PROMPTS = (
    "A train leaves the station at noon and travels west along the river for two hours before it stops "
    "at a small town. "
    "The people of the town have a market every week, and they sell apples, bread, cloth and clocks. Describe the day.",
    "Explain in a few sentences why the sky is blue and why the sunset is red.",
)

#: Numbers of tokens: of a prompt that fits into the budget, of one that almost makes a round due, and of a sequence
#: that continues it token by token through three rounds.
PROMPT, NEAR, FED = 48, 72, 112
EVICT_PROMPT = {"kv_budget": BUDGET, "allow_prefill_compression": True}
PER_LAYER_PER_HEAD = {"per_head_pruning": False, "per_layer_perhead_pruning": True}

#: Causes of failures, told as one finding each.
PADDED = "a left-padded row of a batch gives other tokens than alone"
PROMPT_STEP = "a prompt above the trigger is not compressed after its step"
