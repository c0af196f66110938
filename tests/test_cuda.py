"""What only the compiled kernels promise: no host sync, graphs, streams, 64-bit addresses, equality with composite.

Collected where a GPU is present and the kernels run on it (conftest.py).
"""

import gc

import oracle
import pytest
import torch
from cases import (CASES, HALVES, SMALL, Case, Inputs, assert_close, assert_same_bits, backend_id, case_id,
                   relative_error, tolerance)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import moe_kernels as mk
from moe_kernels import ops, schemas

SIZE = Case("graph", 200, 8, 2, 128, 64)


def step(logits, x):
    """gate, fused_experts with biases, permute, grouped_mm, unpermute: outputs, then all gradients."""
    leaves = [logits, x.hidden_states, x.gate_up_proj, x.down_proj, x.gate_up_bias, x.down_bias]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weights, ids = mk.gate(logits, x.case.top_k, correction_bias=logits.detach()[0], routed_scaling_factor=2.5)
    out = mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, weights, ids, "swiglu", 7.0, x.gate_up_bias,
                           x.down_bias)
    plan = mk.make_plan(ids, x.case.num_experts)
    rows = mk.grouped_mm(mk.permute(x.hidden_states, plan), x.gate_up_proj, plan.expert_offsets, x.gate_up_bias)
    mixed = mk.unpermute(rows, plan, weights)
    # the second gradient is a constant of mixed's own shape: any will do
    grads = torch.autograd.grad([out, mixed], leaves, [x.grad_output, mixed.detach()])
    return [out.detach(), mixed.detach(), weights.detach(), ids, *plan, *grads]


def new_logits(seed):
    return torch.randn(SIZE.num_tokens, SIZE.num_experts, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
def test_graph_replayed_with_other_routing(dtype):
    x, logits = Inputs(SIZE, "cuda", dtype), new_logits(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(logits, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, x)
    one_expert = torch.zeros_like(logits)
    one_expert[:, 5], one_expert[:, 6] = 4.0, 3.0
    for other in (new_logits(1), one_expert, new_logits(2)):
        with torch.no_grad():
            logits.copy_(other)
        graph.replay()
        replayed = [result.clone() for result in captured]
        assert_same_bits(replayed, step(logits, x))


@pytest.mark.parametrize("num_tokens, num_experts, top_k", [(100, 64, 8), (2000, 768, 16), (16384, 768, 16)])
def test_gate_and_plan_replayed_with_other_logits(num_tokens, num_experts, top_k):
    """Kernels that start while the one before them ends see its results, and not those of the replay before."""
    generator = torch.Generator("cuda").manual_seed(0)
    draws = [torch.randn(num_tokens, num_experts, device="cuda", generator=generator) for _ in range(4)]
    logits = draws[0].clone()

    def route():
        weights, ids = mk.gate(logits, top_k, "sigmoid")
        return [weights, ids, *mk.make_plan(ids, num_experts)]

    route()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = route()
    for draw in draws * 5:
        logits.copy_(draw)
        graph.replay()
        replayed = [result.clone() for result in captured]
        ids = replayed[1].flatten().long()
        order = torch.argsort(ids, stable=True)
        assert torch.equal(replayed[3], order.int())
        assert torch.equal(replayed[2].diff(), torch.bincount(ids, minlength=num_experts).int())
        assert_same_bits(replayed, route())


@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
def test_no_host_sync(dtype):
    x, logits = Inputs(SIZE, "cuda", dtype), new_logits(0)
    step(logits, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(logits, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(function):
    """The names of the kernels that a call launches; another one before it sets up what needs it."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


# 400 slots are sorted by one block; 40,000 are counted by one kernel and placed by another
@pytest.mark.parametrize("num_tokens, plan_kernels", [(200, 1), (20_000, 2)])
def test_number_of_kernels(num_tokens, plan_kernels):
    """One a stage, two for the plan of many slots, and none of torch's beside them."""
    x = Inputs(Case("launches", num_tokens, 8, 2, 128, 64), "cuda", torch.bfloat16)
    logits = torch.randn(num_tokens, 8, device="cuda", requires_grad=True)
    bias = torch.randn(8, device="cuda")
    weights, ids = mk.gate(logits, 2)
    grad = torch.ones_like(weights)
    calls = {
        "gate": (1, lambda: mk.gate(logits, 2)),
        "gate in groups": (1, lambda: mk.gate(logits, 2, "softmax", bias, 4, 2)),
        "gate of given ids": (1, lambda: mk.gate(logits, 2, topk_ids=ids)),
        "gate backward": (1, lambda: torch.autograd.grad(weights, logits, grad, retain_graph=True)),
        "plan": (plan_kernels, lambda: mk.make_plan(ids, 8)),
        "experts": (plan_kernels + 3, lambda: mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj,
                                                               x.topk_weights, x.topk_ids)),
    }
    for name, (most, call) in calls.items():
        kernels = kernels_of(call)
        assert 1 <= len(kernels) <= most and all("moe::" in kernel for kernel in kernels), f"{name}: {kernels}"


def test_side_stream():
    """Work lands on the current stream: behind a long wait there, the inputs are written late and still seen."""
    x, logits = Inputs(SIZE, "cuda", torch.bfloat16), new_logits(0)
    expected = step(logits, x)
    torch.cuda.synchronize()
    wanted, stream = logits.detach().clone(), torch.cuda.Stream()
    with torch.no_grad():
        logits.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            logits.copy_(wanted)
        results = step(logits, x)
    stream.synchronize()
    assert_same_bits(expected, results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
def test_device_that_is_not_current():
    x = Inputs(SIZE, "cuda:1", torch.bfloat16)
    expected = step(new_logits(0), Inputs(SIZE, "cuda:0", torch.bfloat16))
    results = step(new_logits(0).detach().to("cuda:1"), x)
    assert all(result.device.index == 1 for result in results)
    assert_same_bits([result.cpu() for result in expected], [result.cpu() for result in results])


@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_composite_agrees(case, dtype, monkeypatch):
    """The torch implementation, forced by the environment, computes the same in the same dtype."""
    x = Inputs(case, "cuda", dtype)
    leaves = x.require_grad()

    def run():
        assert ops.uses_kernels(x.hidden_states) == (forced is None)
        out = mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights, x.topk_ids, "geglu", None,
                               x.gate_up_bias, x.down_bias)
        return (out, *torch.autograd.grad(out, leaves, x.grad_output))

    forced = None
    kernels = run()
    forced = "composite"
    monkeypatch.setenv("MOE_KERNELS_IMPLEMENTATION", forced)
    for a, b in zip(kernels, run()):
        assert relative_error(a, b) <= tolerance(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
@pytest.mark.parametrize("skew", [False, True], ids=["uniform", "skewed"])
def test_many_tiles(skew, dtype, run_twice):
    """Several tiles an expert in every direction, every SM busy more than once; against fp64 on the GPU."""
    case = Case("many_tiles", 3000, 16, 4, 520, 264)
    x = Inputs(case, "cuda", dtype)
    if skew:
        x.topk_ids[:, 0] = 3  # one expert has 3000 rows, and some tokens name it twice
    leaves = x.require_grad()

    def run():
        out = mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights, x.topk_ids, "swiglu", None,
                               x.gate_up_bias, x.down_bias)
        return (out, *torch.autograd.grad(out, leaves, x.grad_output))

    results = run_twice(run)
    ref_leaves = [oracle.to64(leaf).requires_grad_() for leaf in leaves]
    hidden, gate_up, down, weights, gate_up_bias, down_bias = ref_leaves
    ref = oracle.experts(hidden, gate_up, down, weights, x.topk_ids.cpu(), "swiglu", None, gate_up_bias, down_bias)
    for out, expected in zip(results, (ref, *torch.autograd.grad(ref, ref_leaves, oracle.to64(x.grad_output)))):
        assert_close(out, expected, dtype)


def free_bytes():
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.skipif(free_bytes() < 40e9, reason="wants 40 GB of free GPU memory")
def test_more_than_2_to_the_31_elements():
    """T*K*H is above 2^31: forward, backward, permute and unpermute, compared on tokens from both ends."""
    case = Case("huge", 135_008, 8, 8, 2048, 64)
    assert case.num_tokens * case.top_k * case.hidden_size > 2**31
    few = Case("few", 16, 8, 8, 2048, 64)
    base = Inputs(few, "cuda", torch.bfloat16)
    repeats = case.num_tokens // few.num_tokens

    def tile(x):  # every 16th token is the same, so that 16 tokens tell what all must be
        return x.repeat(repeats, 1)

    hidden, weights, ids, grad_output = map(tile, (base.hidden_states, base.topk_weights, base.topk_ids,
                                                   base.grad_output))
    leaves = [hidden.requires_grad_(), weights.requires_grad_()]
    out = mk.fused_experts(hidden, base.gate_up_proj, base.down_proj, weights, ids)
    grads = torch.autograd.grad(out, leaves, grad_output)
    small = [base.hidden_states.requires_grad_(), base.topk_weights.requires_grad_()]
    expected = mk.fused_experts(small[0], base.gate_up_proj, base.down_proj, small[1], base.topk_ids)
    small_grads = torch.autograd.grad(expected, small, base.grad_output)
    for result, wanted in zip((out.detach(), *grads), (expected.detach(), *small_grads)):
        assert relative_error(result[:16], wanted) < tolerance(torch.bfloat16)
        blocks = result.view(-1, 16, result.shape[1]).float()
        assert (blocks - blocks[:1]).abs().max() <= tolerance(torch.bfloat16) * 4 * blocks[0].abs().max()
    del out, grads, blocks, result
    plan = mk.make_plan(ids, 8)
    rows = mk.permute(hidden.detach(), plan)
    assert rows.numel() > 2**31
    assert torch.equal(rows[plan.row_of_slot[-1].long()], hidden.detach()[-1:].expand(8, -1))
    assert torch.equal(mk.unpermute(rows, plan), (8 * hidden.detach().float()).bfloat16())


def test_kernels_refuse_what_they_do_not_serve():
    x = Inputs(Case("refused", 4, 4, 2, 12, 8), "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="H, the last size of hidden_states, wants a multiple of 8.*got 12"):
        mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights, x.topk_ids)
    with pytest.raises(ValueError, match="wants 1 to 1024, got 1025"):
        mk.gate(torch.zeros(2, 1025, device="cuda"), 2)
    with pytest.raises(ValueError, match="top_k wants 1 to 32, got 33"):
        mk.gate(torch.zeros(2, 64, device="cuda"), 33)
    with pytest.raises(ValueError, match="num_experts wants 1 to 4096, got 4097"):
        mk.make_plan(torch.zeros(2, 2, dtype=torch.int32, device="cuda"), 4097)


def test_every_operator_has_a_cuda_kernel():
    missing = [name for name in schemas.SCHEMAS.keys() - schemas.FALLBACKS.keys()
               if not torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_kernels::{name}", "CUDA")]
    assert missing == []


@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_memory_that_training_keeps(case):
    """hidden_states (the caller's own), the pre-activation and the routing: what a forward leaves allocated."""
    x = Inputs(case, "cuda", torch.bfloat16)
    x.require_grad()
    mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights, x.topk_ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights, x.topk_ids)
    kept = torch.cuda.memory_allocated() - before
    rows = case.num_tokens * case.top_k
    wanted = 2 * out.numel() + 2 * rows * 2 * case.intermediate_size + 4 * (2 * rows + case.num_experts + 1)
    assert kept <= wanted + 6 * 512  # the allocator rounds each block up to 512 bytes


def shifted(tensor):
    """The same values, contiguous, in memory that begins one element behind a multiple of 16 bytes."""
    flat = tensor.new_empty(tensor.numel() + 8)[1:tensor.numel() + 1]
    return flat.copy_(tensor.detach().flatten()).view(tensor.shape)


@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
def test_tensors_that_begin_anywhere(dtype):
    """As parameters that are views of one flat buffer do."""
    x, y = (Inputs(SIZE, "cuda", dtype) for _ in range(2))
    for name in ("hidden_states", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias", "grad_output"):
        setattr(y, name, shifted(getattr(x, name)))
        assert getattr(y, name).data_ptr() % 16 != 0
    assert_same_bits(step(new_logits(0), y), step(new_logits(0), x))
    plan = mk.make_plan(x.topk_ids, SIZE.num_experts)
    rows = mk.permute(shifted(x.hidden_states), plan)
    assert_same_bits([mk.unpermute(shifted(rows), plan, x.topk_weights)], [mk.unpermute(rows, plan, x.topk_weights)])
    buffers = [shifted(torch.zeros_like(weight, dtype=torch.float32)) for weight in (x.gate_up_proj, x.down_proj)]
    with pytest.raises(ValueError, match=r"grad_buffers\[0\] wants memory that begins at a multiple of 16 bytes, got"):
        mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights, x.topk_ids, grad_buffers=buffers)


def test_out_of_memory_says_so():
    a = torch.zeros(2**20, 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(1, 2**23, 8, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="CUDA out of memory. Tried to allocate a tensor of 8796093022208 elements"):
        mk.grouped_mm(a, weight, torch.tensor([0, 2**20], device="cuda", dtype=torch.int32))
