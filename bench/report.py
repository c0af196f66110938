"""What is made from the results files: README's block, the summary lines, the plot, and the check. Needs no torch."""

import math
from pathlib import Path

from . import cases, results_file
from .results_file import ROOT

OURS, PEER = "moe_kernels", "hf_grouped_mm"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_RESULTS = "No results are stored yet: `python -m bench --save` measures the card that it runs on."
MEMORY_FIELDS = {"extra_over_rows": "peak memory", "backward_extra_over_rows": "peak memory of the backward"}
TITLES = {"forward": "Forward", "train": "Forward and backward, all gradients",
          "decode": "Decode (forward, caches cold)"}


def geometric_mean(values):
    """Of positive numbers; None for none."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def rows_of(results, pass_name, dtype, routing, impl=OURS):
    """The rows of one implementation in the order of measuring: (shape, num_tokens) -> row."""
    return {(row["shape"], row["num_tokens"]): row for row in results
            if (row["pass"], row["dtype"], row["routing"], row["impl"]) == (pass_name, dtype, routing, impl)}


def kinds(results):
    """The (dtype, routing) pairs for which there are layer rows, bf16 and uniform first."""
    found = {(row["dtype"], row["routing"]) for row in results if row["pass"] in TITLES}
    return sorted(found, key=lambda kind: (kind[0] != "bf16", kind[1] != "uniform", kind))


def speed_ups(ours, theirs):
    """(shape, num_tokens) -> time of the other / our time, where both were measured."""
    return {key: theirs[key]["ms"] / row["ms"] for key, row in ours.items() if key in theirs}


def other_peers(results, pass_name, dtype, routing):
    """The implementations of a pass beside ours and Hugging Face's grouped_mm, by name."""
    return sorted({row["impl"] for row in results if row["impl"] not in (OURS, PEER)
                   and (row["pass"], row["dtype"], row["routing"]) == (pass_name, dtype, routing)})


def fastest_peers(results, pass_name, dtype, routing):
    """(shape, num_tokens) -> the fastest row of those implementations."""
    fastest = {}
    for impl in other_peers(results, pass_name, dtype, routing):
        for key, row in rows_of(results, pass_name, dtype, routing, impl).items():
            fastest[key] = min(fastest.get(key, row), row, key=lambda row: row["ms"])
    return fastest


def _ratio(ratio):
    """In two places, or in three where two would make 1 of less."""
    return f"{ratio:.3f}" if 0.995 <= ratio < 1 else f"{ratio:.2f}"


def _ms(row):
    """A time with a star if no CUDA graph was captured."""
    return f"{row['ms']:.3f}" + ("*" if row["timing"] == "eager" else "")


def _ratio_words(ratios, than):
    """How much faster we are in the mean, and where we are slower."""
    slower = [f"{shape} {num_tokens} ({_ratio(ratio)})" for (shape, num_tokens), ratio in ratios.items() if ratio < 1]
    return (f"{geometric_mean(ratios.values()):.2f} times as fast as {than} in the geometric mean over {len(ratios)} "
            f"cases; slower in {', '.join(slower) or 'none'}")


def summary(results, dtype="bf16", routing="uniform"):
    """Lines: the geometric means over the cases of 1024 tokens and more, and the cases where we are slower."""
    lines = []
    for pass_name in ("forward", "train", "decode"):
        rows = rows_of(results, pass_name, dtype, routing)
        if not rows:
            continue
        line = f"{TITLES[pass_name]}: {geometric_mean(row['share'] for row in rows.values()):.2f} of the floor"
        ratios = speed_ups(rows, rows_of(results, pass_name, dtype, routing, PEER))
        if ratios:
            line += " and " + _ratio_words(ratios, "Hugging Face's grouped_mm")
        ratios = speed_ups(rows, fastest_peers(results, pass_name, dtype, routing))
        if ratios:
            names = other_peers(results, pass_name, dtype, routing)
            line += ". " + _ratio_words(ratios, names[0] if len(names) == 1 else f"the fastest of {', '.join(names)}")
        lines.append(line + ".")
    return lines


def _table(results, pass_name, dtype, routing):
    """A Markdown table of one pass: ours beside Hugging Face's and, where others were measured, the fastest of them."""
    ours, theirs = (rows_of(results, pass_name, dtype, routing, impl) for impl in (OURS, PEER))
    fastest = fastest_peers(results, pass_name, dtype, routing)
    ratios, others = speed_ups(ours, theirs), speed_ups(ours, fastest)
    decode = pass_name == "decode"
    unit = "GB/s" if decode else "TFLOP/s"
    lines = [f"| shape | tokens | ms | {unit} | share of the floor | HF grouped_mm, ms | times as fast |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    if fastest:
        lines = [lines[0] + " fastest of the others | ms | times as fast |", lines[1] + " --- | ---: | ---: |"]
    for key, row in ours.items():
        speed = row["gb_per_s"] if decode else row["tflop_per_s"]
        peer = theirs.get(key)
        peer_ms = "-" if peer is None else _ms(peer)
        ratio = _ratio(ratios[key]) if key in ratios else "-"
        lines.append(f"| {key[0]} | {key[1]} | {row['ms']:.3f} | {speed:.0f} | {row['share']:.2f} "
                     f"| {peer_ms} | {ratio} |"
                     + (f" {fastest[key]['impl']} | {_ms(fastest[key])} | {_ratio(others[key])} |" if key in others
                        else " - | - | - |" if fastest else ""))
    return lines


def _stage_table(results):
    """A Markdown table of the stages: ours beside torch's own operators."""
    ours = [row for row in results if row["pass"].startswith("stage:") and row["impl"] == OURS]
    if not ours:
        return []
    torch_ms = {tuple(row[name] for name in results_file.ROW_KEY[:-1]): row["ms"] for row in results
                if row["impl"] == "torch"}
    lines = ["", "Stages, beside the same in torch's operators:", "",
             "| stage | shape | tokens | ms | speed | share of the floor | torch, ms |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in ours:
        other = torch_ms.get(tuple(row[name] for name in results_file.ROW_KEY[:-1]))
        speed = f"{row['tflop_per_s']:.0f} TFLOP/s" if row["gb_per_s"] is None else f"{row['gb_per_s']:.0f} GB/s"
        lines.append(f"| {row['pass'][6:]} | {row['shape']} | {row['num_tokens']} | {row['ms']:.4f} | {speed} | "
                     f"{row['share']:.2f} | {'-' if other is None else f'{other:.4f}'} |")
    return lines


def _model_table(models):
    """A Markdown table of the whole models: our backend, our layers, and how much faster they are."""
    if not models:
        return []
    title = (f"Whole models of Hugging Face transformers, {models['shape']}, random weights, {models['num_tokens']} "
             "tokens, called without CUDA graphs or compilation:")
    lines = ["", title, "", "| pass | implementation | ms | times as fast as grouped_mm | as eager |",
             "| --- | --- | ---: | ---: | ---: |"]
    for pass_name, times in models["ms"].items():
        for implementation, ms in times.items():
            ratios = models["times_as_fast"][pass_name].get(implementation, {})
            lines.append(f"| {pass_name} | {implementation} | {ms:.2f} | " + " | ".join(
                f"{ratios[peer]:.2f}" if peer in ratios else "-" for peer in ("grouped_mm", "eager")) + " |")
    return lines


def training_lines(training):
    """What training of the reference transformer gave: a table, its meaning, and where a step's time goes."""
    if not training:
        return []
    ours, theirs = (training["implementations"][name] for name in (OURS, PEER))
    lines = [f"Training of the reference transformer, preset {training['preset']} "
             f"({training['parameters'] / 1e6:.0f} M parameters, "
             f"{training['active_parameters'] / 1e6:.0f} M of them work on a token), "
             f"{training['batch_size']} x {training['seq_len']} tokens a step, AdamW, bf16 autocast, "
             f"{training['steps']} steps:", "",
             "| experts | ms a step | tokens/s | share of the dense rate | peak memory, GB | loss at the end |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, found in training["implementations"].items():
        peak = "-" if found["peak_mb"] is None else f"{found['peak_mb'] / 1e3:.1f}"
        losses = ", ".join(f"{curve[-1]:.3f}" for curve in found["losses"])
        lines.append(f"| {name}{'*' if found['mode'] == 'eager' else ''} | {found['ms']:.1f} "
                     f"| {found['tokens_per_s']} | {found['share']:.3f} | {peak} | {losses} |")
    memory = training["of_their_memory"]
    lines += ["", f"{training['times_as_fast']:.2f} times as fast as with Hugging Face's grouped_mm"
                  + ("" if memory is None else f", with {memory:.2f} of its peak memory")
                  + f". {_curve_words(training['curves'])}"]
    if "eager" in (ours["mode"], theirs["mode"]):
        lines += ["", "\\* called without a CUDA graph, which it could not be captured into."]
    return lines + _profile_table(training["profile"])


def _curve_words(curves):
    """A sentence on two implementations' losses."""
    words = ("In the last quarter of the steps the losses of the same seed differ by "
             f"{curves['between_implementations']:.4f} nats in the mean")
    if curves["agree"] is None:
        return words + "."
    return (f"{words}, those of two seeds by {curves['between_seeds']:.4f}: they "
            + ("agree within their noise." if curves["agree"] else "differ by more than their noise."))


def _profile_table(profile):
    """Where one training step's time goes, by torch.profiler."""
    if profile is None:
        return []
    total = sum(profile["groups"].values())
    return ["", f"Kernels of one of our training steps, {total:.1f} ms together:", "",
            "| kernels | ms | share |", "| --- | ---: | ---: |",
            *(f"| {group} | {ms:.2f} | {ms / total:.2f} |" for group, ms in profile["groups"].items() if ms)]


def _span(values):
    """The smallest and the largest of some numbers, in words."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _memory_lines(results):
    """Two lines about memory, of the rows that know it."""
    texts = {"extra_over_rows": "Memory beyond weights, inputs and output at the highest point of an inference",
             "backward_extra_over_rows": "Memory beyond what training keeps and the gradients, at that of a backward"}
    lines = []
    for field, text in texts.items():
        values = [row[field] for row in results if row["impl"] == OURS and row.get(field) is not None]
        if values:
            lines += ["", f"{text}: {_span(values)} times S*(I + H) elements."]
    return lines


def _host_lines(results):
    """A line for each pass: the host's time of a call in elementwise operations, ours and each peer's."""
    lines = []
    for pass_name, title in (("host:forward", "one forward"), ("host:train", "one forward and backward"),
                             ("host:train-8-layers", "one forward and backward of each of eight layers together"),
                             ("host:train-one-thread", "one forward and backward on the calling thread "
                                                       "(torch.autograd.set_multithreading_enabled(False))")):
        cases_of = {}
        for row in results:
            if row["pass"] == pass_name:
                case = tuple(row[name] for name in results_file.ROW_KEY[:-1])
                cases_of.setdefault(case, []).append(f"{row['impl']} {row['in_operations']:.1f}")
        lines += [line for case, texts in cases_of.items() for line in (
            "", f"Host time of {title} without a CUDA graph, {case[0]} with {case[1]} tokens, in elementwise torch "
                f"operations (x * 2): {', '.join(texts)}.")]
    return lines


def _skew_table(results):
    """A Markdown table of skewed routing: the time over that of uniform routing, forward and with the backward."""
    ratios = {}
    for row in results:
        if row["pass"].startswith("skew:") and row["impl"] == OURS:
            case = ratios.setdefault((row["shape"], row["num_tokens"]), {})
            case[row["pass"][5:], row["routing"]] = row["over_uniform"]
    if not ratios:
        return []
    columns = [(pass_name, routing) for routing in ("zipf", "same") for pass_name in ("forward", "train")]
    lines = ["", "Skewed routing, time over that of uniform routing: a Zipf load (exponent 1), and all tokens on the "
                 "same K experts:", "",
             "| shape | tokens | Zipf, forward | Zipf, with backward | same, forward | same, with backward |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for (shape, num_tokens), found in ratios.items():
        cells = (f"{found[column]:.2f}" if column in found else "-" for column in columns)
        lines.append(f"| {shape} | {num_tokens} | {' | '.join(cells)} |")
    return lines


def card_section(content, name):
    """README's lines about one card."""
    limits, results = content["limits"], content["results"]
    versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    lines = [f"### {content['card']}", "",
             f"Measured {content['date'][:10]} with {versions}; sources {content['source_hash']}. "
             "Limits in the last of its runs: "
             f"dense product {limits['dense_tflop_per_s']:.0f} TFLOP/s, copy {limits['copy_gb_per_s']:.0f} GB/s, "
             f"read {limits['read_gb_per_s']:.0f} GB/s."]
    if content.get("tests"):
        tests = content["tests"]
        lines.append(f"Tests on this card: {tests['passed']} passed, {tests['failed']} failed, "
                     f"{tests['skipped']} skipped.")
    lines += [f"Not measured, because it failed: {failure}." for failure in content.get("failures", [])]
    for dtype, routing in kinds(results):
        for line in summary(results, dtype, routing):
            lines += ["", line]
        for pass_name, title in TITLES.items():
            if rows_of(results, pass_name, dtype, routing):
                lines += ["", f"{title}, {dtype}, {routing} routing:", "", *_table(results, pass_name, dtype, routing)]
    lines += _stage_table(results) + _skew_table(results) + _memory_lines(results) + _host_lines(results)
    lines += _model_table(content.get("models"))
    if content.get("training"):
        lines += ["", *training_lines(content["training"])]
    if any(row["timing"] == "eager" and row["impl"] != OURS and row["pass"] in TITLES for row in results):
        lines += ["", "\\* called without a CUDA graph, which it could not be captured into."]
    return lines + ["", f"![{content['card']}](bench/results/{name}.png)"]


def readme_block(results=results_file.RESULTS):
    """The text between README's two markers."""
    files = results_file.read_all(results)
    if not files:
        return NO_RESULTS
    return "\n\n".join("\n".join(card_section(content, path.stem)) for path, content in files)


def _split_readme(readme):
    text = Path(readme).read_text()
    before, begin, rest = text.partition(BEGIN)
    block, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the markers {BEGIN} and {END}")
    return before, block.strip("\n"), after


def fill_readme(readme, results=results_file.RESULTS):
    """Writes the block anew; the rest of the file stays."""
    before, _, after = _split_readme(readme)
    Path(readme).write_text(f"{before}{BEGIN}\n{readme_block(results)}\n{END}{after}")


def check(readme=ROOT / "README.md", results=results_file.RESULTS, root=ROOT):
    """What is stale, a line each; empty if the results are those of the sources and README shows them."""
    files = results_file.read_all(results)
    problems = []
    if not files:
        problems.append(f"there is no results file in {results}: run `python -m bench --save` on a GPU")
    current = results_file.source_hash(root)
    for path, content in files:
        if content["source_hash"] != current:
            problems.append(f"{path.name} is stale: it was measured on sources {content['source_hash']}, "
                            f"and those of csrc/ and moe_kernels/ are {current}")
    if _split_readme(readme)[1] != readme_block(results):
        problems.append(f"{Path(readme).name} does not show what the results files hold: "
                        "run `python -m bench --readme`")
    return problems


def missing(content):
    """The layer cases of a full bf16 run that a results file lacks."""
    return [f"{shape} {num_tokens} {pass_name}" for shape, num_tokens, pass_name in cases.expected_keys()
            if (shape, num_tokens) not in rows_of(content["results"], pass_name, "bf16", "uniform")]
