"""Draws bench/results/<card>.png from a results file."""

from . import report

PANELS = (("forward", "tflop_per_s", "TFLOP/s", "dense_tflop_per_s"),
          ("train", "tflop_per_s", "TFLOP/s", "dense_tflop_per_s"),
          ("decode", "gb_per_s", "GB/s of expert weights", "read_gb_per_s"))


def draw(content, path, dtype="bf16", routing="uniform"):
    """One panel a pass: our speed beside Hugging Face's grouped_mm and what else was measured, the limit as a line.

    Returns: whether a plot was drawn; not if matplotlib is missing or there are no such rows.
    """
    panels = [panel for panel in PANELS if report.rows_of(content["results"], panel[0], dtype, routing)]
    try:
        import matplotlib
    except ImportError:
        return False
    if not panels:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    impls = [report.OURS, report.PEER] + sorted({impl for panel in panels for impl in report.other_peers(
        content["results"], panel[0], dtype, routing)})
    colors = {impl: f"C{number}" for number, impl in enumerate(impls)}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 6), squeeze=False)
    for axis, (pass_name, field, unit, limit) in zip(axes[0], panels):
        ours = report.rows_of(content["results"], pass_name, dtype, routing)
        positions = range(len(ours))
        shown = [report.OURS, report.PEER, *report.other_peers(content["results"], pass_name, dtype, routing)]
        height = 0.8 / len(shown)
        for number, impl in enumerate(shown):
            rows = report.rows_of(content["results"], pass_name, dtype, routing, impl)
            axis.barh([p - 0.4 + (number + 0.5) * height for p in positions],
                      [rows[key][field] if key in rows else 0 for key in ours], height, color=colors[impl],
                      label="Hugging Face grouped_mm" if impl == report.PEER else impl)
        axis.axvline(content["limits"][limit], color="black", linestyle="--", linewidth=1, label="measured limit")
        axis.set_yticks(list(positions), [f"{shape} {num_tokens}" for shape, num_tokens in ours], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(unit)
        axis.set_title(report.TITLES[pass_name], fontsize=10)
    legend = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(legend.values(), legend.keys(), loc="lower center", ncols=2 * len(panels))
    figure.suptitle(f"{content['card']}, {dtype}, {routing} routing")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return True
