"""fused_experts: the whole flow and all six gradients against the naive loops."""

import oracle
import pytest
import torch
from cases import (ACTIVATION_OPTIONS, BACKENDS, CASES, DEVICES, LAYOUTS, SMALL, Inputs, assert_close, backend_id,
                   case_id, in_layout, layout_options, swiglu_limit)

import moe_kernels as mk
from moe_kernels.activation import CLAMPED


def forward(inputs, limit=None, bias=True, layout="rows"):
    """The weights are brought into the layout first, so that their gradients are those of [E, 2I, H] and [E, H, I]."""
    gate_up_proj, down_proj, gate_up_bias = in_layout(layout, inputs.gate_up_proj, inputs.down_proj,
                                                      inputs.gate_up_bias)
    return mk.fused_experts(
        inputs.hidden_states, gate_up_proj, down_proj, inputs.topk_weights, inputs.topk_ids, inputs.activation, limit,
        gate_up_bias if bias else None, inputs.down_bias if bias else None, **layout_options(layout))


def reference(inputs, limit=None, bias=True):
    """(output, gradients in the order of Inputs.FLOATS) in fp64; a gradient that reaches nothing is zero."""
    leaves = [oracle.to64(getattr(inputs, name)).requires_grad_() for name in inputs.FLOATS]
    hidden, gate_up, down, weights, gate_up_bias, down_bias = leaves
    biases = (gate_up_bias, down_bias) if bias else (None, None)
    out = oracle.experts(hidden, gate_up, down, weights, inputs.topk_ids.cpu(), inputs.activation, limit, *biases)
    if not out.requires_grad:
        return out, [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(out, leaves, oracle.to64(inputs.grad_output), allow_unused=True)
    return out, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads)]


def check_all(inputs, run_twice, limit=None, bias=True, layout="rows"):
    """Output and gradients, run twice each on poisoned memory."""
    leaves = inputs.require_grad()
    leaves = leaves if bias else leaves[:4]

    def run():
        out = forward(inputs, limit, bias, layout)
        return (out, *torch.autograd.grad(out, leaves, inputs.grad_output))

    out, *grads = run_twice(run)
    ref, ref_grads = reference(inputs, limit, bias)
    assert out.dtype == inputs.dtype
    assert_close(out, ref, inputs.dtype)
    for name, leaf, grad, ref_grad in zip(inputs.FLOATS, leaves, grads, ref_grads):
        assert grad.dtype == leaf.dtype
        assert_close(grad, ref_grad, inputs.dtype, f"gradient of {name}")
    return out, grads


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_case(case, layout, bias, device, dtype, run_twice):
    check_all(Inputs(case, device, dtype), run_twice, bias=bias, layout=layout)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("option", [None, "limit"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_swiglu_oai(case, layout, option, device, dtype, run_twice):
    inputs = Inputs(case, device, dtype, "swiglu_oai")
    check_all(inputs, run_twice, swiglu_limit(option, dtype), layout=layout)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("activation, option", ACTIVATION_OPTIONS)
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_activation(case, activation, option, device, dtype, run_twice):
    check_all(Inputs(case, device, dtype, activation), run_twice, swiglu_limit(option, dtype))


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_without_gradients_the_same_bits_and_no_graph(case, device, dtype, run_twice):
    inputs = Inputs(case, device, dtype)
    out = run_twice(lambda: forward(inputs))
    assert not out.requires_grad
    inputs.require_grad()
    assert torch.equal(out, forward(inputs).detach())
    with torch.no_grad():
        assert torch.equal(out, forward(inputs))


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone_is_the_same(wanted, device, dtype):
    inputs = Inputs(SMALL[2], device, dtype)
    all_grads = torch.autograd.grad(forward(inputs), leaves, inputs.grad_output) if (
        leaves := inputs.require_grad()) else None
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    (alone,) = torch.autograd.grad(forward(inputs), [leaves[wanted]], inputs.grad_output)
    assert torch.equal(alone, all_grads[wanted])


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sentinels_read_nothing(layout, device, dtype):
    inputs = Inputs(next(case for case in CASES if case.name == "sentinels"), device, dtype)
    inputs.hidden_states[0] = float("nan")  # token 0 has sentinels only
    leaves = inputs.require_grad()
    out = forward(inputs, layout=layout)
    grads = torch.autograd.grad(out, leaves, inputs.grad_output)
    assert (out[0] == 0).all() and out.isfinite().all()
    assert (grads[0][0] == 0).all() and all(grad.isfinite().all() for grad in grads)
    invalid = (inputs.topk_ids < 0) | (inputs.topk_ids >= inputs.case.num_experts)
    assert (grads[3][invalid] == 0).all()


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_idle_expert_is_not_read_and_has_a_zero_gradient(layout, device, dtype):
    inputs = Inputs(next(case for case in CASES if case.routing == "idle"), device, dtype)
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        getattr(inputs, name)[3] = float("nan")
    leaves = inputs.require_grad()
    out = forward(inputs, layout=layout)
    grads = torch.autograd.grad(out, leaves, inputs.grad_output)
    assert out.isfinite().all()
    for grad in (grads[1], grads[2], grads[4], grads[5]):
        assert (grad[3] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation, option, layout", [(*options, "rows") for options in ACTIVATION_OPTIONS] + [
    (activation, "limit", layout) for activation in CLAMPED for layout in ("transposed", "interleaved")])
def test_gradcheck(activation, option, layout, device):
    """Numerical derivatives in fp64; relu's kink and a clamp's are hit with probability zero."""
    from cases import Case

    inputs = Inputs(Case("gradcheck", 4, 3, 2, 3, 2), device, torch.float64, activation).to_layout(layout)
    limit, alpha = 0.8 if option else None, 1.2 if activation == "swiglu_oai" else None
    inputs.topk_ids[1, 0], inputs.topk_weights[1, 0] = -1, 0.0
    leaves = inputs.require_grad()

    def function(hidden, gate_up, down, weights, gate_up_bias, down_bias):
        return mk.fused_experts(hidden, gate_up, down, weights, inputs.topk_ids, activation, limit, gate_up_bias,
                                down_bias, swiglu_alpha=alpha, **layout_options(layout))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden_size, intermediate_size", [(5, 3), (12, 7), (1, 1)])
def test_sizes_that_are_no_multiple_of_8(hidden_size, intermediate_size, layout, run_twice):
    from cases import Case

    case = Case("odd", 20, 4, 3, hidden_size, intermediate_size)
    for device in DEVICES:
        check_all(Inputs(case, device, torch.float32), run_twice, layout=layout)


def test_saved_for_backward_is_the_least():
    """hidden_states, the weights, the routing and the pre-activation; nothing else of size S."""
    inputs = Inputs(next(case for case in CASES if case.name == "odd_multiples_of_8"))
    leaves, saved = inputs.require_grad(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        forward(inputs)
    case = inputs.case
    rows = case.num_tokens * case.top_k
    extra = sorted(x.numel() for x in saved if not any(x is leaf or x.data_ptr() == leaf.data_ptr() for leaf in leaves))
    assert extra == sorted([case.num_experts + 1, rows, rows, rows * 2 * case.intermediate_size])
