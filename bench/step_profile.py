"""What one training step spends its time on: the kernels that torch.profiler sees, in groups.

    moe_kernels       ours
    attention         scaled dot products and softmax, fused
    dense products    projections, shared experts, router, head
    optimizer         AdamW
    clipping          the norm of the gradients, and their scaling
    casts and copies  weights and gradients between fp32 and bf16, layouts, memory set to zero
    other             norms, rotations, activations, sums, the loss, the balance
"""

import re

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

# The first that matches: fused attention is built of cutlass too, and AdamW is a multi_tensor_apply.
GROUPS = (("moe_kernels", r"\bmoe::|\bmoe_kernels"),
          ("attention", r"fmha|flash|sdpa|attention"),
          ("optimizer", r"adam"),
          ("clipping", r"multi_tensor_apply|LpNorm|foreach"),
          ("dense products", r"gemm|nvjet|cutlass|cublas|xmma|gemv|splitk|aten::(b|add)?mm\b"),
          ("casts and copies", r"copy_kernel|memcpy|memset|FillFunctor|aten::(copy_|fill_|zero_)"))
OTHER = "other"
LARGEST = 20  # kernels that the result lists one by one


def group_of(name):
    """The group of a kernel (or, on a CPU, of an operator) of this name."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def table(kernels):
    """The groups and the largest kernels.

    Args: kernels: (name, milliseconds, calls) of each kernel.
    Returns: {"groups": {group: milliseconds}, "kernels": [{"name", "group", "ms", "calls"}, the slowest first]}.
    """
    groups = {group: 0.0 for group, _ in GROUPS} | {OTHER: 0.0}
    for name, ms, _ in kernels:
        groups[group_of(name)] += ms
    largest = sorted(kernels, key=lambda kernel: -kernel[1])[:LARGEST]
    return {"groups": {group: round(ms, 3) for group, ms in groups.items()},
            "kernels": [{"name": name[:160], "group": group_of(name), "ms": round(ms, 3), "calls": calls}
                        for name, ms, calls in largest]}


def profile_step(step, device):
    """`table` of one call of step, which takes no arguments; another one before it sets the profiler up."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
        for _ in range(2):
            step()
            if cuda:
                torch.cuda.synchronize()
            profiler.step()
    return table(_kernels(profiler.key_averages(), cuda))


def _kernels(events, cuda):
    """(name, milliseconds, calls) of what ran on the device; ranges that users mark span kernels and are none."""
    found = []
    for event in events:
        if getattr(event, "is_user_annotation", False) or event.key.startswith(("ProfilerStep", "Optimizer.")):
            continue
        if cuda and event.device_type == DeviceType.CUDA:
            found.append((event.key, event.self_device_time_total / 1e3, event.count))
        elif not cuda:
            found.append((event.key, event.self_cpu_time_total / 1e3, event.count))
    return found
