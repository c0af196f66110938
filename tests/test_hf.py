"""Our backend for transformers beyond the families: choice of route, sentinels, memory, generation, replacement."""

import copy
import inspect
import io
import pickle
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import hf_families as tiny
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation  # noqa: E402

import moe_kernels as mk  # noqa: E402
from moe_kernels.hf import backend, families, replace  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "hugging_face.md").read_text()
DEVICES = [("cpu", torch.float32)] + ([("cuda", torch.bfloat16)] if torch.cuda.is_available() else [])
REPLACED = [name for name in tiny.FAMILIES if name in mk.hf.replace.FAMILIES]


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
            self.act_fn, self.limit = ACT2FN[config.hidden_act], config.limit

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
    "swapped halves": ({"body": {"_apply_gate": swapped}}, "unfused", "an _apply_gate of its own"),
    "quick_gelu": ({"hidden_act": "quick_gelu"}, "unfused", "activation QuickGELUActivation"),
    "gated relu2": ({"hidden_act": "relu2"}, "unfused", "activation ReLUSquaredActivation"),
    "ungated silu": ({"has_gate": False}, "fused", {"activation": "silu"}),
    "ungated gelu": ({"has_gate": False, "hidden_act": "gelu"}, "fused", {"activation": "gelu"}),
    "ungated relu": ({"has_gate": False, "hidden_act": "relu", "has_bias": True}, "fused", {"activation": "relu"}),
    "ungated relu2": ({"has_gate": False, "hidden_act": "relu2"}, "fused", {"activation": "relu2"}),
    "ungated tanh": ({"has_gate": False, "hidden_act": "tanh"}, "unfused", "activation Tanh"),
    "transposed": ({"is_transposed": True, "has_bias": True}, "unfused", "transposed weights"),
    "interleaved": ({"is_concatenated": False, "body": {"_apply_gate": interleaved}}, "unfused",
                    "interleaved gate and up, an _apply_gate of its own"),
    "norm": ({"has_post_expert_norm": True}, "unfused", "a norm after each expert"),
    "ungated transposed": ({"has_gate": False, "is_transposed": True, "has_bias": True}, "unfused",
                           "transposed weights"),
}


@pytest.mark.parametrize("device, dtype", DEVICES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_activation(name, device, dtype):
    options, route, detail = LAYOUTS[name]
    experts = make_experts(**options).to(device, dtype)
    assert mk.hf.plan_of(experts) == (route, detail)
    assert_same(experts, routed(device=device, dtype=dtype), 2e-5 if dtype == torch.float32 else 2e-2)


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


@pytest.mark.parametrize("layout", [{}, {"is_transposed": True, "has_bias": True}, {"has_post_expert_norm": True}])
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


@pytest.mark.parametrize("layout", [{}, {"is_transposed": True, "has_bias": True}])
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
@pytest.mark.parametrize("name", ["plain", "ungated relu2", "transposed", "interleaved", "norm"])
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
    if family in REPLACED:
        mk.replace_moe_layers(model)
        assert torch.equal(model.generate(ids, **options), expected)


def test_it_can_be_asked_for_when_a_model_is_loaded(tmp_path):
    model = tiny.build("mixtral")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_kernels").eval()
    ids = tiny.token_ids()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert loaded.config._experts_implementation == "moe_kernels" and "moe_kernels" in ALL_EXPERTS_FUNCTIONS


# --------------------------------------------------------------------------------------------------------- replacement

VARIANTS = {name: (name, {}) for name in REPLACED} | {
    "deepseek_v2 groups": ("deepseek_v2", dict(topk_method="group_limited_greedy")),
    "deepseek_v3 as it is": ("deepseek_v3", dict(norm_topk_prob=False, routed_scaling_factor=1.7)),
    "deepseek_v4 sigmoid": ("deepseek_v4", dict(scoring_func="sigmoid", routed_scaling_factor=1.3)),
    "qwen3_moe as it is": ("qwen3_moe", dict(norm_topk_prob=False)),
    "olmoe renormalised": ("olmoe", dict(norm_topk_prob=True)),
}


def test_all_nine_families_are_replaced_in_the_tests():
    assert sorted(REPLACED) == sorted(replace.FAMILIES)


def router_logits_of(model, ids):
    """What the model collects; () in an older transformers, where some families collect none."""
    return getattr(model(ids, output_router_logits=True, use_cache=False), "router_logits", None) or ()


@pytest.mark.parametrize("variant", VARIANTS)
def test_replaced_layers_compute_the_same(variant):
    family, settings = VARIANTS[variant]
    model, ids = tiny.build(family, **settings), tiny.token_ids()
    reference = tiny.results_of(model, ids)
    logits = router_logits_of(model, ids)
    state = {name: x.data_ptr() for name, x in model.state_dict().items()}
    report = mk.replace_moe_layers(model)
    experts, routers = tiny.experts_of(model), [x for x in model.modules() if isinstance(x, replace._OurRouter)]
    assert len(report.replaced) == len(experts) + len(routers) and len(experts) == len(routers) > 0
    errors = tiny.relative_errors(tiny.results_of(model, ids), reference)
    assert {name: error for name, error in errors.items() if not error < 5e-5} == {}
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == state
    ours = router_logits_of(model, ids)
    assert len(ours) == len(logits)
    for mine, theirs in zip(ours, logits):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", REPLACED)
def test_bf16_routers_return_what_theirs_return(family):
    """Dtypes, and values to the rounding of bf16, where no two experts are so near that it decides."""
    model = tiny.build(family)
    router = next(x for x in model.modules() if replace._kind_of(x) and "Hash" not in type(x).__name__)
    router.to(torch.bfloat16)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    expected = router(x)
    mk.replace_moe_layers(model)
    got = router(x)
    assert [x.dtype for x in got] == [x.dtype for x in expected] and torch.equal(got[0], expected[0])
    dense = [replace._dense(weights.float(), ids, 8) for _, weights, ids in (got, expected)]
    same = ((dense[0] > 0) == (dense[1] > 0)).all(dim=1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(dense[0][same], dense[1][same], rtol=2e-2, atol=2e-3)


def test_operators_are_called(monkeypatch):
    """Not the model's own loop: both stages pass through our functions."""
    model = tiny.build("qwen3_moe")
    calls = []
    for name in ("gate", "fused_experts"):
        function = getattr(mk.ops, name)
        monkeypatch.setattr(mk.ops, name, lambda *a, _f=function, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
    model(tiny.token_ids())
    assert calls == []
    mk.replace_moe_layers(model)
    calls.clear()
    model(tiny.token_ids())
    assert calls == ["gate", "fused_experts"] * 2
    model.set_experts_implementation("grouped_mm")  # the replacement stays until it is undone
    model(tiny.token_ids())
    assert len(calls) == 8
    mk.restore_moe_layers(model)
    model(tiny.token_ids())
    assert len(calls) == 8


def test_restore_gives_every_class_back():
    model = tiny.build("qwen2_moe")
    classes = {name: type(module) for name, module in model.named_modules()}
    report = mk.replace_moe_layers(model)
    assert all(isinstance(module, classes[name]) for name, module in model.named_modules())
    again = mk.replace_moe_layers(model)
    assert again.replaced == [] and [why for name, why in again.left if "shared" not in name] == ["replaced before"] * 4
    assert sorted(mk.restore_moe_layers(model)) == sorted(name for name, _ in report.replaced)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert mk.restore_moe_layers(model) == []


def test_report_names_what_was_left():
    report = mk.replace_moe_layers(tiny.build("deepseek_v4"))
    assert str(report).splitlines() == [
        "replaced 1 x model.layers.*.mlp.gate: DeepseekV4HashRouter, moe_kernels.gate",
        "replaced 2 x model.layers.*.mlp.experts: DeepseekV4Experts, fused (swiglu, 1.0)",
        "replaced 1 x model.layers.*.mlp.gate: DeepseekV4TopKRouter, moe_kernels.gate",
        "left 2 x model.layers.*.mlp.shared_experts: DeepseekV4MLP, dense"]
    assert str(mk.hf.Report([], [])) == "no MoE layers"


def test_a_router_that_computes_something_else_is_left(monkeypatch):
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    own = OlmoeTopKRouter.forward

    def forward(self, hidden_states):
        logits, weights, ids = own(self, hidden_states)
        return logits, weights.square(), ids

    monkeypatch.setattr(OlmoeTopKRouter, "forward", forward)
    model = tiny.build("olmoe")
    expected = model(tiny.token_ids()).logits
    report = mk.replace_moe_layers(model)
    assert [why for _, why in report.left] == [
        "OlmoeTopKRouter, its router computes something else than moe_kernels.gate"] * 2
    assert len(report.replaced) == 2
    torch.testing.assert_close(model(tiny.token_ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_router_of_an_older_transformers_is_left(monkeypatch):
    """One without a setting that ours wants, and one that returns the logits alone."""
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

    own = Glm4MoeTopkRouter.forward
    model, ids = tiny.build("glm4_moe"), tiny.token_ids()
    expected, router = model(ids).logits, model.model.layers[1].mlp.gate
    groups = router.__dict__.pop("num_group")
    monkeypatch.setattr(Glm4MoeTopkRouter, "forward", lambda self, x: own(types.SimpleNamespace(
        **vars(self), **self._parameters, **self._buffers, num_group=groups), x))
    assert "a router of another make: 'Glm4MoeTopkRouter' object has no attribute 'num_group'" in str(
        mk.replace_moe_layers(model))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    mk.restore_moe_layers(model)
    router.num_group = groups
    monkeypatch.setattr(Glm4MoeTopkRouter, "forward", lambda self, x: own(self, x)[0])
    assert "values to unpack" in str(mk.replace_moe_layers(model))


def test_routers_that_the_gate_does_not_serve_are_left():
    model = tiny.build("deepseek_v4", scoring_func="tanh")
    assert "scores by Tanh, which moe_kernels.gate does not have" in str(mk.replace_moe_layers(model))
    with torch.device("meta"):
        config = transformers.Qwen3MoeConfig(**tiny.settings_of("qwen3_moe", num_experts=2048, num_local_experts=2048))
        large = transformers.AutoModelForCausalLM.from_config(config)
    assert "2048 experts, 2 a token, and moe_kernels.gate serves 1024 and 32" in str(mk.replace_moe_layers(large))
    set_on_object = tiny.build("mixtral")
    gate = set_on_object.model.layers[0].mlp.gate
    gate.forward = gate.forward
    assert "left 1 x model.layers.*.mlp.gate: MixtralTopKRouter, whose forward was set on the object" in str(
        mk.replace_moe_layers(set_on_object))
    quantized = tiny.build("mixtral")
    quantized.model.layers[1].mlp.experts.to(torch.float8_e4m3fn)
    assert "left 1 x model.layers.*.mlp.experts: MixtralExperts, with weights of float8_e4m3fn" in str(
        mk.replace_moe_layers(quantized))


def test_copies_and_pickles_of_replaced_layers():
    model, ids = tiny.build("deepseek_v4"), tiny.token_ids()
    mk.replace_moe_layers(model)
    expected = model(ids, use_cache=False).logits
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(ids, use_cache=False).logits, expected, rtol=0, atol=0)
    assert len(mk.restore_moe_layers(copied)) == len(mk.restore_moe_layers(model)) == 4
    mk.replace_moe_layers(model)
    block = model.model.layers[1].mlp
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(6))
    for loaded in (pickle.loads(pickle.dumps(block)), saved_and_loaded(block)):
        assert isinstance(loaded.gate, replace._OurRouter) and isinstance(loaded.experts, replace._OurExperts)
        assert torch.equal(loaded(x), block(x))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_replaced_model_under_fsdp(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, ids = tiny.build("qwen3_moe"), tiny.token_ids()
    expected = tiny.results_of(model, ids)
    mk.replace_moe_layers(model)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer.mlp.experts, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        output = model(ids, use_cache=False).logits
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        ((output * weights).sum() / output.shape[-1]).backward()
        results = {"output": output.detach(),
                   **{name: x.grad.full_tensor() for name, x in model.named_parameters() if x.grad is not None}}
        assert max(tiny.relative_errors(results, expected).values()) < 5e-5
        with pytest.raises(ValueError, match="got model.layers.0.mlp.experts of class FSDPQwen3MoeExpertsOnMoeKernels"):
            mk.restore_moe_layers(model)
    finally:
        dist.destroy_process_group()


def test_replaced_model_compiles_and_trains():
    model, ids = tiny.build("glm4_moe"), tiny.token_ids()
    mk.replace_moe_layers(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        losses.append(model(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("family, instead", [("dots1", "set_experts_implementation('moe_kernels')"),
                                             ("llama", "moe_kernels.MoE builds such layers")])
def test_an_unknown_family_names_itself_and_what_to_use(family, instead):
    config = transformers.AutoConfig.for_model(family, **{**tiny.COMMON, **tiny.GROUPS})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"deepseek_v2.*got {type(model).__name__} \(model_type {family}\)") as error:
        mk.replace_moe_layers(model)
    assert instead in str(error.value)


@pytest.mark.parametrize("call", [mk.hf.register, lambda: mk.replace_moe_layers(torch.nn.Linear(1, 1)), families.table])
def test_transformers_missing_or_too_old(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match=f"wants transformers 5.7 or newer, got {transformers.__version__}") as error:
        call()
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="wants transformers 5.7 or newer, which is not installed") as error:
        call()
    assert "\n" not in str(error.value)


def test_an_interface_without_foreign_backends_is_too_old(monkeypatch):
    from transformers.integrations import moe

    monkeypatch.setattr(moe, "use_experts_implementation", lambda experts_class=None, *, is_transposed=False: None)
    with pytest.raises(ImportError, match=f"got {transformers.__version__}, whose models take no other experts: pip"):
        mk.hf.register()


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, moe_kernels, moe_kernels.hf; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_bad_weights_name_themselves():
    experts = make_experts()
    experts.config._experts_implementation = "moe_kernels"
    x, ids, weights = routed()
    with pytest.raises(ValueError, match=r"topk_weights wants shape \[T=20, K=2\], got \[20, 1\]"):
        experts(x, ids, weights[:, :1])
    with pytest.raises(TypeError, match="topk_ids wants dtype int32, int64, got float32"):
        experts(x, ids.float(), weights)


# ----------------------------------------------------------------------------------------------------------------- docs


def test_the_table_of_families_is_current():
    written = re.search(r"<!-- families:begin -->\n(.*?)\n<!-- families:end -->", PAGE, re.DOTALL).group(1)
    version = re.match(r"transformers (\S+):", written).group(1)
    if version != transformers.__version__:
        pytest.skip(f"the table was made with transformers {version}, this is {transformers.__version__}")
    assert families.table() == written, "run python -m moe_kernels.hf and put its table into docs/hugging_face.md"


def test_the_module_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr(families, "table", lambda: "the table")
    runpy.run_module("moe_kernels.hf", run_name="__main__")
    assert capsys.readouterr().out == "the table\n"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="^moe_kernels.hf wants transformers 5.7 or newer, which is not installed"):
        runpy.run_module("moe_kernels.hf", run_name="__main__")


def test_the_table_agrees_with_the_models():
    rows = {row.family: row for row in families.rows()}
    served = {family: row for family, row in rows.items() if "interface" not in row.detail}
    assert len(served) >= 20
    for model_type, (_, route) in tiny.FAMILIES.items():
        row = served.get(model_type.removesuffix("_text"))
        assert row is None or row.route == route, model_type


BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SCRIPTS = [code for language, code in BLOCKS if language == "python"]


@pytest.mark.parametrize("index", range(len(SCRIPTS)))
def test_scripts_of_the_page(index, capsys):
    exec(compile(SCRIPTS[index], "docs/hugging_face.md", "exec"), {})
    printed = capsys.readouterr().out
    assert index == 0 or sorted(printed.splitlines()) == sorted(
        next(code for language, code in BLOCKS if language == "text").splitlines())
