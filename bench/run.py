"""One run of `python -m bench`: measures case by case, prints, and stores after every case what is there so far."""

import contextlib
import datetime
import gc
import importlib.metadata
import importlib.util
import platform
import time

import torch

from . import cases, peers, report, results_file
from .inputs import DTYPES, make_weights
from .limits import measure_limits
from .measure import OURS, Options, routing_rows
from .passes import case_rows
from .timing import first_line

BUDGET_S = 0.6  # for all rounds of one measure
LEAST_STEPS = 8  # of training: some to warm up, some to measure


class Run:
    """The state of a run: what was measured, what failed, and where it goes."""

    def __init__(self, arguments, tests):
        self.arguments, self.tests = arguments, tests
        self.rows, self.failures, self.left_out, self.models, self.training = [], [], [], None, None
        self.begin = time.perf_counter()
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda wants a GPU that torch can use, and there is none")
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.card = torch.cuda.get_device_name(0) if device == "cuda" else f"CPU {platform.machine()}"
        self.path = arguments.results / f"{results_file.slug(self.card)}.json"
        self.previous = dict(results_file.read_all(arguments.results)).get(self.path)
        self.quick = arguments.quick or (device == "cpu" and arguments.shape is None)
        self.training_options = training_options(arguments, self.quick)
        require_kernels(self.device)
        if self.quick and arguments.save and arguments.results == results_file.RESULTS:
            raise ValueError(f"--save into {results_file.RESULTS} wants the real shapes; give --results FOLDER")
        self.options = self._options()

    def _options(self):
        dtype = DTYPES[self.arguments.dtype]
        chosen = peers.select(self.arguments.peers)
        limits = measure_limits(dtype, self.device, self.quick)
        print(f"{self.card}: dense {limits.dense_tflop_per_s:.1f} TFLOP/s, copy {limits.copy_gb_per_s:.0f} GB/s, read "
              f"{limits.read_gb_per_s:.0f} GB/s + {limits.read_latency_us:.1f} us; peers: "
              f"{', '.join(peer.name for peer in chosen) or 'none'}", flush=True)
        return Options(self.device, dtype, self.arguments.dtype, self.arguments.routing, limits, chosen,
                       0.05 if self.quick else BUDGET_S)

    def seconds(self):
        return time.perf_counter() - self.begin

    def measure(self, name, function):
        """Runs one measurement; one that raises is noted and the run goes on, unless the GPU itself has failed."""
        limit = self.arguments.time_limit
        if limit is not None and self.seconds() > limit:
            self.left_out.append(name)
            return
        try:
            rows = function()
        except Exception as error:
            self.failures.append(f"{name}: {first_line(error)}")
            print(f"FAILED {self.failures[-1]}", flush=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the error was one that nothing runs after
            return
        self.rows += rows
        for line in row_lines(rows):
            print(line, flush=True)
        self.store()

    def measure_models(self):
        """Whole models of transformers, beside its own backends."""
        from . import models

        self.models = models.measure_models(self.options.dtype, self.device, self.quick, self.options.budget_s * 5)
        for line in models.lines(self.models):
            print(line, flush=True)
        return []

    def measure_training(self):
        """The reference transformer trained, beside Hugging Face's experts in it."""
        from . import training

        self.training = training.measure_training(self.device, self.options.limits.dense_tflop_per_s, self.quick,
                                                  **self.training_options)
        for line in report.training_lines(self.training):
            print(line, flush=True)
        return []

    def content(self):
        """The results file."""
        return {"card": self.card, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "source_hash": results_file.source_hash(), "versions": versions(),
                "limits": self.options.limits.as_json(), "tests": self.tests, "failures": self.failures,
                "models": self.models, "training": self.training, "results": self.rows}

    def store(self):
        """Writes the results file, with the rows that an earlier run on the same sources has beside ours."""
        if self.arguments.save:
            results_file.write(self.path, results_file.merge(self.previous, self.content()))


def training_options(arguments, quick):
    """The options of `measure_training` that were given. Raises: ValueError on those that --training does not take."""
    given = {name: getattr(arguments, name) for name in ("steps", "seeds", "batch_size")
             if getattr(arguments, name) is not None}
    if given and not arguments.training:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} is an option of --training, which is not given")
    if not arguments.training:
        return {}
    if arguments.dtype != "bf16":
        raise ValueError(f"--training wants --dtype bf16, got {arguments.dtype}")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--training wants transformers to be installed, whose experts it compares with")
    for name, least in (("steps", LEAST_STEPS), ("seeds", 1), ("batch_size", 1)):
        if given.get(name, least) < least:
            raise ValueError(f"--{name.replace('_', '-')} wants at least {least}, got {given[name]}")
    return ({"steps": LEAST_STEPS} if quick else {}) | given


def require_kernels(device):
    """Refuses to measure torch's operators as if they were the kernels."""
    import moe_kernels

    if device.type == "cuda" and not moe_kernels.ops.uses_kernels(torch.empty(0, dtype=torch.bfloat16, device=device)):
        raise ValueError(f"the CUDA kernels do not serve this card, or are not built: {moe_kernels.build_info()}")


def versions():
    """What the times depend on besides the card."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        import moe_kernels

        found["nvcc"] = str(moe_kernels.build_info().get("cuda_version"))
    for package in ("transformers", *(("triton", "sonic-moe", "vllm") if torch.cuda.is_available() else ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def extra_line(row):
    """A printed line for a row of skewed routing or of host time."""
    start = f"{row['shape']:17} {row['num_tokens']:6} {row['pass']:16} {row['impl']:18} {row['ms']:9.4f} ms "
    if row["pass"].startswith("skew:"):
        return f"{start} {row['routing']} routing: {row['over_uniform']:.2f} times the time of uniform routing"
    return f"{start} of the host a call: {row['in_operations']:.1f} elementwise operations"


def row_lines(rows):
    """A printed line for each row; ours tells how many times as fast it is as each other implementation."""
    for row in rows:
        if row["pass"].startswith(("skew:", "host:")):
            yield extra_line(row)
            continue
        memory = row["tflop_per_s"] is None
        speed = f"{row['gb_per_s']:8.1f} GB/s   " if memory else f"{row['tflop_per_s']:8.1f} TFLOP/s"
        others = [other for other in rows if other["pass"] == row["pass"] and row["impl"] == OURS != other["impl"]]
        ratios = "".join(f"  {other['ms'] / row['ms']:.2f}x {other['impl']}" for other in others)
        error = f"  error {row['relative_error']:.4f}" if "relative_error" in row else ""
        error += "".join(f"  {name} {row[field]:.2f} S*(I+H)" for field, name in report.MEMORY_FIELDS.items()
                         if row.get(field) is not None)
        mode = "" if row["timing"] == "graph" else f"  ({row['timing']})"
        yield (f"{row['shape']:17} {row['num_tokens']:6} {row['pass']:16} {row['impl']:18} {row['ms']:9.4f} ms "
               f"{speed}  share {row['share']:.2f}{ratios}{error}{mode}")


def free(device):
    """Gives back what the last shape held: two shapes' weights do not fit the card together."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_shape(current, shape, passes):
    """All cases of a shape, with one set of weights."""
    wanted = [num_tokens for num_tokens in shape.every_num_tokens()
              if {*shape.passes(num_tokens), *shape.extra_passes(num_tokens)} & set(passes)]
    limit = current.arguments.time_limit
    if not wanted or (limit is not None and current.seconds() > limit):
        current.left_out += [f"{shape.name} {num_tokens}" for num_tokens in wanted]
        return
    weights = make_weights(shape, current.options.dtype, current.device)
    for num_tokens in wanted:
        for pass_name, function in case_rows(shape, num_tokens, weights, passes, current.options):
            current.measure(f"{shape.name} {num_tokens} {pass_name}", function)
            del function  # it holds the inputs
        free(current.device)


def run(arguments, tests, write_reports):
    """Measures what the command line asks for; returns the exit status: 1 if anything failed."""
    current = Run(arguments, tests)
    shapes, routings = ((), ()) if arguments.models or arguments.training else cases.select(
        arguments.shape, current.quick and arguments.shape is None)
    passes = arguments.passes or cases.PASSES
    gc.collect()
    gc.freeze()  # collections between captures need not walk the imported libraries
    for routing in routings if "stages" in passes else ():
        current.measure(f"{routing.name} {routing.num_tokens}",
                        lambda routing=routing: routing_rows(routing, current.options))
    if arguments.models:
        current.measure("models", current.measure_models)
    if arguments.training:
        current.measure("training", current.measure_training)
    for shape in shapes:
        measure_shape(current, shape, passes)
        free(current.device)
    current.store()
    for line in report.summary(current.rows, arguments.dtype, arguments.routing):
        print(line)
    for name, entries in (("failed", current.failures), ("left out for lack of time", current.left_out)):
        if entries:
            print(f"{name}: {'; '.join(entries)}")
    print(f"{len(current.rows)} rows in {current.seconds():.0f} s")
    if arguments.save:
        write_reports(arguments)
    return 1 if current.failures else 0
