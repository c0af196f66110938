"""What is measured on one number of tokens of a shape, in the order of measuring."""

from .host_time import host_rows
from .inputs import make_inputs
from .measure import expert_stage_rows, layer_rows
from .skew import skew_rows


def case_rows(shape, num_tokens, weights, passes, options):
    """Yields (pass, function that measures it and returns rows) for those of `passes` that the case has."""
    inputs = make_inputs(shape, num_tokens, weights, options.routing)
    for pass_name in shape.passes(num_tokens):
        if pass_name in passes:
            yield pass_name, lambda pass_name=pass_name: layer_rows(shape, inputs, pass_name, options)
    extra = {"stages": lambda: expert_stage_rows(shape, inputs, options),
             "skew": lambda: skew_rows(shape, num_tokens, weights, options),
             "host": lambda: host_rows(shape, inputs, options)}
    for name in shape.extra_passes(num_tokens):
        if name in passes:
            yield name, extra[name]
