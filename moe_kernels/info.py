"""What `moe-kernels info` prints: a preset in numbers, and what runs on this machine."""

import math
import os

import torch

from . import ops, schemas
from .model import ModelConfig, count_parameters

BYTES_A_PARAMETER = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5}  # weights alone, without the scales of fp8 and fp4
CARD_BYTES = 80e9
CONTEXT = 4096

# stage, what its kernels take, what is left to torch operations
_KERNEL_DTYPES = (
    ("gate", "bf16, fp16, fp32 logits", "fp64"),
    ("plan", "int32 and int64 ids", ""),
    ("up_proj", "bf16, fp16", "fp32, fp64"),
    ("down_proj", "bf16, fp16", "fp32, fp64"),
    ("combine", "bf16, fp16", "fp32, fp64"),
)


def preset_lines(name):
    """The preset's numbers, a line each."""
    config = ModelConfig.preset(name)
    total, active = count_parameters(config)
    kv = 2 * config.cache_width * config.num_layers
    lines = [
        f"{name}",
        f"  parameters      {_amount(total)}, {_amount(active)} ({100 * active / total:.1f}%) for a token",
        f"  layers          {config.num_layers}: {config.num_dense_layers} dense, {config.num_moe_layers} MoE; "
        f"hidden size {config.hidden_size}",
        f"  experts         {config.top_k} of {config.num_experts}, width {config.expert_intermediate_size}; "
        f"{config.num_shared_experts} shared; {config.score_fn} scores",
        f"  operations      {_amount(operations(config, active, 0))} a token, "
        f"{_amount(operations(config, active, CONTEXT))} with {CONTEXT} tokens before it",
        f"  latent cache    {kv:,} bytes a token in bf16",
        "",
        f"  {'weights':<8}{'memory':>12}{'read a token':>16}{'80 GB GPUs':>14}",
    ]
    for dtype, size in BYTES_A_PARAMETER.items():
        lines.append(f"  {dtype:<8}{_bytes(total * size):>12}{_bytes(active * size):>16}"
                     f"{math.ceil(total * size / CARD_BYTES):>14}")
    return lines


def operations(config, active, context):
    """Of one token's forward: 2 a parameter it multiplies with, and 2 a product of queries, keys and values.

    The embedding is looked up, not multiplied. `context` tokens precede it.
    """
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 2 * config.num_layers * config.num_heads * (config.qk_head_dim + config.v_head_dim) * context
    return 2 * (active - looked_up) + attention


def machine_lines():
    """torch, card, what was built, and which implementation serves each stage and why."""
    build = ops.build_info()
    built = ", ".join(map(str, build["architectures"])) or "none"
    lines = [f"torch             {build['torch']}",
             f"compiled module   {_module_text(build, built)}",
             f"processor         {torch.get_num_threads()} threads"]
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    if not cards:
        return lines + ["cards             none", *_stage_lines("cpu", "no CUDA card")]
    for index in cards:
        card = torch.cuda.get_device_properties(index)
        lines.append(f"card {index}            {card.name}, compute capability {card.major}.{card.minor}, "
                     f"{card.total_memory / 1e9:.0f} GB")
        why_not = _why_not(build, index)
        lines += _stage_lines(f"cuda:{index}", why_not)
        if why_not is None:
            lines.append(f"  products   {_engine(10 * card.major + card.minor)}")
    return lines


def _engine(capability):
    """Which engine of the compiled module computes the grouped products on a card of this compute capability."""
    many, few = (schemas.compiled_module.choose_engine(rows, 1, capability) for rows in (1024, 1))
    if many == "sm90":
        few = few.replace("sm", "sm_")
        return f"sm_90a engine (wgmma, TMA); for a few rows of small experts the {few} engine (mma.sync)"
    return "sm_80 engine (mma.sync)"


def _module_text(build, built):
    if not build["cuda_built"]:
        return "not there: built without a CUDA toolkit, or not built"
    return f"architectures {built}; CUDA {build['cuda_version']}"


def _why_not(build, index):
    """Why the compiled kernels serve nothing on this card, or None where they do."""
    if not build["cuda_built"]:
        return "the compiled module is not there"
    if os.environ.get("MOE_KERNELS_IMPLEMENTATION") == "composite":
        return "MOE_KERNELS_IMPLEMENTATION=composite"
    if not ops._kernels_run_on(index):
        return "the card is older than the architectures built"
    return None


def _stage_lines(device, why_not):
    """Which implementation serves each stage on this device, for which dtypes, and why."""
    lines = [f"on {device}:"]
    for stage, dtypes, rest in _KERNEL_DTYPES:
        if why_not is not None:
            lines.append(f"  {stage:<11}torch operations (composite.py), every dtype: {why_not}")
            continue
        lines.append(f"  {stage:<11}CUDA kernels, {dtypes}: the module is built for this card")
        if rest:
            lines.append(f"  {'':<11}torch operations (composite.py), {rest}: the kernels do not store it")
    return lines


def _amount(number):
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number:,.0f}"


def _bytes(number):
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number:,.0f} B"
