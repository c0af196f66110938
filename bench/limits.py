"""What this machine can do at most, measured in the same run as the figures that are compared with it."""

import statistics
import time
from typing import NamedTuple

import torch

from .timing import measure


class Limits(NamedTuple):
    """Measured limits. A cold read of B bytes in a graph takes read_latency_us + B / read_gb_per_s."""

    dense_tflop_per_s: float
    copy_gb_per_s: float
    read_gb_per_s: float
    read_latency_us: float

    def copy_ms(self, num_bytes):
        """The time of moving so many bytes, read and written ones counted."""
        return num_bytes / self.copy_gb_per_s / 1e6

    def cold_read_ms(self, num_bytes):
        """The time of reading so many bytes with cold caches, in a kernel that does nothing else."""
        return self.read_latency_us / 1e3 + num_bytes / self.read_gb_per_s / 1e6

    def as_json(self):
        """A dict of rounded figures."""
        return {name: round(value, 4) for name, value in self._asdict().items()}


def dense_tflop_per_s(dtype, device, size, seconds):
    """Sustained speed of a square torch.matmul: the median of the second half, when the power cap has settled."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 4:
        times.append(_time_batch(lambda: torch.matmul(a, b, out=out), device, 20 if device.type == "cuda" else 1))
    return 2 * size ** 3 / statistics.median(times[len(times) // 2:]) / 1e9


def _time_batch(function, device, repeat):
    """Milliseconds of one call, of several calls back to back."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeat):
            function()
        return 1e3 * (time.perf_counter() - start) / repeat
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeat


def _copy_gb_per_s(num_bytes, device):
    """The better of a copy, which a CUDA graph leaves to a slower engine, and of a kernel that moves as many bytes."""
    source, target = (torch.zeros(num_bytes // 4, dtype=torch.int32, device=device) for _ in range(2))
    ways = {"copy": lambda: target.copy_(source), "kernel": lambda: torch.neg(source, out=target)}
    return 2 * num_bytes / min(timing.ms for timing in measure(ways, device).values()) / 1e6


def _readers(buffer):
    """Ways to read a buffer of fp32 that write next to nothing; which one is fastest depends on the card and torch."""
    sink = torch.zeros((), dtype=torch.float32, device=buffer.device)
    matrix = buffer.view(torch.bfloat16).view(-1, 4096)
    vector = torch.zeros(4096, dtype=torch.bfloat16, device=buffer.device)
    column = torch.zeros(matrix.shape[0], dtype=torch.bfloat16, device=buffer.device)
    return {"sum": lambda: torch.sum(buffer, dim=0, out=sink),
            "max": lambda: torch.amax(buffer, dim=0, out=sink),
            "rows": lambda: torch.sum(buffer.view(-1, 2048), dim=1),
            "gemv": lambda: torch.mv(matrix, vector, out=column)}


def _read_limits(sizes, device):
    """Bandwidth and latency of a cold read: the best bandwidth, and the least time that any read took over it."""
    times = []
    for num_bytes in sizes:
        buffer = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
        measured = measure(_readers(buffer), device, budget_s=0.3, cold=True)
        times.append((num_bytes, min(timing.ms for timing in measured.values())))
    largest, largest_ms = times[-1]
    smallest, smallest_ms = times[0]
    gb_per_s = max((largest - smallest) / max(largest_ms - smallest_ms, 1e-9), largest / largest_ms) / 1e6
    latency_ms = min(ms - num_bytes / gb_per_s / 1e6 for num_bytes, ms in times)
    return gb_per_s, max(0.0, 1e3 * latency_ms)


def measure_limits(dtype, device, quick=False):
    """All four limits; about 3 seconds on a GPU, less on request and on the CPU."""
    small = quick or device.type != "cuda"
    read = _read_limits([1 << 20, 16 << 20] if small else [16 << 20, 128 << 20, 2 << 30], device)
    copy = _copy_gb_per_s((16 << 20) if small else (1 << 30), device)
    dense = dense_tflop_per_s(dtype, device, 512 if small else 8192, 0.05 if small else 1.5)
    return Limits(dense, copy, *read)
