"""Phase 6, first of all: the patch can be applied to a real model, on which every other check of a patch rests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import verify
from verify import check
from verify.errors import SubjectLacks, SubjectNeeds, Wrong
from verify.model.live_model import LiveModel
from verify.model.settings import PROMPT, PROMPTS
from verify.subject.refusal import REFUSALS, raised_in, refusal


@check(
    "p6.patch", gate="hard", needs=("p1.identity",), cases="applies",
    claim="apply_triattention_patch accepts a model, its statistics and a budget, with the published defaults or the "
    "recommended setting, and the patched model takes a prompt and a token.",
    reason="Nothing that a patched model does can be judged if the patch cannot be applied.",
    remedy="Look at the named line first: a library may have changed since it was written.",
    timeout_s=600,  # the first check of a model: it may have to be converted and calibrated
)  # fmt: skip
def test_the_patch_can_be_applied(case: str, model: LiveModel, choose: Callable[[str], None]) -> None:
    ids, what = model.tokens(" ".join(PROMPTS))["input_ids"][:, : PROMPT + 1], "the patch cannot be applied"
    try:
        try:
            model.apply_bare(kv_budget=4096)
        except REFUSALS as error:
            if not refusal(error, model.subject):
                raise
            model.apply(kv_budget=4096)
            choose(f"the published defaults are refused ({error}), and the recommended setting is accepted")
        what = "the patched model cannot be run"
        fed = [count for count, _ in model.feed(ids, PROMPT)]
    except (SubjectLacks, SubjectNeeds):
        raise
    except Exception as error:  # a subject may crash in any way
        at = raised_in(error, model.subject, (Path(__file__).parent, Path(verify.__file__).parent))
        if not at or refusal(error, model.subject):
            raise
        cause = f"{what}: {type(error).__name__} at {at}"
        raise Wrong(f"{cause}: {error}", cause) from None
    assert fed == [PROMPT, PROMPT + 1], f"{fed} tokens were fed"
