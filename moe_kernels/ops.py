"""The public functions. They check their arguments, pick the implementation, and call one operator each.

T tokens, H hidden size, I expert width, E experts, K experts a token, S = T*K rows (a row is one (token, slot) pair).

    gate -> make_plan -> up_proj -> down_proj -> combine        the last four in one call: fused_experts

On a CUDA card bf16 and fp16 run in the compiled kernels; the CPU, fp32 and fp64 run in torch operations (composite.py).
The environment variable MOE_KERNELS_IMPLEMENTATION=composite makes everything do so. Under `torch.autocast` floating
inputs are cast to its dtype, except the routing, which stays in fp32.
"""

import functools
import os
import re
from typing import NamedTuple

import torch

from . import autograd, checks, schemas
from .activation import SWIGLU_OAI_ALPHA

HALF_DTYPES = (torch.bfloat16, torch.float16)
MAX_GATE_EXPERTS, MAX_GATE_TOP_K = 1024, 32  # of the gate kernel, which keeps a token's scores in registers
MAX_PLAN_EXPERTS = 4096  # of the plan kernel, which counts in shared memory


class Plan(NamedTuple):
    """Which rows each expert works on; of `make_plan`. All int32, on the device of topk_ids.

    expert_offsets: [E+1]; rows expert_offsets[e] to expert_offsets[e+1] are those of expert e.
    sorted_rows: [S]; row r is slot sorted_rows[r] % K of token sorted_rows[r] // K; -1 behind the last row.
    row_of_slot: [T, K]; the row of each slot, -1 where the id is outside [0, E).
    """

    expert_offsets: torch.Tensor
    sorted_rows: torch.Tensor
    row_of_slot: torch.Tensor

    @property
    def num_experts(self):
        """E."""
        return self.expert_offsets.shape[0] - 1

    @property
    def top_k(self):
        """K."""
        return self.row_of_slot.shape[1]


# ------------------------------------------------------------------------------------------ which implementation


def build_info():
    """What this installation holds: a dict with cuda_built, architectures, cuda_version (of the compiler) and torch."""
    built = {} if schemas.compiled_module is None else dict(schemas.compiled_module.build_info())
    return {"cuda_built": schemas.compiled_module is not None, "architectures": built.pop("architectures", []),
            "cuda_version": built.pop("cuda_version", None), "torch": torch.__version__, **built}


@functools.cache
def _lowest_capability():
    """The lowest compute capability the module was built for, such as 80; PTX carries it to every newer card."""
    text = ",".join(map(str, build_info()["architectures"]))
    return min((int(number) for number in re.findall(r"\d+", text)), default=80)


@functools.cache
def _built_for(device_index):
    """Whether the compiled module is there and has code for this CUDA device."""
    if schemas.compiled_module is None:
        return False
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor >= _lowest_capability()


@torch.compiler.assume_constant_result
def _kernels_run_on(device_index):
    """Whether the compiled kernels serve this CUDA device."""
    return _built_for(device_index) and os.environ.get("MOE_KERNELS_IMPLEMENTATION") != "composite"


def uses_kernels(x, dtypes=HALF_DTYPES):
    """Whether an operator on this tensor runs in the compiled CUDA kernels, which store the given dtypes."""
    return x.is_cuda and x.dtype in dtypes and _kernels_run_on(x.device.index)


def _namespace(x, dtypes=HALF_DTYPES):
    """The operators that serve this tensor."""
    if x.is_cuda and not uses_kernels(x, dtypes):
        return torch.ops.moe_kernels_composite
    return torch.ops.moe_kernels


def _autocast(*tensors):
    """The tensors as autocast wants them: cast to its dtype where it is on; fp64 stays, as in torch's own operators."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device_type = next(x.device.type for x in tensors if isinstance(x, torch.Tensor))
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    cast = (torch.float32, *HALF_DTYPES)
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in cast else x for x in tensors)


def _contiguous(*tensors):
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _int32_ids(topk_ids):
    """int32 ids; an int64 id that int32 cannot hold becomes a sentinel instead of wrapping around."""
    if topk_ids.dtype == torch.int64:
        topk_ids = topk_ids.clamp(-checks.MAX_ROWS - 1, checks.MAX_ROWS).to(torch.int32)
    return topk_ids.contiguous()


# -------------------------------------------------------------------------------------------------- public functions


def gate(router_logits, top_k, score_fn="sigmoid", correction_bias=None, num_expert_groups=1, topk_groups=1,
         renormalize=True, routed_scaling_factor=1.0, topk_ids=None):
    """The experts of each token and their weights, by DeepSeek's rules.

    scores = score_fn(router_logits) in fp32; the K best of scores + correction_bias are chosen, ties to the lower id,
    NaN last; the weights are the unbiased scores of the chosen, divided by their sum (+ 1e-20) if renormalize, times
    routed_scaling_factor. With groups only the experts of the topk_groups best groups can be chosen; a group's score is
    the sum of its two best biased scores with a bias, and its best score without.

    Args:
        router_logits: [T, E] fp32, bf16, fp16 or fp64; differentiable.
        top_k: K; at most E. The kernel serves E up to 1024 and K up to 32.
        score_fn: "softmax", "sigmoid" or "sqrtsoftplus".
        correction_bias: [E] fp32 or None; chooses and never weighs, has no gradient.
        routed_scaling_factor: a number.
        topk_ids: [T, K] int32 or int64; if given (hash routing) nothing is chosen, and the gate only weighs. An id
            outside [0, E) gets weight 0.
    Returns: topk_weights [T, K] fp32 (fp64 for fp64 logits), best first; topk_ids [T, K] int32.
    Raises: ValueError, TypeError on an argument that is not as above.
    Source: DeepSeek-V3 report, section 2.1.2, and its model code; sqrtsoftplus and hash routing: DeepSeek-V4.
    """
    checks.check_tensor("router_logits", router_logits, (("T", None), ("E", None)), checks.FLOAT_DTYPES)
    num_tokens, num_experts = router_logits.shape
    device = router_logits.device
    checks.check_integer("the last size of router_logits", num_experts, 1)
    checks.check_integer("top_k", top_k, 1, num_experts if topk_ids is None else None)
    checks.check_choice("score_fn", score_fn, checks.SCORE_FUNCTIONS)
    checks.check_groups(num_experts, top_k if topk_ids is None else 1, num_expert_groups, topk_groups)
    checks.check_num_rows(num_tokens, top_k)
    checks.check_number("routed_scaling_factor", routed_scaling_factor)
    if correction_bias is not None:
        checks.check_tensor("correction_bias", correction_bias, (("E", num_experts),), (torch.float32,), device)
        correction_bias = correction_bias.detach().contiguous()
    if topk_ids is not None:
        checks.check_tensor("topk_ids", topk_ids, (("T", num_tokens), ("K", top_k)), checks.INDEX_DTYPES, device)
        topk_ids = _int32_ids(topk_ids)
    dtypes = (torch.float32, *HALF_DTYPES)
    if uses_kernels(router_logits, dtypes):
        checks.check_integer("the last size of router_logits", num_experts, 1, MAX_GATE_EXPERTS)
        checks.check_integer("top_k", top_k, 1, MAX_GATE_TOP_K)
    return autograd.call(
        _namespace(router_logits, dtypes).gate, router_logits.contiguous(), correction_bias, topk_ids, top_k, score_fn,
        num_expert_groups, topk_groups, bool(renormalize), float(routed_scaling_factor))


def make_plan(topk_ids, num_experts):
    """Sorts the slots by expert: which rows each expert works on, and where each slot's row is.

    The order is stable (token by token, slot by slot inside an expert). An id outside [0, E), the sentinel of expert
    parallelism, gets no row. Nothing is read on the host.

    Args:
        topk_ids: [T, K] int32 or int64; T*K below 2^31.
        num_experts: E. The kernel serves up to 4096.
    Returns: Plan(expert_offsets [E+1], sorted_rows [S], row_of_slot [T, K]), all int32.
    Raises: ValueError, TypeError on an argument that is not as above.
    """
    checks.check_tensor("topk_ids", topk_ids, (("T", None), ("K", None)), checks.INDEX_DTYPES)
    checks.check_integer("the last size of topk_ids", topk_ids.shape[1], 1)
    checks.check_integer("num_experts", num_experts, 1)
    checks.check_num_rows(*topk_ids.shape)
    if uses_kernels(topk_ids, checks.INDEX_DTYPES):
        checks.check_integer("num_experts", num_experts, 1, MAX_PLAN_EXPERTS)
    operator = _namespace(topk_ids, checks.INDEX_DTYPES).plan
    return Plan(*autograd.call(operator, _int32_ids(topk_ids), num_experts))


def _fused_experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation, swiglu_limit,
                   gate_up_bias, down_bias, grad_buffers, swiglu_alpha, is_transposed, is_concatenated):
    """(output, the three tensors of the plan) of `fused_experts`."""
    checks.check_activation(activation, swiglu_limit, swiglu_alpha)
    checks.check_layout(activation, is_transposed, is_concatenated)
    hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias = _autocast(
        hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias)
    if torch.compiler.is_compiling() or not checks.experts_fit(hidden_states, gate_up_proj, down_proj, topk_weights,
                                                               topk_ids, gate_up_bias, down_bias, activation,
                                                               is_transposed):
        checks.check_experts(hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias, activation, is_transposed)
        checks.check_topk(topk_weights, topk_ids, hidden_states.shape[0], hidden_states.dtype, hidden_states.device)
    if grad_buffers is not None:
        checks.check_grad_buffers(grad_buffers, gate_up_proj, down_proj, is_transposed)
    kernels = uses_kernels(hidden_states)
    if kernels:
        checks.check_integer("the first size of gate_up_proj", gate_up_proj.shape[0], 1, MAX_PLAN_EXPERTS)
        checks.check_multiple_of_8("H, the last size of hidden_states,", hidden_states.shape[1])
        checks.check_multiple_of_8(f"I, the {'middle' if is_transposed else 'last'} size of down_proj,",
                                   down_proj.shape[1 if is_transposed else 2])
    # the pre-activation is stored for a backward alone
    keep = torch.is_grad_enabled() and (
        hidden_states.requires_grad or gate_up_proj.requires_grad or down_proj.requires_grad
        or topk_weights.requires_grad or (gate_up_bias is not None and gate_up_bias.requires_grad)
        or (down_bias is not None and down_bias.requires_grad))
    ops = torch.ops.moe_kernels_composite if hidden_states.is_cuda and not kernels else torch.ops.moe_kernels
    return autograd.fused_experts(ops, (
        hidden_states.contiguous(), gate_up_proj.contiguous(), down_proj.contiguous(), topk_weights.contiguous(),
        _int32_ids(topk_ids), None if gate_up_bias is None else gate_up_bias.contiguous(),
        None if down_bias is None else down_bias.contiguous(), activation,
        None if swiglu_limit is None else float(swiglu_limit),
        SWIGLU_OAI_ALPHA if swiglu_alpha is None else float(swiglu_alpha), bool(is_transposed), bool(is_concatenated),
        keep), grad_buffers)


def fused_experts_and_plan(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation="swiglu",
                           swiglu_limit=None, gate_up_bias=None, down_bias=None, grad_buffers=None, swiglu_alpha=None,
                           is_transposed=False, is_concatenated=True):
    """`fused_experts` that also returns the `Plan`, whose expert_offsets tell each expert's load."""
    output, *plan = _fused_experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation,
                                   swiglu_limit, gate_up_bias, down_bias, grad_buffers, swiglu_alpha, is_transposed,
                                   is_concatenated)
    return output, Plan(*plan)


def fused_experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation="swiglu",
                  swiglu_limit=None, gate_up_bias=None, down_bias=None, grad_buffers=None, swiglu_alpha=None,
                  is_transposed=False, is_concatenated=True):
    """The experts of a mixture-of-experts layer: each token's K experts, and their weighted sum.

    out[t] = sum_k topk_weights[t, k] * (act(hidden_states[t] @ gate_up_proj[e].T + gate_up_bias[e]) @ down_proj[e].T
    + down_bias[e]) with e = topk_ids[t, k]. Differentiable in all six floating inputs; training keeps hidden_states,
    the pre-activation [S, 2I] and the routing.

    Args:
        hidden_states: [T, H] bf16, fp16, fp32 or fp64; the weights and biases have the same dtype.
        gate_up_proj: [E, 2I, H], the gate half first; [E, I, H] for an ungated activation; [E, H, 2I] with
            is_transposed.
        down_proj: [E, H, I]; [E, I, H] with is_transposed. The kernels want H and I to be multiples of 8.
        topk_weights: [T, K] fp32 (fp64 is taken with fp64), scaled already.
        topk_ids: [T, K] int32 or int64; an id outside [0, E) contributes nothing, whatever its weight.
        activation: gated "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai" (gpt-oss: gate * sigmoid(swiglu_alpha
            * gate) * (up + 1)); ungated "silu", "gelu", "relu", "relu2".
        swiglu_limit: L clamps the gate above at L and up to [-L, L], with swiglu and swiglu_oai alone; None: no clamp.
        gate_up_bias: [E, 2I], in the order of the weights' columns, or None. down_bias: [E, H] or None.
        grad_buffers: None, or (gate_up_grad, down_grad) in the weights' shapes, contiguous and fp32 (fp64 with fp64
            weights), either of them None: the backward adds that weight's gradient to its buffer, in fp32 and not
            rounded before, and gives the weight itself none. For gradients accumulated over several backward calls
            without another pass over them. No second derivative.
        swiglu_alpha: of swiglu_oai alone; None is 1.702.
        is_transposed: the weights are [E, H, 2I] and [E, I, H], used as they lie; swiglu and swiglu_oai alone.
        is_concatenated: False: gate and up take turns, gate_up_proj[..., 0::2] and [..., 1::2]; with is_transposed
            alone. Both names are those of transformers' experts interface.
    Returns: [T, H] in the dtype of hidden_states (autocast's under autocast); deterministic.
    Raises: ValueError, TypeError on an argument that is not as above.
    Source: DeepSeek-V3 report, section 2.1.2; what is stored for the backward: SonicMoE, arXiv 2512.14080.
    """
    return _fused_experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation, swiglu_limit,
                          gate_up_bias, down_bias, grad_buffers, swiglu_alpha, is_transposed, is_concatenated)[0]


def _check_plan(plan, device):
    if not isinstance(plan, Plan):
        raise TypeError(f"plan wants a Plan of make_plan, got {type(plan).__name__}")
    num_tokens, top_k = plan.row_of_slot.shape
    checks.check_tensor("plan.row_of_slot", plan.row_of_slot, (("T", None), ("K", None)), (torch.int32,), device)
    checks.check_tensor("plan.sorted_rows", plan.sorted_rows, (("S", num_tokens * top_k),), (torch.int32,), device)


def permute(hidden_states, plan):
    """Each row's token: rows[r] = hidden_states[plan.sorted_rows[r] // K], zero behind the last row.

    Args:
        hidden_states: [T, H] bf16, fp16, fp32 or fp64; differentiable.
        plan: of `make_plan`, with the same T.
    Returns: [S, H] in the dtype of hidden_states, sorted by expert.
    Raises: ValueError, TypeError on an argument that is not as above.
    """
    checks.check_tensor("hidden_states", hidden_states, (("T", None), ("H", None)), checks.FLOAT_DTYPES)
    _check_plan(plan, hidden_states.device)
    shape = (("T", plan.row_of_slot.shape[0]), ("H", None))
    checks.check_tensor("hidden_states", hidden_states, shape, checks.FLOAT_DTYPES)
    if uses_kernels(hidden_states):
        checks.check_multiple_of_8("H, the last size of hidden_states,", hidden_states.shape[1])
    operator = _namespace(hidden_states).permute
    return autograd.call(operator, hidden_states.contiguous(), plan.sorted_rows.contiguous(),
                         plan.row_of_slot.contiguous())


def unpermute(rows, plan, topk_weights=None):
    """The sum of each token's rows, weighted if there are weights: the combine stage, and the inverse of `permute`.

    out[t] = sum_k topk_weights[t, k] * rows[plan.row_of_slot[t, k]]

    Args:
        rows: [S, H] bf16, fp16, fp32 or fp64, sorted by expert; differentiable.
        plan: of `make_plan`.
        topk_weights: [T, K] fp32 (fp64 is taken with fp64) or None for a plain sum; differentiable.
    Returns: [T, H] in the dtype of rows; summed in fp32, k ascending, deterministic.
    Raises: ValueError, TypeError on an argument that is not as above.
    Source: DeepSeek-V3 report, section 2.1.2.
    """
    checks.check_tensor("rows", rows, (("S", None), ("H", None)), checks.FLOAT_DTYPES)
    _check_plan(plan, rows.device)
    checks.check_tensor("rows", rows, (("S", plan.sorted_rows.shape[0]), ("H", None)), checks.FLOAT_DTYPES)
    if topk_weights is not None:
        checks.check_topk(topk_weights, plan.row_of_slot, plan.row_of_slot.shape[0], rows.dtype, rows.device)
    if uses_kernels(rows):
        checks.check_multiple_of_8("H, the last size of rows,", rows.shape[1])
    return autograd.call(_namespace(rows).combine, *_contiguous(rows, topk_weights, plan.row_of_slot))


def grouped_mm(a, b, expert_offsets, bias=None, transpose_b=True):
    """One product an expert: c[r] = a[r] @ b[e].T (+ bias[e]) for the rows r of expert e, as `down_proj` does it.

    Args:
        a: [S, k] bf16, fp16, fp32 or fp64, sorted by expert; differentiable.
        b: [E, n, k] in the dtype of a; differentiable. The kernels want n and k to be multiples of 8.
        expert_offsets: [E+1] int32 or int64, ascending, on the device of a; rows before the first and
            behind the last offset give zeros.
        bias: [E, n] in the dtype of a, or None; differentiable.
        transpose_b: False takes b as [E, k, n] and does not transpose it: c[r] = a[r] @ b[e].
    Returns: [S, n] in the dtype of a (autocast's under autocast); accumulated in fp32.
    Raises: ValueError, TypeError on an argument that is not as above.
    """
    a, b, bias = _autocast(a, b, bias)
    checks.check_tensor("a", a, (("S", None), ("k", None)), checks.FLOAT_DTYPES)
    inner, outer = ("k", a.shape[1]), ("n", None)
    checks.check_tensor("b", b, (("E", None), *((outer, inner) if transpose_b else (inner, outer))), (a.dtype,),
                        a.device)
    num_experts, columns = b.shape[0], b.shape[1 if transpose_b else 2]
    checks.check_tensor("expert_offsets", expert_offsets, (("E+1", num_experts + 1),), checks.INDEX_DTYPES, a.device)
    if bias is not None:
        checks.check_tensor("bias", bias, (("E", num_experts), ("n", columns)), (a.dtype,), a.device)
    checks.check_num_rows(a.shape[0], 1)
    if uses_kernels(a):
        checks.check_multiple_of_8("k, the last size of a,", a.shape[1])
        checks.check_multiple_of_8(f"n, the {'middle' if transpose_b else 'last'} size of b,", columns)
    a, b, bias, offsets = _contiguous(a, b, bias, expert_offsets.to(torch.int32))
    return autograd.call(_namespace(a).grouped_mm, a, b, bias, offsets, bool(transpose_b))
