"""up_proj: gathered rows, the activation in the epilogue, the stored pre-activation."""

import oracle
import pytest
import torch
from cases import (ACTIVATION_OPTIONS, BACKENDS, CASES, SMALL, Inputs, assert_close, backend_id, case_id, interleaved,
                   operator_options, swiglu_limit)

from moe_kernels.activation import activate, activate_backward


def run(inputs, limit=None, bias=True, keep=True):
    plan = inputs.plan()
    return plan, inputs.ops.up_proj(
        inputs.hidden_states, inputs.gate_up_proj, inputs.gate_up_bias if bias else None, plan.expert_offsets,
        plan.sorted_rows, inputs.case.top_k, *operator_options(inputs.activation, limit), keep)


def reference(inputs, limit=None, bias=True):
    """(rows [S, I], pre-activation [S, W]) in fp64; rows of no expert are zero."""
    offsets, sorted_rows, _ = oracle.plan(inputs.topk_ids.tolist(), inputs.case.num_experts)
    gathered = oracle.gather(oracle.to64(inputs.hidden_states), sorted_rows, inputs.case.top_k)
    bias = oracle.to64(inputs.gate_up_bias) if bias else None
    pre = oracle.grouped_mm(gathered, oracle.to64(inputs.gate_up_proj), offsets, bias)
    return oracle.activation(pre, inputs.activation, limit), pre


def check(rows, pre, ref_rows, ref_pre, dtype):
    assert rows.dtype == pre.dtype == dtype
    assert_close(rows, ref_rows, dtype, "rows")
    assert_close(pre, ref_pre, dtype, "pre_activation")


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_case(case, device, dtype, run_twice):
    inputs = Inputs(case, device, dtype)
    for bias in (False, True):
        rows, pre = run_twice(lambda: run(inputs, bias=bias)[1])
        check(rows, pre, *reference(inputs, bias=bias), dtype)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("activation, option", ACTIVATION_OPTIONS)
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_activation(case, activation, option, device, dtype, run_twice):
    inputs, limit = Inputs(case, device, dtype, activation), swiglu_limit(option, dtype)
    rows, pre = run_twice(lambda: run(inputs, limit)[1])
    check(rows, pre, *reference(inputs, limit), dtype)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_pre_activation_is_kept_on_demand_only(case, device, dtype):
    inputs = Inputs(case, device, dtype)
    _, (rows, nothing) = run(inputs, keep=False)
    _, (kept_rows, _) = run(inputs, keep=True)
    assert nothing.shape == (0, inputs.gate_up_proj.shape[1])
    assert torch.equal(rows, kept_rows)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_no_expert_are_zero_and_read_nothing(bias, device, dtype):
    inputs = Inputs(next(case for case in CASES if case.name == "sentinels"), device, dtype)
    inputs.hidden_states[0] = float("nan")  # token 0 has sentinels only
    plan, (rows, pre) = run(inputs, bias=bias)
    end = plan.expert_offsets[-1]
    assert (rows[end:] == 0).all() and (pre[end:] == 0).all()
    assert rows.isfinite().all() and pre.isfinite().all()


@pytest.mark.parametrize("activation, option", ACTIVATION_OPTIONS)
def test_derivative_of_the_activation(activation, option):
    generator = torch.Generator().manual_seed(0)
    pre = (3 * torch.randn(40, 24, generator=generator, dtype=torch.float64)).requires_grad_()
    limit = 1.25 if option else None
    out = activate(pre, activation, limit)
    torch.testing.assert_close(out, oracle.activation(pre, activation, limit))
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(out, pre, grad)
    torch.testing.assert_close(activate_backward(grad, pre.detach(), activation, limit), expected)


@pytest.mark.parametrize("activation, alpha", [("swiglu", 1.702), ("swiglu_oai", 1.702), ("swiglu_oai", 0.6)])
def test_interleaved_activation_and_its_derivative(activation, alpha):
    generator = torch.Generator().manual_seed(0)
    pre, grad = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (24, 12))
    pre.mul_(3).requires_grad_()
    out = oracle.activation(pre, activation, 1.25, alpha)
    (expected,) = torch.autograd.grad(out, pre, grad)
    options = (activation, 1.25, alpha, False)
    torch.testing.assert_close(activate(interleaved(pre), *options), out)
    torch.testing.assert_close(activate_backward(grad, interleaved(pre.detach()), *options), interleaved(expected))
