"""Expert parallelism and FSDP on ranks, each equal to one rank that has all experts and all tokens.

Gloo ranks on the CPU; NCCL too where there are two GPUs. What a rank makes is on its default device.

A spawn costs seconds, so each has several checks; a failed one shows its rank's traceback.
"""

import copy
import functools
import os

import pytest
import torch
from torch import nn

import moe_kernels as mk

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.distributed.tensor.parallel import parallelize_module  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from moe_kernels.parallel import ExpertParallel  # noqa: E402

H, I, E, K = 16, 8, 8, 3
LOADS = [7, 0, 13, 1]  # tokens of each rank


def make_layer(dtype=torch.float64, **options):
    """The same layer on every rank."""
    torch.manual_seed(0)
    layer = mk.MoE(H, I, E, K, num_shared_experts=1, expert_bias=True, dtype=dtype, **options)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def tokens(rank, num_tokens=None, dtype=torch.float64):
    """What rank works on: every rank can make every other's."""
    shape = (LOADS[rank] if num_tokens is None else num_tokens, H)
    return draw(torch.randn, shape, 100 + rank, dtype=dtype).requires_grad_()


def draw(function, shape, seed, **options):
    """Random numbers, the same on every rank and device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return function(size=shape, generator=generator, device="cpu", **options).to(torch.get_default_device())


def device_type():
    return torch.get_default_device().type


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(out, ref, rtol=1e-10):
    torch.testing.assert_close(full(out), ref, rtol=rtol, atol=rtol)


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def reference_gradients(layer, inputs):
    """The layer's gradients summed over several ranks' tokens, by a copy on one rank."""
    layer = copy.deepcopy(layer)
    for x in inputs:
        layer(x.detach()).square().sum().backward()
    return gradients(layer)


# checks that run on every rank --------------------------------------------------------------------------------------


def check_layer(rank, size, mesh):
    """Output, load counts and every gradient of a MoE, with uneven loads and a rank without tokens."""
    layer, parallel = make_layer(), make_layer()
    assert parallelize_module(parallel, mesh["ep"], ExpertParallel()) is parallel
    assert parallel.experts.down_proj.to_local().shape == (E // size, H, I)
    assert parallel.experts.gate_up_proj_bias.to_local().shape == (E // size, 2 * I)
    for name, value in parallel.state_dict().items():
        assert torch.equal(full(value), layer.state_dict()[name])
    x, x_ref = tokens(rank), tokens(rank)
    out, ref = parallel(x), layer(x_ref)
    close(out, ref)
    assert torch.equal(parallel.tokens_per_expert, layer.tokens_per_expert)
    out.square().sum().backward()
    ref.square().sum().backward()
    close(x.grad, x_ref.grad)
    everyone = reference_gradients(make_layer(), [tokens(r) for r in range(size)])
    for name, grad in gradients(parallel).items():
        close(grad, everyone[name] if "experts." in name and "shared" not in name else gradients(layer)[name])
    with torch.no_grad():
        close(parallel(x), ref)


def check_experts(rank, size, mesh):
    """Sentinels, all rows on one expert, no rows at all, int64 ids; the gradient of the routing weights."""
    experts, parallel = make_layer(torch.float32).experts, make_layer(torch.float32).experts
    parallelize_module(parallel, mesh["ep"], ExpertParallel())
    ids = draw(functools.partial(torch.randint, E), (9, K), rank)
    ids[0], ids[1, 1], ids[2, 0] = -1, E, 2**40
    weights = draw(torch.rand, (9, K), 10 + rank) + 0.1
    one_expert = torch.full_like(ids, E - 1)
    for chosen in (ids, one_expert, torch.full_like(ids, -1), ids[:rank], ids.int()):
        results = []
        for module in (parallel, experts):
            module.zero_grad()
            x = tokens(rank, chosen.shape[0], torch.float32)
            w = weights[: chosen.shape[0]].clone().requires_grad_()
            out, plan = module(x, w, chosen, return_plan=True)
            out.square().sum().backward()
            results.append((out.detach(), x.grad, w.grad, *plan))
        for mine, other in zip(*results):
            close(mine, other, 1e-5)


def check_options(rank, size, mesh):
    """Activation checkpointing, autocast, copies and fp32 gradient buffers of the shards."""
    layer = make_layer(torch.float32)
    parallel = parallelize_module(make_layer(torch.float32), mesh["ep"], ExpertParallel())
    x = tokens(rank, 6, torch.float32)
    parallel(x).square().sum().backward()
    expected = {name: full(grad).clone() for name, grad in gradients(parallel).items()}
    for use_reentrant in (False, True):
        parallel.zero_grad()
        checkpoint(parallel, x, use_reentrant=use_reentrant).square().sum().backward()
        for name, grad in gradients(parallel).items():
            assert torch.equal(full(grad), expected[name])
    with torch.autocast("cpu", torch.bfloat16):
        out, ref = parallel(x), layer(x)
    assert out.dtype == ref.dtype == torch.bfloat16
    close(out.float(), ref.float(), 0.05)
    twin = copy.deepcopy(parallel)
    assert torch.equal(twin(x), parallel(x))
    weights = (parallel.experts.gate_up_proj, parallel.experts.down_proj)
    parallel.zero_grad()
    parallel.experts.grad_buffers = [torch.zeros_like(w.to_local(), requires_grad=False) for w in weights]
    for _ in range(2):
        parallel(x).square().sum().backward()
    twin.experts.grad_buffers = parallel.experts.grad_buffers[:1]
    with pytest.raises(TypeError, match="grad_buffers wants a pair"):
        twin(x)
    for name, buffer, weight in zip(("gate_up_proj", "down_proj"), parallel.experts.grad_buffers, weights):
        assert weight.grad is None
        first = rank * (E // size)
        close(buffer, 2 * expected[f"experts.{name}"][first : first + E // size], 1e-4)


def check_errors(rank, size, mesh):
    wide = init_device_mesh(device_type(), (1, size), mesh_dim_names=("dp", "ep"))
    for module, on, error, message in (
        (nn.Linear(2, 2), mesh, TypeError, "wants moe_kernels.MoE or moe_kernels.Experts, got Linear"),
        (make_layer(), wide, ValueError, "wants a mesh of one dimension"),
        (mk.Experts(size + 1, H, I), mesh, ValueError, f"multiple of the mesh's {size} ranks, got {size + 1}"),
        (parallelize_module(make_layer(), mesh, ExpertParallel()), mesh, ValueError, "not distributed yet.*down_proj"),
    ):
        with pytest.raises(error, match=message):
            ExpertParallel()._apply(module, on)


def check_fsdp(rank, size, mesh):
    """fully_shard of a whole layer, alone: the gradients are the mean over the ranks of one rank's."""
    layer = make_layer()
    fully_shard(layer, mesh=mesh["ep"])
    x = tokens(rank)
    layer(x).square().sum().backward()
    everyone = reference_gradients(make_layer(), [tokens(r) for r in range(size)])
    for name, grad in gradients(layer).items():
        close(grad, everyone[name] / size)
    balances_alike(layer, size)


def check_low_precision_and_ddp(rank, size, mesh):
    """A router under FSDP in bf16 computes in fp32; DDP without broadcast buffers keeps each rank's loads."""
    layer = make_layer(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(layer, mesh=mesh["ep"], mp_policy=policy)
    logits = []
    layer.gate.register_forward_hook(lambda module, inputs, outputs: logits.append((inputs[0].dtype, outputs[2].dtype)))
    out = layer(tokens(rank, 6, torch.float32))
    out.square().sum().backward()
    assert out.dtype == torch.bfloat16 and logits == [(torch.bfloat16, torch.float32)]
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in gradients(layer).values())
    layer = make_layer()
    model = nn.parallel.DistributedDataParallel(layer, broadcast_buffers=False)
    for _ in range(2):
        model(tokens(rank)).square().sum().backward()
    everyone = reference_gradients(make_layer(), [tokens(r) for r in range(size)])
    for name, grad in gradients(layer).items():
        close(grad, 2 * everyone[name] / size)
    assert layer.tokens_per_expert.sum() == 2 * LOADS[rank] * K
    balances_alike(layer, size)


def check_compile(rank, size, mesh):
    """Compiled piecewise: the sizes of the all-to-alls are read on the host."""
    layer = parallelize_module(make_layer(), mesh["ep"], ExpertParallel())
    compiled = torch.compile(layer, dynamic=True, backend="aot_eager")
    for count in (7, 12):
        x, x_ref = tokens(rank, count + rank), tokens(rank, count + rank)
        out, ref = compiled(x), layer(x_ref)
        close(out, ref)
        close(torch.autograd.grad(out.square().sum(), x)[0], torch.autograd.grad(ref.square().sum(), x_ref)[0])


def check_two_dimensions(rank, size, mesh):
    """Experts spread over "ep" and sharded over "dp", all else sharded over all ranks: gradients and steps of SGD."""
    for data_parallel in {1, size // 2, size}:
        both = init_device_mesh(device_type(), (data_parallel, size // data_parallel), mesh_dim_names=("dp", "ep"))
        layer, reference = make_layer(), make_layer()
        parallelize_module(layer, both["ep"], ExpertParallel())
        for module, over in ((layer.experts, both["dp"]), (layer, mesh)):
            fully_shard(module, mesh=over)
            module.set_gradient_divide_factor(1.0)  # sums, as those over "ep" are
            module.set_force_sum_reduction_for_comms(True)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (layer, reference)]
        for _ in range(2):
            x, x_ref = tokens(rank), tokens(rank)
            out, ref = layer(x), reference(x_ref)
            close(out, ref)
            out.square().sum().backward()
            everyone = reference_gradients(reference, [tokens(r) for r in range(size)])
            close(x.grad, torch.autograd.grad(ref.square().sum(), x_ref)[0])
            for name, parameter in reference.named_parameters():
                parameter.grad = everyone[name]
                close(gradients(layer)[name], parameter.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for name, value in layer.state_dict().items():
            close(value, reference.state_dict()[name])


def balances_alike(layer, size):
    """The biases move by the loads of all ranks, the same on each."""
    mk.balance.update_biases(layer, step=0.1)
    reference = make_layer()
    for rank in range(size):
        reference(tokens(rank))
    load = reference.tokens_per_expert
    assert torch.equal(layer.gate.e_score_correction_bias, 0.1 * torch.sign(load.sum() - E * load).float())
    assert not layer.tokens_per_expert.any()


def check_kernels(rank, size, mesh):
    """In bf16, which the CUDA kernels serve where they are: as one rank, up to the order of a few roundings."""
    layer = make_layer(torch.bfloat16)
    parallel = parallelize_module(make_layer(torch.bfloat16), mesh["ep"], ExpertParallel())
    steps = []
    for module in (layer, parallel):
        x = tokens(rank, 40 + rank, torch.bfloat16)
        out = module(x)
        steps.append((out, torch.autograd.grad(out.float().square().sum(), x)[0]))
    for ref, got in zip(*steps):
        assert got.dtype == torch.bfloat16 and (got - ref).norm() < 0.01 * ref.norm()


def on_a_rank(rank, size, path, backend, checks):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=size)
    mesh = init_device_mesh(device_type(), (size,), mesh_dim_names=("ep",))
    for check in checks:
        check(rank, size, mesh)
    dist.barrier()
    dist.destroy_process_group()


def spawn(size, path, *checks, backend="gloo"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(on_a_rank, args=(size, path / "store", backend, checks), nprocs=size)


def test_two_ranks(tmp_path):
    spawn(2, tmp_path, check_layer, check_experts, check_options, check_errors, check_fsdp,
          check_low_precision_and_ddp, check_compile, check_two_dimensions)


def test_four_ranks(tmp_path):
    spawn(4, tmp_path, check_layer, check_experts, check_kernels, check_two_dimensions)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
def test_two_gpus(tmp_path):
    spawn(2, tmp_path, check_layer, check_experts, check_kernels, check_fsdp, check_two_dimensions, backend="nccl")
