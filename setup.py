"""Builds the CUDA module through CMakeLists.txt where there is an nvcc; without one the package is Python alone.

MOE_BUILD_CUDA          auto (default): build where nvcc is found; 1: fail where it is not; 0: do not build
CUDACXX, CUDA_HOME      where nvcc is; else the PATH and /usr/local/cuda are searched
MOE_CUDA_ARCHITECTURES  as CMake's CMAKE_CUDA_ARCHITECTURES, separated by ";"; CMakeLists.txt has the default
MAX_JOBS                compile jobs at a time; default: one a core
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc():
    """The path of nvcc, or None. A CUDACXX or CUDA_HOME that is set is believed: nothing else is searched then."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    if os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def decide():
    """The nvcc to build with, or None: a Python-only package."""
    wanted = os.environ.get("MOE_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"MOE_BUILD_CUDA must be auto, 1 or 0, got {wanted!r}")
    nvcc = None if wanted == "0" else find_nvcc()
    if wanted == "1" and nvcc is None:
        sys.exit("MOE_BUILD_CUDA=1, but no nvcc was found: set CUDA_HOME to a CUDA toolkit, or put nvcc on the PATH")
    if wanted == "auto" and nvcc is None:
        print("moe_kernels: no nvcc found, installing the torch implementation without CUDA kernels", file=sys.stderr)
    return nvcc


class CMakeBuild(build_ext):
    """Runs cmake and ninja in build/<tag>, which stays: a rebuild compiles what changed."""

    def build_extension(self, extension):
        import pybind11
        from torch.utils import cpp_extension

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "CMAKE_CUDA_COMPILER": NVCC,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "TORCH_LIBRARY_DIRS": ";".join(cpp_extension.library_paths()),
        }
        if os.environ.get("MOE_CUDA_ARCHITECTURES"):
            options["MOE_CUDA_ARCHITECTURES"] = os.environ["MOE_CUDA_ARCHITECTURES"]
        # -U: a default of an older CMakeLists.txt must not live on in the build folder
        configure = ["cmake", "-UMOE_CUDA_ARCHITECTURES", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        subprocess.run(configure + [f"-D{name}={value}" for name, value in options.items()], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(folder), "--parallel", jobs], check=True)


NVCC = decide()

setup(
    ext_modules=[Extension("moe_kernels._C", sources=[])] if NVCC else [],
    cmdclass={"build_ext": CMakeBuild},
)
