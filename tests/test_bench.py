"""The benchmark itself: its shapes, its arithmetic, that a wrong layer is noticed, and a run from end to end."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

from bench import cases, host_time, kernel_peers, memory, peers, report, results_file
from bench.__main__ import main
from bench.inputs import Inputs, layer_call, make_inputs, make_routing, make_weights
from bench.limits import Limits
from bench.measure import Options, floor_ms, layer_rows, touched_bytes
from bench.reference import WrongResult, check_layer, sampled_tokens
from bench.timing import MIN_ROUNDS, balanced_orders, measure
from moe_kernels import ops

ROOT = Path(__file__).resolve().parent.parent
KERNELS_RUN = torch.cuda.is_available() and ops.uses_kernels(torch.empty(0, dtype=torch.bfloat16, device="cuda"))
DEVICES = ["cpu"] + (["cuda"] if KERNELS_RUN else [])  # without the kernels a GPU is refused
QUICK = cases.QUICK_SHAPES[0]
BIND_OURS = peers.bind_ours
LIMITS = Limits(dense_tflop_per_s=700.0, copy_gb_per_s=3000.0, read_gb_per_s=3172.0, read_latency_us=9.6)


def quick_inputs(num_tokens=32, dtype=torch.float32, device="cpu"):
    return make_inputs(QUICK, num_tokens, make_weights(QUICK, dtype, torch.device(device)))


# ------------------------------------------------------------------------------------------------------------- cases


def test_passes_of_the_shapes():
    keys = cases.expected_keys()
    assert len(keys) == len(set(keys)) == 17 + 16 + 13  # forward, train, decode
    assert ("seed-1t-full", 4096, "train") not in keys and ("qwen3-30b", 128, "decode") in keys


def test_select():
    assert cases.select("qwen3-30b")[0][0].num_experts == 128 and cases.select("qwen3-30b")[1] == ()
    assert cases.select(quick=True) == (cases.QUICK_SHAPES, cases.QUICK_ROUTINGS)
    with pytest.raises(ValueError, match="mixtral.*got nothing-like-it"):
        cases.select("nothing-like-it")


def test_extra_cases():
    shape = cases.select("qwen3-30b")[0][0]
    assert shape.every_num_tokens() == [1, 16, 64, 128, 1024, 8192, 32768]
    assert shape.passes(64) == () and shape.extra_passes(64) == ("host",)
    assert shape.passes(8192) == ("forward", "train") and shape.extra_passes(8192) == ("stages", "skew")
    known = {(shape.name, num_tokens) for shape in cases.SHAPES + cases.QUICK_SHAPES for num_tokens in shape.num_tokens}
    assert cases.EXTRA_CASES["stages"] | cases.EXTRA_CASES["skew"] <= known


def test_all_tokens_on_the_same_experts():
    weights, ids = make_routing(100, 16, 4, torch.device("cpu"), "same")
    assert all(sorted(row) == [0, 1, 2, 3] for row in ids.tolist())
    assert ids.unique(dim=0).shape[0] > 4  # each in an order of its own
    torch.testing.assert_close(weights.sum(-1), torch.ones(100))


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_routing_is_distinct_and_weights_sum_to_one(routing):
    weights, ids = make_routing(500, 16, 4, torch.device("cpu"), routing)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert all(len(set(row)) == 4 and 0 <= min(row) and max(row) < 16 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(500))
    load = ids.flatten().bincount(minlength=16).float()
    assert (load.max() / load.mean() > 2) == (routing == "zipf")


# -------------------------------------------------------------------------------------------------- floors and timing


def test_floor_of_a_decode_is_the_cold_read_fit():
    mixtral = cases.select("mixtral")[0][0]
    inputs = make_fake_inputs(mixtral, 64)
    assert touched_bytes(mixtral, inputs) == 8 * 3 * 4096 * 14336 * 2
    assert floor_ms(mixtral, inputs, "decode", LIMITS, 0.0) == pytest.approx(0.0096 + 2.818572288 / 3.172, rel=1e-6)


def test_floor_of_training_is_three_passes_over_the_weights_or_the_dense_products():
    olmoe = cases.select("olmoe")[0][0]
    inputs = make_fake_inputs(olmoe, 4096)
    weights = 64 * 3 * 2048 * 1024 * 2
    assert floor_ms(olmoe, inputs, "train", LIMITS, 0.1) == pytest.approx(3 * weights / 3e9, rel=1e-6)
    assert floor_ms(olmoe, inputs, "forward", LIMITS, 0.1) == pytest.approx((weights + 4 * 4096 * 2048) / 3e9, rel=1e-6)
    assert floor_ms(olmoe, inputs, "forward", LIMITS, 9.0) == 9.0


def make_fake_inputs(shape, num_tokens):
    """Inputs whose big tensors are on the meta device; every expert is chosen."""
    with torch.device("meta"):
        hidden = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16)
        weight = torch.empty(1, 1, dtype=torch.bfloat16)
    ids = torch.arange(num_tokens * shape.top_k).remainder(shape.num_experts).view(num_tokens, shape.top_k)
    return Inputs(hidden, weight, weight, ids.float(), ids, hidden)


@pytest.mark.parametrize("device", DEVICES)
def test_measure_orders_a_slow_and_a_fast_function(device):
    a = torch.randn(512, 512, device=device)
    timings = measure({"slow": lambda: [a @ a for _ in range(20)], "fast": lambda: a + 1.0}, torch.device(device))
    assert timings["slow"].ms > timings["fast"].ms > 0
    assert {timing.mode for timing in timings.values()} == {"graph" if device == "cuda" else "cpu"}


@pytest.mark.parametrize("count", range(1, 8))
def test_every_function_runs_behind_every_other_equally_often(count):
    names = [f"impl{number}" for number in range(count)]
    orders = balanced_orders(names, MIN_ROUNDS)
    assert len(orders) >= MIN_ROUNDS and all(sorted(order) == names for order in orders)
    behind = Counter(pair for order in orders for pair in zip(order, order[1:]))
    assert len(behind) == count * (count - 1) and len(set(behind.values())) <= 1


@pytest.mark.parametrize("device", DEVICES)
def test_host_time_counts_operations(device):
    small = torch.zeros(64, device=device)
    times = host_time.host_times({"one": lambda: small * 2, "ten": lambda: [small * 2 for _ in range(10)]},
                                 torch.device(device), rounds=9)
    assert 0.2 < times["one"][1] < 5 < times["ten"][1] < 50 and times["ten"][0] > times["one"][0] > 0
    (ms, operations), = host_time.host_times({"ten": lambda: [small * 2 for _ in range(10)]}, torch.device(device),
                                             rounds=9, layers=8).values()
    assert 0.2 < operations / 10 * 8 < 5 and ms > 0


def test_layers_of_one_backward_have_gradients_of_their_own():
    inputs = make_inputs(QUICK, 32, make_weights(QUICK, torch.float32, torch.device("cpu")))
    grads = layer_call(peers.bind_ours, inputs, True, 3)()
    alone = layer_call(peers.bind_ours, inputs, True)()
    assert len(grads) == 12 and len(alone) == 4
    for i, grad in enumerate(grads):
        assert torch.equal(grad, alone[i % 4])


def test_memory_fields():
    inputs = make_fake_inputs(QUICK, 32)
    rows = 2 * 32 * QUICK.top_k * (QUICK.hidden_size + QUICK.intermediate_size)
    assert memory.rows_bytes(QUICK, inputs) == rows
    assert memory.fields(QUICK, inputs, None) == {"peak_extra_mb": None}
    assert memory.fields(QUICK, inputs, 3 * rows + inputs.hidden_states.nbytes)["extra_over_rows"] == 3
    train = memory.fields(QUICK, inputs, rows, 2_000_000, rows // 2)
    assert train["kept_mb"] == 2.0 and train["backward_extra_over_rows"] == 0.5 and "extra_over_rows" not in train


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU's memory is not counted")
def test_memory_of_calls():
    x = torch.zeros(1 << 20, device="cuda")
    device = x.device
    assert memory.call_memory(lambda: (x + 1).sum(), device) == pytest.approx(x.nbytes, rel=0.01)
    leaf = x.clone().requires_grad_()
    assert memory.kept_memory(lambda: (leaf.exp() * 2).sum(), device) == pytest.approx(x.nbytes, rel=0.01)
    inputs = Inputs(leaf, leaf.clone(), leaf.clone(), leaf.clone(), None, x)

    def layer():
        scratch = torch.utils.checkpoint.checkpoint(torch.exp, leaf, use_reentrant=False)
        return scratch + sum(other.exp() for other in inputs.leaves[1:])

    # computed again in the backward: a tensor beside the four gradients, while those of the sum are freed
    assert -4 * x.nbytes <= memory.backward_memory(layer, inputs, device) <= 1.01 * x.nbytes


def test_measure_leaves_out_a_peer_that_raises(capsys):
    def broken():
        raise RuntimeError("not here")

    timings = measure({"ours": lambda: None, "peer": broken}, torch.device("cpu"), budget_s=0.01)
    assert set(timings) == {"ours"} and "peer does not run: RuntimeError: not here" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        measure({"ours": broken, "peer": lambda: None}, torch.device("cpu"), budget_s=0.01)


# -------------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["moe_kernels", "hf_grouped_mm", "hf_eager", "torch_grouped_mm", "torch_loop"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_implementation_agrees_with_the_reference(device, name, train):
    ours = name == "moe_kernels"
    peer = peers.Peer(name, peers.bind_ours) if ours else peers.PEERS[name]
    if not peer.available():
        pytest.skip(f"{name} is not installed")
    inputs = quick_inputs(dtype=torch.bfloat16, device=device)
    error = check_layer(inputs if ours else peer.inputs(inputs), peer.bind, train)
    assert 0 < error < 0.02


KERNEL_PEERS = ("sonic_moe", "sonic_moe_interleaved", "triton_kernels", "vllm")


@pytest.mark.skipif(not KERNELS_RUN, reason="their kernels want a GPU")
@pytest.mark.parametrize("name, train", [(name, train) for name in KERNEL_PEERS for train in (False, True)
                                         if peers.PEERS[name].trains or not train])
def test_peers_with_kernels_of_their_own_agree_with_the_reference(name, train):
    peer = peers.PEERS[name]
    if not peer.available():
        pytest.skip(f"{name} is not installed")
    for num_experts, top_k in ((16, 4), (40, 3)):
        shape = cases.Shape("small", 256, 128, num_experts, top_k, (256,))
        inputs = make_inputs(shape, 256, make_weights(shape, torch.bfloat16, torch.device("cuda")))
        assert 0 < check_layer(peer.inputs(inputs), peer.bind, train) < 0.02


def test_peers_that_are_not_installed_are_not_chosen(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not any(peers.PEERS[name].available() for name in (*KERNEL_PEERS, "hf_grouped_mm"))
    assert peers.select(",".join((*KERNEL_PEERS, "torch_loop"))) == [peers.PEERS["torch_loop"]]
    assert not {peer.name for peer in peers.select("all")} & set(KERNEL_PEERS)


def test_peers_with_kernels_of_their_own_want_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not any(peers.PEERS[name].available() for name in KERNEL_PEERS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert all(peers.PEERS[name].available() for name in KERNEL_PEERS)


def test_routing_in_the_types_of_a_peers_router():
    inputs = quick_inputs(dtype=torch.bfloat16)
    for name, weights, ids in (("sonic_moe", torch.float32, torch.int32), ("hf_eager", torch.bfloat16, torch.int64),
                               ("triton_kernels", torch.float32, torch.int16)):
        its = peers.PEERS[name].inputs(inputs)
        assert (its.topk_weights.dtype, its.topk_ids.dtype) == (weights, ids)


def test_interleaved_weights():
    gate_up = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(kernel_peers.interleave(gate_up), gate_up[:, [0, 2, 1, 3]])


def test_a_peer_without_a_backward_is_not_measured_in_training():
    options = Options(torch.device("cpu"), torch.float32, "fp32", "uniform", LIMITS,
                      [peers.PEERS["torch_loop"]._replace(trains=False)], 0.01)
    inputs = quick_inputs()
    for pass_name, expected in (("forward", {"moe_kernels", "torch_loop"}), ("train", {"moe_kernels"})):
        assert {row["impl"] for row in layer_rows(QUICK, inputs, pass_name, options)} == expected


def test_a_peer_that_is_wrong_is_not_timed(capsys):
    options = Options(torch.device("cpu"), torch.float32, "fp32", "uniform", LIMITS,
                      [peers.Peer("wrong", swapped_halves)], 0.01)
    assert {row["impl"] for row in layer_rows(QUICK, quick_inputs(), "forward", options)} == {"moe_kernels"}
    assert "wrong is not measured: WrongResult" in capsys.readouterr().err


def test_reference_in_fp32_is_close():
    assert check_layer(quick_inputs(), peers.bind_ours, train=True) < 1e-5


def swapped_halves(inputs):
    layer_inputs = inputs._replace(gate_up_proj=inputs.gate_up_proj.flip(1))
    return BIND_OURS(layer_inputs)


def last_token_zero(inputs):
    layer = BIND_OURS(inputs)
    return lambda: torch.cat([layer()[:-1], torch.zeros_like(inputs.hidden_states[:1])])


def doubled_gradient(inputs):
    layer = BIND_OURS(inputs)
    return lambda: 2 * layer() - layer().detach()


@pytest.mark.parametrize("bind, train, what", [
    (swapped_halves, False, "output"), (last_token_zero, False, "output"), (doubled_gradient, True, "gradient")])
def test_a_wrong_layer_is_noticed(bind, train, what):
    with pytest.raises(WrongResult, match=what):
        check_layer(quick_inputs(), bind, train)


def test_sampled_tokens():
    assert sampled_tokens(1) == [0] and sampled_tokens(3) == [0, 1, 2]
    assert sampled_tokens(4096)[0] == 0 and sampled_tokens(4096)[-1] == 4095 and len(sampled_tokens(4096)) == 8


# ---------------------------------------------------------------------------------------------------- from end to end


@pytest.mark.parametrize("device", DEVICES)
def test_a_quick_run_from_end_to_end(device, tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    places = ["--results", str(results), "--readme-file", str(readme)]
    assert main(["--device", device, "--quick", "--save", "--tests", "5,0,1", *places]) == 0
    output = capsys.readouterr().out
    assert "Forward: " in output and "stage:up_proj" in output and "stage:gate+plan" in output
    (path, content), = results_file.read_all(results)
    ours = [row for row in content["results"] if row["impl"] == "moe_kernels"]
    assert {row["pass"] for row in ours} == {"forward", "train", "decode", *(f"stage:{stage}" for stage in (
        "gate", "plan", "gate+plan", "up_proj", "down_proj", "combine", "permute")),
        "skew:forward", "skew:train", "host:forward", "host:train", "host:train-8-layers", "host:train-one-thread"}
    assert content["tests"]["passed"] == 5 and all(row["ms"] > 0 for row in content["results"])
    alone = {row["pass"]: row["in_operations"] for row in content["results"] if row["impl"] == "one_operation"}
    assert set(alone) == {"host:train", "host:train-8-layers", "host:train-one-thread"} and min(alone.values()) > 1
    layers = [row for row in ours if ":" not in row["pass"]]
    assert all(0 < row["relative_error"] < 0.02 for row in layers)
    assert all(row["timing"] == ("graph" if device == "cuda" else "cpu") for row in ours
               if not row["pass"].startswith("host:"))
    assert all(("extra_over_rows" in row) == (device == "cuda" and row["pass"] != "train") for row in layers)
    assert all(("backward_extra_over_rows" in row) == (device == "cuda" and row["pass"] == "train") for row in layers)
    skewed = [row for row in ours if row["pass"].startswith("skew:")]
    assert [row["routing"] for row in skewed] == ["zipf", "same"] * 2 and all(row["over_uniform"] > 0 for row in skewed)
    text = readme.read_text()
    assert "Skewed routing" in text and "one forward and backward without a CUDA graph" in text
    if importlib.util.find_spec("matplotlib"):
        assert path.with_suffix(".png").stat().st_size > 1000
    assert main(["--check", *places]) == 0
    readme.write_text(readme.read_text().replace("quick", "edited"))
    assert main(["--check", *places]) == 1
    assert main(["--readme", "--tests", "6,0,0", *places]) == 0 and main(["--check", *places]) == 0
    assert "6 passed" in readme.read_text()


def test_a_failing_case_is_named_and_the_rest_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(peers, "bind_ours", swapped_halves)
    assert main(["--device", "cpu", "--shape", "quick", "--pass", "forward"]) == 1
    assert "FAILED quick 1024 forward: WrongResult" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--shape", "nothing"], "--shape wants one of"), (["--peers", "nothing"], "--peers wants auto"),
    (["--quick", "--save", "--device", "cpu"], "wants the real shapes")])
def test_wrong_options_are_one_line(arguments, message, capsys):
    assert main([*arguments]) == 2
    assert message in capsys.readouterr().err


def test_check_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from bench.__main__ import main; main(['--check'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pytest_benchmark_files_run():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, and this process is not one of its workers
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    on_the_cpu = {**inherited, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=on_the_cpu)
    assert done.returncode == 0 and "test_up_proj" in done.stdout, done.stdout + done.stderr
