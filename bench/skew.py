"""The layer under other loads of the experts than uniform ones, timed in the same rounds as uniform routing."""

from . import peers
from .cases import ROUTING_KINDS
from .inputs import layer_call, make_inputs
from .measure import OURS, row
from .timing import measure


def skew_rows(shape, num_tokens, weights, options):
    """Rows of ours with zipf and same routing, forward and, where the shape trains, forward and backward.

    `over_uniform` is the time over that of uniform routing; share and floor_ms are those of no floor: None.
    """
    rows = []
    passes = ("forward", "train") if shape.trains else ("forward",)
    inputs = {kind: make_inputs(shape, num_tokens, weights, kind) for kind in ROUTING_KINDS}
    for pass_name in passes:
        calls = {kind: layer_call(peers.bind_ours, inputs[kind], pass_name == "train") for kind in ROUTING_KINDS}
        timings = measure(calls, options.device, options.budget_s)
        for kind in ROUTING_KINDS[1:]:
            key = {"shape": shape.name, "num_tokens": num_tokens, "pass": f"skew:{pass_name}",
                   "dtype": options.dtype_name, "routing": kind}
            ratio = round(timings[kind].ms / timings["uniform"].ms, 4)
            rows.append(row(key, OURS, timings[kind], None, over_uniform=ratio))
    return rows
