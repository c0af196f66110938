"""`replace_moe_layers`: routers and experts of a transformers model on our kernels; `restore_moe_layers` undoes it.

A module is not replaced by another one: its class becomes a subclass of the one that it had, with our forward. So it is
the same object with the same parameters, buffers, hooks and names, and what asks for its class (the collection of
router logits, weight initialisation) finds it. Blocks, shared experts and everything else stay the model's.

Before a router is taken over, its own forward and ours are compared on random weights and tokens: one that computes
something else, in another version of transformers say, is left as it is.
"""

import copy
import functools
import re
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import checks, ops
from .backend import NAME, describe, experts_forward, experts_interface, is_experts, plan_of

# ------------------------------------------------------------------------------------------------------ the routers


class Kind(NamedTuple):
    """How a router of transformers routes.

    options: router -> the options of `gate` for it. widen: the logits are computed in fp32. narrow: the weights are
    returned in the dtype of the logits, as the router itself does; else in fp32.
    """

    options: Callable
    widen: bool = False
    narrow: bool = False


def _deepseek_v2(router):
    groups = {}
    if router.topk_method == "group_limited_greedy":
        groups = {"num_expert_groups": router.num_group, "topk_groups": router.topk_group}
    return {"score_fn": "softmax", "renormalize": False, "routed_scaling_factor": router.routed_scaling_factor,
            **groups}


def _deepseek_v3(router):
    return {"score_fn": "sigmoid", "correction_bias": router.e_score_correction_bias.float(),
            "num_expert_groups": router.num_group, "topk_groups": router.topk_group,
            "renormalize": router.norm_topk_prob, "routed_scaling_factor": router.routed_scaling_factor}


def _softmax(router):
    return {"score_fn": "softmax", "renormalize": getattr(router, "norm_topk_prob", True)}


def _deepseek_v4(router):
    score_fn = {"Sigmoid": "sigmoid", "SqrtSoftplusActivation": "sqrtsoftplus"}.get(type(router.score_fn).__name__)
    if score_fn is None:
        raise ValueError(f"scores by {type(router.score_fn).__name__}, which moe_kernels.gate does not have")
    bias = getattr(router, "e_score_correction_bias", None)
    return {"score_fn": score_fn, "correction_bias": None if bias is None else bias.float(), "renormalize": True,
            "routed_scaling_factor": router.routed_scaling_factor}


# gpt-oss takes the softmax of the chosen logits alone, which is that of all of them renormalised
ROUTERS = {
    "DeepseekV2TopkRouter": Kind(_deepseek_v2, widen=True),
    "DeepseekV3TopkRouter": Kind(_deepseek_v3, widen=True),
    "DeepseekV4TopKRouter": Kind(_deepseek_v4, narrow=True),
    "DeepseekV4HashRouter": Kind(_deepseek_v4, narrow=True),
    "Glm4MoeTopkRouter": Kind(_deepseek_v3, widen=True),
    "GptOssTopKRouter": Kind(_softmax, narrow=True),
    "MixtralTopKRouter": Kind(_softmax),
    "OlmoeTopKRouter": Kind(_softmax, narrow=True),
    "Qwen2MoeTopKRouter": Kind(_softmax, narrow=True),
    "Qwen3MoeTopKRouter": Kind(_softmax, narrow=True),
}
FAMILIES = ("deepseek_v2", "deepseek_v3", "deepseek_v4", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe",
            "qwen3_moe")


def _route(router, kind, hidden_states, token_ids=None):
    """[..., H] -> router_logits [T, E], topk_weights [T, K], topk_ids [T, K] int64, as the router's own forward."""
    weight = router.weight
    flat = hidden_states.reshape(-1, weight.shape[1])
    if kind.widen:
        flat, weight = flat.float(), weight.float()
    router_logits = F.linear(flat, weight, getattr(router, "bias", None))
    given = None if token_ids is None else router.tid2eid[token_ids.reshape(-1)]
    topk_weights, topk_ids = ops.gate(router_logits, router.top_k, topk_ids=given, **kind.options(router))
    # transformers' expert parallelism scatters by the ids, which wants int64
    return router_logits, topk_weights.to(router_logits.dtype) if kind.narrow else topk_weights, topk_ids.long()


def _kind_of(module):
    """The Kind of a router of transformers, or None for every other module."""
    is_theirs = type(module).__module__.startswith("transformers.")
    return ROUTERS.get(type(module).__name__) if is_theirs else None


# -------------------------------------------------------------------------------------------- classes with our forward


class _Ours:
    """What the classes below share: they are made when they are wanted, so a pickle names what they are made of."""

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.moe_kernels_base,), self.__dict__.copy()


class _OurExperts(_Ours):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        """As `moe_kernels.hf.backend.experts_forward`, whatever experts_implementation the model is set to."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


class _OurRouter(_Ours):
    def forward(self, hidden_states, input_ids=None):
        """[..., H] -> router_logits [T, E], topk_weights [T, K], topk_ids [T, K] int64."""
        return _route(self, self.moe_kernels_kind, hidden_states, input_ids)


@functools.cache
def _our_class(base):
    """The subclass of a router's or experts' class that has our forward."""
    kind = ROUTERS.get(base.__name__)
    ours = _OurExperts if kind is None else _OurRouter
    return type(f"{base.__name__}OnMoeKernels", (ours, base),
                {"__module__": __name__, "moe_kernels_base": base, "moe_kernels_kind": kind})


def _rebuild(base):
    ours = _our_class(base)
    return ours.__new__(ours)


# -------------------------------------------------------------------------------------------------- is it the same?


def _random_twin(router, generator):
    """A router with the same settings, and random fp32 parameters and buffers of its own on the CPU."""

    def parameter(x):
        return torch.randn(x.shape, generator=generator) * x.shape[-1] ** -0.5

    def buffer(x):
        if x.dtype.is_floating_point:
            return 0.1 * torch.randn(x.shape, generator=generator)
        return torch.randint(router.num_experts, x.shape, generator=generator)

    twin = copy.copy(router)
    twin.__dict__.update(
        _parameters={name: nn.Parameter(parameter(x)) for name, x in router._parameters.items() if x is not None},
        _buffers={name: buffer(x) for name, x in router._buffers.items() if x is not None}, training=False)
    return twin


def _dense(topk_weights, topk_ids, num_experts):
    dense = topk_weights.new_zeros(topk_weights.shape[0], num_experts)
    return dense.scatter_add(1, topk_ids, topk_weights)


@torch.no_grad()
def _routes_alike(router, kind):
    """Whether ours and the router's own forward agree on 64 random tokens and random weights."""
    num_experts, hidden_size = router.weight.shape
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        twin = _random_twin(router, generator)
        tokens = torch.randn(64, hidden_size, generator=generator)
        table = getattr(twin, "tid2eid", None)
        ids = () if table is None else (torch.randint(table.shape[0], (64,), generator=generator),)
        logits, weights, experts = _route(twin, kind, tokens, *ids)
        expected_logits, expected_weights, expected_experts = type(router).forward(twin, tokens, *ids)
    return torch.allclose(logits, expected_logits, rtol=1e-5, atol=1e-5) and torch.allclose(
        _dense(weights, experts, num_experts), _dense(expected_weights, expected_experts, num_experts), rtol=1e-4,
        atol=1e-6)


def _difference(router, kind):
    """Why our router is not this one, in words, or None."""
    try:
        if router.num_experts > ops.MAX_GATE_EXPERTS or router.top_k > ops.MAX_GATE_TOP_K:
            return (f"{router.num_experts} experts, {router.top_k} a token, and moe_kernels.gate serves "
                    f"{ops.MAX_GATE_EXPERTS} and {ops.MAX_GATE_TOP_K}")
        return None if _routes_alike(router, kind) else "its router computes something else than moe_kernels.gate"
    except (AttributeError, TypeError) as error:  # of a version of transformers whose router has other parts
        return f"a router of another make: {error}"
    except ValueError as error:
        return str(error)


# ----------------------------------------------------------------------------------------------------- public functions


class Report(NamedTuple):
    """What `replace_moe_layers` did; str() of it is a line for each kind of module.

    replaced: (name, how) of each module that runs on our kernels now. left: (name, why) of each that does not.
    """

    replaced: list
    left: list

    def __str__(self):
        lines = []
        for verb, entries in (("replaced", self.replaced), ("left", self.left)):
            counts = {}
            for name, text in entries:
                key = (re.sub(r"\.\d+(?=\.|$)", ".*", name), text)
                counts[key] = counts.get(key, 0) + 1
            lines += [f"{verb} {count} x {name}: {text}" for (name, text), count in counts.items()]
        return "\n".join(lines) or "no MoE layers"


def _check_module(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model wants a torch.nn.Module, got {type(model).__name__}")


def _blocks(model):
    """(name, block) of every module with experts of transformers' interface as its child."""
    return [(name, module) for name, module in model.named_modules()
            if any(is_experts(child) for child in module.children())]


def _refuse(model, has_experts):
    name = f"{type(model).__name__} (model_type {getattr(getattr(model, 'config', None), 'model_type', 'unknown')})"
    instead = ("for its experts alone call moe_kernels.hf.register() and "
               f"model.set_experts_implementation({NAME!r})" if has_experts else
               "no experts of transformers' interface are in it; moe_kernels.MoE builds such layers")
    raise ValueError(f"replace_moe_layers wants a model with the MoE layers of {', '.join(FAMILIES)}, got {name}: "
                     f"{instead}")


def _hindrance(child, kind, differences):
    """Why a router or experts stay as they are, in words, or None. differences: what was found before, by settings."""
    if "forward" in vars(child):
        return "whose forward was set on the object, as expert parallelism and accelerate do"
    if kind is None:
        dtype = child.down_proj.dtype
        return None if dtype in checks.FLOAT_DTYPES else f"with weights of {str(dtype).removeprefix('torch.')}"
    settings = {name: value for name, value in vars(child).items() if isinstance(value, (int, float, str))}
    key = (type(child), type(getattr(child, "score_fn", None)), *sorted(settings.items()), child.weight.shape)
    if key not in differences:
        differences[key] = _difference(child, kind)
    return differences[key]


def _replace_child(name, child, report, differences):
    """Replaces one child of a block, or says why not."""
    kind, label = _kind_of(child), type(child).__name__
    if isinstance(child, _Ours):
        report.left.append((name, "replaced before"))
        return
    if kind is None and not is_experts(child):
        report.left.append((name, f"{label}, dense"))
        return
    hindrance = _hindrance(child, kind, differences)
    if hindrance is not None:
        report.left.append((name, f"{label}, {hindrance}"))
        return
    how = "moe_kernels.gate"
    if kind is None:
        route, detail = plan_of(child)
        how = f"{route} ({describe(detail) if route == 'fused' else detail})"
    child.__class__ = _our_class(type(child))
    report.replaced.append((name, f"{label}, {how}"))


def replace_moe_layers(model):
    """Runs routers and experts of a transformers model on our kernels, in place, with the same parameters.

    Served are the layers of DeepSeek-V2, V3 and V4, Qwen2-MoE and Qwen3-MoE, Mixtral, OLMoE, GLM-4-MoE and gpt-oss.
    Results stay the same to the rounding: each router is compared with the model's own before. State dict names, hooks
    and collected router logits stay too. No copy of a weight is made.

    Args:
        model: a `PreTrainedModel`, or any module that holds such layers.
    Returns: Report(replaced, left), which prints as lines that say what was replaced, what was left, and why.
    Raises: TypeError on what is no module; ValueError on a model that has no such layer, with its name and what serves
        it instead; ImportError where transformers is missing or too old.
    """
    _check_module(model)
    experts_interface()
    blocks = _blocks(model)
    known = [(name, block) for name, block in blocks
             if any(_kind_of(child) or isinstance(child, _OurRouter) for child in block.children())]
    if not known:
        _refuse(model, bool(blocks))
    report, differences = Report([], []), {}
    for name, block in blocks:
        for child_name, child in block.named_children():
            full_name = f"{name}.{child_name}" if name else child_name
            if (name, block) in known:
                _replace_child(full_name, child, report, differences)
            elif is_experts(child):
                report.left.append((full_name, f"{type(child).__name__}, of a family that is not served"))
    return report


def restore_moe_layers(model):
    """Undoes `replace_moe_layers`.

    Returns: the names of the modules that have their own forward again.
    Raises: TypeError on what is no module; ValueError where something else, such as fully_shard, changed the class of a
        replaced module since.
    """
    _check_module(model)
    ours = [(name, module) for name, module in model.named_modules() if isinstance(module, _Ours)]
    for name, module in ours:
        if "moe_kernels_base" not in vars(type(module)):
            raise ValueError(f"restore_moe_layers wants modules as they were replaced, got {name} of class "
                             f"{type(module).__name__}: restore before what made it so, such as fully_shard")
    for _, module in ours:
        module.__class__ = module.moe_kernels_base
    return [name for name, _ in ours]
