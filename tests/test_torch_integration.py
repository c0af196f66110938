"""The layer under torch's own machinery: compile, autocast, activation checkpointing, export, copies, state dicts.

In each the loads are counted once, and outputs and gradients are those of a plain call.
"""

import copy
import functools
import io
import pickle
import shutil

import pytest
import torch
from cases import DEVICES, HALVES, assert_same_bits, backend_id
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import moe_kernels as mk

H, E, K = 32, 8, 3


def make_layer(device="cpu", dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"num_shared_experts": 1, "sequence_balance_alpha": 0.01, **options}
    return mk.MoE(H, 24, E, K, **options, device=device, dtype=dtype)


def tokens(count, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, H, generator=generator).to(device, dtype).requires_grad_()


def train_step(layer, call, x):
    """(output, every gradient, loads) of one step; the loads are set to 0 before it."""
    layer.tokens_per_expert.zero_()
    out = call(x)
    loss = out.float().square().sum()
    if layer.sequence_balance_loss is not None:
        loss = loss + layer.sequence_balance_loss
    grads = torch.autograd.grad(loss, [x, *layer.parameters()])
    return (out.detach(), *grads, layer.tokens_per_expert.clone())


def assert_close_steps(first, second, rtol=1e-5):
    assert torch.equal(first[-1], second[-1]) and first[-1].sum() == first[0].shape[0] * K
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# compile -------------------------------------------------------------------------------------------------------------


# inductor compiles C++ on a CPU, which takes long: once, left to itself, when it makes a graph of either kind
@pytest.mark.parametrize("dynamic, backend, device", [
    (dynamic, backend, device) for device in DEVICES for backend in ("aot_eager", "inductor")
    for dynamic in (True, None) if backend == "aot_eager" or shutil.which("g++") and not (device == "cpu" and dynamic)])
def test_compile_makes_one_graph_for_all_token_counts(dynamic, backend, device):
    """Left to itself torch compiles for the first count, then once for any; told that it is dynamic, once."""
    torch._dynamo.reset()
    counters.clear()
    layer = make_layer(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    for count in (5, 9, 33, 70, 128):
        x = tokens(count, device)
        assert_close_steps(train_step(layer, compiled, x), train_step(layer, layer, x))
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_functions_make_one_graph(device):
    torch._dynamo.reset()
    counters.clear()
    experts = make_layer(device).experts

    def call(x, weights, ids):
        return mk.fused_experts(x, experts.gate_up_proj, experts.down_proj, weights, ids)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 9, 33):
        x, weights = tokens(count, device), torch.rand(count, K, device=device)
        ids = torch.randint(E, (count, K), device=device)
        results = []
        for function in (call, compiled):
            out = function(x, weights, ids)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), [x, experts.down_proj])))
        assert_same_bits(*results)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("training", [True, False])
def test_compiled_layer_for_inference_and_under_autocast(training):
    torch._dynamo.reset()
    layer = make_layer().train(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 12):
        x = tokens(count)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(compiled(x), layer(x))
        with torch.inference_mode():
            assert_same_bits(compiled(x), layer(x))
    assert layer.tokens_per_expert.sum() == (training * 4 * (4 + 12) * K)


# autocast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hashed", [False, True], ids=["top_k", "hash"])
@pytest.mark.parametrize("to", HALVES, ids=backend_id)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=backend_id)
def test_autocast_gives_the_dtype_of_a_linear(dtype, to, hashed, device):
    """From any dtype of layer and input; the result is the one without autocast, up to rounding."""
    options = {"vocab_size": 50} if hashed else {"bias": False}
    layer, linear = make_layer(device, dtype, **options), nn.Linear(H, H, device=device, dtype=dtype)
    x, ids = tokens(40, device, dtype), (torch.arange(40, device=device),) if hashed else ()
    steps = []
    for enabled in (False, True):
        with torch.autocast(device, to, enabled=enabled):
            steps.append(train_step(layer, lambda x: layer(x, *ids), x))
            assert steps[-1][0].dtype == linear(x).dtype == (to if enabled else dtype)
    for wanted, got in zip(*steps):
        assert got.dtype == wanted.dtype or got is steps[1][0]
        assert (got.float() - wanted.float()).norm() < 0.03 * wanted.float().norm()
    assert steps[1][-1].sum() == 40 * K


def test_autocast_leaves_fp64_as_a_linear_does():
    layer, linear, x = make_layer(dtype=torch.float64), nn.Linear(H, H, dtype=torch.float64), tokens(9).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype == torch.float64


# activation checkpointing --------------------------------------------------------------------------------------------


def save_experts(context, operator, *args, **kwargs):
    """Selective checkpointing: the expensive operator is kept, the cheap ones are computed again."""
    keep = operator is torch.ops.moe_kernels.fused_experts.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "non_reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False,
                  "context_fn": functools.partial(create_selective_checkpoint_contexts, save_experts)},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alpha", [0.0, 0.01])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointing(kind, alpha, device):
    layer, x = make_layer(device, sequence_balance_alpha=alpha), tokens(24, device)
    expected = train_step(layer, layer, x)

    def step():
        layer.tokens_per_expert.zero_()
        layer.zero_grad()
        x.grad = None
        out = checkpoint(layer, x, **CHECKPOINTS[kind])
        (out.square().sum() + (layer.sequence_balance_loss if alpha else 0)).backward()
        return out.detach(), x.grad, *(p.grad for p in layer.parameters()), layer.tokens_per_expert.clone()

    if alpha and kind == "reentrant":
        with pytest.raises(RuntimeError, match="sequence_balance_loss got no gradient.*use_reentrant=False"):
            step()
    else:
        assert_close_steps(step(), expected)


@pytest.mark.parametrize("outside", ["checkpoint", "compile"])
def test_checkpointing_and_compile(outside):
    torch._dynamo.reset()
    layer, x = make_layer(sequence_balance_alpha=0.0), tokens(24)
    expected = train_step(layer, layer, x)
    options = {"fullgraph": True, "backend": "aot_eager"}
    if outside == "compile":
        call = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), **options)
    else:
        call = functools.partial(checkpoint, torch.compile(layer, **options), use_reentrant=False)
    assert_close_steps(train_step(layer, call, x), expected)


# export, copies, files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hashed", [False, True], ids=["top_k", "hash"])
def test_export_with_any_number_of_tokens(hashed, training):
    """The exported program goes through a file, serves other token counts, and counts the loads where it trains."""
    layer = make_layer(**({"vocab_size": 50} if hashed else {})).train(training)

    def inputs(count):
        return (tokens(count).detach(), *([torch.arange(count) % 50] if hashed else []))

    count = torch.export.Dim("num_tokens")
    program = torch.export.export(layer, inputs(20), dynamic_shapes=[{0: count}] * (1 + hashed))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    layer.tokens_per_expert.zero_()
    for size in (20, 7, 300):
        assert_same_bits(loaded(*inputs(size)).detach(), layer(*inputs(size)).detach())
    names = {str(node.target) for node in program.graph.nodes}
    assert {"moe_kernels.gate.default", "moe_kernels.fused_experts.default"} <= names
    buffer = dict(loaded.named_buffers())["tokens_per_expert"]
    assert buffer.sum() == (327 * K if training else 0) and torch.equal(buffer, layer.tokens_per_expert)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: torch.load(_file_of(layer), weights_only=False),
}


def _file_of(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("hashed", [False, True], ids=["top_k", "hash"])
def test_copies_of_a_layer_in_the_middle_of_training(hashed, name):
    """A copy holds the loads, not the loss of the graph that made them, and shares nothing with the original."""
    layer, ids = make_layer(expert_bias=True, **({"vocab_size": 50} if hashed else {})), torch.arange(9)
    inputs = (tokens(9), ids) if hashed else (tokens(9),)
    layer(*inputs)
    assert layer.sequence_balance_loss.requires_grad
    twin = COPIES[name](layer)
    assert twin.sequence_balance_loss is None and layer.sequence_balance_loss is not None
    assert torch.equal(twin.tokens_per_expert, layer.tokens_per_expert)
    assert_same_bits(twin(*inputs).detach(), layer(*inputs).detach())
    before = copy.deepcopy(twin.state_dict())
    (layer(*inputs).sum() + layer.sequence_balance_loss).backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    mk.balance.update_biases(layer)
    assert all(torch.equal(value, before[key]) for key, value in twin.state_dict().items())
    assert twin.tokens_per_expert.any() and not layer.tokens_per_expert.any()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    """Through a file, without pickled code; what is counted is no state; a layer on meta takes it by assignment."""
    layer = make_layer(expert_bias=True)
    layer(tokens(9))
    mk.balance.update_biases(layer)
    state = torch.load(_file_of(layer.state_dict()), weights_only=True)
    assert sorted(state) == [
        "experts.down_proj", "experts.down_proj_bias", "experts.gate_up_proj", "experts.gate_up_proj_bias",
        "gate.e_score_correction_bias", "gate.weight", "shared_experts.down_proj.weight",
        "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"]
    other = make_layer("meta" if assign else "cpu", expert_bias=True)
    assert str(other.load_state_dict(state, strict=True, assign=assign)) == "<All keys matched successfully>"
    assert_same_bits(other.eval()(tokens(9)).detach(), layer.eval()(tokens(9)).detach())
    assert layer.gate.e_score_correction_bias.any()


# functorch -----------------------------------------------------------------------------------------------------------


def test_tensor_that_outlived_a_transform_counts_as_what_it_wraps():
    """As in every autograd.Function, although fused_experts calls past the wrapper that unwraps it."""
    escaped = []

    def leak(x):
        escaped.append(x)
        return x.sum()

    x, gate_up, down = torch.randn(4, 16), torch.randn(4, 16, 16, requires_grad=True), torch.randn(4, 16, 8)
    routing = torch.rand(4, 2), torch.randint(4, (4, 2), dtype=torch.int32)
    torch.func.grad(leak)(x)
    results = []
    for hidden in (x, escaped[0]):
        out = mk.fused_experts(hidden, gate_up, down, *routing)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), gate_up)))
    assert_same_bits(*results)
