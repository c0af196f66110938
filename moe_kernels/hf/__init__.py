"""Hugging Face transformers on our kernels, in one line or in two.

    register()                  adds the experts backend "moe_kernels", for every family with experts of its interface
    replace_moe_layers(model)   experts and routers of the families whose routers `moe_kernels.gate` computes
    restore_moe_layers(model)   undoes it

transformers is imported when one of them is called, not before. `python -m moe_kernels.hf` prints how each family that
transformers has is served.
"""

from .backend import plan_of, register
from .replace import Report, replace_moe_layers, restore_moe_layers

__all__ = ["Report", "plan_of", "register", "replace_moe_layers", "restore_moe_layers"]
