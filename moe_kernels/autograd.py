"""Autograd formulas of the operators: the forward flow, and under it the mirrored backward.

What training keeps of `fused_experts` is hidden_states, the weights, the routing and the pre-activation; the backward
gathers and recomputes everything else. The gradients themselves have no gradient: a second derivative raises.
"""

import torch

from . import schemas


def invert_rows(index, shape):
    """The inverse of sorted_rows or row_of_slot (either way): out.flatten()[index[i]] = i, int32; -1 stays -1."""
    flat = index.reshape(-1)
    size = flat.shape[0]
    slot = torch.where(flat < 0, size, flat).long()  # what has no row goes to a last place that is cut off
    out = torch.full((size + 1,), -1, dtype=torch.int32, device=index.device)
    out = out.scatter(0, slot, torch.arange(size, dtype=torch.int32, device=index.device))
    return out[:size].reshape(shape)


def _gate(ops):
    def setup_context(ctx, inputs, output):
        router_logits, _, _, _, score_fn, _, _, renormalize, scale = inputs
        ctx.save_for_backward(router_logits, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.options = (score_fn, renormalize, scale)

    def backward(ctx, grad_topk_weights, _):
        router_logits, topk_ids = ctx.saved_tensors
        grad = ops.gate_backward(grad_topk_weights.contiguous(), router_logits, topk_ids, *ctx.options)
        return grad, *[None] * 8

    return backward, setup_context


def _fused_experts(ops):
    return _formula_of_experts(ops, lambda ctx: ops.fused_experts_backward)


def _fused_experts_accumulate(ops):
    def backward_of(ctx):
        if torch.is_grad_enabled():
            raise NotImplementedError("fused_experts: a second derivative wants grad_buffers=None, because what is "
                                      "added to a buffer is in no graph")
        return lambda *args: ops.fused_experts_backward_accumulate(*ctx.buffers, *args)

    return _formula_of_experts(ops, backward_of)


def _formula_of_experts(ops, backward_of):
    """The formula of fused_experts, with or without buffers; backward_of(ctx) gives the operator that it calls."""

    def setup_context(ctx, inputs, output):
        hidden_states, gate_up_proj, down_proj, topk_weights, _, gate_up_bias, down_bias = inputs[:7]
        ctx.save_for_backward(hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias,
                              *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        # buffers are not saved for backward: other backward calls may add to them before this one
        ctx.activation, ctx.swiglu_limit, ctx.kept, *ctx.buffers = inputs[7:]

    def backward(ctx, grad_output, *_):
        unused = (None,) * (3 + len(ctx.buffers))  # activation, swiglu_limit, keep_pre_activation, buffers
        if grad_output is None:
            return (None,) * 7 + unused
        if not ctx.kept:
            raise RuntimeError("fused_experts: a gradient wants keep_pre_activation=True in the forward call")
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5, 6)]
        grads = backward_of(ctx)(grad_output.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.swiglu_limit, needs)
        grads = [grad if need else None for grad, need in zip(grads, needs)]
        for i, buffer in enumerate(ctx.buffers, start=1):
            if buffer is not None:
                grads[i] = None
        return *grads[:4], None, *grads[4:], *unused

    return backward, setup_context


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
        sorted_rows = invert_rows(row_of_slot, (-1,))
        grad_output = grad_output.contiguous()
        if topk_weights is None:
            return ops.permute(grad_output, sorted_rows, row_of_slot.shape[1]), None, None
        return *ops.combine_backward(grad_output, rows, topk_weights, sorted_rows, row_of_slot), None

    return backward, setup_context


def _permute(ops):
    def setup_context(ctx, inputs, output):
        _, sorted_rows, ctx.top_k = inputs
        ctx.save_for_backward(sorted_rows)

    def backward(ctx, grad_rows):
        (sorted_rows,) = ctx.saved_tensors
        row_of_slot = invert_rows(sorted_rows, (-1, ctx.top_k))
        return ops.combine(grad_rows.contiguous(), None, row_of_slot), None, None

    return backward, setup_context


def _no_gradient(name):
    def backward(ctx, *grads):
        raise NotImplementedError(f"moe_kernels::{name} has no gradient of its own: differentiate fused_experts, "
                                  "gate, grouped_mm, permute or unpermute, and those once only")

    return backward, None


FORMULAS = {"gate": _gate, "fused_experts": _fused_experts, "fused_experts_accumulate": _fused_experts_accumulate,
            "grouped_mm": _grouped_mm, "combine": _combine, "permute": _permute}


def _refuse_gradient(operator):
    """The autograd kernel of an operator that writes to an argument, for which torch takes no formula."""

    def call(*args):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            raise NotImplementedError(f"{operator} has no gradient: call it under torch.no_grad()")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return call


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
