"""Expert parallelism as torch has its other kinds: a style for `parallelize_module`.

    parallelize_module(layer, mesh["ep"], ExpertParallel())

P ranks, E experts in all, E/P on each rank. T tokens of this rank, H hidden size, K experts a token, S = T*K rows, R
rows that reach this rank's experts. A forward of `Experts`, on every rank at once:

    hidden_states [T, H], topk_ids [T, K]
      1. plan, permute: this rank's rows in the order of all E experts, so those of one owner lie together   [S, H]
      2. dispatch:      the number of rows of each expert, then the rows themselves, by all-to-all           [R, H]
      3. experts:       this rank's own E/P experts, one a row
      4. return:        the results, by the opposite all-to-all                                              [S, H]
      5. combine:       each token's weighted sum, in slot order                                             [T, H]

So the sum is the one of a single rank, in its order. The sizes of the all-to-alls are read on the host: one wait a
forward. The same code serves every backend of torch.distributed that has all-to-all: NCCL, gloo.
"""

import torch
from torch import nn

from . import checks, ops
from .layer import Experts, MoE

if not torch.distributed.is_available():
    raise ImportError("moe_kernels.parallel wants a torch that was built with torch.distributed")

from torch.distributed import _functional_collectives as collectives  # noqa: E402
from torch.distributed.tensor import DTensor, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ParallelStyle  # noqa: E402


class ExpertParallel(ParallelStyle):
    """Spreads the experts of a layer over a mesh of one dimension, equally many on each rank.

    Afterwards every parameter of the `Experts` is a DTensor, sharded on dim 0 (experts), and a forward takes this
    rank's own tokens, as many as there are, none too. Every rank of the mesh must call the layer equally often. A
    parameter's gradient is the sum over the tokens of all ranks of the mesh. Router and shared experts stay as they
    are: their gradients are those of this rank's tokens, for `fully_shard` or DDP to reduce.

    Apply it before `fully_shard`, which then shards each rank's experts further over its own mesh.

    Takes: `Experts`, or `MoE`, whose `experts` are spread. `parallelize_module` passes the module and the mesh.
    Raises: TypeError on another module; ValueError on a mesh of several dimensions, a number of experts that it does
        not divide, or parameters that are distributed already.
    """

    def _apply(self, module, device_mesh):
        experts = module.experts if isinstance(module, MoE) else module
        if not isinstance(experts, Experts):
            raise TypeError(f"ExpertParallel wants moe_kernels.MoE or moe_kernels.Experts, got {type(module).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f'ExpertParallel wants a mesh of one dimension, such as mesh["ep"], got {device_mesh}')
        if experts.num_experts % device_mesh.size() != 0:
            raise ValueError(f"ExpertParallel wants a number of experts that is a multiple of the mesh's "
                             f"{device_mesh.size()} ranks, got {experts.num_experts}")
        parameters = dict(experts.named_parameters(recurse=False))
        distributed = [name for name, parameter in parameters.items() if isinstance(parameter, DTensor)]
        if distributed:
            raise ValueError(f"ExpertParallel wants parameters that are not distributed yet (it comes before "
                             f"fully_shard, and once), got DTensors: {', '.join(distributed)}")
        for name, parameter in parameters.items():
            sharded = distribute_tensor(parameter, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
            experts.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        experts.__class__ = DistributedExperts
        return module


class DistributedExperts(Experts):
    """What `ExpertParallel` makes of `Experts`: the same module, whose parameters are shards.

    gate_up_proj [E, 2I, H], down_proj [E, H, I] and the biases are DTensors that hold E/P experts on each rank.
    grad_buffers: as in `Experts`, in the shapes of the shards.
    """

    def forward(self, hidden_states, topk_weights, topk_ids, return_plan=False):
        """[T, H], [T, K] fp32, [T, K] -> [T, H]; the `Plan` of return_plan: this rank's tokens, over all E experts."""
        (hidden_states,) = ops._autocast(hidden_states)
        plan = ops.make_plan(topk_ids, self.num_experts)
        rows = ops.permute(hidden_states, plan)
        group = self.down_proj.device_mesh.get_group()
        counts, sent, received = _exchange_counts(plan, group)
        unsent = rows.shape[0] - sum(sent)  # of no expert (sentinels): combine reads none of them
        if unsent:
            rows = rows[:-unsent]
        rows = _all_to_all(rows, received, sent, group)
        rows = _all_to_all(self._compute(rows, counts), sent, received, group)
        if unsent:
            rows = nn.functional.pad(rows, (0, 0, 0, unsent))
        output = ops.unpermute(rows, plan, topk_weights)
        return (output, plan) if return_plan else output

    def _compute(self, rows, counts):
        """Each row through its expert: [R, H] to [R, H]; counts: [P, E/P], the rows of each expert by sending rank."""
        num_ranks, num_local = counts.shape
        experts = torch.arange(num_local, dtype=torch.int32, device=rows.device).repeat(num_ranks)
        topk_ids = experts.repeat_interleave(counts.flatten(), output_size=rows.shape[0]).unsqueeze(1)
        ones = torch.ones_like(topk_ids, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)
        gate_up_proj, down_proj, gate_up_bias, down_bias = (
            None if p is None else p.to_local() for p in (self.gate_up_proj, self.down_proj, self.gate_up_proj_bias,
                                                          self.down_proj_bias))
        if self.grad_buffers is not None:
            checks.check_grad_buffers(self.grad_buffers, gate_up_proj, down_proj)
            gate_up_proj, down_proj = map(_leaf_where_buffered, (gate_up_proj, down_proj), self.grad_buffers)
        return ops.fused_experts(rows, gate_up_proj, down_proj, ones, topk_ids, self.activation, self.swiglu_limit,
                                 gate_up_bias, down_bias, self.grad_buffers)


def _leaf_where_buffered(weight, buffer):
    """The weight, cut off from its parameter where its gradient goes to a buffer.

    Torch 2.11 would otherwise make zeros of the gradient that the parameter does not get.
    """
    return weight if buffer is None else weight.detach().requires_grad_(weight.requires_grad)


def _exchange_counts(plan, group):
    """How many rows go where: counts [P, E/P] on the device, rows sent to and received from each rank as lists.

    counts[p, e] is the number of rows that rank p sends to this rank's e-th expert.
    """
    num_ranks = group.size()
    sending = plan.expert_offsets.diff()
    counts = collectives.wait_tensor(collectives.all_to_all_single(sending, None, None, group))
    per_rank = torch.stack((sending, counts)).view(2, num_ranks, -1).sum(dim=-1)
    sent, received = per_rank.tolist()
    return counts.view(num_ranks, -1), sent, received


def _all_to_all(rows, output_sizes, input_sizes, group):
    """Rows exchanged between the ranks, in the order of the ranks; the gradient goes back the same way."""
    out = collectives.all_to_all_single_autograd(rows, output_sizes, input_sizes, group)
    return collectives.wait_tensor(out)
