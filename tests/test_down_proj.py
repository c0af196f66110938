"""down_proj: its backward, which recomputes the activation, and the gradients of weights and biases."""

import oracle
import pytest
import torch
from cases import (ACTIVATION_OPTIONS, BACKENDS, CASES, SMALL, Inputs, assert_close, assert_same_bits, backend_id,
                   case_id, operator_options, swiglu_limit)


def random_pre_activation(inputs, plan):
    """[S, W] of size 1; zero behind the last row, as up_proj leaves it."""
    shape = (plan.sorted_rows.shape[0], inputs.gate_up_proj.shape[1])
    pre = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(inputs.device, inputs.dtype)
    pre[plan.sorted_rows < 0] = 0
    return pre


def run(inputs, plan, pre, limit, bias):
    return inputs.ops.down_proj_backward(
        inputs.grad_output, inputs.topk_weights, inputs.down_proj, inputs.down_bias if bias else None, pre, *plan,
        *operator_options(inputs.activation, limit))


def reference(inputs, pre, limit, bias):
    """grad_pre_activation, weighted_rows, grad_topk_weights in fp64, row by row."""
    num_experts, top_k = inputs.case.num_experts, inputs.case.top_k
    offsets, sorted_rows, _ = oracle.plan(inputs.topk_ids.tolist(), num_experts)
    grad_output, weights = oracle.to64(inputs.grad_output), oracle.to64(inputs.topk_weights)
    down, down_bias, pre = oracle.to64(inputs.down_proj), oracle.to64(inputs.down_bias), oracle.to64(pre)
    grad_pre, grad_weights = torch.zeros_like(pre), torch.zeros_like(weights)
    weighted = torch.zeros(pre.shape[0], down.shape[2], dtype=torch.float64)
    for expert in range(num_experts):
        for row in range(offsets[expert], offsets[expert + 1]):
            token, slot = divmod(sorted_rows[row], top_k)
            leaf = pre[row].clone().requires_grad_()
            activated = oracle.activation(leaf, inputs.activation, limit)
            output = down[expert] @ activated + (down_bias[expert] if bias else 0)
            product = grad_output[token] @ output
            (grad,) = torch.autograd.grad(product, leaf)
            grad_pre[row] = weights[token, slot] * grad
            weighted[row] = weights[token, slot] * activated.detach()
            grad_weights[token, slot] = product.detach()
    return grad_pre, weighted, grad_weights


def check(outputs, references, dtype):
    for name, out, ref in zip(("grad_pre_activation", "weighted_rows", "grad_topk_weights"), outputs, references):
        assert_close(out, ref, dtype, name)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_backward(case, device, dtype, run_twice):
    inputs = Inputs(case, device, dtype)
    plan = inputs.plan()
    pre = random_pre_activation(inputs, plan)
    for bias in (False, True):
        outputs = run_twice(lambda: run(inputs, plan, pre, None, bias))
        assert [x.dtype for x in outputs] == [dtype, dtype, torch.float32]
        check(outputs, reference(inputs, pre, None, bias), dtype)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("activation, option", ACTIVATION_OPTIONS)
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_backward_of_activation(case, activation, option, device, dtype, run_twice):
    inputs, limit = Inputs(case, device, dtype, activation), swiglu_limit(option, dtype)
    plan = inputs.plan()
    pre = random_pre_activation(inputs, plan)
    check(run_twice(lambda: run(inputs, plan, pre, limit, True)), reference(inputs, pre, limit, True), dtype)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
def test_gradient_at_the_limit_passes(device, dtype):
    inputs = Inputs(SMALL[2], device, dtype)
    plan = inputs.plan()
    pre = torch.full_like(random_pre_activation(inputs, plan), 2.0)
    at_limit = run(inputs, plan, pre, 2.0, False)[0]
    assert_same_bits(at_limit, run(inputs, plan, pre, 3.0, False)[0])
    beyond = run(inputs, plan, pre, 1.0, False)[0]
    assert (beyond == 0).all()


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
def test_rows_of_no_expert_are_zero_and_read_nothing(device, dtype):
    inputs = Inputs(next(case for case in CASES if case.name == "sentinels"), device, dtype)
    plan = inputs.plan()
    pre = random_pre_activation(inputs, plan)
    inputs.grad_output[0] = float("nan")  # token 0 has sentinels only
    grad_pre, weighted_rows, grad_weights = run(inputs, plan, pre, None, True)
    end = plan.expert_offsets[-1]
    assert (grad_pre[end:] == 0).all() and (weighted_rows[end:] == 0).all()
    assert (grad_weights[plan.row_of_slot < 0] == 0).all()
    assert all(x.isfinite().all() for x in (grad_pre, weighted_rows, grad_weights))


def weight_grad_inputs(case, device, dtype, gather_grad, gather_a):
    """grad [S or T, n] and a [S or T, k], and the same as fp64 rows [S, *]."""
    inputs = Inputs(case, device, dtype)
    plan = inputs.plan()
    num_rows, generator = plan.sorted_rows.shape[0], torch.Generator().manual_seed(5)
    offsets, sorted_rows, _ = oracle.plan(inputs.topk_ids.tolist(), case.num_experts)

    def operand(gathered, width):
        x = torch.randn(case.num_tokens if gathered else num_rows, width, generator=generator).to(device, dtype)
        rows = oracle.gather(oracle.to64(x), sorted_rows, case.top_k) if gathered else oracle.to64(x)
        return x, rows

    return plan, offsets, operand(gather_grad, case.hidden_size), operand(gather_a, case.intermediate_size), inputs


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_weight_grad(case, device, dtype, run_twice):
    for gather_grad, gather_a in ((False, False), (True, False), (False, True)):
        plan, offsets, (grad, grad_rows), (a, a_rows), inputs = weight_grad_inputs(
            case, device, dtype, gather_grad, gather_a)
        out = run_twice(lambda: inputs.ops.weight_grad(
            grad, a, plan.expert_offsets, plan.sorted_rows if gather_grad else None,
            plan.sorted_rows if gather_a else None, case.top_k))
        ref = torch.stack([grad_rows[first:last].T @ a_rows[first:last] for first, last in zip(offsets, offsets[1:])])
        assert out.dtype == dtype
        assert_close(out, ref, dtype, f"weight_grad, gathered: {gather_grad}, {gather_a}")
        for expert in range(case.num_experts):
            assert offsets[expert] < offsets[expert + 1] or (out[expert] == 0).all()


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bias_grad(case, device, dtype, run_twice):
    plan, offsets, (grad, grad_rows), _, inputs = weight_grad_inputs(case, device, dtype, True, False)
    weights = oracle.to64(inputs.topk_weights).flatten()
    per_row = torch.stack([weights[s] if s >= 0 else torch.tensor(0.0) for s in plan.sorted_rows.tolist()]).double() \
        if case.num_tokens else torch.zeros(0, dtype=torch.float64)
    weighted = grad_rows * per_row.unsqueeze(-1)

    def sums(rows):
        return torch.stack([rows[first:last].sum(0) for first, last in zip(offsets, offsets[1:])])

    out = run_twice(lambda: inputs.ops.bias_grad(grad, inputs.topk_weights, plan.expert_offsets, plan.sorted_rows,
                                                 case.top_k))
    assert out.dtype == dtype
    assert_close(out, sums(weighted), dtype, "bias_grad, gathered and weighted")
    rows = grad_rows.to(device, dtype)
    out = run_twice(lambda: inputs.ops.bias_grad(rows, None, plan.expert_offsets, None, case.top_k))
    assert_close(out, sums(grad_rows), dtype, "bias_grad of rows")
