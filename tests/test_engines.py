"""The two engines behind the products give the same bits, whatever the tile, and whatever else is in the batch.

Collected where a GPU is present and the kernels run on it (conftest.py); the sm_90a engine is tested on compute
capability 9.0 alone, and there every product runs in both.
"""

import pytest
import torch
from cases import (CASES, HALVES, LAYOUTS, SMALL, Case, Inputs, assert_same_bits, backend_id, case_id, interleaved,
                   layout_options, operator_options)
from conftest import poison

import moe_kernels as mk
from moe_kernels.activation import ACTIVATIONS, CLAMPED

HOPPER = torch.cuda.get_device_capability() == (9, 0)
ENGINES = ["sm80", "sm90"] if HOPPER else ["sm80"]
TILES = ["16x128", "64x128", "128x128", "128x256"]
needs_hopper = pytest.mark.skipif(not HOPPER, reason="the sm_90a engine wants compute capability 9.0")

# several row tiles an expert, ends inside the second half of a tile, a last column tile of 8, one k-block and many
LARGE = [Case("row_tiles", 700, 6, 3, 200, 136), Case("many_blocks", 1000, 70, 4, 512, 384),
         Case("half_of_a_tile_unused", 2100, 2, 1, 192, 64), Case("deep", 260, 2, 2, 3200, 264),
         Case("sentinels_among_many", 900, 6, 6, 136, 264, "sentinels"),
         # more tiles than there are multiprocessors: of one k-block, of two, without an expert
         Case("tile_after_tile", 900, 300, 2, 64, 64, "sentinels"), Case("two_k_blocks", 900, 300, 2, 72, 136, "idle"),
         Case("many_without_an_expert", 24000, 2, 2, 64, 264, "sentinels"),
         # pairs of blocks, of which one consumer has no columns in every other tile, and experts without rows between
         Case("pairs_of_blocks", 900, 300, 2, 136, 136, "idle"),
         # tiles whose outputs leave during the next tile's products, all of which are long enough for that
         Case("outputs_leave_late", 3000, 40, 4, 256, 264), Case("late_columns_end", 3000, 40, 4, 520, 168),
         # rows in order, in tiles high enough that the consumers of a block take turns: many tiles a block
         Case("in_turn", 12000, 8, 4, 456, 72, "sentinels"), Case("in_turn_skewed", 6000, 16, 4, 256, 264, "skewed"),
         Case("in_turn_low", 2900, 16, 1, 1480, 328, "skewed"),  # most experts: one box of rows
         # one expert has far more rows than the others
         Case("skewed", 4000, 300, 2, 72, 136, "skewed"), Case("skewed_columns", 3000, 150, 3, 328, 264, "skewed")]


def products(x, activation="swiglu", limit=None, layout="rows"):
    """Every product of the forward and the backward flow, with and without biases and gathers."""
    ops, k, is_rows = torch.ops.moe_kernels, x.case.top_k, layout == "rows"
    options = operator_options(activation, limit, layout=layout)
    offsets, sorted_rows, row_of_slot = ops.plan(x.topk_ids, x.case.num_experts)
    rows, pre = ops.up_proj(x.hidden_states, x.gate_up_proj, x.gate_up_bias, offsets, sorted_rows, k, *options, True)
    plain, _ = ops.up_proj(x.hidden_states, x.gate_up_proj, None, offsets, sorted_rows, k, *options, False)
    down = ops.grouped_mm(rows, x.down_proj, x.down_bias, offsets, is_rows)
    grad_pre, weighted, grad_weights = ops.down_proj_backward(
        x.grad_output, x.topk_weights, x.down_proj, x.down_bias, pre, offsets, sorted_rows, row_of_slot, *options)
    grad_rows = ops.grouped_mm(grad_pre, x.gate_up_proj, None, offsets, not is_rows)
    results = [rows, pre, plain, down, grad_pre, weighted, grad_weights, grad_rows]
    grads = ((grad_pre, x.hidden_states, None, sorted_rows), (x.grad_output, weighted, sorted_rows, None),
             (grad_pre, rows, None, None), (x.grad_output, x.hidden_states, sorted_rows, sorted_rows))
    for grad, a, *gathers in grads:
        if not is_rows:
            grad, a, gathers = a, grad, gathers[::-1]
        results.append(ops.weight_grad(grad, a, offsets, *gathers, k))
        buffer = torch.ones_like(results[-1], dtype=torch.float32)
        ops.weight_grad_accumulate(buffer, grad, a, offsets, *gathers, k)
        results.append(buffer)
    return results


@needs_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
@pytest.mark.parametrize("case", CASES + LARGE, ids=case_id)
def test_engines_give_the_same_bits(case, dtype, force, run_twice):
    x = Inputs(case, "cuda", dtype)
    force("sm80")
    expected = products(x)
    force("sm90")
    assert_same_bits(expected, run_twice(lambda: products(x)))


@needs_hopper
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_engines_give_the_same_bits_with_every_activation(activation, force):
    x = Inputs(LARGE[0], "cuda", torch.bfloat16, activation)
    limit = 0.7 if activation in CLAMPED else None
    force("sm80")
    expected = products(x, activation, limit)
    force("sm90")
    assert_same_bits(expected, products(x, activation, limit))


@needs_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
@pytest.mark.parametrize("layout", ["transposed", "interleaved"])
@pytest.mark.parametrize("case", SMALL + LARGE, ids=case_id)
def test_engines_give_the_same_bits_in_every_layout(case, layout, activation, dtype, force, run_twice):
    x = Inputs(case, "cuda", dtype).to_layout(layout)
    force("sm80")
    expected = products(x, activation, 0.7, layout)
    force("sm80", "16x128")
    assert_same_bits(expected, products(x, activation, 0.7, layout))
    force("sm90")
    assert_same_bits(expected, run_twice(lambda: products(x, activation, 0.7, layout)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
@pytest.mark.parametrize("layout", ["transposed", "interleaved"])
def test_a_layout_changes_no_bit(layout, activation, engine, force):
    """Up to the gradient of the pre-activation: the products behind that sum over its columns, in their order."""
    force(engine)
    x = Inputs(LARGE[0], "cuda", torch.bfloat16)
    expected = products(x, activation, 0.7)[:7]
    if layout == "interleaved":
        expected[1], expected[4] = interleaved(expected[1]), interleaved(expected[4])
    assert_same_bits(expected, products(x.to_layout(layout), activation, 0.7, layout)[:7])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first, last", [(0, 6), (2, 5), (5, 6), (3, 3)])
def test_rows_of_other_experts_give_zeros(engine, first, last, force):
    """The offsets may be a slice of a plan's, even an empty one: what is before and behind it is written as zeros."""
    x = Inputs(LARGE[0], "cuda", torch.bfloat16)
    rows = torch.randn(2100, 136, device="cuda").to(torch.bfloat16)
    plan = x.plan()
    whole = mk.grouped_mm(rows, x.down_proj, plan.expert_offsets)
    expected = torch.zeros_like(whole)
    begin, end = plan.expert_offsets[[first, last]].tolist()
    expected[begin:end] = whole[begin:end]
    force(engine)
    poison()
    assert_same_bits(expected, mk.grouped_mm(rows, x.down_proj[first:last], plan.expert_offsets[first:last + 1]))


@needs_hopper
def test_an_infinite_gradient_stays_infinite_at_the_last_columns(force):
    x = Inputs(Case("tail", 40, 2, 1, 64, 8), "cuda", torch.bfloat16)
    x.grad_output[:] = 0
    x.grad_output[3, 5] = float("inf")
    force("sm80")
    expected = products(x)[6]
    force("sm90")
    assert_same_bits(expected, products(x)[6])


@needs_hopper
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65])
def test_sums_of_minus_zeros(rows, force):
    """Zero activations times negative gradients: the sign of zero is a bit too."""
    offsets = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
    grad = torch.full((rows, 136), -1.0, device="cuda", dtype=torch.bfloat16)
    zeros, weights = torch.zeros_like(grad), torch.full((1, 72, 136), -1.0, device="cuda", dtype=torch.bfloat16)

    def run(engine):
        force(engine)
        return [torch.ops.moe_kernels.weight_grad(grad, zeros, offsets, None, None, 1),
                torch.ops.moe_kernels.grouped_mm(zeros, weights, None, offsets, True)]

    assert_same_bits(run("sm80"), run("sm90"))


@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
@pytest.mark.parametrize("case", SMALL + LARGE, ids=case_id)
def test_every_tile_gives_the_same_bits(case, dtype, force):
    x = Inputs(case, "cuda", dtype)
    force("sm80", TILES[0])
    expected = products(x)
    for tile in TILES[1:]:
        force("sm80", tile)
        assert_same_bits(expected, products(x))


def outputs_and_gradients(x, tokens, topk_ids, layout):
    """The layer's output, dX and the routing gradients of a batch of these tokens of x."""
    leaves = [x.hidden_states[tokens].clone().requires_grad_(), x.topk_weights[tokens].clone().requires_grad_()]
    out = mk.fused_experts(leaves[0], x.gate_up_proj, x.down_proj, leaves[1], topk_ids, gate_up_bias=x.gate_up_bias,
                           down_bias=x.down_bias, **layout_options(layout))
    return [out.detach(), *torch.autograd.grad(out, leaves, x.grad_output[tokens])]


@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_does_not_depend_on_its_batch(layout, engine, dtype, force):
    """Among 1 to 16384 tokens, in another order, beside other loads: the same bits of the output and of dX."""
    x = Inputs(Case("batch", 16384, 16, 4, 264, 136), "cuda", dtype).to_layout(layout)
    force(engine)
    everything = torch.arange(16384, device="cuda")
    ids = x.topk_ids
    whole = outputs_and_gradients(x, everything, ids, layout)
    for count in (1, 2, 40, 129, 1000, 5000):
        tokens = torch.randperm(16384, generator=torch.Generator().manual_seed(count))[:count].cuda()
        assert_same_bits([result[tokens] for result in whole], outputs_and_gradients(x, tokens, ids[tokens],
                                                                                        layout))
    loads = ids.clone()
    loads[8192:] = torch.arange(4, device="cuda", dtype=ids.dtype)  # half of the batch on the same experts
    other = outputs_and_gradients(x, everything, loads, layout)
    assert_same_bits([result[:8192] for result in whole], [result[:8192] for result in other])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [512, 8192])
def test_inference_needs_the_rows_and_nothing_else(tokens, layout):
    """Peak memory beyond inputs and output: at most S * (I + H) elements and 5%."""
    x = Inputs(Case("memory", tokens, 16, 8, 512, 256), "cuda", torch.bfloat16).to_layout(layout)

    def call():
        with torch.no_grad():
            return mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights, x.topk_ids,
                                    **layout_options(layout))

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra <= 1.05 * 2 * tokens * 8 * (256 + 512)


def test_training_keeps_the_pre_activation_and_the_routing():
    """Between forward and backward hidden states, pre-activation and routing lie; the backward's peak has its bound."""
    tokens, k, hidden, width, experts = 8192, 8, 512, 256, 16
    x = Inputs(Case("memory", tokens, experts, k, hidden, width), "cuda", torch.bfloat16)
    leaves = [x.hidden_states.requires_grad_(), x.gate_up_proj.requires_grad_(), x.down_proj.requires_grad_(),
              x.topk_weights.requires_grad_()]

    def forward():
        return mk.fused_experts(*leaves, x.topk_ids)

    torch.autograd.grad(forward(), leaves, x.grad_output)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = forward()
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    rows = tokens * k
    routing = 4 * (2 * rows + experts + 1)
    assert kept <= 1.01 * (2 * rows * 2 * width + routing)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, leaves, x.grad_output)
    results = sum(grad.numel() * grad.element_size() for grad in grads)
    extra = torch.cuda.max_memory_allocated() - before - results
    assert extra <= 2 * rows * (2 * width + hidden + width)


def test_deterministic_mode_changes_nothing():
    x = Inputs(LARGE[0], "cuda", torch.bfloat16)
    expected = products(x)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(expected, products(x))
    finally:
        torch.use_deterministic_algorithms(False)
