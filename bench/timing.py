"""Medians of interleaved runs: CUDA-graph replays on a GPU, plain calls on the CPU.

In every round each function runs once, and over the rounds each runs behind each other one equally often: a card at
its power cap may run faster behind what needed little power, and with one order a function owes time to its neighbour.
`cold` empties the L2 cache before every run by reading a buffer several times its size; reading leaves no dirty lines
behind, whose write-back would be paid in the measured run.
"""

import random
import statistics
import sys
import time
from typing import NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 30


class Timing(NamedTuple):
    """The median of a function's runs, and how they were made: "graph", "eager" (CUDA events) or "cpu"."""

    ms: float
    mode: str
    rounds: int


class Prepared:
    """A function made ready to be run many times; on a GPU a captured graph where the capture succeeds."""

    def __init__(self, function, device, capture):
        self.run, self.mode, self._graph, self._result = function, "cpu", None, None
        if device.type == "cuda":
            self._warm_up(function)
            self.mode = "eager"
            if capture:
                self._capture(function)
        else:
            function()

    @staticmethod
    def _warm_up(function):
        """Twice on a side stream, as a capture wants it: libraries and autograd set up."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the side stream cached would not serve the capture's pool

    def _capture(self, function):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self._result = function()  # held: the graph writes to it at every replay
        except Exception as error:
            self._result = None
            torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own stream current
            torch.cuda.synchronize()
            print(f"  not captured, timed call by call: {first_line(error)}", file=sys.stderr)
            return
        self._graph, self.run, self.mode = graph, graph.replay, "graph"
        graph.replay()
        torch.cuda.synchronize()

    def release(self):
        """Gives the graph's memory back."""
        self.run = self._result = None
        if self._graph is not None:
            self._graph.reset()
            self._graph = None


def first_line(error):
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


class CacheFlush:
    """Reads a buffer of 256 MB or four times the L2 cache."""

    def __init__(self, device):
        size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self.sink = torch.zeros((), dtype=torch.float32, device=device)

    def __call__(self):
        torch.sum(self.buffer, dim=0, out=self.sink)


def balanced_orders(names, rounds):
    """At least so many orders of the names, in which each stands behind each other one equally often.

    Source: Williams, Experimental designs balanced for the estimation of residual effects of treatments (1949).
    """
    names, count = list(names), len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2, ...
    square = [[names[(step + turn) % count] for step in zigzag] for turn in range(count)]
    if count % 2:  # an odd number wants the mirrored square too
        square += [order[::-1] for order in square]
    random.Random(0).shuffle(square)
    return square * -(-rounds // len(square))


def _cuda_round(prepared, flush, order):
    """One run of each, with events around it; nothing is waited for."""
    events = {}
    for name in order:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush is not None:
            flush()
        start.record()
        prepared[name].run()
        end.record()
        events[name] = (start, end)
    return events


def _cuda_rounds(prepared, flush, orders):
    events = [_cuda_round(prepared, flush, order) for order in orders]
    torch.cuda.synchronize()
    return [{name: start.elapsed_time(end) for name, (start, end) in pairs.items()} for pairs in events]


def _cpu_rounds(prepared, orders):
    times = []
    for order in orders:
        times.append({})
        for name in order:
            start = time.perf_counter()
            prepared[name].run()
            times[-1][name] = 1e3 * (time.perf_counter() - start)
    return times


def measure(functions, device, budget_s=0.6, cold=False, capture=lambda name: True):
    """Times functions of no arguments against each other.

    Args:
        functions: name -> function. On a GPU each is captured into a CUDA graph if capture(name), else called.
        budget_s: seconds for all rounds together; there are 7 to 30 rounds, and some more to balance their orders.
        cold: empty the L2 cache before every run; GPU only.
    Returns: name -> Timing. A function whose warm-up raises is left out, with a line on stderr; the first function is
        the one that the measurement is for, and its exception is raised.
    """
    prepared = {}
    try:
        for name, function in functions.items():
            try:
                prepared[name] = Prepared(function, device, capture(name))
            except Exception as error:
                if not prepared:
                    raise
                print(f"  {name} does not run: {first_line(error)}", file=sys.stderr)
        flush = CacheFlush(device) if cold and device.type == "cuda" else None
        run = (lambda orders: _cuda_rounds(prepared, flush, orders)) if device.type == "cuda" else (
            lambda orders: _cpu_rounds(prepared, orders))
        start = time.perf_counter()
        run([list(prepared)])  # the time of a round, flush included
        round_s = max(time.perf_counter() - start, 1e-6)
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s / round_s)))
        times = run(balanced_orders(prepared, rounds))
        return {name: Timing(statistics.median(row[name] for row in times), item.mode, len(times))
                for name, item in prepared.items()}
    finally:
        for item in prepared.values():
            item.release()
        if device.type == "cuda":
            torch.cuda.empty_cache()
