"""grouped_mm: both orders of the second operand, biases, gradients."""

import oracle
import pytest
import torch
from cases import BACKENDS, CASES, Inputs, assert_close, backend_id, case_id

import moe_kernels as mk

# rows of each expert, rows behind the last, k, n: every tile edge, one k step more or less than a tile has
SIZES = [([127, 128, 129], 0, 64, 64), ([1, 0, 15, 16, 17, 31, 33], 3, 8, 264), ([63, 64, 65], 5, 72, 136),
         ([0, 0, 0], 4, 64, 64), ([300], 0, 520, 24), ([255, 256, 257], 0, 40, 56), ([0, 2, 0, 500, 0], 1, 128, 512)]


def size_id(size):
    return "_".join(map(str, size[0])) + f"-{size[2]}x{size[3]}"


def operands(size, device, dtype, transpose_b):
    loads, behind, k, n = size
    generator = torch.Generator().manual_seed(6)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    a, b = normal(sum(loads) + behind, k), normal(len(loads), *((n, k) if transpose_b else (k, n))) * k**-0.5
    offsets = [sum(loads[:e]) for e in range(len(loads) + 1)]
    a[offsets[-1] :] = float("nan")  # rows of no expert are not read
    return a, b, normal(len(loads), n), offsets, torch.tensor(offsets, dtype=torch.int32, device=device)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_operator(size, transpose_b, device, dtype, run_twice):
    a, b, bias, offsets, offsets_on_device = operands(size, device, dtype, transpose_b)
    ops = mk.ops._namespace(a)
    for this_bias in (None, bias):
        out = run_twice(lambda: ops.grouped_mm(a, b, this_bias, offsets_on_device, transpose_b))
        ref = oracle.grouped_mm(oracle.to64(a), oracle.to64(b), offsets, oracle.to64(this_bias), transpose_b)
        assert out.dtype == dtype
        assert_close(out, ref, dtype)
        assert (out[offsets[-1] :] == 0).all()


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_down_proj_of_a_case(case, device, dtype, run_twice):
    """The second product of the layer, with the plan's offsets."""
    inputs = Inputs(case, device, dtype)
    plan = inputs.plan()
    rows = torch.randn(plan.sorted_rows.shape[0], case.intermediate_size, generator=torch.Generator().manual_seed(8))
    rows = rows.to(device, dtype)
    out = run_twice(lambda: mk.grouped_mm(rows, inputs.down_proj, plan.expert_offsets, inputs.down_bias))
    ref = oracle.grouped_mm(oracle.to64(rows), oracle.to64(inputs.down_proj), plan.expert_offsets.tolist(),
                            oracle.to64(inputs.down_bias))
    assert_close(out, ref, dtype)


@pytest.mark.parametrize("device, dtype", BACKENDS, ids=backend_id)
@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_gradients(size, transpose_b, device, dtype, run_twice):
    a, b, bias, offsets, offsets_on_device = operands(size, device, dtype, transpose_b)
    a[offsets[-1] :] = 0
    leaves = [x.requires_grad_() for x in (a, b, bias)]
    c = mk.grouped_mm(a, b, offsets_on_device, bias, transpose_b)
    grad = torch.randn(c.shape, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    outs = run_twice(lambda: torch.autograd.grad(c, leaves, grad, retain_graph=True))
    references = [oracle.to64(x).requires_grad_() for x in (a, b, bias)]
    ref = oracle.grouped_mm(references[0], references[1], offsets, references[2], transpose_b)
    refs = torch.autograd.grad(ref, references, oracle.to64(grad))
    for name, out, expected in zip(("a", "b", "bias"), outs, refs):
        assert out.dtype == dtype
        assert_close(out, expected, dtype, f"gradient of {name}")


@pytest.mark.parametrize("transpose_b", [True, False])
def test_gradcheck(transpose_b):
    a, b, bias, _, offsets = operands(([2, 0, 3], 1, 3, 4), "cpu", torch.float64, transpose_b)
    leaves = [x.nan_to_num().requires_grad_() for x in (a, b, bias)]
    assert torch.autograd.gradcheck(
        lambda a, b, bias: torch.ops.moe_kernels.grouped_mm(a, b, bias, offsets, transpose_b), leaves)
