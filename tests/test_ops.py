"""The operators as torch sees them: opcheck, compile, errors, autocast, strides, dtypes."""

import shutil

import pytest
import torch
from cases import (CASES, DEVICES, HALVES, SMALL, Case, Inputs, assert_same_bits, backend_id, case_id,
                   operator_options)

import moe_kernels as mk
from moe_kernels import ops, schemas

OPCHECK_CASES = [CASES[0], Case("odd", 7, 4, 3, 24, 8), next(case for case in CASES if case.routing == "sentinels")]
OPCHECK = [("cpu", torch.float32, "moe_kernels"), ("cpu", torch.float32, "moe_kernels_composite")]
if torch.cuda.is_available():
    OPCHECK += [("cuda", torch.float32, "moe_kernels_composite")]
    if ops._kernels_run_on(0):
        OPCHECK += [("cuda", torch.bfloat16, "moe_kernels")]


def clone(x):
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def operator_arguments(case, device, dtype):
    """{operator: [arguments, ...]} for every operator; those with a formula also with inputs that require grad."""
    x = Inputs(case, device, dtype)
    x.topk_weights.nan_to_num_(0.5)
    offsets, sorted_rows, row_of_slot = plan = x.plan()
    num_rows, top_k, width = sorted_rows.shape[0], case.top_k, x.gate_up_proj.shape[1]
    logits = torch.randn(case.num_tokens, case.num_experts, device=device)
    bias = torch.randn(case.num_experts, device=device)
    rows = torch.randn(num_rows, case.intermediate_size, device=device).to(dtype)
    wide = torch.randn(num_rows, case.hidden_size, device=device).to(dtype)
    pre = torch.randn(num_rows, width, device=device).to(dtype)
    activation = operator_options("swiglu", 1.5)
    other = operator_options("swiglu_oai", 1.5, 1.2, "interleaved")
    y = Inputs(case, device, dtype).to_layout("interleaved")
    whole = (x.hidden_states, x.gate_up_proj, x.down_proj, x.topk_weights)
    needs = [True, False, True, True, False, True]
    plain = {
        "gate": [(logits, bias, None, top_k, "sigmoid", 1, 1, True, 2.5),
                 (logits, None, x.topk_ids, top_k, "softmax", 1, 1, False, 1.0)],
        "gate_backward": [(x.topk_weights, logits, x.topk_ids, "sqrtsoftplus", True, 2.5)],
        "plan": [(x.topk_ids, case.num_experts)],
        "count_loads": [(torch.ones(case.num_experts, dtype=torch.int64, device=device), offsets)],
        "up_proj": [(x.hidden_states, x.gate_up_proj, x.gate_up_bias, offsets, sorted_rows, top_k, *activation, True),
                    (x.hidden_states, x.gate_up_proj, None, offsets, sorted_rows, top_k, *operator_options("relu2"),
                     False),
                    (x.hidden_states, y.gate_up_proj, y.gate_up_bias, offsets, sorted_rows, top_k, *other, True)],
        "grouped_mm": [(rows, x.down_proj, x.down_bias, offsets, True), (wide, x.down_proj, None, offsets, False)],
        "weight_grad": [(wide, rows, offsets, None, None, top_k),
                        (x.grad_output, rows, offsets, sorted_rows, None, top_k)],
        "weight_grad_accumulate": [(torch.ones(case.num_experts, wide.shape[1], rows.shape[1], device=device),
                                    wide, rows, offsets, None, None, top_k)],
        "bias_grad": [(wide, None, offsets, None, top_k),
                      (x.grad_output, x.topk_weights, offsets, sorted_rows, top_k)],
        "combine": [(wide, x.topk_weights, row_of_slot), (wide, None, row_of_slot)],
        "combine_backward": [(x.grad_output, wide, x.topk_weights, sorted_rows, row_of_slot)],
        "permute": [(x.hidden_states, sorted_rows, row_of_slot)],
        "down_proj_backward": [(x.grad_output, x.topk_weights, x.down_proj, x.down_bias, pre, *plan, *activation),
                               (x.grad_output, x.topk_weights, y.down_proj, x.down_bias, pre, *plan, *other)],
        "fused_experts": [(*whole, x.topk_ids, x.gate_up_bias, x.down_bias, *activation, True),
                          (*whole, x.topk_ids, None, None, *operator_options("swiglu"), False),
                          (x.hidden_states, y.gate_up_proj, y.down_proj, x.topk_weights, x.topk_ids, y.gate_up_bias,
                           x.down_bias, *other, True)],
        "fused_experts_backward": [(x.grad_output, *whole, x.gate_up_bias, x.down_bias, pre, *plan, *activation,
                                    needs),
                                   (x.grad_output, x.hidden_states, y.gate_up_proj, y.down_proj, x.topk_weights,
                                    y.gate_up_bias, x.down_bias, pre, *plan, *other, [True] * 6)],
    }
    buffers = [torch.ones(weight.shape, device=device) for weight in (x.gate_up_proj, x.down_proj)]
    plain["fused_experts_accumulate"] = [(*plain["fused_experts"][0], *buffers)]
    plain["fused_experts_backward_accumulate"] = [(*pair, *plain["fused_experts_backward"][0])
                                                  for pair in (buffers, (None, buffers[1]))]
    differentiable = {"gate": (0,), "grouped_mm": (0, 1, 2), "combine": (0, 1), "permute": (0,),
                      "fused_experts": (0, 1, 2, 3, 5, 6), "fused_experts_accumulate": (0, 3, 5, 6)}
    for name, positions in differentiable.items():
        arguments = [clone(argument) for argument in plain[name][0]]
        for i in positions:
            arguments[i].requires_grad_()
        plain[name].append(tuple(arguments))
    return plain


@pytest.mark.parametrize("device, dtype, namespace", OPCHECK, ids=backend_id)
@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_opcheck(name, device, dtype, namespace):
    operator = getattr(getattr(torch.ops, namespace), name).default
    for case in OPCHECK_CASES:
        for arguments in operator_arguments(case, device, dtype)[name]:
            torch.library.opcheck(operator, arguments)


def test_every_operator_has_a_schema_in_both_namespaces():
    for name in schemas.SCHEMAS:
        first, second = (getattr(getattr(torch.ops, n), name).default._schema for n in schemas.LIBRARIES)
        assert str(first).split("::")[1] == str(second).split("::")[1]


@pytest.mark.parametrize("name", sorted(set(schemas.SCHEMAS) - {"gate", "plan", "grouped_mm", "combine", "permute",
                                                                "fused_experts", "fused_experts_accumulate",
                                                                "fused_experts_backward_accumulate",
                                                                "weight_grad_accumulate", "count_loads"}))
def test_operators_without_a_gradient_say_so(name):
    arguments = [clone(a) for a in operator_arguments(OPCHECK_CASES[1], "cpu", torch.float32)[name][0]]
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            argument.requires_grad_()
    out = getattr(torch.ops.moe_kernels, name)(*arguments)
    with pytest.raises(NotImplementedError, match=f"{name} has no gradient"):
        (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()


def test_second_derivative_raises():
    x = Inputs(OPCHECK_CASES[1])
    x.hidden_states.requires_grad_()
    (grad,) = torch.autograd.grad(call(x).sum(), x.hidden_states, create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        grad.sum().backward()


def call(x, **changes):
    arguments = dict(hidden_states=x.hidden_states, gate_up_proj=x.gate_up_proj, down_proj=x.down_proj,
                     topk_weights=x.topk_weights, topk_ids=x.topk_ids, gate_up_bias=x.gate_up_bias,
                     down_bias=x.down_bias)
    return mk.fused_experts(**{**arguments, **changes})


# compile -------------------------------------------------------------------------------------------------------------


# on a CPU inductor compiles C++ for half a minute; test_torch_integration.py has a case of that
@pytest.mark.parametrize("backend, device", [("aot_eager", device) for device in DEVICES] + [
    ("inductor", device) for device in DEVICES if device != "cpu" and shutil.which("g++")])
def test_compile_with_other_token_counts(backend, device):
    """One graph for every number of tokens, forward and backward, with the same bits as eager."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch._dynamo.reset()

    def flow(logits, hidden, gate_up, down):
        weights, ids = mk.gate(logits, 2, "sigmoid")
        plan = mk.make_plan(ids, logits.shape[1])
        mixed = mk.unpermute(mk.grouped_mm(mk.permute(hidden, plan), down.transpose(1, 2), plan.expert_offsets), plan,
                             weights)
        return mk.fused_experts(hidden, gate_up, down, weights, ids), mixed

    compiled = torch.compile(flow, fullgraph=True, dynamic=True, backend=backend)
    for num_tokens in (5, 12, 1, 0):
        x = Inputs(Case("compile", num_tokens, 4, 2, 16, 8), device, dtype)
        leaves = [torch.randn(num_tokens, 4, device=device), x.hidden_states, x.gate_up_proj, x.down_proj]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        results = []
        for function in (flow, compiled):
            first, second = function(*leaves)
            grads = torch.autograd.grad([first, second], leaves, [x.grad_output, second.detach()])
            results.append((first.detach(), second.detach(), *grads))
        assert_same_bits(*results)


# autocast, strides, dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=backend_id)
def test_autocast(dtype, device):
    """The same as casting the floating inputs by hand; the routing stays fp32; gradients come back in fp32."""
    x, half = Inputs(SMALL[2], device, torch.float32), Inputs(SMALL[2], device, dtype)
    leaves = x.require_grad()
    with torch.autocast(device, dtype):
        out = call(x)
        weights, _ = mk.gate(torch.randn(3, 8, device=device), 2)
        rows = mk.grouped_mm(x.hidden_states, x.down_proj.transpose(1, 2).contiguous(),
                             torch.tensor([0, 9, 9, 20, 50], device=device))
    assert out.dtype == rows.dtype == dtype and weights.dtype == torch.float32
    assert torch.equal(out, call(half))
    grads = torch.autograd.grad(out, leaves, half.grad_output)
    half_leaves = half.require_grad()
    expected = torch.autograd.grad(call(half), half_leaves, half.grad_output)
    for grad, wanted in zip(grads, expected):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, wanted.float())


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_fp32_products_alone(device):
    """A backward under autocast, which would lower the products inside, gives what it gives outside."""
    x = Inputs(SMALL[2], device, torch.float32)
    leaves = x.require_grad()
    out = call(x)
    first = torch.autograd.grad(out, leaves, x.grad_output, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        second = torch.autograd.grad(out, leaves, x.grad_output)
    assert_same_bits(first, second)


def strided(x):
    """The same values in memory with gaps, and transposed where that is possible."""
    if x.dim() < 2:
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x.transpose(-1, -2).contiguous().transpose(-1, -2).repeat_interleave(2, dim=0)[::2]


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, y = Inputs(SMALL[2], device, dtype), Inputs(SMALL[2], device, dtype)
    for name in (*y.FLOATS, "topk_ids"):
        setattr(y, name, strided(getattr(y, name)))
        assert not getattr(y, name).is_contiguous()
    x_leaves, y_leaves = x.require_grad(), y.require_grad()
    out, out_strided = call(x), call(y)
    assert_same_bits(out.detach(), out_strided.detach())
    grad = x.grad_output[:1].expand_as(out)
    grads = torch.autograd.grad(out, x_leaves, grad.contiguous())
    assert_same_bits(grads, torch.autograd.grad(out_strided, y_leaves, grad))
    plan = x.plan()
    assert_same_bits(plan, mk.make_plan(y.topk_ids, x.case.num_experts))
    rows = mk.permute(x.hidden_states, plan)
    assert_same_bits(rows, mk.permute(y.hidden_states, plan))
    assert_same_bits(mk.unpermute(rows, plan, x.topk_weights), mk.unpermute(strided(rows), plan, y.topk_weights))
    b = x.gate_up_proj
    assert_same_bits(mk.grouped_mm(rows, b, plan.expert_offsets, x.gate_up_bias),
                     mk.grouped_mm(strided(rows), strided(b), strided(plan.expert_offsets).long(), y.gate_up_bias))
    logits = torch.randn(9, 12, device=device)
    assert_same_bits(mk.gate(logits, 3, correction_bias=logits[0]),
                     mk.gate(strided(logits), 3, correction_bias=strided(logits[0])))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_int64_ids(case, device):
    x = Inputs(case, device)
    assert_same_bits(call(x), call(x, topk_ids=x.topk_ids.long()))


def test_build_info_says_what_is_there():
    info = mk.build_info()
    assert info["torch"] == torch.__version__
    assert info["cuda_built"] == (schemas.compiled_module is not None)
    assert bool(info["architectures"]) == info["cuda_built"]


# errors --------------------------------------------------------------------------------------------------------------

X = Inputs(Case("errors", 6, 4, 2, 16, 8))
Y = Inputs(Case("transposed", 6, 4, 2, 16, 12)).to_layout("transposed")
PLAN = X.plan()
LOGITS = torch.randn(6, 4)
ERRORS = {
    "hidden_states_no_tensor": (lambda: call(X, hidden_states=[1.0]), TypeError,
                                "hidden_states wants a tensor, got list"),
    "hidden_states_shape": (lambda: call(X, hidden_states=X.hidden_states[0]), ValueError, r"hidden_states.*\[16\]"),
    "hidden_states_dtype": (lambda: call(X, hidden_states=X.hidden_states.int()), TypeError, "hidden_states.*int32"),
    "gate_up_proj_shape": (lambda: call(X, gate_up_proj=X.gate_up_proj[:, :, :8]), ValueError, "gate_up_proj.*H=16"),
    "gate_up_proj_dtype": (lambda: call(X, gate_up_proj=X.gate_up_proj.double()), TypeError, "gate_up_proj.*float64"),
    "gate_up_proj_device": (lambda: call(X, gate_up_proj=X.gate_up_proj.to("meta")), ValueError,
                            "gate_up_proj wants device cpu, got meta"),
    "gate_up_proj_odd": (lambda: call(X, gate_up_proj=X.gate_up_proj[:, :15]), ValueError, "two halves.*15"),
    "no_experts": (lambda: call(X, gate_up_proj=X.gate_up_proj[:0], down_proj=X.down_proj[:0]), ValueError,
                   "gate_up_proj.*at least 1, got 0"),
    "down_proj_shape": (lambda: call(X, down_proj=X.down_proj[:3]), ValueError, r"down_proj.*E=4.*got \[3, 16, 8\]"),
    "down_proj_for_ungated": (lambda: call(X, activation="silu"), ValueError, "down_proj.*I=16"),
    "gate_up_bias_shape": (lambda: call(X, gate_up_bias=X.gate_up_bias[:, :8]), ValueError, "gate_up_bias.*2I=16"),
    "down_bias_dtype": (lambda: call(X, down_bias=X.down_bias.half()), TypeError, "down_bias.*float16"),
    "topk_weights_shape": (lambda: call(X, topk_weights=X.topk_weights[:, :1]), ValueError, "topk_weights.*K=2"),
    "topk_weights_dtype": (lambda: call(X, topk_weights=X.topk_weights.bfloat16()), TypeError,
                           "topk_weights.*bfloat16"),
    "topk_ids_dtype": (lambda: call(X, topk_ids=X.topk_ids.float()), TypeError, "topk_ids.*int32, int64.*float32"),
    "topk_ids_shape": (lambda: call(X, topk_ids=X.topk_ids[:5]), ValueError, "topk_ids.*T=6"),
    "topk_ids_no_slot": (lambda: call(X, topk_ids=X.topk_ids[:, :0]), ValueError, "topk_ids.*at least 1, got 0"),
    "activation": (lambda: call(X, activation="swish"), ValueError, "activation wants one of swiglu, .*'swish'"),
    "limit_of_geglu": (lambda: call(X, activation="geglu", swiglu_limit=7.0), ValueError, "swiglu_limit.*'geglu'"),
    "limit_negative": (lambda: call(X, swiglu_limit=-1.0), ValueError, "swiglu_limit.*above 0, got -1.0"),
    "alpha_of_swiglu": (lambda: call(X, swiglu_alpha=1.0), ValueError, "swiglu_alpha wants .*'swiglu_oai', .*'swiglu'"),
    "alpha_negative": (lambda: call(X, activation="swiglu_oai", swiglu_alpha=-1.0), ValueError,
                       "swiglu_alpha wants a number above 0, got -1.0"),
    "transposed_geglu": (lambda: call(X, activation="geglu", is_transposed=True), ValueError,
                         "is_transposed wants activation 'swiglu' or 'swiglu_oai', got 'geglu'"),
    "interleaved_rows": (lambda: call(X, is_concatenated=False), ValueError,
                         "is_concatenated wants True where is_transposed is False"),
    "transposed_gate_up_proj": (lambda: call(Y, is_transposed=True, gate_up_proj=Y.gate_up_proj.mT), ValueError,
                                r"gate_up_proj wants shape \[E, H=16, 2I\], got \[4, 24, 16\]"),
    "transposed_down_proj": (lambda: call(Y, is_transposed=True, down_proj=Y.down_proj.mT), ValueError,
                             r"down_proj wants shape \[E=4, I=12, H=16\], got \[4, 16, 12\]"),
    "transposed_odd": (lambda: call(Y, is_transposed=True, gate_up_proj=Y.gate_up_proj[..., :23]), ValueError,
                       "two halves.*23 columns"),
    "limit_no_number": (lambda: call(X, swiglu_limit="7"), TypeError, "swiglu_limit wants a number, got str"),
    "logits_shape": (lambda: mk.gate(LOGITS[0], 2), ValueError, r"router_logits wants shape \[T, E\], got \[4\]"),
    "logits_dtype": (lambda: mk.gate(LOGITS.long(), 2), TypeError, "router_logits.*int64"),
    "top_k_large": (lambda: mk.gate(LOGITS, 5), ValueError, "top_k wants 1 to 4, got 5"),
    "top_k_zero": (lambda: mk.gate(LOGITS, 0), ValueError, "top_k wants 1 to 4, got 0"),
    "top_k_type": (lambda: mk.gate(LOGITS, 2.0), TypeError, "top_k wants an integer, got float"),
    "score_fn": (lambda: mk.gate(LOGITS, 2, "tanh"), ValueError, "score_fn wants one of softmax, .*'tanh'"),
    "bias_shape": (lambda: mk.gate(LOGITS, 2, correction_bias=LOGITS[0, :3]), ValueError, "correction_bias.*E=4"),
    "bias_dtype": (lambda: mk.gate(LOGITS, 2, correction_bias=LOGITS[0].bfloat16()), TypeError, "correction_bias"),
    "groups_divide": (lambda: mk.gate(LOGITS, 2, num_expert_groups=3), ValueError, "num_expert_groups wants a divisor"),
    "topk_groups": (lambda: mk.gate(LOGITS, 2, num_expert_groups=2, topk_groups=3), ValueError, "topk_groups.*1 to 2"),
    "groups_hold_top_k": (lambda: mk.gate(LOGITS, 3, num_expert_groups=2), ValueError, "topk_groups.*top_k=3"),
    "scaling_text": (lambda: mk.gate(LOGITS, 2, routed_scaling_factor="a"), TypeError,
                     "routed_scaling_factor wants a number, got str"),
    "scaling_none": (lambda: mk.gate(LOGITS, 2, routed_scaling_factor=None), TypeError, "wants a number, got NoneType"),
    "scaling_tensor": (lambda: mk.gate(LOGITS, 2, routed_scaling_factor=torch.tensor(2.5)), TypeError,
                       "routed_scaling_factor wants a number, got Tensor"),
    "given_ids_shape": (lambda: mk.gate(LOGITS, 2, topk_ids=X.topk_ids[:, :1]), ValueError, "topk_ids.*K=2"),
    "plan_dtype": (lambda: mk.make_plan(X.topk_weights, 4), TypeError, "topk_ids.*float32"),
    "plan_experts": (lambda: mk.make_plan(X.topk_ids, 0), ValueError, "num_experts wants at least 1, got 0"),
    "plan_rows": (lambda: mk.make_plan(torch.empty(2**28, 8, dtype=torch.int32, device="meta"), 4), ValueError,
                  "below 2.31"),
    "permute_plan": (lambda: mk.permute(X.hidden_states, PLAN[0]), TypeError, "plan wants a Plan"),
    "permute_tokens": (lambda: mk.permute(X.hidden_states[:5], PLAN), ValueError, "hidden_states.*T=6"),
    "unpermute_rows": (lambda: mk.unpermute(X.hidden_states, PLAN), ValueError, "rows.*S=12"),
    "unpermute_weights": (lambda: mk.unpermute(torch.zeros(12, 8), PLAN, X.topk_weights[:3]), ValueError, "T=6"),
    "grouped_a": (lambda: mk.grouped_mm(X.down_proj, X.down_proj, PLAN[0]), ValueError, r"a wants shape \[S, k\]"),
    "grouped_b": (lambda: mk.grouped_mm(torch.zeros(12, 9), X.down_proj, PLAN[0]), ValueError, "b wants.*k=9"),
    "grouped_b_untransposed": (lambda: mk.grouped_mm(torch.zeros(12, 9), X.down_proj, PLAN[0], transpose_b=False),
                               ValueError, r"b wants shape \[E, k=9, n\]"),
    "grouped_offsets": (lambda: mk.grouped_mm(torch.zeros(12, 8), X.down_proj, PLAN[0][1:]), ValueError, "E.1=5"),
    "grouped_bias": (lambda: mk.grouped_mm(torch.zeros(12, 8), X.down_proj, PLAN[0], X.gate_up_bias[:, :3]), ValueError,
                     "bias.*n=16"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_names_the_argument_what_it_wants_and_what_it_got(name):
    function, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        function()


@pytest.mark.parametrize("device", [device for device in DEVICES if device != "cpu"] or ["meta"])
def test_tensors_of_two_devices(device):
    for name in (*X.FLOATS[1:], "topk_ids"):
        with pytest.raises(ValueError, match=f"{name} wants device cpu, got {device}"):
            call(X, **{name: getattr(X, name).to(device)})
    with pytest.raises(ValueError, match="plan.row_of_slot wants device"):
        mk.permute(X.hidden_states.to(device), PLAN)


def test_gradient_without_the_kept_pre_activation_says_so():
    hidden = X.hidden_states.clone().requires_grad_()
    out = torch.ops.moe_kernels.fused_experts(hidden, X.gate_up_proj, X.down_proj, X.topk_weights, X.topk_ids, None,
                                              None, *operator_options("swiglu"), False)[0]
    with pytest.raises(RuntimeError, match="keep_pre_activation=True"):
        out.sum().backward()
