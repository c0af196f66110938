"""replace_moe_layers and restore_moe_layers: our routers and experts in a model of transformers, and the way back."""

import copy
import io
import pickle
import types

import hf_families as tiny
import pytest
import torch

transformers = pytest.importorskip("transformers")

import moe_kernels as mk  # noqa: E402
from moe_kernels.hf import replace  # noqa: E402

REPLACED = [name for name in tiny.FAMILIES if name in mk.hf.replace.FAMILIES]

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


@pytest.mark.parametrize("function", [mk.replace_moe_layers, mk.restore_moe_layers])
@pytest.mark.parametrize("model, got", [(3, "int"), (None, "NoneType"), (torch.nn.Linear, "type")])
def test_what_is_no_module_is_refused(function, model, got):
    with pytest.raises(TypeError, match=f"model wants a torch.nn.Module, got {got}"):
        function(model)


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
        "replaced 2 x model.layers.*.mlp.experts: DeepseekV4Experts, fused (swiglu, limit 1)",
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
