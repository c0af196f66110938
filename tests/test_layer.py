"""The modules: what they compute, their state dicts, and that they match Hugging Face's."""

import pytest
import torch
from cases import ACTIVATION_OPTIONS, DEVICES, Case, Inputs, assert_close, assert_same_bits, relative_error
from torch import nn

import moe_kernels as mk
from moe_kernels.layer import hash_table


def make_layer(device="cpu", dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "top_k": 3, **options}
    layer = mk.MoE(**options, device=device, dtype=dtype)
    if getattr(layer.gate, "e_score_correction_bias", None) is not None:
        nn.init.normal_(layer.gate.e_score_correction_bias, std=0.1)
    return layer


def by_hand(layer, x, token_ids=None):
    """The layer's output token by token, in plain torch."""
    flat = x.reshape(-1, x.shape[-1])
    weights, ids, _ = layer.gate(flat) if token_ids is None else layer.gate(flat, token_ids)
    experts, rows = layer.experts, []
    for token, (w, chosen) in enumerate(zip(weights, ids.tolist())):
        total = torch.zeros_like(flat[token])
        for slot, expert in enumerate(chosen):
            gate, up = (experts.gate_up_proj[expert] @ flat[token]).chunk(2)
            total = total + w[slot] * (experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
        rows.append(total)
    out = torch.stack(rows).view(x.shape)
    return out if layer.shared_experts is None else out + layer.shared_experts(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [0, 2])
def test_output(shared, device):
    layer = make_layer(device, num_shared_experts=shared, num_expert_groups=4, topk_groups=2, routed_scaling_factor=2.5)
    x = torch.randn(2, 7, 32, device=device)
    out = layer(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert relative_error(out, by_hand(layer, x)) < 1e-5
    assert_same_bits(out.detach(), layer(x).detach())
    assert (layer.shared_experts is None) == (shared == 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 0, 32), (1, 2, 3, 32)])
def test_any_leading_shape(shape, device):
    layer = make_layer(device, num_shared_experts=1, sequence_balance_alpha=0.01)
    x = torch.randn(shape, device=device, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == shape and x.grad.shape == shape
    assert layer.sequence_balance_loss.isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_every_parameter_gets_a_gradient(device):
    layer = make_layer(device, num_shared_experts=1, expert_bias=True)
    layer(torch.randn(64, 32, device=device)).square().sum().backward()
    without = [name for name, parameter in layer.named_parameters()
               if parameter.grad is None or not parameter.grad.any()]
    assert without == []


@pytest.mark.parametrize("activation, option", ACTIVATION_OPTIONS)
def test_activations_of_experts_and_shared_experts(activation, option):
    """A shared expert with an expert's weights computes what that expert does."""
    limit = 0.5 if option else None
    layer = make_layer(num_experts=1, top_k=1, num_shared_experts=1, activation=activation, swiglu_limit=limit,
                       bias=False)
    mlp, experts = layer.shared_experts, layer.experts
    with torch.no_grad():
        halves = experts.gate_up_proj[0].chunk(2) if hasattr(mlp, "gate_proj") else (None, experts.gate_up_proj[0])
        if hasattr(mlp, "gate_proj"):
            mlp.gate_proj.weight.copy_(halves[0])
        mlp.up_proj.weight.copy_(halves[1])
        mlp.down_proj.weight.copy_(experts.down_proj[0])
    x = 3 * torch.randn(20, 32)
    ones, ids = torch.ones(20, 1), torch.zeros(20, 1, dtype=torch.int32)
    torch.testing.assert_close(mlp(x), experts(x, ones, ids))


@pytest.mark.parametrize("device", DEVICES)
def test_loads_are_counted_in_training_and_not_saved(device):
    layer = make_layer(device)
    x = torch.randn(30, 32, device=device)
    _, ids, _ = layer.gate(x)
    expected = torch.bincount(ids.flatten().long().cpu(), minlength=8)
    layer(x)
    assert layer.tokens_per_expert.cpu().equal(expected)
    layer(x)
    layer.eval()
    layer(x)
    assert layer.tokens_per_expert.cpu().equal(2 * expected)
    assert "tokens_per_expert" not in layer.state_dict()


def test_bias_stays_fp32_and_router_computes_in_fp32():
    layer = make_layer()
    bias = layer.gate.e_score_correction_bias.clone()
    layer.to(torch.bfloat16)
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(layer.gate.e_score_correction_bias, bias)
    x = torch.randn(5, 32).bfloat16()
    weights, _, logits = layer.gate(x)
    assert logits.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ layer.gate.weight.float().T)
    assert layer(x).dtype == torch.bfloat16
    assert layer.double().gate.e_score_correction_bias.dtype == torch.float32
    assert layer(x.double()).dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_runs_experts_low_and_router_high(device):
    layer = make_layer(device, num_shared_experts=1)
    x = torch.randn(40, 32, device=device)
    expected = layer(x)
    with torch.autocast(device, torch.bfloat16):
        out = layer(x)
        _, _, logits = layer.gate(x)
    assert out.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert 1e-4 < relative_error(out, expected) < 0.02
    out.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_compile_traces_the_whole_layer(device):
    torch._dynamo.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layer = make_layer(device, dtype, num_shared_experts=1, sequence_balance_alpha=0.01)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 9, 1):
        x = torch.randn(2, num_tokens, 32, device=device, dtype=dtype, requires_grad=True)
        layer.tokens_per_expert.zero_()
        results = []
        for module in (layer, compiled):
            out = module(x)
            loss = out.float().square().sum() + layer.sequence_balance_loss
            results.append((out.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])))
        assert layer.tokens_per_expert.sum() == 2 * 2 * num_tokens * 3
        for eager, traced in zip(*results):
            assert relative_error(traced, eager) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_hash_router(device):
    layer = make_layer(device, vocab_size=50, num_shared_experts=1, score_fn="sqrtsoftplus", routed_scaling_factor=1.5)
    x, token_ids = torch.randn(2, 6, 32, device=device), torch.randint(50, (2, 6), device=device)
    weights, ids, logits = layer.gate(x.view(-1, 32), token_ids)
    table = layer.gate.tid2eid
    assert torch.equal(ids.long(), table[token_ids.view(-1)])
    score = nn.functional.softplus(logits).sqrt().gather(1, ids.long())
    torch.testing.assert_close(weights, 1.5 * score / score.sum(-1, keepdim=True))
    assert relative_error(layer(x, token_ids), by_hand(layer, x, token_ids)) < 1e-5
    for wrong in (None, token_ids[:1]):
        with pytest.raises(ValueError, match="token_ids wants T=12"):
            layer(x, wrong)


def test_hash_table_is_fixed_and_names_different_experts():
    table = hash_table(1000, 12, 5, seed=3)
    assert torch.equal(table, hash_table(1000, 12, 5, seed=3))
    assert not torch.equal(table, hash_table(1000, 12, 5, seed=4))
    assert all(len(set(row)) == 5 for row in table.tolist())
    load = torch.bincount(table.flatten(), minlength=12)
    assert load.min() > 330 and load.max() < 510  # 417 on average, 16 standard deviation
    assert mk.HashRouter(8, 12, 5, 1000, device="meta").tid2eid.is_meta


def test_sentinel_ids_reach_the_experts():
    experts = mk.Experts(4, 32, 16)
    x, weights = torch.randn(3, 32), torch.ones(3, 2)
    ids = torch.tensor([[0, 4], [-1, 4], [2, 3]])
    out = experts(x, weights, ids)
    assert (out[1] == 0).all() and out[0].any()


def test_wrong_hidden_size_and_options():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"hidden_states wants shape \[..., H=32\], got \[4, 31\]"):
        layer(torch.randn(4, 31))
    with pytest.raises(ValueError, match="top_k wants 1 to 8, got 9"):
        make_layer(top_k=9)
    with pytest.raises(ValueError, match="score_fn wants one of"):
        make_layer(score_fn="relu")
    with pytest.raises(ValueError, match="activation wants one of"):
        make_layer(activation="tanh")
    with pytest.raises(ValueError, match="num_expert_groups wants a divisor"):
        make_layer(num_expert_groups=3)


def test_experts_equal_the_function():
    x = Inputs(Case("layer", 20, 4, 2, 32, 24))
    experts = mk.Experts(4, 32, 24, bias=True)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
            getattr(experts, name.replace("bias", "proj_bias")).copy_(getattr(x, name))
    expected = mk.fused_experts(x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights, x.topk_ids,
                                gate_up_bias=x.gate_up_bias, down_bias=x.down_bias)
    assert_same_bits(experts(x.hidden_states, x.topk_weights, x.topk_ids).detach(), expected)


def hugging_face_layer(device, **options):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(hidden_size=32, moe_intermediate_size=24, n_routed_experts=8,
                                       num_experts_per_tok=3, n_shared_experts=2, routed_scaling_factor=2.5, **options)
    config._experts_implementation = "eager"
    layer = modeling.DeepseekV3MoE(config).to(device)
    torch.manual_seed(1)
    for tensor in layer.state_dict().values():
        nn.init.normal_(tensor, std=0.2)
    return layer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups, kept", [(1, 1), (4, 2)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_hugging_face_layer(renormalize, groups, kept, device):
    """A state dict goes both ways; in fp32 output and gradients are the same."""
    theirs = hugging_face_layer(device, n_group=groups, topk_group=kept, norm_topk_prob=renormalize)
    ours = make_layer(device, num_shared_experts=2, num_expert_groups=groups, topk_groups=kept, renormalize=renormalize,
                      routed_scaling_factor=2.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 11, 32, device=device, requires_grad=True)
    outs = [layer(x) for layer in (ours, theirs)]
    assert_close(outs[0], outs[1], torch.float32)
    grads = []
    for layer, out in zip((ours, theirs), outs):
        parameters = dict(layer.named_parameters())
        names = sorted(parameters)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *(parameters[name] for name in names)]))
    for mine, other in zip(*grads):
        assert relative_error(mine, other) < 1e-5


@pytest.mark.parametrize("changes, error, message", [
    ({"hidden_size": 0}, ValueError, "hidden_size wants at least 1, got 0"),
    ({"num_experts": 0}, ValueError, "num_experts wants at least 1, got 0"),
    ({"intermediate_size": 8.0}, TypeError, "intermediate_size wants an integer, got float"),
    ({"num_shared_experts": -1}, ValueError, "num_shared_experts wants at least 0, got -1"),
    ({"routed_scaling_factor": "a"}, TypeError, "routed_scaling_factor wants a number, got str")])
def test_sizes_that_make_no_layer(changes, error, message):
    with pytest.raises(error, match=message):
        mk.MoE(**{"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2} | changes)
