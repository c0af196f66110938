"""How long the host is busy with one call of the layer outside a CUDA graph, in elementwise torch operations.

The unit, `x * 2` of a small tensor, is timed in the same rounds: hosts differ, and the cost of a launch with them. A
backward is handed over to autograd's own thread and back, once however many layers it goes through; so the layer is
timed by itself, and as one of several.
"""

import contextlib
import statistics
import sys
import time

import torch

from . import peers as peers_module
from .inputs import layer_call
from .measure import OURS, row
from .timing import Timing, first_line

ONE_OPERATION = "one_operation"  # x * 2 of a small tensor with its gradient: what autograd takes by itself
CALLS = 8  # layers in a row before the GPU is waited for: its queue takes all their launches
UNIT_CALLS = 100
ROUNDS = 15


def _ms_a_call(function, calls, device):
    """Milliseconds of the host a call; on a GPU nothing is waited for inside."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    elapsed = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * elapsed / calls


def host_times(functions, device, rounds=ROUNDS, layers=1):
    """name -> (median milliseconds of the host a layer, the same in elementwise operations); a call has `layers`."""
    small = torch.zeros(64, device=device)
    calls = {"unit": (lambda: small * 2, UNIT_CALLS),
             **{name: (call, CALLS // layers) for name, call in functions.items()}}
    times = {name: [] for name in calls}
    for call, _ in calls.values():
        for _ in range(3):
            call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    for _ in range(rounds):
        for name, (call, count) in calls.items():
            times[name].append(_ms_a_call(call, count, device))
    unit = statistics.median(times.pop("unit"))
    medians = {name: statistics.median(found) / layers for name, found in times.items()}
    return {name: (median, median / unit) for name, median in medians.items()}


def one_operation(device, layers):
    """The least that has a forward and a backward, in place of each layer."""
    leaves = [torch.zeros(64, device=device, requires_grad=True) for _ in range(layers)]
    grads = [torch.ones(64, device=device)] * layers
    return lambda: torch.autograd.grad([leaf * 2 for leaf in leaves], leaves, grads)


# pass -> (what is called, layers of a call, the mode it is called in, entered once for all calls)
PASSES = {"host:forward": ("forward", 1, torch.no_grad), "host:train": ("train", 1, contextlib.nullcontext),
          "host:train-8-layers": ("train", 8, contextlib.nullcontext),
          "host:train-one-thread": ("train", 1, lambda: torch.autograd.set_multithreading_enabled(False))}


def host_rows(shape, inputs, options):
    """Rows of ours and of the peers: one forward call, and where the shape trains one forward and backward, by itself, as
    one of eight, and with autograd's backward on the calling thread; beside them a single operation with its gradient."""
    rows = []
    everyone = [peers_module.Peer(OURS, peers_module.bind_ours), *options.peers]
    for pass_name, (called, layers, mode) in PASSES.items():
        if called == "train" and not shape.trains:
            continue
        calls = {}
        for peer in everyone:
            if called == "train" and not peer.trains:
                continue
            try:
                its_inputs = inputs if peer.name == OURS else peer.inputs(inputs)
                train = called == "train"
                call = layer_call(peer.bind, its_inputs, True, layers) if train else peer.bind(its_inputs)
                call()
                calls[peer.name] = call
            except Exception as error:
                if peer.name == OURS:
                    raise
                print(f"  {peer.name} is not measured: {first_line(error)}", file=sys.stderr)
        if called == "train":
            calls[ONE_OPERATION] = one_operation(options.device, layers)
        key = {"shape": shape.name, "num_tokens": inputs.topk_ids.shape[0], "pass": pass_name,
               "dtype": options.dtype_name, "routing": options.routing}
        rounds = ROUNDS if options.device.type == "cuda" else 3
        with mode():
            times = host_times(calls, options.device, rounds, layers)
        for name, (ms, operations) in times.items():
            rows.append(row(key, name, Timing(ms, "host", rounds), None, in_operations=round(operations, 2)))
    return rows
