"""Time on the host: what the Python side of a call costs, beside elementwise torch operations on the same machine.

The operators themselves are replaced by stubs that return tensors made before, so that only the checks, the choice of
the implementation and autograd are timed.
"""

import time

import pytest
import torch

import moe_kernels as mk

T, H, I, E, K = 4, 16, 8, 4, 2


def microseconds(functions, calls=300, repeats=15):
    """The least time of each function, interleaved, so that what else the machine does meets all alike."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            best[i] = min(best[i], (time.perf_counter() - start) / calls * 1e6)
    return best


@pytest.fixture
def arguments(monkeypatch):
    """The arguments of fused_experts, whose operators are stubs from here on."""
    x, gate_up, down = torch.randn(T, H), torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    weights, ids = torch.rand(T, K), torch.randint(E, (T, K), dtype=torch.int32)
    empty = torch.empty(0)
    gradients = tuple(torch.ones_like(tensor) for tensor in (x, gate_up, down, weights)) + (empty, empty)
    for name, results in (("fused_experts", (x.clone(), *[empty] * 4)), ("fused_experts_backward", gradients)):
        def stub(*args, results=results):
            return tuple(result.detach() for result in results)

        monkeypatch.setattr(torch.ops.moe_kernels, name, stub)
    return x, gate_up, down, weights, ids


def elementwise(x, count):
    def run():
        y = x
        for _ in range(count):
            y = y + 1.0

    return run


def test_forward_costs_less_than_8_elementwise_operations(arguments):
    with torch.no_grad():
        ours, theirs = microseconds([lambda: mk.fused_experts(*arguments), elementwise(arguments[0], 8)])
    assert ours < theirs, f"{ours:.1f} us, 8 elementwise operations {theirs:.1f} us"


def test_forward_and_backward_cost_less_than_30_elementwise_operations(arguments):
    leaves = [tensor.requires_grad_() for tensor in arguments[:4]]
    grad = torch.randn(T, H)

    def train():
        return torch.autograd.grad(mk.fused_experts(*arguments), leaves, grad)

    assert [result.sum() for result in train()] == [leaf.numel() for leaf in leaves]
    ours, theirs = microseconds([train, elementwise(arguments[0].detach(), 30)])
    assert ours < theirs, f"{ours:.1f} us, 30 elementwise operations {theirs:.1f} us"
