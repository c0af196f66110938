"""The layer, forward and with all gradients: ours and every peer that is installed and quick to set up."""

import pytest

from bench.inputs import layer_call
from bench.peers import OURS, PEERS, Peer, bind_ours

LAYERS = {OURS: Peer(OURS, bind_ours)} | {name: PEERS[name] for name in ("hf_grouped_mm", "torch_grouped_mm")}


def bound(name, inputs):
    """The peer on inputs as its own router gives them; skips where it is not installed."""
    peer = LAYERS[name]
    if not peer.available():
        pytest.skip(f"{name} is not installed")
    return peer, inputs if name == OURS else peer.inputs(inputs)


@pytest.mark.parametrize("impl", LAYERS)
def test_forward(run_benchmark, layer_inputs, impl):
    peer, inputs = bound(impl, layer_inputs)
    run_benchmark(layer_call(peer.bind, inputs, train=False))


@pytest.mark.parametrize("impl", LAYERS)
def test_train(run_benchmark, layer_inputs, impl):
    peer, inputs = bound(impl, layer_inputs)
    run_benchmark(layer_call(peer.bind, inputs, train=True))
