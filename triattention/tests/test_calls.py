"""Every way to call a patched model: it compresses as ``generate`` does, or is refused in one sentence.

The rows of the table in docs/reference.md are the names of these cases.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    TextStreamer,
    pipeline,
)
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from triattention.errors import TriAttentionError
from triattention.methods.baselines import apply_baseline_patch
from triattention.methods.triattention import apply_triattention_patch, remove_triattention_patch
from triattention.tests import tiny

_REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"
_ROW = re.compile(r"^\| (.+?) \| (served|passed on|refused)", re.MULTILINE)
_IDS = tiny.tokens(30)
_NEW = 100


class Ways:
    """A model, its statistics, and the tokens that it generates with and without the patch."""

    def __init__(self, folder: Path) -> None:
        self.base, self.folder = tiny.make(), folder
        self.stats = tiny.calibrated(self.base, folder / "stats.pt")
        self.plain = tiny.generate(self.base, _IDS, _NEW)
        self.compressed = tiny.generate(self.patched(), _IDS, _NEW)
        assert not torch.equal(self.plain, self.compressed)

    def patched(self, model: Any = None) -> Any:
        """``model``, or a copy of the unpatched one, patched."""
        model = copy.deepcopy(self.base) if model is None else model
        apply_triattention_patch(model, stats_path=self.stats, model_path=None, **tiny.RECOMMENDED)
        return model

    def must_compress(self, model: Any, **options: Any) -> None:
        """``model`` generates the tokens of the patched model, with rounds of its own."""
        model.triattention.reset()
        assert torch.equal(model.generate(input_ids=_IDS, **_GREEDY, **options), self.compressed)
        assert model.triattention.rounds == 5


_GREEDY: dict[str, Any] = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Ways:
    return Ways(tmp_path_factory.mktemp("ways"))


def _own_weights(ways: Ways, twin: Any, original: Any) -> None:
    ways.must_compress(twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert float(twin(_IDS).logits.abs().max()) == 0.0
    ways.must_compress(original)
    remove_triattention_patch(original)
    assert float(twin(_IDS).logits.abs().max()) == 0.0
    assert hasattr(twin, "triattention")


def _deepcopy(ways: Ways) -> None:
    model = ways.patched()
    _own_weights(ways, copy.deepcopy(model), model)


def _shallow(ways: Ways) -> None:
    model = ways.patched()
    twin = copy.copy(model)
    twin._modules = dict(twin._modules, lm_head=torch.nn.Linear(64, 256))
    torch.nn.init.zeros_(twin.lm_head.weight)
    torch.nn.init.zeros_(twin.lm_head.bias)
    assert float(twin(_IDS).logits.abs().max()) == 0.0
    ways.must_compress(model)


def _pickle(ways: Ways) -> None:
    model = ways.patched()
    _own_weights(ways, pickle.loads(pickle.dumps(model)), model)


def _torch_save(ways: Ways) -> None:
    stream = io.BytesIO()
    torch.save(ways.patched(), stream)
    stream.seek(0)
    ways.must_compress(torch.load(stream, weights_only=False))


def _save_pretrained(ways: Ways) -> None:
    model = ways.patched()
    model.save_pretrained(ways.folder / "saved")
    assert '"LlamaForCausalLM"' in (ways.folder / "saved" / "config.json").read_text()
    for load in (AutoModelForCausalLM.from_pretrained, type(model).from_pretrained):
        loaded = load(ways.folder / "saved")
        assert torch.equal(tiny.generate(loaded, _IDS, _NEW), ways.plain)
        assert not hasattr(loaded, "triattention")
        ways.must_compress(ways.patched(loaded))


def _compile(ways: Ways) -> None:
    ways.must_compress(torch.compile(ways.patched(), backend="eager"))


def _compile_first(ways: Ways) -> None:
    model = torch.compile(copy.deepcopy(ways.base), backend="eager")
    ways.must_compress(ways.patched(model))
    remove_triattention_patch(model)
    assert torch.equal(tiny.generate(model, _IDS, _NEW), ways.plain)


def _move(ways: Ways) -> None:
    model = ways.patched().to(torch.bfloat16).to("cpu")
    tiny.generate(model, _IDS, _NEW)
    assert model.triattention.rounds == 5
    method = model.triattention
    method._follow([torch.empty(0, device="meta")])
    assert {getattr(method, name).device.type for name in ("omega", "q_mean_real", "freq_weight")} == {"meta"}
    with pytest.raises(TriAttentionError, match="the cache is spread over cpu, meta; keep the model on one device"):
        method._follow([torch.empty(0), torch.empty(0, device="meta")])


def _data_parallel(ways: Ways) -> None:
    model = torch.nn.DataParallel(ways.patched())
    cache = DynamicCache(config=model.module.config)
    for part in tiny.tokens(90).split(30, 1):
        model(input_ids=part, past_key_values=cache)
    assert cache.layers[0].keys.shape[-2] == 48
    replica = model.module._replicate_for_data_parallel()
    replica.lm_head = torch.nn.Linear(64, 256).requires_grad_(False)
    assert torch.equal(replica(_IDS).logits, replica.lm_head(replica.model(_IDS).last_hidden_state))
    assert ways.patched(torch.nn.DataParallel(copy.deepcopy(ways.base))).module.triattention.rounds == 0


def _functional_call(ways: Ways) -> None:
    model = ways.patched()
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    assert float(torch.func.functional_call(model, zeros, (_IDS,)).logits.abs().max()) == 0.0


def _lora(ways: Ways, *, patched_first: bool) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    if patched_first:
        model = get_peft_model(ways.patched(), config)
    else:
        model = get_peft_model(copy.deepcopy(ways.base), config)
        tiny.calibrated(model, ways.folder / "adapted.pt")
        ways.patched(model)
    ways.must_compress(model)  # an adapter begins as the identity
    cache = DynamicCache(config=model.config)
    model(input_ids=tiny.tokens(90), past_key_values=cache)
    assert cache.layers[0].keys.shape[-2] == 48
    merged = model.merge_and_unload()
    ways.must_compress(merged)
    remove_triattention_patch(merged)
    assert torch.equal(tiny.generate(merged, _IDS, _NEW), ways.plain)


def _add_adapter(ways: Ways) -> None:
    from peft import LoraConfig

    model = ways.patched()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    ways.must_compress(model)


class _Int8(torch.nn.Module):
    """A linear layer as quantisers leave it: no parameters, integers in buffers."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("quantised", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.quantised.to(x.dtype) * self.scale)


def _quantised(ways: Ways) -> None:
    model = copy.deepcopy(ways.base)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in [*part.named_children()]:
                if isinstance(linear, torch.nn.Linear):
                    setattr(part, name, _Int8(linear))
    plain, stats = tiny.generate(model, _IDS, _NEW), tiny.calibrated(model, ways.folder / "quantised.pt")
    for budget, rounds in ((1000, 0), (48, 5)):
        options = {**tiny.RECOMMENDED, "kv_budget": budget}
        apply_triattention_patch(model, stats_path=stats, model_path=None, **options)
        assert torch.equal(tiny.generate(model, _IDS, _NEW), plain) is (rounds == 0)
        assert model.triattention.rounds == rounds
        remove_triattention_patch(model)


def _hooks(ways: Ways) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = ways.patched()
    add_hook_to_module(model, ModelHook())
    ways.must_compress(model)
    remove_hook_from_module(model)
    ways.must_compress(model)
    hooked = copy.deepcopy(ways.base)
    add_hook_to_module(hooked, ModelHook())
    ways.must_compress(ways.patched(hooked))
    ways.must_compress(copy.deepcopy(hooked))
    remove_triattention_patch(hooked)
    assert torch.equal(tiny.generate(hooked, _IDS, _NEW), ways.plain)


def _pipeline(ways: Ways) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(256)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0")
    model = ways.patched()
    ask = pipeline("text-generation", model=model, tokenizer=wrapped)
    text = " ".join(f"w{n}" for n in _IDS[0].tolist())
    (reply,) = ask(text, return_tensors=True, generation_config=GenerationConfig(**_GREEDY))
    assert reply["generated_token_ids"] == ways.compressed[0].tolist()
    assert model.triattention.rounds == 5


def _streamer(ways: Ways) -> None:
    class Counting(TextStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    streamer = Counting()
    ways.must_compress(ways.patched(), streamer=streamer)
    assert streamer.tokens == ways.compressed[0].tolist()


def _several_sequences(ways: Ways) -> None:
    model = ways.patched()
    options = _GREEDY | {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    made = model.generate(_IDS, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(_IDS.repeat(3, 1), **options | {"num_return_sequences": 1}), made)
    assert model.triattention.rounds == 5


def _guidance(ways: Ways) -> None:
    model = ways.patched()
    made = model.generate(_IDS, guidance_scale=1.5, return_dict_in_generate=True, **_GREEDY)
    assert made.past_key_values.layers[0].held < 48 + 16
    assert model.triattention.rounds > 5  # of both caches


def _embeddings(ways: Ways) -> None:
    model = ways.patched()
    made = model.generate(inputs_embeds=model.get_input_embeddings()(_IDS), **_GREEDY)
    assert torch.equal(made, ways.compressed[:, 30:])
    assert model.triattention.rounds == 5


def _custom_generate(ways: Ways) -> None:
    def mine(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        cache, made = DynamicCache(config=model.config), [input_ids]
        for _ in range(_NEW):
            made.append(model(input_ids=made[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        return torch.cat(made, 1)

    ways.must_compress(ways.patched(), custom_generate=mine)


def _caches(ways: Ways) -> None:
    class Mine(DynamicCache):
        pass

    for cache in (DynamicCache(), DynamicCache(config=ways.base.config), Mine()):
        ways.must_compress(ways.patched(), past_key_values=cache)
        cache.reset()
        ways.must_compress(ways.patched(), past_key_values=cache)


def _copied_cache(ways: Ways) -> None:
    model, cache = ways.patched(), DynamicCache(config=ways.base.config)
    model(_IDS, past_key_values=cache)
    twin = copy.deepcopy(cache)
    for seed in range(50):
        one, two = (model(tiny.tokens(1, seed), past_key_values=held).logits for held in (cache, twin))
        assert torch.equal(one, two)
    assert cache.layers[0].held == twin.layers[0].held < 48 + 16


def _unused_flag(ways: Ways) -> None:
    model, caches = ways.patched(), [DynamicCache(config=ways.base.config) for _ in range(2)]
    for seed in range(60):
        used = model(tiny.tokens(1, seed), past_key_values=caches[0])
        unused = model(tiny.tokens(1, seed), past_key_values=caches[1], use_cache=False)
        assert torch.equal(used.logits, unused.logits)
    assert caches[0].layers[0].held == caches[1].layers[0].held < 48 + 16


def _positional(ways: Ways) -> None:
    model, cache = ways.patched(), DynamicCache(config=ways.base.config)
    for seed in range(80):
        model(tiny.tokens(1, seed), None, None, cache)
    assert cache.layers[0].held < 48 + 16


def _two_models(ways: Ways) -> None:
    one, two = ways.patched(), ways.patched()
    two.triattention.budget = replace(two.triattention.budget, kv_budget=32)
    other = tiny.generate(two, _IDS, _NEW)
    ways.must_compress(one)
    assert torch.equal(tiny.generate(two, _IDS, _NEW), other)
    assert two.triattention.peak_length < 32 + 16


def _threads(ways: Ways) -> None:
    def observing() -> Any:
        model = copy.deepcopy(ways.base)
        apply_baseline_patch(model, method="snapkv", kv_budget=48, divide_length=16)
        return model

    for model in (ways.patched(), observing()):
        alone, made = tiny.generate(model, _IDS, _NEW), [None] * 3

        def run(number: int, model: Any = model, made: list = made) -> None:
            made[number] = tiny.generate(model, _IDS, _NEW)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(one, alone) for one in made)


def _unpatched(ways: Ways) -> None:
    model, cache = ways.patched(), DynamicCache(config=ways.base.config)
    made = tiny.generate(model, _IDS, _NEW, past_key_values=cache)
    held = cache.layers[0].held
    remove_triattention_patch(model)
    assert type(model) is type(ways.base)
    assert not model.model._forward_pre_hooks
    tiny.generate(model, made, 20, past_key_values=cache)
    assert cache.layers[0].held == held + 20
    assert cache.get_seq_length() == 30 + _NEW + 19


def _no_cache(ways: Ways) -> None:
    model = ways.patched()
    assert torch.equal(tiny.generate(model, _IDS, 40, use_cache=False), ways.plain[:, : 30 + 40])
    assert model.triattention.rounds == 0
    assert model.model(_IDS).last_hidden_state.shape == (1, 30, 64)


def _training(ways: Ways) -> None:
    ids = tiny.tokens(90)
    for checkpointing in (False, True):
        grads = []
        for model in (copy.deepcopy(ways.base), ways.patched()):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.train()
            model(input_ids=ids, labels=ids).loss.backward()
            grads.append(model.lm_head.weight.grad)
        assert torch.equal(*grads)
        model.eval()
        ways.must_compress(model)


SERVED: dict[str, Callable[[Ways], None]] = {
    "`copy.deepcopy(model)`": _deepcopy,
    "`copy.copy(model)`": _shallow,
    "`pickle.dumps(model)`": _pickle,
    "`torch.save(model, file)`": _torch_save,
    "`model.save_pretrained(folder)`": _save_pretrained,
    "`torch.compile(model)`, `model.compile()`": _compile,
    "a patch of `torch.compile(model)`": _compile_first,
    "`model.to(dtype)`, `model.to(device)`": _move,
    "`DataParallel(model)`": _data_parallel,
    "`torch.func.functional_call(model, ...)`": _functional_call,
    "peft: `get_peft_model(model, LoraConfig(...))`": lambda ways: _lora(ways, patched_first=True),
    "a patch of a peft model": lambda ways: _lora(ways, patched_first=False),
    "`model.add_adapter(...)`": _add_adapter,
    "quantised linear layers": _quantised,
    "hooks of accelerate": _hooks,
    '`pipeline("text-generation", model)`': _pipeline,
    "`generate(streamer=...)`": _streamer,
    "`generate(do_sample=True, num_return_sequences=n)`": _several_sequences,
    "`generate(guidance_scale=...)`": _guidance,
    "`generate(inputs_embeds=...)`": _embeddings,
    "`generate(prefill_chunk_size=n)`": lambda ways: ways.must_compress(ways.patched(), prefill_chunk_size=7),
    "`generate(custom_generate=function)`": _custom_generate,
    '`generate(cache_implementation="dynamic")`': lambda ways: ways.must_compress(
        ways.patched(), cache_implementation="dynamic"
    ),
    "an empty `DynamicCache`, or of a class derived from it": _caches,
    "`copy.deepcopy(cache)`": _copied_cache,
    "a cache with `use_cache=False`": _unused_flag,
    "a cache as positional argument": _positional,
    "several patched models in one process": _two_models,
    "several threads on one model": _threads,
    "a compressed cache after `remove_triattention_patch`": _unpatched,
    "`use_cache=False` without a cache": _no_cache,
    "training, also with gradient checkpointing": _training,
}


def _generated(**options: Any) -> Callable[[Ways], object]:
    return lambda ways: ways.patched().generate(_IDS, **_GREEDY, **options)


def _assisting(ways: Ways) -> None:
    copy.deepcopy(ways.base).generate(_IDS, assistant_model=ways.patched(), **_GREEDY)


def _filled(ways: Ways) -> DynamicCache:
    cache = DynamicCache(config=ways.base.config)
    ways.base(_IDS, past_key_values=cache)
    return cache


def _sliding(ways: Ways) -> Cache:
    return Cache(layers=[DynamicSlidingWindowLayer(sliding_window=8) for _ in range(3)])


def _rebuilt(ways: Ways) -> DynamicCache:
    cache = DynamicCache(config=ways.base.config)
    ways.patched()(_IDS, past_key_values=cache)
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


def _prefix(ways: Ways) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(ways.patched(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.generate(input_ids=_IDS, **_GREEDY)


def _changed(change: Callable[[Cache], object]) -> Callable[[Ways], object]:
    def run(ways: Ways) -> None:
        cache = DynamicCache(config=ways.base.config)
        ways.patched()(_IDS.repeat(2, 1), past_key_values=cache)
        change(cache)

    return run


def _paged_directly(ways: Ways) -> None:
    ways.patched()(input_ids=_IDS, cache=object(), use_cache=False)


def _spread(ways: Ways) -> None:
    model = copy.deepcopy(ways.base)
    model.model.layers[1].to("meta")
    ways.patched(model)


def _batch(ways: Ways) -> list:
    return [_IDS[0].tolist()]


_BEAMS = "beam search and row reordering are not supported with a compressed cache; use num_beams=1"
_BACK = "a compressed cache cannot be rolled back, so speculative decoding is not supported"
_PAGED = "continuous batching .* keeps a paged cache, which cannot be compressed; use generate, or vLLM with the plugin"
_LAYER = "layer 0 of the cache is a {}, which cannot be compressed"
_BEFORE = r"the cache holds \d+ tokens from before the patch; start with an empty cache"
_MOVED = "requires `trust_remote_code=True`"

REFUSED: dict[str, dict[str, tuple[Callable[[Ways], object], str]]] = {
    "beam search": {
        "greedy": (_generated(num_beams=2), _BEAMS),
        "several": (_generated(num_beams=2, num_return_sequences=2), _BEAMS),
        "groups": (_generated(num_beams=4, num_beam_groups=2, diversity_penalty=0.5), _BEAMS),
        "sampled": (lambda ways: ways.patched().generate(_IDS, **_GREEDY | {"do_sample": True}, num_beams=2), _BEAMS),
        "reorder": (_changed(lambda cache: cache.reorder_cache(torch.tensor([1, 0]))), _BEAMS),
        "select": (_changed(lambda cache: cache.batch_select_indices(torch.tensor([1]))), _BEAMS),
        "repeat": (_changed(lambda cache: cache.batch_repeat_interleave(2)), _BEAMS),
    },
    "speculative decoding": {
        "assistant": (lambda ways: _generated(assistant_model=copy.deepcopy(ways.base))(ways), _BACK),
        "is assistant": (_assisting, _BACK),
        "prompt lookup": (_generated(prompt_lookup_num_tokens=3), _BACK),
        "early exit": (_generated(assistant_early_exit=1), _BACK),
        "crop": (_changed(lambda cache: cache.crop(10)), _BACK),
    },
    "contrastive search, DoLa": {
        "contrastive": (_generated(penalty_alpha=0.6, top_k=4), _MOVED),
        "dola": (_generated(dola_layers="low"), _MOVED),
    },
    "continuous batching": {
        "paged": (_generated(cache_implementation="paged"), _PAGED),
        "generate_batch": (lambda ways: ways.patched().generate_batch(_batch(ways)), _PAGED),
        "context": (lambda ways: ways.patched().continuous_batching_context_manager(), _PAGED),
        "manager": (lambda ways: ways.patched().init_continuous_batching(), _PAGED),
        "cache": (_paged_directly, "the cache is a object; leave past_key_values out"),
    },
    "a static, sliding, offloaded or quantised cache": {
        "static": (_generated(cache_implementation="static"), _LAYER.format("StaticLayer")),
        "given": (
            lambda ways: _generated(past_key_values=StaticCache(config=ways.base.config, max_cache_len=200))(ways),
            _LAYER.format("StaticLayer"),
        ),
        "offloaded": (_generated(cache_implementation="offloaded"), "an offloaded cache cannot be compressed"),
        "both": (_generated(cache_implementation="offloaded_static"), "an offloaded cache cannot be compressed"),
        "sliding": (
            lambda ways: ways.patched()(_IDS, past_key_values=_sliding(ways)),
            _LAYER.format("DynamicSlidingWindowLayer"),
        ),
        "encoder": (
            _generated(past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())),
            "the cache is a EncoderDecoderCache; leave past_key_values out, or pass a DynamicCache",
        ),
    },
    "a cache with tokens from before the patch, or made from tensors": {
        "filled": (
            lambda ways: ways.patched().generate(_IDS.repeat(1, 2), past_key_values=_filled(ways), **_GREEDY),
            _BEFORE,
        ),
        "rebuilt": (lambda ways: ways.patched()(tiny.tokens(1), past_key_values=_rebuilt(ways)), _BEFORE),
        "prefix": (_prefix, f"{_BEFORE}|both cache and past_key_values are given; give one cache"),
    },
    "the decoder, `model.model(...)`, with a cache": {
        "named": (
            lambda ways: ways.patched().model(input_ids=_IDS, past_key_values=DynamicCache()),
            "LlamaModel was called with a cache, .* call the patched model itself",
        ),
        "positional": (
            lambda ways: ways.patched().model(_IDS, None, None, DynamicCache()),
            "LlamaModel was called with a cache, .* call the patched model itself",
        ),
    },
    "a model on several devices": {"meta": (_spread, "the model is spread over cpu, meta; load it on one device")},
    "`torch.export`, `torch.jit.trace`": {
        "export": (lambda ways: torch.export.export(ways.patched(), (_IDS,)), "cannot be exported or traced"),
        "trace": (lambda ways: torch.jit.trace(ways.patched(), (_IDS,)), "cannot be exported or traced"),
    },
    "`torch.compile(model, fullgraph=True)`": {
        "forward": (
            lambda ways: torch.compile(ways.patched(), backend="eager", fullgraph=True)(_IDS),
            "torch.compiler.disable|cannot be exported or traced",  # the second with torch 2.11
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("way", SERVED)
def test_a_way_is_served(way: str, ways: Ways) -> None:
    with torch.set_grad_enabled(way.startswith("training")):
        SERVED[way](ways)


@pytest.mark.parametrize(("way", "case"), [(way, case) for way, cases in REFUSED.items() for case in cases])
def test_a_way_is_refused_in_a_sentence(way: str, case: str, ways: Ways) -> None:
    call, words = REFUSED[way][case]
    ours = not words.startswith(("requires", "torch."))
    with torch.no_grad(), pytest.raises(TriAttentionError if ours else (ValueError, RuntimeError), match=words):
        call(ways)


def test_a_transformers_that_was_not_tested_is_told_and_served(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.27.0.dev0")
    with pytest.warns(UserWarning, match=r"transformers 5\.27\.0\.dev0 is newer than 5\.24, the newest"):
        model = ways.patched()
    ways.must_compress(model)


def test_the_table_has_every_way() -> None:
    rows = dict(_ROW.findall(_REFERENCE.read_text("utf-8")))
    assert {way for way, what in rows.items() if what == "refused"} == {*REFUSED}
    assert {way for way, what in rows.items() if what != "refused"} == {*SERVED}
