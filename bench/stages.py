"""Each stage as a function of no arguments: ours, and the same in torch's own operators. Also the dense floors.

    gate -> plan -> up_proj -> down_proj -> combine; permute stands alone
"""

import torch
import torch.nn.functional as F

from .inputs import make_generator, normal

COPYING_STAGES = ("combine", "permute")  # they move S*H and T*H elements, and multiply nothing to speak of


def operators(tensor):
    """The operators that serve this tensor in `moe_kernels`: the kernels where they are built, torch's otherwise."""
    import moe_kernels

    kernels = tensor.device.type == "cpu" or moe_kernels.ops.uses_kernels(tensor)
    return torch.ops.moe_kernels if kernels else torch.ops.moe_kernels_composite


def torch_plan(ids, num_experts):
    """Sorted order of the slots and the end of each expert's rows, as torch users write it."""
    order = torch.argsort(ids.reshape(-1), stable=True)
    kind = torch.int32 if ids.is_cuda else torch.float32
    ends = torch.histc(ids.reshape(-1).to(kind), num_experts, 0, num_experts - 1).cumsum(0, dtype=torch.int32)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    return order, ends, position


def routing_stages(routing, device, copies=1):
    """stage -> (implementation -> function) for gate, plan and both, with fp32 logits, sigmoid scores and a bias.

    A function does its stage for `copies` inputs, one after the other.
    """
    import moe_kernels

    generator = make_generator(device, seed=3)
    all_logits = [normal((routing.num_tokens, routing.num_experts), 1.0, torch.float32, device, generator)
                  for _ in range(copies)]
    bias = normal((routing.num_experts,), 0.1, torch.float32, device, generator)
    top_k, num_experts = routing.top_k, routing.num_experts

    def gate(logits):
        return moe_kernels.gate(logits, top_k, "sigmoid", bias)

    def plan(ids):
        return moe_kernels.make_plan(ids, num_experts)

    def torch_gate(logits):
        scores = logits.sigmoid()
        ids = (scores + bias).topk(top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), ids

    def for_each(inputs, function):
        return lambda: [function(x) for x in inputs]

    all_ids = [gate(logits)[1] for logits in all_logits]
    return {
        "gate": {"moe_kernels": for_each(all_logits, gate), "torch": for_each(all_logits, torch_gate)},
        "plan": {"moe_kernels": for_each(all_ids, plan),
                 "torch": for_each(all_ids, lambda ids: torch_plan(ids, num_experts))},
        "gate+plan": {"moe_kernels": for_each(all_logits, lambda logits: plan(gate(logits)[1])),
                      "torch": for_each(all_logits, lambda logits: torch_plan(torch_gate(logits)[1], num_experts))},
    }


def expert_stages(inputs):
    """stage -> (implementation -> function) for up_proj, down_proj, combine and permute, on the inputs of a layer."""
    import moe_kernels

    hidden, gate_up, down, weights, ids = inputs[:5]
    num_experts, top_k = gate_up.shape[0], ids.shape[1]
    plan = moe_kernels.make_plan(ids, num_experts)
    order, ends, _ = torch_plan(ids, num_experts)
    slot_rows = plan.row_of_slot.long()

    def up_proj():
        return operators(hidden).up_proj(hidden, gate_up, None, plan.expert_offsets, plan.sorted_rows, top_k, "swiglu",
                                         None, 1.0, False, True, False)[0]

    def torch_up_proj():
        gate, up = F.grouped_mm(hidden[order // top_k], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return F.silu(gate) * up

    rows = up_proj()
    expert_rows = moe_kernels.grouped_mm(rows, down, plan.expert_offsets)
    return {
        "up_proj": {"moe_kernels": up_proj, "torch": torch_up_proj},
        "down_proj": {"moe_kernels": lambda: moe_kernels.grouped_mm(rows, down, plan.expert_offsets),
                      "torch": lambda: F.grouped_mm(rows, down.transpose(1, 2), offs=ends)},
        "combine": {"moe_kernels": lambda: moe_kernels.unpermute(expert_rows, plan, weights),
                    "torch": lambda: (expert_rows[slot_rows] * weights[..., None]).sum(1).to(hidden.dtype)},
        "permute": {"moe_kernels": lambda: moe_kernels.permute(hidden, plan), "torch": lambda: hidden[order // top_k]},
    }


def dense_products(inputs, parts):
    """A function that runs products of the layer's sizes as if there were one expert: what cuBLAS takes for them.

    parts: some of "up_proj", "down_proj" and, for training, "backward" (the four products of the two gradients).
    """
    hidden, gate_up, down, _, ids = inputs[:5]
    num_rows = ids.numel()
    generator = make_generator(hidden.device, seed=4)
    x, pre, act = (normal((num_rows, size), 1.0, hidden.dtype, hidden.device, generator)
                   for size in (hidden.shape[1], gate_up.shape[1], down.shape[2]))
    up_weight, down_weight = gate_up[0].detach(), down[0].detach()
    products = {"up_proj": ((x, up_weight.t()),), "down_proj": ((act, down_weight.t()),),
                "backward": ((x, down_weight), (x.t(), act), (pre.t(), x), (pre, up_weight))}
    chosen = [pair for part in parts for pair in products[part]]

    def run():
        for left, right in chosen:
            torch.matmul(left, right)
    return run
