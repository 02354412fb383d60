"""A model directory small enough for unit tests: two random Llama layers and a word tokenizer with a chat template."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}user : {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def write_tiny_model(directory: Path, *, layers: int = 2, head_dim: int = 16, template: str | None = TEMPLATE) -> Path:
    """Write the model in the transformers format; float32, 4 query and 2 KV heads, 512 positions."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", "user", "assistant", ":", "what", "is", "+", "?", *map(str, range(10))]
    words += [f"word{index}" for index in range(100 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=4 * head_dim,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
