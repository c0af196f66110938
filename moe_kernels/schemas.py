"""Operator schemas, their fake (meta) kernels, and the registration of both operator namespaces.

`torch.ops.moe_kernels.X` is the torch implementation on the CPU and a CUDA kernel on a GPU (registered by the compiled
module `moe_kernels._C`, where it was built). `torch.ops.moe_kernels_composite.X` is the torch implementation on every
device. The schemas stand here, in Python, so that the same operators exist with and without the compiled module.

T tokens, H hidden size, I expert width, E experts, K experts a token, S = T*K rows, W pre-activation columns.
Weights are [E, W, H] and [E, H, I], or [E, H, W] and [E, I, H] with is_transposed.
"""

import functools
import importlib

import torch

from . import composite
from .activation import pre_activation_width

KERNELS = "moe_kernels"
COMPOSITE = "moe_kernels_composite"

_OPTIONS = "str activation, float? swiglu_limit, float swiglu_alpha, bool is_transposed, bool is_concatenated"
_FUSED_EXPERTS = ("Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor topk_ids,"
                  f" Tensor? gate_up_bias, Tensor? down_bias, {_OPTIONS}, bool keep_pre_activation")
_FUSED_EXPERTS_RESULTS = ("Tensor output, Tensor pre_activation, Tensor expert_offsets, Tensor sorted_rows,"
                          " Tensor row_of_slot")
_FUSED_EXPERTS_BACKWARD = ("Tensor grad_output, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj,"
                           " Tensor topk_weights, Tensor? gate_up_bias, Tensor? down_bias, Tensor pre_activation,"
                           f" Tensor expert_offsets, Tensor sorted_rows, Tensor row_of_slot, {_OPTIONS},"
                           " bool[6] needs")
_GRADIENTS = ("Tensor grad_hidden_states, Tensor grad_gate_up_proj, Tensor grad_down_proj, Tensor grad_topk_weights,"
              " Tensor grad_gate_up_bias, Tensor grad_down_bias")

SCHEMAS = {
    "gate": "(Tensor router_logits, Tensor? correction_bias, Tensor? given_ids, int top_k, str score_fn,"
            " int num_expert_groups, int topk_groups, bool renormalize, float routed_scaling_factor)"
            " -> (Tensor topk_weights, Tensor topk_ids)",
    "gate_backward": "(Tensor grad_topk_weights, Tensor router_logits, Tensor topk_ids, str score_fn,"
                     " bool renormalize, float routed_scaling_factor) -> Tensor",
    "plan": "(Tensor topk_ids, int num_experts) -> (Tensor expert_offsets, Tensor sorted_rows, Tensor row_of_slot)",
    "count_loads": "(Tensor(a!) tokens_per_expert, Tensor expert_offsets) -> ()",
    "up_proj": "(Tensor hidden_states, Tensor gate_up_proj, Tensor? gate_up_bias, Tensor expert_offsets,"
               f" Tensor sorted_rows, int top_k, {_OPTIONS}, bool keep_pre_activation)"
               " -> (Tensor rows, Tensor pre_activation)",
    "grouped_mm": "(Tensor a, Tensor b, Tensor? bias, Tensor expert_offsets, bool transpose_b) -> Tensor",
    "weight_grad": "(Tensor grad, Tensor a, Tensor expert_offsets, Tensor? grad_sorted_rows, Tensor? a_sorted_rows,"
                   " int top_k) -> Tensor",
    "weight_grad_accumulate": "(Tensor(a!) buffer, Tensor grad, Tensor a, Tensor expert_offsets,"
                              " Tensor? grad_sorted_rows, Tensor? a_sorted_rows, int top_k) -> ()",
    "bias_grad": "(Tensor grad, Tensor? topk_weights, Tensor expert_offsets, Tensor? sorted_rows, int top_k)"
                 " -> Tensor",
    "combine": "(Tensor rows, Tensor? topk_weights, Tensor row_of_slot) -> Tensor",
    "combine_backward": "(Tensor grad_output, Tensor rows, Tensor topk_weights, Tensor sorted_rows,"
                        " Tensor row_of_slot) -> (Tensor grad_rows, Tensor grad_topk_weights)",
    "permute": "(Tensor hidden_states, Tensor sorted_rows, Tensor row_of_slot) -> Tensor",
    "down_proj_backward": "(Tensor grad_output, Tensor topk_weights, Tensor down_proj, Tensor? down_bias,"
                          " Tensor pre_activation, Tensor expert_offsets, Tensor sorted_rows, Tensor row_of_slot,"
                          f" {_OPTIONS})"
                          " -> (Tensor grad_pre_activation, Tensor weighted_rows, Tensor grad_topk_weights)",
    "fused_experts": f"({_FUSED_EXPERTS}) -> ({_FUSED_EXPERTS_RESULTS})",
    "fused_experts_accumulate": f"({_FUSED_EXPERTS}, Tensor? gate_up_grad, Tensor? down_grad)"
                                f" -> ({_FUSED_EXPERTS_RESULTS})",
    "fused_experts_backward": f"({_FUSED_EXPERTS_BACKWARD}) -> ({_GRADIENTS})",
    "fused_experts_backward_accumulate": "(Tensor(a!)? gate_up_grad, Tensor(b!)? down_grad,"
                                         f" {_FUSED_EXPERTS_BACKWARD}) -> ({_GRADIENTS})",
}


def _int32(like, *shape):
    return like.new_empty(shape, dtype=torch.int32)


def _fake_gate(router_logits, correction_bias, given_ids, top_k, *options):
    num_tokens = router_logits.shape[0]
    dtype = composite.accumulation_dtype(router_logits.dtype)
    return router_logits.new_empty(num_tokens, top_k, dtype=dtype), _int32(router_logits, num_tokens, top_k)


def _fake_plan(topk_ids, num_experts):
    return (_int32(topk_ids, num_experts + 1), _int32(topk_ids, topk_ids.shape[0] * topk_ids.shape[1]),
            _int32(topk_ids, *topk_ids.shape))


def _fake_up_proj(hidden_states, gate_up_proj, gate_up_bias, expert_offsets, sorted_rows, top_k, activation,
                  swiglu_limit, swiglu_alpha, is_transposed, is_concatenated, keep_pre_activation):
    width, num_rows = gate_up_proj.shape[2 if is_transposed else 1], sorted_rows.shape[0]
    intermediate_size = width // pre_activation_width(1, activation)
    return (hidden_states.new_empty(num_rows, intermediate_size),
            hidden_states.new_empty(num_rows if keep_pre_activation else 0, width))


def _fake_grouped_mm(a, b, bias, expert_offsets, transpose_b):
    return a.new_empty(a.shape[0], b.shape[1 if transpose_b else 2])


def _fake_weight_grad(grad, a, expert_offsets, grad_sorted_rows, a_sorted_rows, top_k):
    return grad.new_empty(expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1])


def _fake_bias_grad(grad, topk_weights, expert_offsets, sorted_rows, top_k):
    return grad.new_empty(expert_offsets.shape[0] - 1, grad.shape[1])


def _fake_down_proj_backward(grad_output, topk_weights, down_proj, down_bias, pre_activation, *rest):
    num_rows, is_transposed = pre_activation.shape[0], rest[-2]
    return (torch.empty_like(pre_activation),
            pre_activation.new_empty(num_rows, down_proj.shape[1 if is_transposed else 2]),
            torch.empty_like(topk_weights))


def _fake_fused_experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, gate_up_bias, down_bias,
                        activation, swiglu_limit, swiglu_alpha, is_transposed, is_concatenated, keep_pre_activation):
    plan = _fake_plan(topk_ids, gate_up_proj.shape[0])
    kept_rows, width = plan[1].shape[0] if keep_pre_activation else 0, gate_up_proj.shape[2 if is_transposed else 1]
    return torch.empty_like(hidden_states), hidden_states.new_empty(kept_rows, width), *plan


def _fake_fused_experts_backward(grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias,
                                 down_bias, pre_activation, *rest):
    needs, num_experts = rest[-1], gate_up_proj.shape[0]
    shapes = (hidden_states.shape, gate_up_proj.shape, down_proj.shape, topk_weights.shape,
              (num_experts, pre_activation.shape[1]), (num_experts, hidden_states.shape[1]))
    like = (hidden_states, gate_up_proj, down_proj, topk_weights, hidden_states, hidden_states)
    return tuple(x.new_empty(shape if need else (0,)) for x, shape, need in zip(like, shapes, needs))


def _fake_fused_experts_backward_accumulate(gate_up_grad, down_grad, *args):
    added = (False, gate_up_grad is not None, down_grad is not None, False, False, False)
    needs = [need and not here for need, here in zip(args[-1], added)]
    return _fake_fused_experts_backward(*args[:-1], needs)


FAKES = {
    "gate": _fake_gate,
    "gate_backward": lambda grad_topk_weights, router_logits, *rest: torch.empty_like(router_logits),
    "plan": _fake_plan,
    "count_loads": lambda tokens_per_expert, expert_offsets: None,
    "up_proj": _fake_up_proj,
    "grouped_mm": _fake_grouped_mm,
    "weight_grad": _fake_weight_grad,
    "weight_grad_accumulate": lambda *args: None,
    "bias_grad": _fake_bias_grad,
    "combine": lambda rows, topk_weights, row_of_slot: rows.new_empty(row_of_slot.shape[0], rows.shape[1]),
    "combine_backward": lambda grad_output, rows, topk_weights, *rest: (torch.empty_like(rows),
                                                                         torch.empty_like(topk_weights)),
    "permute": lambda hidden_states, sorted_rows, row_of_slot: hidden_states.new_empty(sorted_rows.shape[0],
                                                                                       hidden_states.shape[1]),
    "down_proj_backward": _fake_down_proj_backward,
    "fused_experts": _fake_fused_experts,
    "fused_experts_accumulate": lambda *args: _fake_fused_experts(*args[:-2]),
    "fused_experts_backward": _fake_fused_experts_backward,
    "fused_experts_backward_accumulate": _fake_fused_experts_backward_accumulate,
}


# operators that never have a kernel of their own: through torch, on every device
FALLBACKS = {"count_loads": composite.count_loads}


def _without_autocast(function):
    """The function, safe from autocast, which would otherwise lower the fp32 products inside it."""

    @functools.wraps(function)
    def call(*args):
        device_type = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device_type):
            return function(*args)
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return call


def _define(namespace, dispatch_key):
    library = torch.library.Library(namespace, "DEF")
    # the C++ side is handed contiguous tensors, so the compiler must not change the strides of what it passes
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=tags)
        library.impl(name, _without_autocast(getattr(composite, name)), dispatch_key)
        torch.library.register_fake(f"{namespace}::{name}", FAKES[name], lib=library)
    return library


LIBRARIES = {KERNELS: _define(KERNELS, "CPU"), COMPOSITE: _define(COMPOSITE, "CompositeExplicitAutograd")}
for _name, _fallback in FALLBACKS.items():
    LIBRARIES[KERNELS].impl(_name, _without_autocast(_fallback), "CompositeExplicitAutograd")

try:
    compiled_module = importlib.import_module("moe_kernels._C")  # registers CUDA kernels of the operators above
except ModuleNotFoundError as error:
    if error.name != "moe_kernels._C":
        raise
    compiled_module = None
