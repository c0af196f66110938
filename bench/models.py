"""Whole models of Hugging Face transformers with random weights: our two ways into them beside its own backends.

Each model is timed as it is called, without CUDA graphs and without torch.compile: a prefill (forward with a cache,
logits of the last token) and a training step (forward, loss over all tokens, gradients of all parameters; no
optimizer).
"""

import copy
import functools

import torch

from .timing import measure

OURS = ("moe_kernels", "replace_moe_layers")  # the backend alone, and routers and experts replaced
THEIRS = ("grouped_mm", "eager")
PASSES = ("prefill", "train")
SHAPE = "Qwen3-30B-A3B with 4 layers"
SIZES = dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
             num_experts_per_tok=8, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
             vocab_size=151936, max_position_embeddings=40960)
QUICK_SHAPE = "a tiny Qwen3-MoE"
QUICK_SIZES = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
                   num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=128,
                   max_position_embeddings=128)
NUM_TOKENS, QUICK_NUM_TOKENS = 8192, 64
MOST_DIFFERENCE = 0.05  # of the median token's hidden states: bf16 rounding that flips few experts stays below


class WrongModel(Exception):
    """A model whose results are not those of "eager"."""


def make_model(sizes, dtype, device):
    """A Qwen3MoeForCausalLM of transformers' own random weights, but for the experts, which give values of order 1."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, router_aux_loss_coef=0.0), dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def with_implementation(model, name):
    """The model once more, on the same parameters, with one of OURS or THEIRS."""
    import moe_kernels

    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if name == "replace_moe_layers":
        moe_kernels.replace_moe_layers(twin)
    else:
        moe_kernels.hf.register()
        twin.set_experts_implementation(name)
    return twin


@torch.no_grad()
def difference(model, reference, ids):
    """The relative difference of the last hidden states, of the median token."""
    ours, theirs = (x.model(ids, use_cache=False).last_hidden_state.float() for x in (model, reference))
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median().item()


@torch.no_grad()
def prefill(model, ids):
    return model(ids, use_cache=True, logits_to_keep=1).logits


def train(model, ids):
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, use_cache=False).loss.backward()


def measure_models(dtype, device, quick=False, budget_s=3.0):
    """Times every implementation in every pass, interleaved.

    Args:
        dtype: of the weights. device: torch.device. quick: a tiny model, to see whether it runs.
        budget_s: seconds for the rounds of a pass; there are 7 at least.
    Returns: {"shape", "num_tokens", "ms": {pass: {implementation: median}}, "times_as_fast": {pass: {ours: {theirs:
        their time / our time}}}, "difference": {implementation: of its hidden states to eager's}}.
    Raises: WrongModel where ours differs from eager by more than rounding.
    """
    shape, sizes = (QUICK_SHAPE, QUICK_SIZES) if quick else (SHAPE, SIZES)
    num_tokens = QUICK_NUM_TOKENS if quick else NUM_TOKENS
    model = make_model(sizes, dtype, device)
    models = {name: with_implementation(model, name).eval() for name in OURS + THEIRS}
    ids = torch.randint(sizes["vocab_size"], (1, num_tokens), generator=torch.Generator().manual_seed(1)).to(device)
    differences = {name: difference(models[name], models["eager"], ids) for name in models if name != "eager"}
    for name in OURS:
        if not differences[name] < MOST_DIFFERENCE:
            raise WrongModel(f"{name}: hidden states differ from eager's by {differences[name]:.3f} of their norm")
    ms = {}
    for name, function in zip(PASSES, (prefill, train)):
        calls = {key: functools.partial(function, value, ids) for key, value in models.items()}
        timings = measure(calls, device, budget_s, capture=lambda _: False)
        ms[name] = {key: timing.ms for key, timing in timings.items()}
        model.zero_grad(set_to_none=True)
    ratios = {name: {ours: {key: times[key] / times[ours] for key in THEIRS if key in times}
                     for ours in OURS if ours in times} for name, times in ms.items()}
    return {"shape": shape, "num_tokens": num_tokens, "ms": ms, "times_as_fast": ratios, "difference": differences}


def lines(result):
    """What is printed of a result of `measure_models`."""
    for name, times in result["ms"].items():
        yield f"{result['shape']}, {result['num_tokens']} tokens, {name}: " + ", ".join(
            f"{key} {ms:.2f} ms" for key, ms in times.items())
        for ours, ratios in result["times_as_fast"][name].items():
            yield f"  {ours} is " + ", ".join(f"{ratio:.2f} times as fast as {key}" for key, ratio in ratios.items())
