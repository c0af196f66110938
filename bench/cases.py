"""The shapes that are measured: one table for `python -m bench` and for the pytest-benchmark files. Needs no torch.

H hidden size, I expert width, E experts, K experts a token, T tokens.
"""

from typing import NamedTuple

PASSES = ("forward", "train", "decode", "stages", "skew", "host")
ROUTING_KINDS = ("uniform", "zipf", "same")  # see bench/inputs.py
DECODE_BELOW = 1024  # fewer tokens than this are measured as decode: forward alone, caches cold


class Shape(NamedTuple):
    """One layer; every entry of num_tokens is a case of its own, measured with the same weights."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_tokens: tuple
    trains: bool = True  # whether weights, gradients and a peer's gradients fit an 80 GB card

    def passes(self, num_tokens):
        """The passes in which this many tokens are measured; none for a number that only `extra_passes` knows."""
        if num_tokens not in self.num_tokens:
            return ()
        if num_tokens < DECODE_BELOW:
            return ("decode",)
        return ("forward", "train") if self.trains else ("forward",)

    def extra_passes(self, num_tokens):
        """The measurements beside the passes that this case has: of skewed routing, of host time."""
        return tuple(name for name, found in EXTRA_CASES.items() if (self.name, num_tokens) in found)

    def every_num_tokens(self):
        """All numbers of tokens for which something is measured, ascending."""
        extra = {num_tokens for found in EXTRA_CASES.values() for name, num_tokens in found if name == self.name}
        return sorted({*self.num_tokens, *extra})

    @property
    def weights_per_expert(self):
        """Elements of one expert's two matrices together."""
        return 3 * self.hidden_size * self.intermediate_size


class Routing(NamedTuple):
    """A case of gate and plan, which depend on neither H nor I."""

    name: str
    num_tokens: int
    num_experts: int
    top_k: int


SHAPES = (
    Shape("seed-1t-ep8", 7168, 1024, 96, 2, (4096, 16384)),
    Shape("v3-ep8", 7168, 2048, 32, 1, (8192, 32768)),
    Shape("qwen3-30b", 2048, 768, 128, 8, (1, 16, 128, 1024, 8192, 32768)),
    Shape("olmoe", 2048, 1024, 64, 8, (4096, 32768)),
    Shape("mixtral", 4096, 14336, 8, 2, (1, 64, 8192)),
    Shape("fine-7b", 1536, 256, 128, 8, (24576,)),
    Shape("fine-16", 4096, 512, 256, 16, (64, 4096, 16384)),
    Shape("v4-flash", 4096, 2048, 256, 6, (1, 64, 4096, 16384)),
    Shape("v4-pro-ep8", 7168, 3072, 48, 1, (64, 8192)),
    Shape("seed-1t-full", 7168, 1024, 768, 16, (1, 16, 64, 512, 4096), trains=False),
)

ROUTINGS = (
    Routing("routing-e768-k16", 16384, 768, 16),
    Routing("routing-e128-k8", 32768, 128, 8),
    Routing("routing-e128-k8", 1024, 128, 8),
    Routing("routing-e128-k8", 128, 128, 8),
)

# small enough for a CPU, and for a first look at whether everything runs
QUICK_SHAPES = (
    Shape("quick", 32, 16, 4, 2, (4, 1024)),
    Shape("quick-top4", 16, 32, 8, 4, (1024,), trains=False),
)
QUICK_ROUTINGS = (Routing("quick-routing-e16-k4", 1024, 16, 4),)

# (shape, tokens) of what is measured beside the passes, at a few cases only
EXTRA_CASES = {
    # the stages one by one: each case adds ten graphs
    "stages": {("seed-1t-ep8", 16384), ("qwen3-30b", 1024), ("qwen3-30b", 8192), ("mixtral", 8192), ("fine-16", 4096),
               ("v4-flash", 4096), ("quick", 1024)},
    # the same size with other loads of the experts
    "skew": {("seed-1t-ep8", 16384), ("qwen3-30b", 8192), ("olmoe", 4096), ("fine-16", 4096), ("v4-flash", 4096),
             ("quick", 1024)},
    # calls without a graph: how long the host is busy with one
    "host": {("qwen3-30b", 64), ("quick", 1024)},
}


def select(shape_name=None, quick=False):
    """The shapes and routings of a run: all, the quick ones, or those of one name.

    Raises: ValueError if no shape has the name; the message lists those that there are.
    """
    shapes, routings = (QUICK_SHAPES, QUICK_ROUTINGS) if quick else (SHAPES, ROUTINGS)
    if shape_name is None:
        return shapes, routings
    known = SHAPES + QUICK_SHAPES + ROUTINGS + QUICK_ROUTINGS
    chosen = [shape for shape in known if shape.name == shape_name]
    if not chosen:
        raise ValueError(f"--shape wants one of {', '.join(sorted({shape.name for shape in known}))}, got {shape_name}")
    return (tuple(shape for shape in chosen if isinstance(shape, Shape)),
            tuple(shape for shape in chosen if isinstance(shape, Routing)))


def expected_keys():
    """The (shape, tokens, pass) of every layer row that a full run has."""
    return [(shape.name, num_tokens, pass_name) for shape in SHAPES for num_tokens in shape.num_tokens
            for pass_name in shape.passes(num_tokens)]
