"""Stage `permute`: ours and the same in torch's operators."""

import pytest

from bench.inputs import forward_call
from bench.stages import expert_stages


@pytest.mark.parametrize("impl", ["moe_kernels", "torch"])
def test_permute(run_benchmark, layer_inputs, impl):
    run_benchmark(forward_call(expert_stages(layer_inputs)["permute"][impl]))
