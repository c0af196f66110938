"""Autograd formulas of the operators: the forward flow, and under it the mirrored backward.

What training keeps of `fused_experts` is hidden_states, the weights, the routing and the pre-activation; the backward
gathers and recomputes everything else. The gradients themselves have no gradient: a second derivative raises.
"""

import torch

from . import schemas


def invert_rows(row_of_slot):
    """sorted_rows [S] of row_of_slot [T, K]: out[row_of_slot.flatten()[i]] = i, int32; -1 where no slot has the row."""
    flat = row_of_slot.reshape(-1)
    size = flat.shape[0]
    slot = torch.where(flat < 0, size, flat).long()  # what has no row goes to a last place that is cut off
    out = torch.full((size + 1,), -1, dtype=torch.int32, device=flat.device)
    out = out.scatter(0, slot, torch.arange(size, dtype=torch.int32, device=flat.device))
    return out[:size]


def _gate(ops):
    def setup_context(ctx, inputs, output):
        router_logits, _, _, _, score_fn, _, _, renormalize, scale = inputs
        ctx.save_for_backward(router_logits, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else autograd fills zeros [T, K] as the gradient of topk_ids, another kernel
        ctx.options = (score_fn, renormalize, scale)

    def backward(ctx, grad_topk_weights, _):
        if grad_topk_weights is None:
            return (None,) * 9
        router_logits, topk_ids = ctx.saved_tensors
        grad = ops.gate_backward(grad_topk_weights.contiguous(), router_logits, topk_ids, *ctx.options)
        return grad, *[None] * 8

    return backward, setup_context


def _save_experts(ctx, ops, inputs, output):
    """Keeps what the backward of fused_experts wants; inputs: those of fused_experts or fused_experts_accumulate."""
    hidden_states, gate_up_proj, down_proj, topk_weights, _, gate_up_bias, down_bias = inputs[:7]
    ctx.save_for_backward(hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias, *output[1:])
    ctx.set_materialize_grads(False)
    # buffers are not saved for backward: other backward calls may add to them before this one
    ctx.experts = ops, inputs[7:12], inputs[12], inputs[13:]


def _gradients_of_experts(ctx, grad_output, needs):
    """Six gradients, None where there is no need or what there is was added to a buffer."""
    if grad_output is None:
        return (None,) * 6
    ops, options, kept, buffers = ctx.experts
    if not kept:
        raise RuntimeError("fused_experts: a gradient wants keep_pre_activation=True in the forward call")
    arguments = (grad_output.contiguous(), *ctx.saved_tensors, *options, needs)
    if not buffers:
        grads = call(ops.fused_experts_backward, *arguments)
        return [grad if need else None for grad, need in zip(grads, needs)]
    if torch.is_grad_enabled():
        raise NotImplementedError("fused_experts: a second derivative wants grad_buffers=None, because what is added "
                                  "to a buffer is in no graph")
    grads = call(ops.fused_experts_backward_accumulate, *buffers, *arguments)
    added = (False, *(buffer is not None for buffer in buffers), False, False, False)
    return [grad if need and not here else None for grad, need, here in zip(grads, needs, added)]


def _fused_experts(ops):
    def setup_context(ctx, inputs, output):
        _save_experts(ctx, ops, inputs, output)
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx, grad_output, *_):
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5, 6)]
        grads = _gradients_of_experts(ctx, grad_output, needs)
        return *grads[:4], None, *grads[4:], *[None] * (6 + len(ctx.experts[3]))

    return backward, setup_context


class _FusedExperts(torch.autograd.Function):
    """The registered formula of fused_experts once more, for eager mode: there it takes half the time on the host.

    record: a list, whose one entry is (ops, operator, inputs of the operator); the plan, which has no gradient and so
    need not pass through autograd, is appended to it.
    """

    @staticmethod
    def forward(ctx, hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias, record):
        ops, operator, inputs = record[0]
        with _below_autograd():
            output = operator(*inputs)
        _save_experts(ctx, ops, inputs, output)
        record += output[2:]
        return output[0]

    @staticmethod
    def backward(ctx, grad_output):
        return *_gradients_of_experts(ctx, grad_output, ctx.needs_input_grad[:6]), None


# what Function.apply calls once it has asked for functorch's transforms, which fused_experts below has done
_apply_fused_experts = super(torch.autograd.Function, _FusedExperts).apply
_below_autograd = torch._C._AutoDispatchBelowAutograd


def _is_plainly_eager():
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def call(operator, *arguments):
    """The operator's results; past autograd, whose formulas in Python cost time, where no gradient is wanted."""
    if _is_plainly_eager() and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
        with _below_autograd():
            return operator(*arguments)
    return operator(*arguments)


def fused_experts(ops, inputs, grad_buffers):
    """(output, expert_offsets, sorted_rows, row_of_slot) of the operator of ops.

    inputs: those of fused_experts; the last says whether a gradient is wanted. grad_buffers: a pair or None.
    """
    operator, wanted = ops.fused_experts, inputs[-1]
    if wanted and grad_buffers is not None:
        operator, inputs = ops.fused_experts_accumulate, (*inputs, *grad_buffers)
    if wanted and _is_plainly_eager():
        record = [(ops, operator, inputs)]
        record[0] = _apply_fused_experts(*inputs[:4], *inputs[5:7], record)
        return record
    results = call(operator, *inputs)
    return results[:1] + results[2:]


def _grouped_mm(ops):
    def setup_context(ctx, inputs, output):
        a, b, _, expert_offsets, ctx.transpose_b = inputs
        ctx.save_for_backward(a, b, expert_offsets)

    def backward(ctx, grad):
        a, b, expert_offsets = ctx.saved_tensors
        need_a, need_b, need_bias = ctx.needs_input_grad[:3]
        grad, grad_a, grad_b, grad_bias = grad.contiguous(), None, None, None
        if need_a:
            grad_a = ops.grouped_mm(grad, b, None, expert_offsets, not ctx.transpose_b)
        if need_b:
            left, right = (grad, a) if ctx.transpose_b else (a, grad)
            grad_b = ops.weight_grad(left, right, expert_offsets, None, None, 1)
        if need_bias:
            grad_bias = ops.bias_grad(grad, None, expert_offsets, None, 1)
        return grad_a, grad_b, grad_bias, None, None

    return backward, setup_context


def _combine(ops):
    def setup_context(ctx, inputs, output):
        rows, topk_weights, row_of_slot = inputs
        # without weights the gradient needs no rows, only their number, which is that of the slots
        ctx.save_for_backward(None if topk_weights is None else rows, topk_weights, row_of_slot)

    def backward(ctx, grad_output):
        rows, topk_weights, row_of_slot = ctx.saved_tensors
        sorted_rows = invert_rows(row_of_slot)
        grad_output = grad_output.contiguous()
        if topk_weights is None:
            return ops.permute(grad_output, sorted_rows, row_of_slot), None, None
        return *ops.combine_backward(grad_output, rows, topk_weights, sorted_rows, row_of_slot), None

    return backward, setup_context


def _permute(ops):
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    def backward(ctx, grad_rows):
        (row_of_slot,) = ctx.saved_tensors
        return ops.combine(grad_rows.contiguous(), None, row_of_slot), None, None

    return backward, setup_context


def _no_gradient(name):
    def backward(ctx, *grads):
        raise NotImplementedError(f"moe_kernels::{name} has no gradient of its own: differentiate fused_experts, "
                                  "gate, grouped_mm, permute or unpermute, and those once only")

    return backward, None


FORMULAS = {"gate": _gate, "fused_experts": _fused_experts, "fused_experts_accumulate": _fused_experts,
            "grouped_mm": _grouped_mm, "combine": _combine, "permute": _permute}


def _refuse_gradient(operator):
    """The autograd kernel of an operator that writes to an argument, for which torch takes no formula."""

    def kernel(*args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise NotImplementedError(f"{operator} has no gradient: call it under torch.no_grad()")
        with _below_autograd():
            return operator(*args)

    return kernel


def register():
    """Registers the formula of every operator in both namespaces; each calls the operators of its own namespace."""
    for namespace, library in schemas.LIBRARIES.items():
        ops = getattr(torch.ops, namespace)
        for name in schemas.SCHEMAS:
            operator = getattr(ops, name).default
            if name == "count_loads":  # integers alone
                continue
            if operator._schema.is_mutable:
                library.impl(name, _refuse_gradient(operator), "Autograd")
                continue
            backward, setup_context = FORMULAS[name](ops) if name in FORMULAS else _no_gradient(name)
            torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup_context, lib=library)


register()
