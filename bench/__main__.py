"""Measures the stages and the layer on this machine, beside the other implementations that --peers names.

    python -m bench                          every shape, pass by pass; prints a line a row
    python -m bench --shape qwen3-30b        one shape
    python -m bench --models                 only whole transformers models on our kernels
    python -m bench --training               only training of the reference transformer, beside Hugging Face's experts
    python -m bench --save                   and writes bench/results/<card>.json, the plot and README's tables
    python -m bench --readme                 only fills README anew from the stored results
    python -m bench --check                  says what is stale, and then exits 1

A time is the median of CUDA-graph replays, interleaved between the implementations; a share is the floor of
bench/measure.py over the time. What gives a wrong result is not timed; if it is ours, the run exits 1.
"""

import argparse
import sys
from pathlib import Path

from . import cases, report, results_file


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", metavar="NAME", help="one shape instead of all")
    parser.add_argument("--pass", dest="passes", choices=cases.PASSES, action="append",
                        help="one pass; can be repeated")
    parser.add_argument("--models", action="store_true", help="only whole models of Hugging Face transformers")
    parser.add_argument("--training", action="store_true", help="only training of the reference transformer")
    parser.add_argument("--steps", type=int, metavar="N", help="of --training (default: 200; 8 with --quick)")
    parser.add_argument("--seeds", type=int, metavar="N", help="of --training (default: 2)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of --training: sequences a step (default: 8)")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--routing", choices=cases.ROUTING_KINDS, default="uniform")
    parser.add_argument("--peers", default="auto", metavar="LIST", help="auto, all, none, or names joined by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: does everything run?")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin no further case after so long")
    parser.add_argument("--save", action="store_true", help="write the results file, the plot and README's tables")
    parser.add_argument("--readme", action="store_true", help="only fill README from the stored results")
    parser.add_argument("--check", action="store_true", help="exit 1 if the results or README are stale")
    tests = parser.add_mutually_exclusive_group()
    tests.add_argument("--tests", metavar="PASSED,FAILED,SKIPPED", help="counts of the test run on this card")
    tests.add_argument("--junit", metavar="FILE", help="the same, from a file of pytest --junit-xml")
    parser.add_argument("--results", type=Path, default=results_file.RESULTS, metavar="FOLDER")
    parser.add_argument("--readme-file", type=Path, default=results_file.ROOT / "README.md", metavar="FILE")
    return parser.parse_args(arguments)


def counted_tests(options):
    """The counts given by --tests or --junit, or None."""
    if options.junit:
        return results_file.tests_from_junit(options.junit)
    return results_file.tests_from_text(options.tests) if options.tests else None


def refill(options):
    """--readme: test counts, if given, go into the newest results file; then README and the plots are made anew."""
    tests = counted_tests(options)
    files = results_file.read_all(options.results)
    if tests is not None:
        if not files:
            raise ValueError(f"--tests with --readme wants a results file in {options.results}")
        path, content = max(files, key=lambda file: file[1]["date"])
        results_file.write(path, {**content, "tests": tests})
        print(f"test counts go into {path.name}")
    write_reports(options)


def write_reports(options):
    """README's block and a plot a card, from the results files."""
    from . import plot

    for path, content in results_file.read_all(options.results):
        if not plot.draw(content, path.with_suffix(".png")):
            print(f"no plot for {path.name}: matplotlib is not installed, or there are no bf16 rows")
    report.fill_readme(options.readme_file, options.results)


def run_check(options):
    """--check: prints what is stale; the exit status."""
    problems = report.check(options.readme_file, options.results)
    for problem in problems:
        print(problem)
    for path, content in results_file.read_all(options.results):
        gaps = report.missing(content)
        if gaps:
            print(f"note: {path.name} is not a full run; it lacks {len(gaps)} cases, such as {gaps[0]}")
    if not problems:
        print("the results files are those of the sources, and README shows them")
    return 1 if problems else 0


def main(arguments=None):
    """The command line; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        if options.check:
            return run_check(options)
        if options.readme:
            refill(options)
            return 0
        from . import run

        return run.run(options, counted_tests(options), write_reports)
    except (ValueError, OSError) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
