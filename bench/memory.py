"""GPU memory of one call beyond what is there before it, and how it compares with the rows that a layer has to hold.

The measure is S*(I + H) elements: the activated rows and the experts' rows, which an inference holds at one time.
"""

import torch


def _peak(function):
    """(bytes at the highest point, bytes afterwards) of a call, over what is allocated before it; and its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before, result


def call_memory(function, device):
    """Bytes that a call allocates at most beyond what is there before it; None on the CPU."""
    if device.type != "cuda":
        return None
    function()  # workspaces of the libraries stay allocated after their first call
    return _peak(function)[0]


def kept_memory(layer, device):
    """Bytes that a forward keeps for its backward, besides its output; None on the CPU."""
    if device.type != "cuda":
        return None
    _, after, output = _peak(layer)
    return after - output.nbytes


def backward_memory(layer, inputs, device):
    """Bytes that a backward allocates at most, besides the gradients that it returns; None on the CPU."""
    if device.type != "cuda":
        return None
    output = layer()
    peak, _, gradients = _peak(lambda: torch.autograd.grad(output, inputs.leaves, inputs.grad_output))
    return peak - sum(gradient.nbytes for gradient in gradients)


def rows_bytes(shape, inputs):
    """Bytes of S*(I + H) elements."""
    elements = inputs.topk_ids.numel() * (shape.intermediate_size + shape.hidden_size)
    return elements * inputs.hidden_states.element_size()


def megabytes(num_bytes):
    """For a row of the results; None stays None."""
    return None if num_bytes is None else round(num_bytes / 1e6, 1)


def fields(shape, inputs, call, kept=None, backward=None):
    """The fields of a row from the bytes that the functions above give; those that were not measured are left out."""
    found = {"peak_extra_mb": megabytes(call)}
    rows = rows_bytes(shape, inputs)
    if call is not None and backward is None and kept is None:
        found["extra_over_rows"] = round((call - inputs.hidden_states.nbytes) / rows, 4)  # the output is as large
    if kept is not None:
        found["kept_mb"] = megabytes(kept)
    if backward is not None:
        found["backward_extra_mb"] = megabytes(backward)
        found["backward_extra_over_rows"] = round(backward / rows, 4)
    return found
