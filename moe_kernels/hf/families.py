"""How each model family of the installed transformers is served: the table of docs/hugging_face.md.

The rows come from the modules themselves: the experts of each family are built on the meta device from their default
configuration, and `plan_of` decides as it does in a model.
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import torch

from .backend import describe, experts_interface, plan_of
from .replace import FAMILIES

_DECORATOR = "@use_experts_implementation"
_OWN_LOOP = re.compile(r"^class (\w+(?:Experts|MoE|Moe|SparseMLP|MoeMLP|SparseMoeBlock))\(nn\.Module", re.MULTILINE)


class Row(NamedTuple):
    """A family, its experts class, how it is served ("fused", "unfused", "not served"), and the activation or why."""

    family: str
    experts: str
    route: str
    detail: str
    replaced: bool


def _modeling_files():
    import transformers.models

    folder = Path(transformers.models.__file__).parent
    return sorted(folder.glob("*/modeling_*.py"))


class _WithSizes:
    """A configuration in which a size that has no default is 8, and of several the first counts."""

    def __init__(self, configuration):
        self._configuration = configuration

    def __getattr__(self, name):
        value = getattr(self._configuration, name)
        if isinstance(value, (list, tuple)) and value:
            return value[0]
        return 8 if value is None else value


def _configurations(family):
    """The configuration classes of a family, those of text first."""
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    found = [x for _, x in inspect.getmembers(module, inspect.isclass) if x.__module__ == module.__name__]
    return sorted(found, key=lambda x: "Text" not in x.__name__)


def _built(experts_class, family):
    """The experts on the meta device, from the first default configuration that has what they ask for, or None."""
    for configuration in _configurations(family):
        try:
            with torch.device("meta"):
                return experts_class(_WithSizes(configuration()))
        except (AttributeError, TypeError, KeyError, ValueError):
            continue
    return None


def _rows_of(path):
    source, family = path.read_text(encoding="utf-8"), path.parent.name
    decorated = re.findall(rf"^{_DECORATOR}.*\nclass (\w+)", source, re.MULTILINE)
    if not decorated:
        return [Row(family, name, "not served", "its experts are not of transformers' interface", False)
                for name in _OWN_LOOP.findall(source)[:1]]
    module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
    rows = []
    for name in decorated:
        experts = _built(getattr(module, name), family)
        if experts is None:
            rows.append(Row(family, name, "not served", "not built from its default configuration", False))
            continue
        route, detail = plan_of(experts)
        detail = describe(detail) if route == "fused" else detail
        rows.append(Row(family, name, route, detail, family in FAMILIES))
    return rows


def rows():
    """A Row for each experts class of transformers; ImportError where it is missing or too old."""
    experts_interface()
    return [row for path in _modeling_files() for row in _rows_of(path)]


def table():
    """The rows in Markdown, with the version of transformers and the counts above."""
    found = rows()  # has checked that there is a transformers
    import transformers

    counts = ", ".join(f"{sum(row.route == route for row in found)} {route}"
                       for route in ("fused", "unfused", "not served"))
    lines = [f"transformers {transformers.__version__}: {counts}.", "",
             "| family | experts | route | activation, or why not fused | `replace_moe_layers` |",
             "| --- | --- | --- | --- | --- |"]
    lines += [f"| {row.family} | {row.experts} | {row.route} | {row.detail} | {'yes' if row.replaced else ''} |"
              for row in found]
    return "\n".join(lines)
