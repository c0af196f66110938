"""Weight gradients added to given fp32 buffers: gradient accumulation without another pass over the gradients."""

import pytest
import torch
from cases import (BACKENDS, CASES, DEVICES, LAYOUTS, SMALL, Inputs, assert_close, assert_same_bits, backend_id,
                   case_id, layout_options)
from test_fused_experts import reference

import moe_kernels as mk

WEIGHTS = ("gate_up_proj", "down_proj")


def buffers_of(owner, value=0.0):
    """Buffers for the two weights of Inputs or of an Experts module."""
    return [torch.full_like(getattr(owner, name), value, dtype=torch.float32, requires_grad=False) for name in WEIGHTS]


def forward(inputs, buffers, layout="rows"):
    return mk.fused_experts(inputs.hidden_states, inputs.gate_up_proj, inputs.down_proj, inputs.topk_weights,
                            inputs.topk_ids, gate_up_bias=inputs.gate_up_bias, down_bias=inputs.down_bias,
                            grad_buffers=buffers, **layout_options(layout))


def others(leaves):
    return [leaf for i, leaf in enumerate(leaves) if i not in (1, 2)]


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_buffers_hold_the_gradients_and_the_rest_is_unchanged(case, device, dtype, run_twice):
    inputs = Inputs(case, device, dtype)
    leaves = inputs.require_grad()
    out = forward(inputs, None)
    expected = torch.autograd.grad(out, leaves, inputs.grad_output)

    def run():
        buffers = buffers_of(inputs)
        out = forward(inputs, buffers)
        grads = torch.autograd.grad(out, leaves, inputs.grad_output, allow_unused=True)
        assert grads[1] is None and grads[2] is None
        return (out, *buffers, *others(grads))

    out_again, *results = run_twice(run)
    assert_same_bits(out.detach(), out_again.detach())
    assert_same_bits(others(expected), results[2:])
    _, references = reference(inputs)
    for name, buffer, ref, grad in zip(WEIGHTS, results, references[1:3], expected[1:3]):
        assert_close(buffer, ref, dtype, f"buffer of {name}")
        assert_close(buffer, grad, dtype, f"buffer of {name} beside its gradient")
        assert (buffer[(ref == 0).flatten(1).all(dim=1)] == 0).all()


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_of_every_layout(layout, device, dtype):
    inputs = Inputs(SMALL[2], device, dtype).to_layout(layout)
    leaves, buffers = inputs.require_grad(), buffers_of(inputs, 1.0)
    expected = torch.autograd.grad(forward(inputs, None, layout), leaves, inputs.grad_output)
    forward(inputs, buffers, layout).backward(inputs.grad_output)
    for name, buffer, grad in zip(WEIGHTS, buffers, expected[1:3]):
        assert_close(buffer - 1, grad, dtype, f"buffer of {name}")


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_accumulating_twice_equals_the_sum(case, device, dtype):
    first, second = (Inputs(case, device, dtype, seed=seed) for seed in (0, 1))
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    alone, together = [], buffers_of(first)
    for inputs in (first, second):
        inputs.require_grad()
        alone.append(buffers_of(inputs))
        forward(inputs, alone[-1]).backward(inputs.grad_output)
    outs = [forward(inputs, together) for inputs in (first, second)]  # both forwards, then both backwards
    for out, inputs in zip(outs, (first, second)):
        out.backward(inputs.grad_output)
    assert_same_bits(together, [a + b for a, b in zip(*alone)])
    assert first.gate_up_proj.grad is None and first.down_proj.grad is None


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_in_the_buffers_stays_and_one_of_them_may_be_missing(device):
    inputs = Inputs(next(case for case in CASES if case.routing == "idle"), device)
    leaves = inputs.require_grad()
    expected = torch.autograd.grad(forward(inputs, None), leaves, inputs.grad_output)
    for given in (0, 1):
        buffers = buffers_of(inputs, 3.0)
        buffers[1 - given] = None
        grads = torch.autograd.grad(forward(inputs, buffers), leaves, inputs.grad_output, allow_unused=True)
        assert grads[1 + given] is None
        assert torch.equal(grads[2 - given], expected[2 - given])
        torch.testing.assert_close(buffers[given], 3 + expected[1 + given])
        assert (buffers[given][3] == 3).all()  # the idle expert


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_weight_adds_nothing(frozen):
    inputs = Inputs(SMALL[2])
    inputs.require_grad()
    getattr(inputs, WEIGHTS[frozen]).requires_grad_(False)
    buffers = buffers_of(inputs)
    forward(inputs, buffers).backward(inputs.grad_output)
    assert not buffers[frozen].any() and buffers[1 - frozen].any()
    with torch.no_grad():
        assert not forward(inputs, buffers).requires_grad


def test_sums_of_bf16_gradients_are_not_rounded():
    """64 equal gradients: the buffer holds 64 times one, where a bf16 sum stops growing."""
    inputs = Inputs(SMALL[2], dtype=torch.bfloat16)
    inputs.require_grad()
    one, many = buffers_of(inputs), buffers_of(inputs)
    forward(inputs, one).backward(inputs.grad_output)
    for _ in range(64):
        forward(inputs, many).backward(inputs.grad_output)
    torch.testing.assert_close(many, [64 * buffer for buffer in one], rtol=1e-5, atol=1e-5)


def test_under_autocast_the_buffers_get_what_the_rounded_weights_give():
    inputs, half = Inputs(SMALL[2]), Inputs(SMALL[2], dtype=torch.bfloat16)
    inputs.require_grad(), half.require_grad()
    buffers, expected = buffers_of(inputs), buffers_of(half)
    with torch.autocast("cpu", torch.bfloat16):
        out = forward(inputs, buffers)
    out.backward(half.grad_output)
    forward(half, expected).backward(half.grad_output)
    assert_same_bits(buffers, expected)
    assert inputs.gate_up_proj.grad is None and inputs.gate_up_bias.grad is not None


def test_experts_module_with_buffers():
    torch.manual_seed(0)
    layer = mk.MoE(32, 24, 8, 3)
    x = torch.randn(30, 32)
    layer(x).square().sum().backward()
    expected = [getattr(layer.experts, name).grad for name in WEIGHTS]
    layer.zero_grad()
    layer.experts.grad_buffers = buffers_of(layer.experts)
    for _ in range(2):
        layer(x).square().sum().backward()
    torch.testing.assert_close(layer.experts.grad_buffers, [2 * grad for grad in expected])
    assert layer.experts.gate_up_proj.grad is None and layer.gate.weight.grad is not None
    assert set(layer.state_dict()) == {"gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj",
                                       "experts.down_proj"}


def test_compiled_backward_adds_to_the_buffers():
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in (SMALL[1], SMALL[2]):
        inputs, results = Inputs(case), []
        leaves = others(inputs.require_grad())
        for function in (forward, compiled):
            buffers = buffers_of(inputs, 1.0)
            out = function(inputs, buffers)
            grads = torch.autograd.grad(out, leaves, inputs.grad_output)
            results.append((out.detach(), *buffers, *grads))
        assert_same_bits(*results)


BAD = {
    "no_pair": (lambda a, b: a, TypeError, r"grad_buffers wants a pair \(gate_up_grad, down_grad\), got Tensor"),
    "three": (lambda a, b: (a, b, b), TypeError, "grad_buffers wants a pair .* got 3 of them"),
    "no_tensor": (lambda a, b: (a, 1.0), TypeError, r"grad_buffers\[1\] wants a tensor, got float"),
    "shape": (lambda a, b: (a[:, :8], b), ValueError, r"grad_buffers\[0\] wants shape \[E=4, 2I=112, H=136\]"),
    "dtype": (lambda a, b: (a, b.double()), TypeError, r"grad_buffers\[1\] wants dtype float32, got float64"),
    "device": (lambda a, b: (a.to("meta"), b), ValueError, r"grad_buffers\[0\] wants device cpu, got meta"),
    "strides": (lambda a, b: (a, b.mT.contiguous().mT), ValueError, r"grad_buffers\[1\] wants contiguous memory"),
    "graph": (lambda a, b: (a.requires_grad_(), b), ValueError, r"grad_buffers\[0\] wants a tensor without"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_buffers(name):
    change, error, message = BAD[name]
    inputs = Inputs(SMALL[2])
    with pytest.raises(error, match=message):
        forward(inputs, change(*buffers_of(inputs)))


def test_second_derivatives_and_gradients_of_the_operators_raise():
    inputs = Inputs(SMALL[2])
    inputs.require_grad()
    out = forward(inputs, buffers_of(inputs))
    with pytest.raises(NotImplementedError, match="second derivative wants grad_buffers=None"):
        torch.autograd.grad(out.sum(), inputs.hidden_states, create_graph=True)
    offsets = torch.tensor([0, 50, 50, 50, 50], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="weight_grad_accumulate.* has no gradient"):
        torch.ops.moe_kernels.weight_grad_accumulate(buffers_of(inputs)[1].mT.contiguous(), inputs.grad_output[:, :56],
                                                     inputs.hidden_states, offsets, None, None, 1)
