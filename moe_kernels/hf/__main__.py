"""python -m moe_kernels.hf: prints how each model family of the installed transformers is served."""

import sys

from .families import table

if __name__ == "__main__":
    try:
        print(table())
    except ImportError as error:
        sys.exit(str(error))
