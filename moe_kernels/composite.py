"""The five stages in torch operations, forward and backward.

The implementation of the CPU, and on a GPU the one for the dtypes that the kernels do not store (fp32, fp64) and for an
installation without the compiled module. Shapes: T tokens, H hidden size, I expert width, E experts, K experts a token,
S = T*K rows, W columns of the pre-activation (2I gated, I ungated). Weights with is_transposed lie as [E, H, W] and
[E, I, H]; the pre-activation has the order of the weights' columns (is_concatenated: see activation.py).

    gate -> plan -> up_proj -> down_proj (grouped_mm) -> combine

Products accumulate in fp32 (fp64 for fp64) and are rounded once, where they are stored. Sums run in a fixed order, so
the same input gives the same bits. The number of rows of each expert is read on the host: on a GPU the functions that
take expert_offsets wait for the device, which the kernels do not.
"""

import torch
import torch.nn.functional as F

from .activation import activate, activate_backward

RENORMALIZE_EPSILON = 1e-20  # DeepSeek's: keeps a row of zero scores at zero


def accumulation_dtype(dtype):
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------- gate


def scores_of(router_logits, score_fn):
    """Scores [T, E] of logits, in fp32 (fp64 for fp64): softmax, sigmoid or sqrt(softplus)."""
    logits = router_logits.to(accumulation_dtype(router_logits.dtype))
    if score_fn == "softmax":
        return torch.softmax(logits, dim=-1)
    if score_fn == "sigmoid":
        return torch.sigmoid(logits)
    return F.softplus(logits).sqrt()


def _scores_backward(grad_scores, logits, scores, score_fn):
    if score_fn == "softmax":
        return scores * (grad_scores - (grad_scores * scores).sum(dim=-1, keepdim=True))
    if score_fn == "sigmoid":
        return grad_scores * scores * (1 - scores)
    # softplus underflows to 0 for very negative logits, where the derivative's limit is 0
    slope = torch.where(scores > 0, torch.sigmoid(logits) / (2 * scores), torch.zeros_like(scores))
    return grad_scores * slope


def _nan_as_lowest(x):
    return torch.where(torch.isnan(x), float("-inf"), x)


def _only_best_groups(choice, num_expert_groups, topk_groups, group_best):
    """-inf for the experts of all but the topk_groups best groups; a group's score sums its group_best best experts."""
    num_tokens, num_experts = choice.shape
    groups = choice.view(num_tokens, num_expert_groups, num_experts // num_expert_groups)
    best = groups.topk(min(group_best, groups.shape[-1]), dim=-1).values
    order = _nan_as_lowest(best.sum(dim=-1)).sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros(num_tokens, num_expert_groups, dtype=torch.bool, device=choice.device)
    keep.scatter_(1, order[:, :topk_groups], True)
    return groups.masked_fill(~keep.unsqueeze(-1), float("-inf")).view(num_tokens, num_experts)


def _choose(scores, correction_bias, top_k, num_expert_groups, topk_groups):
    choice = _nan_as_lowest(scores if correction_bias is None else scores + correction_bias)
    if topk_groups < num_expert_groups:
        choice = _only_best_groups(choice, num_expert_groups, topk_groups, 1 if correction_bias is None else 2)
    # a stable sort, because topk does not say which of two equal scores it takes
    return choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].to(torch.int32)


def _valid_ids(topk_ids, num_experts):
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    return valid, torch.where(valid, topk_ids, 0).long()


def gate(router_logits, correction_bias, given_ids, top_k, score_fn, num_expert_groups, topk_groups, renormalize,
         routed_scaling_factor):
    """topk_weights [T, K] (fp32, fp64 for fp64 logits) and topk_ids [T, K] int32 of router_logits [T, E]."""
    scores = scores_of(router_logits, score_fn)
    if given_ids is None:
        topk_ids = _choose(scores, correction_bias, top_k, num_expert_groups, topk_groups)
    else:
        topk_ids = given_ids.to(torch.int32, copy=True)
    valid, index = _valid_ids(topk_ids, scores.shape[1])
    weights = torch.where(valid, scores.gather(1, index), 0)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + RENORMALIZE_EPSILON)
    return weights * routed_scaling_factor, topk_ids


def gate_backward(grad_topk_weights, router_logits, topk_ids, score_fn, renormalize, routed_scaling_factor):
    """Gradient of the logits [T, E], in their dtype; the choice itself and the correction bias have none."""
    scores = scores_of(router_logits, score_fn)
    valid, index = _valid_ids(topk_ids, scores.shape[1])
    grad = torch.where(valid, grad_topk_weights.to(scores.dtype), 0) * routed_scaling_factor
    if renormalize:
        chosen = torch.where(valid, scores.gather(1, index), 0)
        total = chosen.sum(dim=-1, keepdim=True) + RENORMALIZE_EPSILON
        grad = (grad - (grad * chosen).sum(dim=-1, keepdim=True) / total) / total
        grad = torch.where(valid, grad, 0)
    grad_scores = torch.zeros_like(scores)
    for k in range(topk_ids.shape[1]):  # slot by slot: given ids may name an expert twice, and the order must be fixed
        slot = index[:, k : k + 1]
        grad_scores.scatter_(1, slot, grad_scores.gather(1, slot) + grad[:, k : k + 1])
    logits = router_logits.to(scores.dtype)
    return _scores_backward(grad_scores, logits, scores, score_fn).to(router_logits.dtype)


# ------------------------------------------------------------------------------------------------------------- plan


def plan(topk_ids, num_experts):
    """expert_offsets [E+1], sorted_rows [S], row_of_slot [T, K], all int32; see `moe_kernels.make_plan`."""
    ids = topk_ids.reshape(-1).to(torch.int32)
    key = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sorted_key, order = key.sort(stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=ids.device)
    expert_offsets = torch.searchsorted(sorted_key, experts, out_int32=True)
    is_row = sorted_key < num_experts
    sorted_rows = torch.where(is_row, order, -1).to(torch.int32)
    rows = torch.arange(ids.numel(), device=ids.device)
    row_of_slot = torch.empty_like(ids).scatter_(0, order, torch.where(is_row, rows, -1).to(torch.int32))
    return expert_offsets, sorted_rows, row_of_slot.view(topk_ids.shape)


def count_loads(tokens_per_expert, expert_offsets):
    """tokens_per_expert [E] += the rows of each expert; nothing while a backward runs, which only repeats a forward.

    Activation checkpointing repeats it, and each token is to be counted once. An operator, so that the question is
    asked when a compiled graph runs, not when it is traced.
    """
    if torch._C._current_graph_task_id() == -1:  # the number of the backward that is running
        tokens_per_expert += expert_offsets.diff()


# ------------------------------------------------------------------------------------------------- grouped products


def _ranges(expert_offsets):
    """(expert, first row, last row + 1) of every expert that has rows."""
    offsets = expert_offsets.tolist()
    return [(e, offsets[e], offsets[e + 1]) for e in range(len(offsets) - 1) if offsets[e + 1] > offsets[e]]


def _grouped_product(a, b, bias, ranges, transpose_b):
    """Rows of expert e times b[e] in the accumulation dtype, [S, n]; rows of no expert are zero."""
    dtype = accumulation_dtype(a.dtype)
    out = torch.zeros(a.shape[0], b.shape[1 if transpose_b else 2], dtype=dtype, device=a.device)
    for expert, first, last in ranges:
        weight = b[expert].to(dtype)
        torch.mm(a[first:last].to(dtype), weight.t() if transpose_b else weight, out=out[first:last])
        if bias is not None:
            out[first:last] += bias[expert].to(dtype)
    return out


def _gather(x, sorted_rows, top_k):
    """x[sorted_rows // K], zero where sorted_rows is -1."""
    token = sorted_rows.clamp(min=0) // top_k
    return x.index_select(0, token).masked_fill_((sorted_rows < 0).unsqueeze(-1), 0)


def _gather_weights(topk_weights, sorted_rows):
    """The routing weight of each row, [S], zero where sorted_rows is -1."""
    weights = topk_weights.reshape(-1).index_select(0, sorted_rows.clamp(min=0))
    return weights.masked_fill_(sorted_rows < 0, 0)


def grouped_mm(a, b, bias, expert_offsets, transpose_b):
    """c[r] = a[r] @ b[e].T (transpose_b, b [E, n, k]) or a[r] @ b[e] (b [E, k, n]), plus bias[e]: [S, n]."""
    return _grouped_product(a, b, bias, _ranges(expert_offsets), transpose_b).to(a.dtype)


def _weight_products(grad, a, expert_offsets, grad_sorted_rows, a_sorted_rows, top_k):
    """(expert, sum over its rows of outer(grad row, a row) in the accumulation dtype) of every expert with rows."""
    dtype = accumulation_dtype(grad.dtype)
    for expert, first, last in _ranges(expert_offsets):
        g = grad[first:last] if grad_sorted_rows is None else _gather(grad, grad_sorted_rows[first:last], top_k)
        x = a[first:last] if a_sorted_rows is None else _gather(a, a_sorted_rows[first:last], top_k)
        yield expert, torch.mm(g.to(dtype).t(), x.to(dtype))


def weight_grad(grad, a, expert_offsets, grad_sorted_rows, a_sorted_rows, top_k):
    """out[e] = sum over the rows r of e of outer(grad row, a row), [E, n, k]; exactly 0 for an expert without rows."""
    out = grad.new_zeros(expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1])
    for expert, product in _weight_products(grad, a, expert_offsets, grad_sorted_rows, a_sorted_rows, top_k):
        out[expert] = product
    return out


def weight_grad_accumulate(buffer, grad, a, expert_offsets, grad_sorted_rows, a_sorted_rows, top_k):
    """buffer[e] += what `weight_grad` computes, not rounded before it is added; buffer: [E, n, k], accumulation dtype.

    One addition an element and call, so that two calls on a zero buffer give the sum of the two gradients, bit for bit.
    An expert without rows keeps its buffer.
    """
    for expert, product in _weight_products(grad, a, expert_offsets, grad_sorted_rows, a_sorted_rows, top_k):
        buffer[expert] += product


def bias_grad(grad, topk_weights, expert_offsets, sorted_rows, top_k):
    """out[e] = sum over the rows r of e of w_r * grad row, [E, n]; w_r is 1 without topk_weights."""
    dtype = accumulation_dtype(grad.dtype)
    out = grad.new_zeros(expert_offsets.shape[0] - 1, grad.shape[1])
    for expert, first, last in _ranges(expert_offsets):
        slots = None if sorted_rows is None else sorted_rows[first:last]
        g = (grad[first:last] if slots is None else _gather(grad, slots, top_k)).to(dtype)
        if topk_weights is not None:
            g = g * _gather_weights(topk_weights, slots).to(dtype).unsqueeze(-1)
        out[expert] = g.sum(dim=0)
    return out


def up_proj(hidden_states, gate_up_proj, gate_up_bias, expert_offsets, sorted_rows, top_k, activation, swiglu_limit,
            swiglu_alpha, is_transposed, is_concatenated, keep_pre_activation):
    """Activated rows [S, I], and the pre-activation [S, W] ([0, W] unless kept)."""
    gathered = _gather(hidden_states, sorted_rows, top_k)
    pre = _grouped_product(gathered, gate_up_proj, gate_up_bias, _ranges(expert_offsets), not is_transposed)
    rows = activate(pre, activation, swiglu_limit, swiglu_alpha, is_concatenated).to(hidden_states.dtype)
    kept = pre.to(hidden_states.dtype) if keep_pre_activation else hidden_states.new_empty(0, pre.shape[1])
    return rows, kept


# ---------------------------------------------------------------------------------------------------------- combine


def permute(hidden_states, sorted_rows, row_of_slot):
    """rows[r] = hidden_states[sorted_rows[r] // K], [S, H]; zero where sorted_rows is -1. row_of_slot [T, K]."""
    return _gather(hidden_states, sorted_rows, row_of_slot.shape[1])


def combine(rows, topk_weights, row_of_slot):
    """out[t] = sum_k topk_weights[t, k] * rows[row_of_slot[t, k]], k ascending: [T, H]. Sentinels (-1) are skipped."""
    dtype = accumulation_dtype(rows.dtype)
    out = torch.zeros(row_of_slot.shape[0], rows.shape[1], dtype=dtype, device=rows.device)
    for k in range(row_of_slot.shape[1]):
        row = _gather(rows, row_of_slot[:, k], 1).to(dtype)
        if topk_weights is None:
            out += row
        else:
            weight = topk_weights[:, k].masked_fill(row_of_slot[:, k] < 0, 0)
            out.addcmul_(row, weight.to(dtype).unsqueeze(-1))
    return out.to(rows.dtype)


def _to_slots(of_row, row_of_slot):
    """[T, K] from a value a row, [S]; zero for sentinels."""
    slots = row_of_slot.reshape(-1)
    return of_row.index_select(0, slots.clamp(min=0)).masked_fill_(slots < 0, 0).view(row_of_slot.shape)


def combine_backward(grad_output, rows, topk_weights, sorted_rows, row_of_slot):
    """grad_rows[r] = w_r * grad_output[t], [S, H]; grad_topk_weights[t, k] = grad_output[t] . rows[row], [T, K]."""
    dtype = accumulation_dtype(rows.dtype)
    gathered = _gather(grad_output, sorted_rows, row_of_slot.shape[1]).to(dtype)
    grad_rows = gathered * _gather_weights(topk_weights, sorted_rows).to(dtype).unsqueeze(-1)
    products = gathered * rows.to(dtype)
    grad_weights = _to_slots(products.sum(dim=-1), row_of_slot)
    return grad_rows.to(rows.dtype), grad_weights.to(topk_weights.dtype)


# ------------------------------------------------------------------------------------------------------- whole flow


def down_proj_backward(grad_output, topk_weights, down_proj, down_bias, pre_activation, expert_offsets, sorted_rows,
                       row_of_slot, activation, swiglu_limit, swiglu_alpha, is_transposed, is_concatenated):
    """Backward of combine, down_proj and the activation in one: the activation is recomputed from pre_activation.

    With u = grad_output[t] @ down_proj[e] and a = act(pre) of a row of weight w:
    grad_pre = w * u * act'(pre), weighted_rows = w * a, grad_topk_weights = a . u (+ grad_output[t] . down_bias[e]).

    Returns: grad_pre_activation [S, W], weighted_rows [S, I], grad_topk_weights [T, K].
    """
    dtype = accumulation_dtype(pre_activation.dtype)
    gathered, ranges = _gather(grad_output, sorted_rows, row_of_slot.shape[1]), _ranges(expert_offsets)
    u = _grouped_product(gathered, down_proj, None, ranges, is_transposed)
    pre, weight = pre_activation.to(dtype), _gather_weights(topk_weights, sorted_rows).to(dtype)
    options = (activation, swiglu_limit, swiglu_alpha, is_concatenated)
    rows = activate(pre, *options)
    grad_weight = (rows * u).sum(dim=-1)
    if down_bias is not None:
        for expert, first, last in ranges:
            grad_weight[first:last] += torch.mv(gathered[first:last].to(dtype), down_bias[expert].to(dtype))
    grad_pre = activate_backward(u * weight.unsqueeze(-1), pre, *options)
    weighted_rows = rows * weight.unsqueeze(-1)
    grad_topk_weights = _to_slots(grad_weight, row_of_slot).to(topk_weights.dtype)
    return grad_pre.to(pre_activation.dtype), weighted_rows.to(pre_activation.dtype), grad_topk_weights


def fused_experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, gate_up_bias, down_bias, activation,
                  swiglu_limit, swiglu_alpha, is_transposed, is_concatenated, keep_pre_activation):
    """plan, up_proj, down_proj and combine: output [T, H], the kept pre-activation, and the plan."""
    top_k = topk_ids.shape[1]
    offsets, sorted_rows, row_of_slot = plan(topk_ids, gate_up_proj.shape[0])
    rows, pre = up_proj(hidden_states, gate_up_proj, gate_up_bias, offsets, sorted_rows, top_k, activation,
                        swiglu_limit, swiglu_alpha, is_transposed, is_concatenated, keep_pre_activation)
    output = combine(grouped_mm(rows, down_proj, down_bias, offsets, not is_transposed), topk_weights, row_of_slot)
    return output, pre, offsets, sorted_rows, row_of_slot


def fused_experts_accumulate(*args):
    """`fused_experts`, whose last two arguments are the buffers that its backward adds the weight gradients to."""
    return fused_experts(*args[:-2])


def fused_experts_backward(*args):
    """Gradients of `fused_experts` in the order of its arguments; one that is not needed is an empty tensor [0].

    The last argument, needs, is six booleans: hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias,
    down_bias.
    """
    return fused_experts_backward_accumulate(None, None, *args)


def fused_experts_backward_accumulate(gate_up_grad, down_grad, grad_output, hidden_states, gate_up_proj, down_proj,
                                      topk_weights, gate_up_bias, down_bias, pre_activation, expert_offsets,
                                      sorted_rows, row_of_slot, activation, swiglu_limit, swiglu_alpha,
                                      is_transposed, is_concatenated, needs):
    """`fused_experts_backward` that adds a weight's gradient to its buffer, where there is one, and returns [0] for it.

    gate_up_grad, down_grad: in their weights' shapes and the accumulation dtype, or None.
    """
    top_k = row_of_slot.shape[1]
    grad_pre, weighted_rows, grad_topk_weights = down_proj_backward(
        grad_output, topk_weights, down_proj, down_bias, pre_activation, expert_offsets, sorted_rows, row_of_slot,
        activation, swiglu_limit, swiglu_alpha, is_transposed, is_concatenated)

    def grad_hidden_states():
        return combine(grouped_mm(grad_pre, gate_up_proj, None, expert_offsets, is_transposed), None, row_of_slot)

    def grad_weight(buffer, grad, grad_slots, a, a_slots):
        factors = (a, grad, expert_offsets, a_slots, grad_slots) if is_transposed else (
            grad, a, expert_offsets, grad_slots, a_slots)
        if buffer is None:
            return weight_grad(*factors, top_k)
        weight_grad_accumulate(buffer, *factors, top_k)
        return hidden_states.new_empty(0)

    results = (
        grad_hidden_states,
        lambda: grad_weight(gate_up_grad, grad_pre, None, hidden_states, sorted_rows),
        lambda: grad_weight(down_grad, grad_output, sorted_rows, weighted_rows, None),
        lambda: grad_topk_weights,
        lambda: bias_grad(grad_pre, None, expert_offsets, None, top_k),
        lambda: bias_grad(grad_output, topk_weights, expert_offsets, sorted_rows, top_k),
    )
    like = (hidden_states, gate_up_proj, down_proj, topk_weights, hidden_states, hidden_states)
    return tuple(f() if need else x.new_empty(0) for f, need, x in zip(results, needs, like))
