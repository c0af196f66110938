"""What every test needs: where they run, poisoned memory, and running twice."""

import pytest
import torch
from cases import assert_same_bits

import moe_kernels
from moe_kernels import ops, schemas

KERNELS_RUN = torch.cuda.is_available() and ops._kernels_run_on(0)
# these are about the compiled kernels: streams, graphs, 64-bit addresses
collect_ignore = [] if KERNELS_RUN else ["test_cuda.py", "test_engines.py", "test_sanitizer.py"]

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_report_header():
    """Says which implementation is tested."""
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return f"moe_kernels: card {card}, kernels {'tested' if KERNELS_RUN else 'not tested'}, {moe_kernels.build_info()}"


def poison():
    """Fills the GPU memory that the allocator hands out next with NaN, so that reading what none wrote shows."""
    if torch.cuda.is_available():
        sizes = [2**10] * 64 + [2**16] * 16 + [2**20] * 8 + [2**23] * 4  # elements; small and large pool
        blocks = [torch.full((size,), float("nan"), device="cuda") for size in sizes]
        del blocks


@pytest.fixture
def run_twice():
    """Calls a function twice on poisoned memory, asserts the same bits, and returns the first result."""

    def call(function):
        poison()
        first = function()
        poison()
        assert_same_bits(first, function())
        return first

    return call


@pytest.fixture
def force():
    """force(engine, tile): the products of this test use them."""

    def call(engine="auto", tile="auto"):
        schemas.compiled_module.force_engine(engine)
        schemas.compiled_module.force_tile(tile)

    yield call
    call()


@pytest.fixture(autouse=True)
def _full_fp32_products():
    """No TF32 while testing fp32, and nothing left of one test's settings in the next."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
