"""gate: the naive loop, DeepSeek's rules one by one, gradients, and Hugging Face's router."""

import oracle
import pytest
import torch
from cases import DEVICES
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels as mk
from moe_kernels import ops

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
# T, E, K, groups, kept groups
SHAPES = [(0, 8, 2, 1, 1), (1, 1, 1, 1, 1), (5, 8, 8, 1, 1), (37, 64, 8, 8, 3), (9, 768, 16, 1, 1), (6, 1024, 32, 1, 1),
          (33, 72, 6, 1, 1), (19, 33, 5, 1, 1), (12, 256, 8, 8, 4), (3, 6, 2, 6, 3), (300, 31, 3, 1, 1)]
LOGITS = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
if torch.cuda.is_available():
    LOGITS += [("cuda", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def random_logits(num_tokens, num_experts, device, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator).to(dtype)
    bias = torch.randn(num_experts, generator=generator) * 0.1
    return logits.to(device), bias.to(device)


def check(logits, bias, weights, ids, top_k, score_fn, groups, kept, renormalize, scale):
    """The chosen have the K best values of the choice, best first, and their weights are right."""
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert weights.shape == ids.shape == (logits.shape[0], top_k)
    bias = None if bias is None else bias.double().tolist()
    for row, w, got in zip(logits.double().tolist(), weights.cpu().double(), ids.tolist()):
        options = (bias, groups, kept, renormalize, scale)
        _, best, choice = oracle.gate_of_token(row, top_k, score_fn, *options)
        assert len(set(got)) == top_k
        assert [choice[e] for e in got] == pytest.approx([choice[e] for e in best], rel=1e-5, abs=1e-6)
        expected, _, _ = oracle.gate_of_token(row, top_k, score_fn, *options, ids=got)
        assert w.tolist() == pytest.approx(expected, rel=3e-6, abs=1e-30)


@pytest.mark.parametrize("device, dtype", LOGITS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("score_fn", SCORE_FUNCTIONS)
def test_naive_loop(score_fn, with_bias, device, dtype, run_twice):
    for num_tokens, num_experts, top_k, groups, kept in SHAPES:
        logits, bias = random_logits(num_tokens, num_experts, device, dtype)
        bias = bias if with_bias else None
        weights, ids = run_twice(lambda: mk.gate(logits, top_k, score_fn, bias, groups, kept, True, 2.5))
        check(logits, bias, weights, ids, top_k, score_fn, groups, kept, True, 2.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score_fn", SCORE_FUNCTIONS)
def test_without_renormalize(score_fn, device):
    logits, bias = random_logits(20, 40, device, torch.float32)
    weights, ids = mk.gate(logits, 4, score_fn, bias, renormalize=False)
    check(logits, bias, weights, ids, 4, score_fn, 1, 1, False, 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_experts, top_k", [(8, 3), (128, 8), (768, 16), (1000, 32)])
def test_ties_go_to_the_lower_id(num_experts, top_k, device):
    logits = torch.zeros(3, num_experts, device=device)
    logits[1, num_experts // 2 :] = 1.0
    logits[2] = torch.arange(num_experts, device=device).flip(0) // 4  # descending in steps of four equal ones
    _, ids = mk.gate(logits, top_k, "sqrtsoftplus")
    first = list(range(top_k))
    half = [num_experts // 2 + e for e in range(min(top_k, num_experts - num_experts // 2))]
    assert ids[0].tolist() == first
    assert ids[1].tolist() == (half + first)[:top_k]
    assert ids[2].tolist() == first


@pytest.mark.parametrize("device", DEVICES)
def test_ties_of_groups_go_to_the_lower_group(device):
    logits = torch.zeros(1, 16, device=device)
    logits[0, 12:] = 1.0
    bias = torch.zeros(16, device=device)
    assert mk.gate(logits, 6, "sigmoid", bias, 4, 2)[1].tolist() == [[12, 13, 14, 15, 0, 1]]


@pytest.mark.parametrize("device", DEVICES)
def test_bias_chooses_and_never_weighs(device):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0], device=device)
    weights, ids = mk.gate(logits, 2, "sigmoid", bias, renormalize=False)
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, torch.sigmoid(logits[:, [3, 0]]))


@pytest.mark.parametrize("device", DEVICES)
def test_group_score_is_two_best_with_a_bias_and_the_best_without(device):
    logits = torch.tensor([[3.0, -3.0, 1.0, 1.0]], device=device)  # groups (3, -3) and (1, 1)
    assert mk.gate(logits, 1, "sigmoid", None, 2, 1)[1].tolist() == [[0]]
    assert mk.gate(logits, 1, "sigmoid", torch.zeros(4, device=device), 2, 1)[1].tolist() == [[2]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score_fn", ("sigmoid", "sqrtsoftplus"))
def test_nan_is_chosen_last(score_fn, device):
    logits = torch.tensor([[float("nan"), 1.0, float("nan"), 2.0, 0.0]], device=device)
    weights, ids = mk.gate(logits, 4, score_fn, renormalize=False)
    assert ids.tolist() == [[3, 1, 4, 0]]
    assert weights[0, :3].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("score_fn", SCORE_FUNCTIONS)
def test_any_logits_choose_different_ids_in_range(score_fn, groups, value, device):
    bias = torch.zeros(64, device=device)
    for row in (torch.full((64,), value), torch.where(torch.arange(64) % 3 == 0, value, torch.arange(64) / 9.0)):
        _, ids = mk.gate(row.repeat(3, 1).to(device), 8, score_fn, bias, groups, min(groups, 2))
        for token in ids.tolist():
            assert len(set(token)) == 8 and min(token) >= 0 and max(token) < 64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("score_fn", SCORE_FUNCTIONS)
def test_given_ids_only_weigh(score_fn, dtype, device, run_twice):
    logits, _ = random_logits(7, 24, device, torch.float32)
    given = torch.tensor([[3, 23, -1], [0, 24, 5], [7, 7, 1], [-9, 99, -1], [1, 2, 3], [23, 22, 21],
                          [2**31 - 1, 0, 4]])
    given_on_device = given.to(device, dtype)
    weights, ids = run_twice(lambda: mk.gate(logits, 3, score_fn, routed_scaling_factor=1.5, topk_ids=given_on_device))
    assert ids.tolist() == given.tolist() and ids.dtype == torch.int32
    for row, got, token in zip(logits.double().tolist(), weights.tolist(), given.tolist()):
        expected, _, _ = oracle.gate_of_token(row, 3, score_fn, scale=1.5, ids=token)
        assert got == pytest.approx(expected, rel=3e-6, abs=1e-30)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score_fn", SCORE_FUNCTIONS)
def test_gradcheck(score_fn, renormalize):
    logits, bias = random_logits(5, 12, "cpu", torch.float64)
    logits.requires_grad_()
    ids = torch.tensor([[1, 2, 3], [4, -1, 6], [7, 7, 0], [12, -1, 99], [11, 0, 5]])
    assert torch.autograd.gradcheck(
        lambda x: mk.gate(x, 3, score_fn, bias, 4, 2, renormalize, 2.5)[0], (logits,))
    assert torch.autograd.gradcheck(
        lambda x: mk.gate(x, 3, score_fn, renormalize=renormalize, routed_scaling_factor=0.7, topk_ids=ids)[0],
        (logits,))


def fp64_gradient(logits, ids, grad, score_fn, renormalize, scale):
    """By autograd through plain torch in fp64; ids in range only."""
    x = logits.detach().cpu().double().requires_grad_()
    score = {"softmax": lambda: x.softmax(-1), "sigmoid": x.sigmoid,
             "sqrtsoftplus": lambda: torch.log1p(x.exp()).sqrt()}[score_fn]()
    weights = score.gather(1, ids.cpu().long())
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if renormalize else weights
    return torch.autograd.grad((weights * scale * grad.cpu().double()).sum(), x)[0]


@pytest.mark.parametrize("device, dtype", LOGITS)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score_fn", SCORE_FUNCTIONS)
def test_gradient(score_fn, renormalize, device, dtype, run_twice):
    for num_tokens, num_experts, top_k, groups, kept in SHAPES:
        logits, bias = random_logits(num_tokens, num_experts, device, dtype)
        logits.requires_grad_()
        weights, ids = mk.gate(logits, top_k, score_fn, bias, groups, kept, renormalize, 2.5)
        grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(3)).to(device)
        out = run_twice(lambda: torch.autograd.grad(weights, logits, grad, retain_graph=True)[0])
        ref = fp64_gradient(logits, ids, grad, score_fn, renormalize, 2.5)
        assert out.dtype == dtype and out.shape == logits.shape
        allowed = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        # renormalised weights of one expert a token are constant: what is left is rounding
        scale = ref.norm() if top_k > 1 or not renormalize else grad.norm().double().cpu()
        assert (out.cpu().double() - ref).norm() <= allowed * scale + 1e-12


@pytest.mark.parametrize("device", DEVICES)
def test_backward_is_one_operator(device):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(operator.name())
            return operator(*args, **(kwargs or {}))

    logits, _ = random_logits(5, 12, device, torch.float32)
    weights, _ = mk.gate(logits.requires_grad_(), 3)
    grad, names = torch.ones_like(weights), []
    with Recorder(), torch.autograd.set_multithreading_enabled(False):  # the mode belongs to this thread
        torch.autograd.grad(weights, logits, grad)
    assert [name.split("::")[1] for name in names] == ["gate_backward"]


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_where_softplus_underflows(device):
    logits = torch.tensor([[-200.0, -120.0, 1.0, -50.0]], device=device, requires_grad=True)
    weights, _ = mk.gate(logits, 4, "sqrtsoftplus", renormalize=False)
    weights.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 0] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_an_expert_given_twice(device):
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.tensor([[1, 1, 2], [5, 0, 5], [3, 3, 3], [0, 1, 2]], dtype=torch.int32, device=device)
    grad = torch.arange(12.0, device=device).view(4, 3)
    out = ops._namespace(logits, (torch.float32,)).gate_backward(grad, logits, ids, "sigmoid", True, 1.0)
    torch.testing.assert_close(out.cpu().double(), fp64_gradient(logits, ids, grad, "sigmoid", True, 1.0),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups, kept", [(1, 1), (4, 2)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_hugging_face_router(renormalize, groups, kept, device):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=groups,
                                       topk_group=kept, norm_topk_prob=renormalize, routed_scaling_factor=2.5)
    theirs = modeling.DeepseekV3TopkRouter(config).to(device)
    torch.manual_seed(0)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.e_score_correction_bias, std=0.1)
    ours = mk.TopKRouter(32, 16, 4, "sigmoid", groups, kept, renormalize, 2.5).to(device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    hidden_states = torch.randn(50, 32, device=device)
    logits, weights, ids = theirs(hidden_states)
    weights_here, ids_here, logits_here = ours(hidden_states)
    order = ids.argsort(-1)
    order_here = ids_here.argsort(-1)
    torch.testing.assert_close(logits_here, logits)
    assert ids_here.gather(1, order_here).long().equal(ids.gather(1, order))
    torch.testing.assert_close(weights_here.gather(1, order_here), weights.gather(1, order))
