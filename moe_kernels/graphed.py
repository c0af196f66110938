"""One training step's forward and backward as a CUDA graph: where a model is small, the host takes most of the time."""

import torch

_EAGER_STEPS = 3  # libraries set themselves up, and the allocator


class GraphedStep:
    """A function of one tensor of fixed shape, run as it is on a CPU, and as a CUDA graph on a GPU.

    The first calls on a GPU run as they are, on the stream of the later capture; the next one is captured, and from
    there on the graph is replayed, with the same bits. Gradients belong to the graph, which writes them anew: they are
    neither to be added up nor set to None between the calls.

    Args:
        function: of one tensor; it waits for nothing on the host, leaves gradients in parameters, and returns a tensor.
        device: torch.device of that tensor.
        capture: False runs every call as it is.
    """

    def __init__(self, function, device, capture=True):
        self._function, self._calls, self._graph = function, 0, None
        self._stream = torch.cuda.Stream(device) if capture and device.type == "cuda" else None

    @property
    def keeps_gradients(self):
        """Whether the gradients are the graph's own."""
        return self._graph is not None

    def __call__(self, x):
        """The function's result for x; a copy, so that the next call leaves it as it is."""
        if self._stream is None:
            return self._function(x)
        self._calls += 1
        if self._calls <= _EAGER_STEPS:
            return self._eagerly(x)
        if self._graph is None:
            self._capture(x)
        self._x.copy_(x)
        self._graph.replay()
        return self._result.clone()

    def _eagerly(self, x):
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            result = self._function(x)
        torch.cuda.current_stream(x.device).wait_stream(self._stream)
        return result

    def _capture(self, x):
        self._x = x.clone()
        torch.cuda.synchronize(x.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._result = self._function(self._x)
