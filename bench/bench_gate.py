"""Stage `gate`: ours and the same in torch's operators."""

import pytest

from bench.inputs import forward_call
from bench.stages import routing_stages


@pytest.mark.parametrize("impl", ["moe_kernels", "torch"])
def test_gate(run_benchmark, routing, device, impl):
    run_benchmark(forward_call(routing_stages(routing, device)["gate"][impl]))
