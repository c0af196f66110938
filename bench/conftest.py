"""Fixtures of the pytest-benchmark files: `pytest bench/ --benchmark-only`."""

import pytest
import torch

from bench import cases
from bench.inputs import make_inputs, make_weights

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GPU_CASES = {("qwen3-30b", 8192), ("fine-16", 4096), ("v3-ep8", 8192)}


def layer_cases():
    """The (shape, num_tokens) that pytest-benchmark measures: small ones on the CPU."""
    if DEVICE.type == "cpu":
        return [(cases.QUICK_SHAPES[0], 1024)]
    return [(shape, num_tokens) for shape in cases.SHAPES for num_tokens in shape.num_tokens
            if (shape.name, num_tokens) in GPU_CASES]


def pytest_generate_tests(metafunc):
    """Cases for the fixtures that tests ask for."""
    if "layer_inputs" in metafunc.fixturenames:
        metafunc.parametrize("layer_inputs", layer_cases(), indirect=True, ids=lambda case: f"{case[0].name}-{case[1]}")
    if "routing" in metafunc.fixturenames:
        routings = cases.QUICK_ROUTINGS if DEVICE.type == "cpu" else cases.ROUTINGS
        metafunc.parametrize("routing", routings, ids=lambda case: f"{case.name}-{case.num_tokens}")


@pytest.fixture
def layer_inputs(request):
    """bf16 `Inputs` of a case."""
    shape, num_tokens = request.param
    yield make_inputs(shape, num_tokens, make_weights(shape, torch.bfloat16, DEVICE))
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def device():
    """Where the benchmarks run."""
    return DEVICE


@pytest.fixture
def run_benchmark(benchmark):
    """benchmark(function), with the GPU's work waited for; host time is part of it, as without CUDA graphs."""
    def run(function):
        def call():
            result = function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            return result
        return benchmark.pedantic(call, warmup_rounds=3, rounds=30 if DEVICE.type == "cuda" else 5)
    return run
