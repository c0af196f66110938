"""Our backend for transformers beyond the families: choice of route, sentinels, memory, generation."""

import copy
import inspect
import types

import hf_families as tiny
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation  # noqa: E402

import moe_kernels as mk  # noqa: E402
from moe_kernels.hf import backend  # noqa: E402

DEVICES = [("cpu", torch.float32)] + ([("cuda", torch.bfloat16)] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def _registered():
    mk.hf.register()


# --------------------------------------------------------------------------------------------------- experts by hand


HAS_NORM = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters


def experts_class(body=(), **layout):
    """A class of experts with `use_experts_implementation`, whose own forward is a loop in the same layout."""
    if layout.get("has_post_expert_norm") and not HAS_NORM:
        pytest.skip("this transformers has no norm after each expert")
    gated, transposed = layout.get("has_gate", True), layout.get("is_transposed", False)
    up_name = "gate_up_proj" if gated else "up_proj"

    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, width = 4, 48 if gated else 24
            generator = torch.Generator().manual_seed(3)

            def parameter(*shape, transpose=False):
                x = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
                return torch.nn.Parameter(x.transpose(1, 2).contiguous() if transpose else x)

            setattr(self, up_name, parameter(4, width, 32, transpose=transposed))
            self.down_proj = parameter(4, 32, 24, transpose=transposed)
            if layout.get("has_bias"):
                setattr(self, f"{up_name}_bias", parameter(4, width))
                self.down_proj_bias = parameter(4, 32)
            if layout.get("has_post_expert_norm"):
                self.post_expert_norm = torch.nn.RMSNorm(32, eps=1e-6)
            self.act_fn, self.limit, self.alpha = ACT2FN[config.hidden_act], config.limit, 1.3

        def forward(self, hidden_states, top_k_index, top_k_weights):
            output = torch.zeros_like(hidden_states)
            up_bias, down_bias = (getattr(self, f"{name}_bias", None) for name in (up_name, "down_proj"))
            for expert in range(self.num_experts):
                tokens, slots = torch.where(top_k_index == expert)
                up, down = (getattr(self, name)[expert] for name in (up_name, "down_proj"))
                rows = hidden_states[tokens] @ (up if transposed else up.t())
                rows = rows if up_bias is None else rows + up_bias[expert]
                rows = (self._apply_gate(rows) if gated else self.act_fn(rows)) @ (down if transposed else down.t())
                rows = rows if down_bias is None else rows + down_bias[expert]
                rows = self.post_expert_norm(rows) if layout.get("has_post_expert_norm") else rows
                output = output.index_add(0, tokens, (rows * top_k_weights[tokens, slots, None]).to(output.dtype))
            return output

    for name, function in dict(body).items():
        setattr(Experts, name, function)
    return use_experts_implementation(**layout)(Experts)


def make_experts(body=(), hidden_act="silu", limit=0.5, **layout):
    config = types.SimpleNamespace(hidden_act=hidden_act, limit=limit, _experts_implementation="eager")
    return experts_class(body, **layout)(config)


def routed(num_tokens=20, top_k=2, num_experts=4, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(num_tokens, 32, generator=generator).to(device, dtype).requires_grad_()
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k].to(device)
    weights = torch.rand(num_tokens, top_k, generator=generator).to(device).requires_grad_()
    return x, ids, weights


def both(experts, inputs):
    """Outputs and all gradients of the experts' own forward, and of ours."""
    leaves = [x for x in (*inputs, *experts.parameters()) if x.requires_grad]
    found = []
    for implementation in ("eager", "moe_kernels"):
        experts.config._experts_implementation = implementation
        output = experts(*inputs)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    return found


def assert_same(experts, inputs, tolerance=2e-5):
    for expected, got in zip(*both(experts, inputs)):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= tolerance * expected.norm() + 1e-7


def assert_no_worse(experts, inputs):
    """Ours is as near to eager in fp32 as eager is in the dtype of the experts."""
    exact_inputs = [x.detach().float().requires_grad_() if x.requires_grad else x for x in inputs]
    exact, _ = both(copy.deepcopy(experts).float(), exact_inputs)
    for truth, eager, got in zip(exact, *both(experts, inputs)):
        assert got.dtype == eager.dtype
        assert (got.float() - truth).norm() <= 1.2 * (eager.float() - truth).norm() + 2e-3 * truth.norm()


def clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


def clamped_on_one_side(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit)
    return self.act_fn(gate) * up


def swapped(self, gate_up):
    up, gate = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def interleaved(self, gate_up):
    return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


def oai(self, gate_up):  # of openai_privacy_filter
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


def oai_interleaved(self, gate_up):  # of gpt_oss
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


def oai_swapped(self, gate_up):
    up, gate = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


def clamped_below(self, gate_up):  # as `clamped`, but for one keyword
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(min=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


OAI = {"activation": "swiglu_oai", "swiglu_limit": 0.5, "swiglu_alpha": 1.3}
GPT_OSS = {"is_concatenated": False, "is_transposed": True, "has_bias": True}


LAYOUTS = {
    "plain": ({}, "fused", {"activation": "swiglu"}),
    "bias": ({"has_bias": True}, "fused", {"activation": "swiglu"}),
    "swish": ({"hidden_act": "swish"}, "fused", {"activation": "swiglu"}),
    "gelu": ({"hidden_act": "gelu"}, "fused", {"activation": "geglu"}),
    "gelu_tanh": ({"hidden_act": "gelu_pytorch_tanh"}, "fused", {"activation": "geglu_tanh"}),
    "gelu_new": ({"hidden_act": "gelu_new"}, "fused", {"activation": "geglu_tanh"}),
    "relu": ({"hidden_act": "relu"}, "fused", {"activation": "reglu"}),
    "clamp": ({"body": {"_apply_gate": clamped}}, "fused", {"activation": "swiglu", "swiglu_limit": 0.5}),
    "clamped gelu": ({"body": {"_apply_gate": clamped}, "hidden_act": "gelu"}, "unfused", "a limit of 0.5 on geglu"),
    "another clamp": ({"body": {"_apply_gate": clamped_on_one_side}}, "unfused", "an _apply_gate of its own"),
    "a clamp from below": ({"body": {"_apply_gate": clamped_below}}, "unfused", "an _apply_gate of its own"),
    "swapped halves": ({"body": {"_apply_gate": swapped}}, "unfused", "an _apply_gate of its own"),
    "quick_gelu": ({"hidden_act": "quick_gelu"}, "unfused", "activation QuickGELUActivation"),
    "gated relu2": ({"hidden_act": "relu2"}, "unfused", "activation ReLUSquaredActivation"),
    "ungated silu": ({"has_gate": False}, "fused", {"activation": "silu"}),
    "ungated gelu": ({"has_gate": False, "hidden_act": "gelu"}, "fused", {"activation": "gelu"}),
    "ungated relu": ({"has_gate": False, "hidden_act": "relu", "has_bias": True}, "fused", {"activation": "relu"}),
    "ungated relu2": ({"has_gate": False, "hidden_act": "relu2"}, "fused", {"activation": "relu2"}),
    "ungated tanh": ({"has_gate": False, "hidden_act": "tanh"}, "unfused", "activation Tanh"),
    "transposed": ({"is_transposed": True, "has_bias": True}, "fused", {"activation": "swiglu", "is_transposed": True}),
    "transposed clamp": ({"body": {"_apply_gate": clamped}, "is_transposed": True}, "fused",
                         {"activation": "swiglu", "swiglu_limit": 0.5, "is_transposed": True}),
    "transposed gelu": ({"hidden_act": "gelu", "is_transposed": True}, "unfused", "transposed weights with geglu"),
    "oai": ({"body": {"_apply_gate": oai}}, "fused", OAI),
    "oai transposed": ({"body": {"_apply_gate": oai}, "is_transposed": True}, "fused", {**OAI, "is_transposed": True}),
    "oai interleaved": ({"body": {"_apply_gate": oai_interleaved}, **GPT_OSS}, "fused",
                        {**OAI, "is_transposed": True, "is_concatenated": False}),
    "oai interleaved rows": ({"body": {"_apply_gate": oai_interleaved}, "is_concatenated": False}, "unfused",
                             "interleaved gate and up in rows"),
    "oai swapped": ({"body": {"_apply_gate": oai_swapped}, **GPT_OSS}, "unfused", "an _apply_gate of its own"),
    "oai in the wrong layout": ({"body": {"_apply_gate": oai_interleaved}}, "unfused", "an _apply_gate of its own"),
    "interleaved": ({"is_concatenated": False, "body": {"_apply_gate": interleaved}}, "unfused",
                    "an _apply_gate of its own, interleaved gate and up in rows"),
    "norm": ({"has_post_expert_norm": True}, "unfused", "a norm after each expert"),
    "ungated transposed": ({"has_gate": False, "is_transposed": True, "has_bias": True}, "unfused",
                           "transposed weights with silu"),
}


@pytest.mark.parametrize("device, dtype", DEVICES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_activation(name, device, dtype):
    options, route, detail = LAYOUTS[name]
    experts = make_experts(**options).to(device, dtype)
    assert mk.hf.plan_of(experts) == (route, detail)
    inputs = routed(device=device, dtype=dtype)
    if dtype == torch.float32:
        assert_same(experts, inputs)
    else:
        assert_no_worse(experts, inputs)


def test_an_activation_set_on_the_object_is_its_own():
    experts = make_experts()
    experts._apply_gate = types.MethodType(swapped, experts)
    assert mk.hf.plan_of(experts) == ("unfused", "an _apply_gate of its own")
    assert_same(experts, routed())


def test_a_subclass_of_a_known_activation_is_unknown():
    class Shifted(type(ACT2FN["silu"])):
        def forward(self, x):
            return F.silu(x + 1)

    experts = make_experts()
    experts.act_fn = Shifted()
    assert mk.hf.plan_of(experts) == ("unfused", "activation Shifted")
    assert_same(experts, routed())
    experts.act_fn = torch.nn.GELU(approximate="tanh")
    assert mk.hf.plan_of(experts) == ("fused", {"activation": "geglu_tanh"})
    assert_same(experts, routed())


def test_the_same_code_on_another_global_is_unknown():
    """`F.silu` in the form with swiglu_limit must be torch's."""
    known = backend._clamped_silu
    other = types.FunctionType(known.__code__, {**known.__globals__, "F": types.SimpleNamespace(silu=torch.tanh)})
    assert backend._form_of_function(known) is known and backend._form_of_function(other) is None


def test_a_limit_that_changes_is_read_at_each_call():
    experts = make_experts({"_apply_gate": clamped})
    assert_same(experts, routed())
    experts.limit = 0.1
    assert mk.hf.plan_of(experts)[1]["swiglu_limit"] == 0.1
    assert_same(experts, routed())
    experts.limit = -1.0  # clamps to something else than a limit above 0 does
    assert mk.hf.plan_of(experts) == ("unfused", "a limit of -1.0 on swiglu")
    experts = make_experts({"_apply_gate": oai})
    experts.alpha = torch.tensor(1.3)
    assert mk.hf.plan_of(experts) == ("unfused", "an alpha of 1.2999999523162842 on swiglu_oai")


@pytest.mark.parametrize("layout", [{}, {"is_transposed": True, "has_bias": True}, {"has_post_expert_norm": True},
                                    {"body": {"_apply_gate": oai_interleaved}, **GPT_OSS}])
def test_sentinels_contribute_nothing(layout):
    """The id E of expert parallelism, with a weight that is not 0: nothing comes out, and no gradient goes in."""
    experts = make_experts(**layout)
    experts.config._experts_implementation = "moe_kernels"
    experts._is_expert_parallel = True
    x, ids, weights = routed()
    ids[:5] = 4
    ids[5:10, 1] = 4
    output = experts(x, ids, weights)
    grad_x, grad_weights = torch.autograd.grad(output.sum(), (x, weights))
    assert (output[:5] == 0).all() and (grad_x[:5] == 0).all() and (grad_weights[ids == 4] == 0).all()
    zeroed = torch.where(ids == 4, 0, weights)
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(output, experts(x, ids, zeroed), rtol=1e-5, atol=1e-5)
    assert output[5:10].abs().max() > 0.01 and torch.isfinite(grad_x).all()


@pytest.mark.parametrize("layout", [{}, {"is_transposed": True}])
def test_mixed_dtypes_and_no_tokens(layout):
    experts = make_experts(**layout).to(torch.bfloat16)
    experts.config._experts_implementation = "moe_kernels"
    x, ids, weights = routed()
    output = experts(x, ids, weights.to(torch.bfloat16))  # fp32 hidden states before bf16 weights, as under autocast
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, experts(x.bfloat16(), ids, weights.bfloat16().float()).float())
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, 32)
    wide = make_experts(**layout).double()
    assert_same(wide, (x.double(), ids, weights.double()), 1e-12)


@pytest.mark.parametrize("layout", [{}, {"is_transposed": True}])
def test_autocast(layout):
    experts = make_experts(**layout)
    inputs = routed()
    outputs = []
    for implementation in ("eager", "moe_kernels"):
        experts.config._experts_implementation = implementation
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(experts(*inputs))
    assert outputs[1].dtype == torch.float32
    with torch.no_grad():
        experts.config._experts_implementation = "eager"
        exact = experts(*inputs)
    errors = [(output - exact).norm() / exact.norm() for output in outputs]
    assert 1e-4 < errors[1] < 1.5 * errors[0]  # it did run in bf16


@pytest.mark.parametrize("layout", [{}, {"is_transposed": True, "has_bias": True},
                                    {"body": {"_apply_gate": oai_interleaved}, **GPT_OSS}])
def test_compiles_without_a_break(layout):
    experts = make_experts(**layout)
    experts.config._experts_implementation = "moe_kernels"
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (7, 20):
        inputs = routed(num_tokens)
        torch.testing.assert_close(compiled(*inputs), experts(*inputs))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_dtensor_weights(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    experts = make_experts()
    inputs = routed()
    expected = both(experts, inputs)[1]
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        output = experts(*inputs)
        grads = torch.autograd.grad(output.square().sum(), [inputs[0], inputs[2], *experts.parameters()])
        assert all(isinstance(grad, DTensor) for grad in grads[2:])
        for got, wanted in zip((output, *grads), expected):
            torch.testing.assert_close(got.full_tensor() if isinstance(got, DTensor) else got, wanted)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ memory


class Operators(TorchDispatchMode):
    """Notes the addresses that reach our operators, and every other operator that makes a tensor of a given size."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.addresses, self.copies = sizes, set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace.startswith("moe_kernels"):
            self.addresses |= {x.data_ptr() for x in args if isinstance(x, torch.Tensor) and x.numel()}
        else:
            inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            self.copies += [str(function) for x in (result if isinstance(result, (tuple, list)) else (result,))
                            if isinstance(x, torch.Tensor) and x.numel() in self.sizes
                            and x.untyped_storage().data_ptr() not in inputs]
        return result


@pytest.mark.parametrize("device, dtype", DEVICES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("name", ["plain", "ungated relu2", "transposed", "oai interleaved", "interleaved", "norm"])
def test_weights_are_not_copied(name, device, dtype):
    experts = make_experts(**LAYOUTS[name][0]).to(device, dtype)
    experts.config._experts_implementation = "moe_kernels"
    weights = [x for x in experts.parameters() if x.dim() == 3]
    x, ids, topk_weights = routed(device=device, dtype=dtype)
    with Operators({x.numel() for x in weights}) as seen:
        output = experts(x, ids, topk_weights)
        torch.autograd.grad(output.sum(), x, retain_graph=True)  # gradients of weights have their size, and are no copy
    assert {x.data_ptr() for x in weights} <= seen.addresses and seen.copies == []


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_generate_gives_the_tokens_of_eager(family):
    model, ids = tiny.build(family), tiny.token_ids(count=5)
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = model.generate(ids, **options)
    assert len(set(expected[:, 5:].flatten().tolist())) > 3
    model.set_experts_implementation("moe_kernels")
    assert torch.equal(model.generate(ids, **options), expected)
    if family in mk.hf.replace.FAMILIES:
        mk.replace_moe_layers(model)
        assert torch.equal(model.generate(ids, **options), expected)


def test_it_can_be_asked_for_when_a_model_is_loaded(tmp_path):
    model = tiny.build("mixtral")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_kernels").eval()
    ids = tiny.token_ids()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert loaded.config._experts_implementation == "moe_kernels" and "moe_kernels" in ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("change", [
    lambda act_fn: setattr(act_fn, "forward", lambda x: F.silu(x + 1)),
    lambda act_fn: act_fn.register_forward_hook(lambda module, args, output: 2 * output),
    lambda act_fn: act_fn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))],
    ids=["forward", "hook", "pre"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_an_activation_that_was_changed_runs_as_changed(change, has_gate):
    experts = make_experts(has_gate=has_gate)
    assert mk.hf.plan_of(experts)[0] == "fused"
    change(experts.act_fn)
    assert mk.hf.plan_of(experts) == ("unfused", f"activation {type(experts.act_fn).__name__}")
    assert_same(experts, routed())


# --------------------------------------------------------------------------------------------------------------- errors


def test_weights_in_fp8_name_themselves_and_what_to_use():
    experts = make_experts().to(torch.float8_e4m3fn)
    experts.config._experts_implementation = "moe_kernels"
    with pytest.raises(TypeError, match="'moe_kernels' wants weights of dtype .* got float8_e4m3fn: 'eager' may"):
        experts(*routed())


def test_bad_weights_name_themselves():
    experts = make_experts()
    experts.config._experts_implementation = "moe_kernels"
    x, ids, weights = routed()
    with pytest.raises(ValueError, match=r"topk_weights wants shape \[T=20, K=2\], got \[20, 1\]"):
        experts(x, ids, weights[:, :1])
    with pytest.raises(TypeError, match="topk_ids wants dtype int32, int64, got float32"):
        experts(x, ids.float(), weights)
