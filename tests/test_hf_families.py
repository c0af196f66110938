"""Every family of transformers that our backend serves: logits and all gradients beside the model's own "eager"."""

import math

import hf_families as tiny
import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

import moe_kernels as mk  # noqa: E402

KNOWN = [name for name in tiny.FAMILIES if name in CONFIG_MAPPING]  # an older transformers has fewer
HALF_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(autouse=True)
def _registered():
    mk.hf.register()


def build(family):
    """The tiny model; skips where this transformers does not reach its experts by the interface."""
    model = tiny.build(family)
    if not tiny.experts_of(model):
        assert family in tiny.LATER
        pytest.skip(f"transformers {transformers.__version__} has the experts of {family} in a loop of their own")
    return model


def test_enough_families_are_tried():
    assert len(KNOWN) >= 20 and {"deepseek_v3", "deepseek_v4", "gpt_oss", "qwen3_moe", "mixtral", "olmoe", "glm4_moe",
                                 "nemotron_h", "aria_text", "phimoe"} <= set(KNOWN)


@pytest.mark.parametrize("family", KNOWN)
def test_logits_and_gradients_are_those_of_eager(family):
    model, ids = build(family), tiny.token_ids()
    experts = tiny.experts_of(model)
    assert {mk.hf.plan_of(module)[0] for module in experts} == {tiny.FAMILIES[family][1]}
    reference = tiny.results_of(model, ids)
    named = [name for name in reference if ".experts." in name]
    assert all(reference[name].abs().max() > 1e-4 for name in named) and len(named) >= 2  # the experts matter
    model.set_experts_implementation("moe_kernels")
    errors = tiny.relative_errors(tiny.results_of(model, ids), reference)
    assert {name: error for name, error in errors.items() if not error < 5e-5} == {}


@pytest.mark.parametrize("device", HALF_DEVICES)
@pytest.mark.parametrize("family", KNOWN)
def test_bf16_is_as_near_to_fp32_as_eager(family, device):
    """The fp32 model with the same weights is the reference, and gives the routing."""
    model, ids = tiny.to_bf16(build(family)).float(), tiny.token_ids()
    with tiny.recorded_routing(model) as routing:
        reference = tiny.results_of(model, ids)
    with tiny.fixed_routing(model, routing):
        reference = tiny.results_of(model, ids)  # without gradients through the routing weights
    model, ids = tiny.to_bf16(model.to(device)), ids.to(device)
    errors = {}
    for implementation in ("eager", "moe_kernels"):
        model.set_experts_implementation(implementation)
        with tiny.fixed_routing(model, routing):
            try:
                errors[implementation] = tiny.relative_errors(tiny.results_of(model, ids), reference)
            except RuntimeError as error:
                if implementation == "eager" and "same dtype" in str(error):
                    pytest.skip(f"transformers {transformers.__version__} does not run {family} in bf16")
                raise
    ours, theirs = errors["moe_kernels"], errors["eager"]
    large = [name for name, x in reference.items() if x.numel() >= 16]  # the error of a few numbers is mostly chance
    assert {name: (ours[name], theirs[name]) for name in large if not ours[name] < 3 * theirs[name] + 5e-3} == {}
    ratios = [math.log((ours[name] + 1e-4) / (theirs[name] + 1e-4)) for name in large]
    assert math.exp(sum(ratios) / len(ratios)) < 1.15
