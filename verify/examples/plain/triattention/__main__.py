"""The command line: ``run-one`` answers questions with a full or a compressed cache, one JSON line for each."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from pathlib import Path

from .methods.triattention import apply_triattention_patch, state_of

#: The data set ``smoke``.
_SMOKE = (("What is 2+2?", "4"), ("What is 3+5?", "8"), ("How many days are there in a week?", "7"))


def _arguments() -> argparse.Namespace:
    top = argparse.ArgumentParser(prog="python -m triattention", allow_abbrev=False)
    run = top.add_subparsers(dest="verb", required=True).add_parser("run-one", allow_abbrev=False)
    run.add_argument("--model", required=True, help="a directory")
    run.add_argument("--dataset", required=True, choices=("smoke",))
    run.add_argument("--method", required=True, choices=("full", "fullkv", "triattention"))
    run.add_argument("--stats-path", type=Path, help="in the published layout; needed for triattention")
    run.add_argument("--budget", type=int, default=2048)
    run.add_argument("--divide-length", type=int, default=128)
    run.add_argument("--window-size", type=int, default=0)
    run.add_argument("--allow-prefill-compression", action="store_true")
    run.add_argument("--attn-implementation", default="sdpa", choices=("eager", "sdpa", "flash_attention_2"))
    run.add_argument("--max-questions", type=int, default=len(_SMOKE))
    run.add_argument("--max-new-tokens", type=int, default=64)
    run.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    run.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    run.add_argument("--out", type=Path, required=True, help="a directory")
    chosen = top.parse_args()
    if chosen.method == "triattention" and chosen.stats_path is None:
        run.error("--method triattention needs --stats-path")
    return chosen


def main() -> None:
    """Answer, write ``answers.jsonl`` and print the summary. A reply is right if its last number is the answer."""
    chosen = _arguments()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(
        chosen.model, dtype=getattr(torch, chosen.dtype), attn_implementation=chosen.attn_implementation
    )
    model, tokenizer = model.to(chosen.device).eval(), AutoTokenizer.from_pretrained(chosen.model)
    if chosen.method == "triattention":
        apply_triattention_patch(
            model, stats_path=chosen.stats_path, model_path=chosen.model, kv_budget=chosen.budget,
            divide_length=chosen.divide_length, window_size=chosen.window_size,
            allow_prefill_compression=chosen.allow_prefill_compression, per_head_pruning=True, normalize_scores=True,
            use_slack_trigger=True, count_prompt_tokens=True,
        )  # fmt: skip
    answers, right = [], 0
    for question, answer in _SMOKE[: chosen.max_questions]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(chosen.device)
        cache = DynamicCache(config=model.config)
        name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        out = model.generate(
            **prompt, **{name: cache}, max_new_tokens=chosen.max_new_tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        said = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right += re.findall(r"\d+", said)[-1:] == [answer]
        state = state_of(cache)
        rounds, peak = (state.rounds, state.peak) if state else (0, cache.get_seq_length())
        answers.append({"question": question, "answer": said, "rounds": rounds, "peak_kv_tokens": peak})
    chosen.out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(answer) + "\n" for answer in answers)
    (chosen.out / "answers.jsonl").write_text(lines, "utf-8")
    print(f"{chosen.method}: accuracy {right}/{len(answers)}")


if __name__ == "__main__":
    main()
