"""combine, permute and unpermute, with their gradients."""

import oracle
import pytest
import torch
from cases import BACKENDS, CASES, SMALL, Inputs, assert_close, backend_id, case_id

import moe_kernels as mk


def random_rows(inputs, plan):
    """[S, H] of size 1, NaN behind the last row: what no slot points to must not be read."""
    shape = (plan.sorted_rows.shape[0], inputs.case.hidden_size)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(inputs.device, inputs.dtype)
    rows[plan.sorted_rows < 0] = float("nan")
    return rows


def reference_plan(inputs):
    return oracle.plan(inputs.topk_ids.tolist(), inputs.case.num_experts)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_unpermute(case, device, dtype, run_twice):
    inputs = Inputs(case, device, dtype)
    plan = inputs.plan()
    rows = random_rows(inputs, plan)
    for weights in (inputs.topk_weights, None):
        out = run_twice(lambda: mk.unpermute(rows, plan, weights))
        assert out.dtype == dtype
        ref = oracle.combine(oracle.to64(rows), oracle.to64(weights), reference_plan(inputs)[2])
        assert_close(out, ref, dtype)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
def test_slots_are_summed_in_order(device, dtype):
    """2^26 - 2^26 + 1 is 1 in fp32 in this order alone; the order of the experts is another."""
    ids = torch.tensor([[2, 0, 1], [1, 2, 0]], device=device)
    plan = mk.make_plan(ids, 3)
    rows = torch.zeros(6, 8, device=device, dtype=dtype)
    for slot, value in enumerate((2.0**14, -(2.0**14), 1.0)):
        rows[plan.row_of_slot[:, slot].long()] = value
    weights = torch.tensor([[2.0**12, 2.0**12, 1.0]] * 2, device=device)
    assert (mk.unpermute(rows, plan, weights) == 1).all()


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_combine_backward(case, device, dtype, run_twice):
    inputs = Inputs(case, device, dtype)
    plan = inputs.plan()
    rows = random_rows(inputs, plan)
    rows[plan.sorted_rows < 0] = 0
    out = run_twice(lambda: inputs.ops.combine_backward(inputs.grad_output, rows, inputs.topk_weights,
                                                        plan.sorted_rows, plan.row_of_slot))
    leaves = [oracle.to64(rows).requires_grad_(), oracle.to64(inputs.topk_weights).requires_grad_()]
    total = (oracle.combine(*leaves, reference_plan(inputs)[2]) * oracle.to64(inputs.grad_output)).sum()
    refs = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None, None)
    for name, got, ref, leaf in zip(("grad_rows", "grad_topk_weights"), out, refs, leaves):
        assert_close(got, torch.zeros_like(leaf) if ref is None else ref, dtype, name)
    assert out[0].dtype == dtype and out[1].dtype == torch.float32


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_permute(case, device, dtype, run_twice):
    inputs = Inputs(case, device, dtype)
    if case.routing == "sentinels":
        inputs.hidden_states[0] = float("nan")  # token 0 has sentinels only
    plan = inputs.plan()
    out = run_twice(lambda: mk.permute(inputs.hidden_states, plan))
    expected = oracle.gather(oracle.to64(inputs.hidden_states), reference_plan(inputs)[1], case.top_k)
    assert out.dtype == dtype and torch.equal(out.cpu().double(), expected)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_gradients_of_the_public_functions(case, weighted, device, dtype):
    """permute then unpermute, differentiated through both, against the same in fp64."""
    inputs = Inputs(case, device, dtype)
    plan, (_, sorted_rows, row_of_slot) = inputs.plan(), reference_plan(inputs)

    def gradients(x, w, gather, combine, grad):
        x, w = x.requires_grad_(), w.requires_grad_() if weighted else None
        y = combine(gather(x), w)
        if not y.requires_grad:
            return [torch.zeros_like(leaf) for leaf in (x, w) if leaf is not None]
        leaves = (x, w) if weighted else (x,)
        grads = torch.autograd.grad(y, leaves, grad, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads)]

    outs = gradients(inputs.hidden_states, inputs.topk_weights, lambda x: mk.permute(x, plan),
                     lambda rows, w: mk.unpermute(rows, plan, w), inputs.grad_output)
    refs = gradients(oracle.to64(inputs.hidden_states), oracle.to64(inputs.topk_weights),
                     lambda x: oracle.gather(x, sorted_rows, case.top_k),
                     lambda rows, w: oracle.combine(rows, w, row_of_slot), oracle.to64(inputs.grad_output))
    for out, ref in zip(outs, refs, strict=True):
        assert_close(out, ref, dtype)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(weighted):
    inputs = Inputs(next(case for case in SMALL if case.routing == "sentinels"), "cpu", torch.float64)
    plan = inputs.plan()
    rows = torch.randn(plan.sorted_rows.shape[0], 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(plan.row_of_slot.shape, dtype=torch.float64, requires_grad=True) if weighted else None
    leaves = (rows, weights) if weighted else (rows,)
    assert torch.autograd.gradcheck(lambda r, w=None: mk.unpermute(r, plan, w), leaves, fast_mode=True)
    x = torch.randn(inputs.case.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mk.permute(x, plan), (x,), fast_mode=True)
