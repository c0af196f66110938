"""Measures cases and makes the rows of bench/results/<card>.json from the times."""

import sys
from typing import NamedTuple

import torch

from . import memory, stages
from . import peers as peers_module
from .inputs import forward_call, train_call
from .limits import Limits
from .reference import check_layer
from .timing import first_line, measure

OURS = peers_module.OURS
DENSE = "dense"  # the floor's products, timed in the same rounds as what is compared with them
PASSES_OVER_WEIGHTS = {"forward": 1, "train": 3}
OPERATIONS = {"forward": 6, "train": 18}  # times S*H*I
ROUTING_CALLS = 8


class Options(NamedTuple):
    """What holds for a whole run."""

    device: torch.device
    dtype: torch.dtype
    dtype_name: str
    routing: str
    limits: Limits
    peers: list
    budget_s: float


def touched_bytes(shape, inputs):
    """Bytes of the weights of the experts that the routing chose."""
    return inputs.topk_ids.unique().numel() * shape.weights_per_expert * inputs.gate_up_proj.element_size()


def floor_ms(shape, inputs, pass_name, limits, dense_ms):
    """The least time: the products as dense ones, or the bytes that must move; decode: a cold read of the weights."""
    weights = touched_bytes(shape, inputs)
    if pass_name == "decode":
        return limits.cold_read_ms(weights)
    other = 2 * inputs.hidden_states.nbytes if pass_name == "forward" else 0
    return max(dense_ms, limits.copy_ms(PASSES_OVER_WEIGHTS[pass_name] * weights + other))


def row(key, impl, timing, floor, **measured):
    """One row of the results file; floor in milliseconds, or None where there is none to compare with."""
    share = None if floor is None else float(f"{floor / timing.ms:.4g}")  # never 0: its logarithm is taken
    return {**key, "impl": impl, "ms": round(timing.ms, 5), "floor_ms": None if floor is None else round(floor, 5),
            "share": share, "tflop_per_s": None, "gb_per_s": None, "peak_extra_mb": None, "timing": timing.mode,
            **measured}


def _layer_calls(shape, inputs, pass_name, options):
    """impl -> (function, what else is known of it) for ours and for every peer that runs."""
    ours = peers_module.Peer(OURS, peers_module.bind_ours)
    calls, train = {}, pass_name == "train"
    for peer in [ours, *(peer for peer in options.peers if peer.trains or not train)]:
        try:
            bound = inputs if peer is ours else peer.inputs(inputs)
            off_by = check_layer(bound, peer.bind, train)
            bound = bound.training() if train else bound
            layer = peer.bind(bound)
            function = train_call([layer], [bound]) if train else forward_call(layer)
            known = memory.fields(shape, bound, memory.call_memory(function, options.device), *(
                (memory.kept_memory(layer, options.device), memory.backward_memory(layer, bound, options.device))
                if train else ()))
            known["relative_error"] = round(off_by, 6)
            calls[peer.name] = (function, known)
        except Exception as error:
            if peer is ours:
                raise
            print(f"  {peer.name} is not measured: {first_line(error)}", file=sys.stderr)
    if options.device.type == "cuda":
        torch.cuda.empty_cache()  # what these calls cached would not serve the graphs' pools
    return calls


def layer_rows(shape, inputs, pass_name, options):
    """The layer's rows of one case and pass: ours first, then the peers'."""
    calls = _layer_calls(shape, inputs, pass_name, options)
    functions = {name: function for name, (function, _) in calls.items()}
    if pass_name != "decode":
        parts = ("up_proj", "down_proj", "backward") if pass_name == "train" else ("up_proj", "down_proj")
        functions[DENSE] = stages.dense_products(inputs, parts)
    captured = {peer.name: options.dtype in peer.capture for peer in options.peers}
    timings = measure(functions, options.device, options.budget_s, cold=pass_name == "decode",
                      capture=lambda name: captured.get(name, True))
    num_tokens, top_k = inputs.topk_ids.shape
    floor = floor_ms(shape, inputs, pass_name, options.limits, timings[DENSE].ms if DENSE in timings else 0.0)
    key = {"shape": shape.name, "num_tokens": num_tokens, "pass": pass_name, "dtype": options.dtype_name,
           "routing": options.routing}
    rows = []
    for name, (_, known) in calls.items():
        if name not in timings:
            continue
        if pass_name == "decode":
            speed = {"gb_per_s": round(touched_bytes(shape, inputs) / timings[name].ms / 1e6, 1)}
        else:
            operations = OPERATIONS[pass_name] * num_tokens * top_k * shape.hidden_size * shape.intermediate_size
            speed = {"tflop_per_s": round(operations / timings[name].ms / 1e9, 6)}
        rows.append(row(key, name, timings[name], floor, **speed, **known))
    return rows


def expert_stage_rows(shape, inputs, options):
    """Rows of up_proj, down_proj, combine and permute on one case: ours and torch's own operators."""
    rows = []
    num_tokens, top_k = inputs.topk_ids.shape
    products = num_tokens * top_k * shape.hidden_size * shape.intermediate_size
    weights = touched_bytes(shape, inputs)
    hidden_bytes = inputs.hidden_states.nbytes
    for stage, functions in stages.expert_stages(inputs).items():
        functions = {name: forward_call(function) for name, function in functions.items()}
        if stage not in stages.COPYING_STAGES:
            functions[DENSE] = stages.dense_products(inputs, (stage,))
        timings = measure(functions, options.device, options.budget_s / 2,
                          capture=lambda name: name != "torch" or options.dtype == torch.bfloat16)
        part = {"up_proj": 2, "down_proj": 1}.get(stage, 0)  # thirds of the layer's weights and products
        if part:
            floor = max(timings[DENSE].ms if DENSE in timings else 0.0, options.limits.copy_ms(part * weights / 3))
        else:
            floor = options.limits.copy_ms((top_k + 1) * hidden_bytes)
        for name in ("moe_kernels", "torch"):
            if name in timings:
                ms = timings[name].ms
                speed = ({"tflop_per_s": round(2 * part * products / ms / 1e9, 6)} if part
                         else {"gb_per_s": round((top_k + 1) * hidden_bytes / ms / 1e6, 1)})
                rows.append(row(_stage_key(shape.name, num_tokens, stage, options.dtype_name, options.routing), name,
                                timings[name], floor, **speed))
    return rows


def routing_rows(routing, options):
    """Rows of gate, plan and both together: ours and torch's own operators, with fp32 logits.

    The time is a call's of ROUTING_CALLS in one graph, each with inputs of its own: a graph of one call of 10 us would
    time its own launch, about 4 us, as much.
    """
    rows = []
    slots = routing.num_tokens * routing.top_k
    read_and_written = {"gate": 4 * routing.num_tokens * routing.num_experts + 8 * slots, "plan": 12 * slots}
    read_and_written["gate+plan"] = sum(read_and_written.values())
    for stage, functions in stages.routing_stages(routing, options.device, ROUTING_CALLS).items():
        functions = {name: forward_call(function) for name, function in functions.items()}
        timings = measure(functions, options.device, options.budget_s / 2)
        for name, timing in timings.items():
            timing = timing._replace(ms=timing.ms / ROUTING_CALLS)
            rows.append(row(_stage_key(routing.name, routing.num_tokens, stage, "fp32", "random"), name, timing,
                            options.limits.copy_ms(read_and_written[stage]),
                            gb_per_s=round(read_and_written[stage] / timing.ms / 1e6, 1)))
    return rows


def _stage_key(name, num_tokens, stage, dtype_name, routing):
    return {"shape": name, "num_tokens": num_tokens, "pass": f"stage:{stage}", "dtype": dtype_name, "routing": routing}
