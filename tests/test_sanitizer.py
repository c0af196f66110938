"""Every kernel once on small sizes, for compute-sanitizer: `compute-sanitizer python -m pytest tests -m sanitizer`.

Under racecheck a test takes seconds, so there are few of them and none is large. Collected where a GPU is present and
the kernels run on it (conftest.py). The results are compared with the torch implementation on the CPU, which the
sanitizer does not slow.
"""

import pytest
import torch
from cases import HALVES, Case, Inputs, backend_id, case_id, layout_options, relative_error, tolerance

import moe_kernels as mk

pytestmark = pytest.mark.sanitizer

HOPPER = torch.cuda.get_device_capability() == (9, 0)
ENGINES = [("sm80", tile) for tile in ("16x128", "64x128", "128x128", "128x256")] + [("sm90", "auto")] * HOPPER
# ends inside tiles, slots without an expert, an expert of no rows; several row tiles an expert
CASES = [Case("sentinels", 75, 5, 2, 136, 72, "sentinels"), Case("row_tiles", 300, 2, 2, 72, 136)]


def layer(x, layout="rows"):
    """fused_experts with biases: output and all gradients."""
    leaves = x.require_grad()
    out = mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights, x.topk_ids, x.activation, None,
                           x.gate_up_bias, x.down_bias, **layout_options(layout))
    return (out, *torch.autograd.grad(out, leaves, x.grad_output))


def pieces(x):
    """permute, grouped_mm and unpermute: output and all gradients."""
    leaves = [leaf.requires_grad_() for leaf in (x.hidden_states, x.gate_up_proj, x.gate_up_bias, x.topk_weights)]
    plan = mk.make_plan(x.topk_ids, x.case.num_experts)
    rows = mk.grouped_mm(mk.permute(x.hidden_states, plan), x.gate_up_proj, plan.expert_offsets, x.gate_up_bias)
    out = mk.unpermute(rows, plan, x.topk_weights)
    return (out, *torch.autograd.grad(out, leaves, out.detach()))


def assert_like_the_cpu(function, case, dtype, activation="swiglu"):
    """The function's results on the GPU in dtype are those of fp32 on the CPU, from the same inputs."""
    results = function(Inputs(case, "cuda", dtype, activation))
    wanted = function(rounded(case, dtype, activation))
    for out, ref in zip(results, wanted, strict=True):
        finite = ~ref.isnan()  # a slot without an expert has a routing weight of NaN in these cases
        assert relative_error(out.cpu()[finite], ref[finite]) <= 2 * tolerance(dtype)


def rounded(case, dtype, activation):
    """The case's fp32 inputs on the CPU, with the values that dtype stores."""
    x, stored = (Inputs(case, "cpu", stored_as, activation) for stored_as in (torch.float32, dtype))
    for name in (*Inputs.FLOATS, "grad_output"):
        setattr(x, name, getattr(stored, name).float())
    return x


@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
@pytest.mark.parametrize("engine, tile", ENGINES)
def test_layer(engine, tile, dtype, force):
    force(engine, tile)
    assert_like_the_cpu(layer, CASES[dtype == torch.float16], dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
@pytest.mark.parametrize("layout", ["transposed", "interleaved"])
@pytest.mark.parametrize("engine, tile", [ENGINES[0], *ENGINES[2:3], *ENGINES[4:]])
def test_layer_with_transposed_weights(engine, tile, layout, dtype, force):
    force(engine, tile)
    assert_like_the_cpu(lambda x: layer(x.to_layout(layout), layout), CASES[dtype == torch.float16], dtype,
                        "swiglu_oai")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_pieces(case):
    assert_like_the_cpu(pieces, case, torch.bfloat16)


@pytest.mark.parametrize("case", [Case("one_block", 300, 150, 2, 64, 72, "sentinels"),
                                  Case("two_blocks", 300, 150, 2, 72, 72, "sentinels"),
                                  Case("in_turn", 1800, 20, 2, 2560, 72, "sentinels")], ids=case_id)
def test_tile_after_tile(case, force):
    """More tiles than multiprocessors, so that memory is used again."""
    force("sm90" if HOPPER else "auto")
    assert_like_the_cpu(layer, case, torch.bfloat16)


def test_ungated_layer():
    assert_like_the_cpu(layer, CASES[0], torch.bfloat16, "relu2")


@pytest.mark.parametrize("num_experts, top_k, groups, score_fn",
                         [(768, 16, 1, "sigmoid"), (40, 4, 1, "softmax"), (256, 20, 1, "sqrtsoftplus"),
                          (64, 8, 8, "sigmoid")])
def test_gate(num_experts, top_k, groups, score_fn):
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(9, num_experts, generator=generator), torch.zeros(num_experts)
    logits[0] = 0.5  # more equal choices than candidates

    def run(device):
        x = logits.to(device).requires_grad_()
        weights, ids = mk.gate(x, top_k, score_fn, bias.to(device), groups, (groups + 1) // 2)
        grad, = torch.autograd.grad(weights, x, torch.arange(float(top_k), device=device).expand_as(weights))
        return weights, grad, ids

    weights, grad, ids = run("cuda")
    wanted, wanted_grad, wanted_ids = run("cpu")
    assert torch.equal(ids.cpu(), wanted_ids)
    torch.testing.assert_close(weights.cpu(), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.cpu(), wanted_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_tokens, num_experts, top_k", [(40, 6, 3), (100, 768, 16), (400, 768, 16), (70_000, 5, 1)])
def test_plan(num_tokens, num_experts, top_k):
    """One block with 32 slots a warp and with 128, several blocks with 32 and with 128."""
    ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=torch.Generator().manual_seed(0))
    for ours, wanted in zip(mk.make_plan(ids.cuda(), num_experts), mk.make_plan(ids, num_experts)):
        assert torch.equal(ours.cpu(), wanted)
