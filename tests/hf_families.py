"""Tiny models of transformers' families, and how their results are compared."""

import contextlib
import os
import warnings

import torch

from moe_kernels.hf.backend import is_experts

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # some models look for kernels of their own on the hub

COMMON = dict(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, n_routed_experts=8,
              num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
              eos_token_id=2)
GROUPS = dict(n_group=4, topk_group=2, first_k_dense_replace=1, n_shared_experts=1)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
           num_key_value_heads=4, **GROUPS)
V4_LAYERS = dict(mlp_layer_types=["hash_moe", "moe"], swiglu_limit=1.0)  # a limit that bites

# model type: (settings beside COMMON, route of its experts)
FAMILIES = {
    "afmoe": (dict(num_dense_layers=1), "fused"),
    "aria_text": ({}, "fused"),
    "axk1": (MLA, "fused"),
    "bailing_hybrid": (GROUPS, "fused"),
    "beam": (dict(mlp_layer_types=["dense", "sparse"], n_group=4, topk_group=2), "fused"),
    "cohere2_moe": ({}, "fused"),
    "deepseek_v2": (MLA, "fused"),
    "deepseek_v3": (MLA, "fused"),
    "deepseek_v32": (MLA, "fused"),
    "deepseek_v4": (MLA | V4_LAYERS, "fused"),
    "dots1": (GROUPS, "fused"),
    "ernie4_5_moe": ({}, "fused"),
    "exaone_moe": ({}, "fused"),
    "flex_olmo": ({}, "fused"),
    "flint": (dict(mlp_only_layers=[0]), "fused"),
    "glm4_moe": (GROUPS, "fused"),
    "glm4_moe_lite": (MLA, "fused"),
    "glm_moe_dsa": (MLA, "fused"),
    "gpt_oss": (dict(swiglu_limit=0.9), "fused"),
    "granitemoe": ({}, "fused"),
    "granitemoeshared": ({}, "fused"),
    "hunyuan_v1_moe": ({}, "fused"),
    "hy_v3": ({}, "fused"),
    "hy_v4": (dict(swiglu_limit=1.0), "fused"),
    "inkling2_text": ({}, "unfused"),
    "jamba": ({}, "fused"),
    "laguna": ({}, "fused"),
    "lfm2_moe": (dict(layer_types=["full_attention"] * 2, num_dense_layers=1), "fused"),
    "mellum": ({}, "fused"),
    "mimo_v2_flash": ({}, "fused"),
    "minimax": ({}, "fused"),
    "minimax_m2": ({}, "fused"),
    "minimax_m3_vl_text": ({}, "unfused"),
    "mixtral": ({}, "fused"),
    "muse_spark_text": ({}, "unfused"),
    "nemotron_h": (dict(mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=16), "fused"),
    "olmoe": ({}, "fused"),
    "openai_privacy_filter": (dict(swiglu_limit=1.0), "fused"),
    "phimoe": ({}, "fused"),
    "qwen2_moe": (dict(shared_expert_intermediate_size=24), "fused"),
    "qwen3_moe": ({}, "fused"),
    "qwen3_next": ({}, "fused"),
    "qwen3_5_moe_text": ({}, "fused"),
    "solar_open": ({}, "fused"),
    "zaya": (dict(num_experts_per_tok=1), "fused"),
}

LATER = ("aria_text",)  # not in the interface of every transformers that we serve


def settings_of(model_type, **changes):
    return {**COMMON, **FAMILIES[model_type][0], **changes}


def build(model_type, **changes):
    """A tiny model in fp32 on the CPU, eager, with random weights that keep activations of order 1."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.for_model(model_type, **settings_of(model_type, **changes))
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model):
    generator = torch.Generator().manual_seed(0)

    def normal(x, std):
        return torch.randn(x.shape, generator=generator) * std

    for module in model.modules():
        transposed = getattr(module, "is_transposed", False)
        for parameter in module.parameters(recurse=False):
            fan_in = parameter.shape[1 if transposed and parameter.dim() == 3 else -1]
            parameter.copy_(normal(parameter, fan_in**-0.5) if parameter.dim() > 1 else 1 + normal(parameter, 0.3))
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            order = torch.rand(buffer.shape[0], 8, generator=generator).argsort(dim=1)
            buffer.copy_(order[:, : buffer.shape[1]])
        elif name.endswith("e_score_correction_bias"):
            buffer.copy_(normal(buffer, 0.1))


def to_bf16(model):
    """In place, but for what transformers keeps in fp32."""
    kept = model._keep_in_fp32_modules_strict or ()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.is_floating_point() and not any(part in name for part in kept):
            x.data = x.data.to(torch.bfloat16)
    return model


def experts_of(model):
    """The modules with experts of transformers' interface."""
    return [module for module in model.modules() if is_experts(module)]


def token_ids(device="cpu", count=12):
    return torch.randint(3, 64, (2, count), generator=torch.Generator().manual_seed(1)).to(device)


def output_of(model, ids):
    """Logits, or the last hidden states of a model without a head."""
    output = model(ids, use_cache=False)
    return output.logits if "logits" in output else output.last_hidden_state


def results_of(model, ids):
    """name -> the output and the gradient of every parameter that has one, in fp32 on the CPU."""
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    output = output_of(model, ids)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.device)
    loss = (output.float() * weights).sum() / output.shape[-1]
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    results = {"output": output, **{name: grad for name, grad in zip(parameters, grads) if grad is not None}}
    return {name: x.detach().float().cpu() for name, x in results.items()}


def relative_errors(results, reference):
    """name -> |x - reference| / |reference|, Euclidean; a gradient counts as 1e-5 of the largest at least."""
    assert results.keys() == reference.keys()
    floor = 1e-5 * max(x.norm().item() for name, x in reference.items() if name != "output")
    return {name: (results[name] - x).norm().item() / max(x.norm().item(), floor) for name, x in reference.items()}


@contextlib.contextmanager
def recorded_routing(model):
    """Notes the (weights, ids) that each experts module gets, in the order of the calls."""
    routing = []

    def note(module, args):
        routing.append((args[2].detach().float(), args[1].detach()))

    hooks = [module.register_forward_pre_hook(note) for module in experts_of(model)]
    yield routing
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def fixed_routing(model, routing):
    """Gives the experts modules this routing: rounding that flips an expert would hide everything else."""
    calls = iter(routing)

    def replaced(module, args):
        weights, ids = next(calls)
        return args[0], ids.to(args[1].device, args[1].dtype), weights.to(args[2].device, args[2].dtype)

    hooks = [module.register_forward_pre_hook(replaced) for module in experts_of(model)]
    yield
    for hook in hooks:
        hook.remove()
