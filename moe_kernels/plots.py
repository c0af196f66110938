"""loss.png and experts.png of a run. matplotlib is loaded here and only when something is drawn."""

import math

from .errors import UserError


def draw(history, loads, folder):
    """Writes both plots; returns their paths. Raises: UserError without matplotlib, or on a file it cannot write."""
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError("the plots want matplotlib: pip install matplotlib") from error
    paths = [folder / "loss.png", folder / "experts.png"]
    figures = [_loss(pyplot, history), _experts(pyplot, loads)]
    try:
        for figure, path in zip(figures, paths):
            figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"cannot write plots to {folder}: {error.strerror or error}") from error
    finally:
        pyplot.close("all")
    return paths


def _loss(pyplot, history):
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    bits = [loss / math.log(2) for loss in history["losses"]]
    axes.plot(range(1, len(bits) + 1), bits, linewidth=0.8, alpha=0.6, label="training, each step")
    if history["validation"]:
        axes.plot(*zip(*history["validation"]), marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="bits per byte", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _experts(pyplot, loads):
    """A row a layer: the load of each expert over time in units of the mean load, and MaxVio beside it."""
    layers = loads.layers
    figure, grid = pyplot.subplots(max(1, len(layers)), 2, figsize=(10, 1 + 2.2 * max(1, len(layers))),
                                   width_ratios=(2, 1), squeeze=False, layout="constrained")
    for row, (name, violations) in enumerate(zip(layers, loads.max_violations().T.tolist())):
        image, curve = grid[row]
        relative = loads.shares(name).T * loads.tokens_per_expert(name).shape[1]
        extent = (loads.steps[0], loads.steps[-1] + 1, relative.shape[0] - 0.5, -0.5)
        drawn = image.imshow(relative.numpy(), aspect="auto", interpolation="nearest", extent=extent, cmap="RdBu_r",
                             vmin=0, vmax=2)
        figure.colorbar(drawn, ax=image, label="load / mean")
        image.set(title=name, xlabel="step", ylabel="expert")
        curve.plot(loads.steps, violations)
        curve.set(title="MaxVio", xlabel="step", ylim=(0, None))
        curve.grid(alpha=0.3)
    return figure
