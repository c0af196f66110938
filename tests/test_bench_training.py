"""The benchmark of training: a run from end to end, Hugging Face's experts against ours, the curves, the profile."""

import json
import subprocess
import sys

import pytest
import torch
from test_bench import DEVICES, ROOT
from test_bench_results import results_content

from bench import report, results_file, step_profile, training
from bench.__main__ import main
from moe_kernels import MoE
from moe_kernels.model import ModelConfig

OURS, THEIRS = training.OURS, training.THEIRS


@pytest.mark.parametrize("device", DEVICES)
def test_training_from_end_to_end(device, tmp_path, capsys):
    pytest.importorskip("transformers")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    places = ["--results", str(results), "--readme-file", str(readme)]
    assert main(["--device", device, "--quick", "--training", "--steps", "12", "--save", *places]) == 0
    printed = capsys.readouterr().out
    (_, content), = results_file.read_all(results)
    result = content["training"]
    assert content["results"] == [] and result["steps"] == 12 and result["active_parameters"] == 642112
    mode = "graph" if device == "cuda" else "cpu"
    for name in (OURS, THEIRS):
        found = result["implementations"][name]
        assert found["mode"] == mode and [len(curve) for curve in found["losses"]] == [12, 12]
        assert found["tokens_per_s"] == pytest.approx(64e3 / found["ms"], rel=1e-3, abs=0.5)  # a whole number
        rate = found["tokens_per_s"] * result["operations_a_token"] / 1e12
        # the limit is rounded to four places, of which a CPU's has few
        limit = content["limits"]["dense_tflop_per_s"]
        assert found["share"] == pytest.approx(rate / limit, rel=0.05 + 5e-5 / limit, abs=1e-4)
        assert (found["peak_mb"] is None) == (device == "cpu")
        assert all(curve[-1] < curve[0] for curve in found["losses"])
    ours, theirs = (result["implementations"][name] for name in (OURS, THEIRS))
    assert ours["losses"] != theirs["losses"]  # other kernels, other rounding
    assert result["times_as_fast"] == pytest.approx(theirs["ms"] / ours["ms"], rel=1e-3)
    assert result["curves"]["agree"] is True
    assert result["profile"]["groups"]["moe_kernels"] > 0 and len(result["profile"]["kernels"]) > 5
    assert "they agree within their noise" in printed
    assert f"| moe_kernels | {ours['ms']:.1f} | {ours['tokens_per_s']} |" in readme.read_text()
    assert main(["--check", *places]) == 0


def test_training_stays_in_the_results_of_later_runs(tmp_path):
    content = {**results_content([]), "training": {"steps": 3}}
    assert results_file.merge(content, {**results_content([]), "training": None})["training"] == {"steps": 3}


def test_a_curve_is_one_line_of_the_results(tmp_path):
    content = {**results_content([]), "training": {"losses": [[1.25, -2.5e-05], [3.0, 4]], "names": ["a", "b"]}}
    results_file.write(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content and "3.0, 4" in text and '"a", "b"' not in text


@pytest.mark.parametrize("arguments, message", [
    (["--steps", "9"], "--steps is an option of --training"), (["--batch-size", "9"], "--batch-size is an option of"),
    (["--training", "--steps", "7"], "--steps wants at least 8, got 7"),
    (["--training", "--seeds", "0"], "--seeds wants at least 1, got 0"),
    (["--training", "--dtype", "fp16"], "--training wants --dtype bf16, got fp16")])
def test_wrong_options_are_one_line(arguments, message, capsys):
    pytest.importorskip("transformers")
    assert main(["--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def two_layers(device):
    """An MoE layer with our experts and one with theirs, on the same parameters, and tokens for them."""
    torch.manual_seed(0)
    ours = MoE(64, 32, 8, 4, num_shared_experts=1, device=device)
    theirs = MoE(64, 32, 8, 4, num_shared_experts=1, device=device)
    theirs.load_state_dict(ours.state_dict())
    training.replace_experts(theirs)
    return ours, theirs, torch.randn(2, 24, 64, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_their_experts_give_our_results(device, autocast):
    pytest.importorskip("transformers")
    ours, theirs, x = two_layers(device)
    assert list(ours.state_dict()) == list(theirs.state_dict())  # no weights of their own
    tolerance = 0.02 if autocast else 1e-5
    for layer in (ours, theirs):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            layer.result = layer(x)
        layer.result.square().mean().backward()
    assert ours.result.dtype == theirs.result.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)
    pairs = [(ours.result, theirs.result)] + [
        (one.grad, other.grad) for one, other in zip(ours.parameters(), theirs.parameters())]
    for one, other in pairs:
        assert one.dtype == other.dtype and (one - other).norm() < tolerance * one.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_their_forward_runs_without_deterministic_algorithms_and_leaves_them_on(device):
    pytest.importorskip("transformers")
    layer, x = two_layers(device)[1:]
    seen = []
    experts = training.peers.hugging_face_experts(8, 64, 32, 4, "grouped_mm")
    experts.register_forward_pre_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    layer.experts._theirs[4] = experts
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        layer(x)
        assert seen == [False]
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_operations_of_a_token():
    config = ModelConfig(hidden_size=8, num_layers=2, num_heads=3, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5)
    active = training.count_parameters(config)[1]
    # two products of forward and four of backward, each 2 operations an element of 3 heads of 6 and 5: 9 tokens seen
    # by 17 on average
    assert training.operations_a_token(config, 17) == 6 * active + 2 * 3 * 3 * 2 * (6 + 5) * 9


def test_curves():
    flat = [[9.0] * 6 + [1.0, 2.0], [0.0] * 6 + [1.5, 1.5]]
    near = [[5.0] * 6 + [1.1, 1.9], [5.0] * 6 + [1.6, 1.6]]
    found = training.compare_curves(flat, near)  # only the last two of eight steps count
    assert found == {"between_implementations": 0.1, "between_seeds": 0.45, "difference": -0.05, "agree": True}
    far = [[value + 1 for value in curve] for curve in near]
    assert training.compare_curves(flat, far)["agree"] is False
    alone = training.compare_curves(flat[:1], near[:1])
    assert alone["between_implementations"] == 0.1 and alone["between_seeds"] is alone["agree"] is None
    assert "differ by 0.1000 nats in the mean." in report._curve_words(alone)
    assert "they differ by more than their noise" in report._curve_words(training.compare_curves(flat, far))


def test_order_of_the_runs():
    assert training._order(2) == [(0, OURS), (0, THEIRS), (1, THEIRS), (1, OURS)]
    assert training._order(1) == [(0, THEIRS), (0, OURS)]


def test_every_seed_and_implementation_has_the_same_data():
    pytest.importorskip("transformers")
    text = torch.arange(10_000).remainder(251).to(torch.uint8)
    trainers = [training.TimedTrainer(training.make_options(True, 8, seed), "cpu", (text, text), name)
                for seed in (0, 1) for name in (OURS, THEIRS)]
    batches = [trainer.blocks.batch(4) for trainer in trainers]
    assert all(torch.equal(batch, batches[0]) for batch in batches)
    weights = [trainer.model.lm_head.weight for trainer in trainers]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name, group", [
    ("void moe::sm90::m_grouped_kernel<moe::sm90::Tile>(Params)", "moe_kernels"),
    ("void moe::(anonymous namespace)::combine_kernel<__nv_bfloat16>(moe::CombineParams)", "moe_kernels"),
    ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "dense products"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(Params)", "dense products"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
     "FusedAdamMathFunctor<float, 4>>", "optimizer"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float>>",
     "clipping"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIterator&)>",
     "casts and copies"),
    ("Memcpy HtoD (Pageable -> Device)", "casts and copies"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel(at::TensorIteratorBase&)>", "other"),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "other")])
def test_group_of_a_kernel(name, group):
    assert step_profile.group_of(name) == group


def test_table_of_a_profile():
    kernels = [(f"kernel {i}", float(i), 2) for i in range(30)] + [("moe::gate_kernel", 100.0, 1)]
    found = step_profile.table(kernels)
    assert found["groups"]["moe_kernels"] == 100.0 and found["groups"]["other"] == sum(range(30))
    assert [kernel["ms"] for kernel in found["kernels"]] == [100.0, *map(float, range(29, 10, -1))]
    assert "| moe_kernels | 100.00 | 0.19 |" in report._profile_table(found) and report._profile_table(None) == []


def test_a_profiler_that_fails_costs_the_table_alone(monkeypatch, capsys):
    def fail(step, device):
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(training, "profile_step", fail)
    text = torch.arange(10_000).remainder(251).to(torch.uint8)
    found = training.run_once(training.make_options(True, 8), torch.device("cpu"), (text, text), OURS, profiled=True)
    assert found["profile"] is None and len(found["losses"]) == 8 and "no profiler here" in capsys.readouterr().err


def test_an_error_of_a_step_is_not_taken_for_a_failed_capture():
    step = training.CapturedIfPossible(lambda x: x.view(7), torch.device("cpu"), lambda: None)
    with pytest.raises(RuntimeError, match="invalid for input"):
        step(torch.ones(3))


FAILED_CAPTURE = """
import torch
from bench.training import CapturedIfPossible
weight, cleared, cuda = torch.ones(3, device="cuda", requires_grad=True), [], torch.device("cuda")
def function(x):
    loss = (weight * x).sum()
    loss.backward()
    return x * loss.item()  # waits for the GPU, which no capture survives
def clear():
    weight.grad = None
    cleared.append(1)
step = CapturedIfPossible(function, cuda, clear)
for value in range(1, 7):
    weight.grad = None
    assert step(torch.full((3,), float(value), device=cuda)).tolist() == [3.0 * value * value] * 3
    assert weight.grad.tolist() == [float(value)] * 3 and not step.keeps_gradients
torch.manual_seed(1)
assert cleared == [1] and torch.randn(4, device=cuda).isfinite().all()
"""


@pytest.mark.skipif(DEVICES == ["cpu"], reason="a step is a graph on a GPU alone")
def test_a_capture_that_fails_goes_on_without_a_graph():
    done = subprocess.run([sys.executable, "-c", FAILED_CAPTURE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "not captured" in done.stderr, done.stdout + done.stderr
