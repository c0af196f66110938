"""What the build makes: the machine code, a module that loads in this torch, and how setup.py decides."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import moe_kernels
from moe_kernels import schemas

ROOT = Path(__file__).resolve().parent.parent
MAX_MODULE_MB = 20
BUILD_INPUTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE", "csrc",
                "moe_kernels")


@functools.cache
def module_path():
    """The compiled module that tests run with, or None."""
    spec = importlib.util.find_spec("moe_kernels._C")
    return None if spec is None else Path(spec.origin)


def tool_folders():
    """Where NVIDIA's binary utilities may be: of PyPI's wheels, of a toolkit, of triton."""
    for entry in map(Path, sys.path):
        yield from entry.glob("nvidia/*/bin")
        yield from entry.glob("triton/backends/nvidia/bin")
    yield Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"


@functools.cache
def cuobjdump(*options):
    """What cuobjdump prints about the module."""
    path = os.pathsep.join([os.environ["PATH"], *map(str, tool_folders())])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or ("-sass" in options and shutil.which("nvdisasm", path=path) is None):
        pytest.skip("cuobjdump or nvdisasm is not installed")
    done = subprocess.run([tool, *options, str(module_path())], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_module = pytest.mark.skipif(module_path() is None, reason="the CUDA module is not built here")


@functools.cache
def machine_code():
    """Kernel name -> the set of its instructions, of every architecture together.

    Names have no suffixes, such as {"HMMA", "LDGSTS"}, but for that of loads into several blocks: "UTMALDG.MULTICAST".
    """
    kernels, name = {}, None
    for line in cuobjdump("-sass").splitlines():
        function = re.search(r"Function : (\S+)", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(\.[A-Z0-9_.]*MULTICAST)?", line)
        if function:
            name = function[1]
            kernels.setdefault(name, set())
        elif instruction:
            kernels[name].add(instruction[1] + (".MULTICAST" if instruction[2] else ""))
    return kernels


# ------------------------------------------------------------------------------------------------------ machine code


@needs_module
def test_module_is_small():
    assert module_path().stat().st_size < MAX_MODULE_MB * 1e6


@needs_module
def test_no_kernel_spills_or_uses_a_stack():
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert len(usage) > 10
    assert [name for name, _, stack, local in usage if int(stack) or int(local)] == []


@needs_module
def test_no_kernel_reads_or_writes_local_memory():
    kernels = machine_code()
    assert len(kernels) > 10 and all(kernels.values()), "an empty kernel was compiled for the wrong architecture"
    assert [name for name, instructions in kernels.items() if instructions & {"LDL", "STL"}] == []


@needs_module
@pytest.mark.parametrize("engine, kernel", [("sm80", "m_grouped_kernel"), ("sm80", "k_grouped_kernel"),
                                            ("sm90", "m_grouped_kernel"), ("sm90", "k_grouped_kernel"),
                                            ("sm90", "swap_ab_kernel"), ("sm90", "ping_pong_kernel")])
def test_products_run_on_tensor_cores_and_load_asynchronously(engine, kernel):
    wanted, unwanted = {"sm80": ({"HMMA", "LDGSTS"}, {"HGMMA"}),
                        "sm90": ({"HGMMA", "UTMALDG", "UTMASTG|UTMAREDG"}, {"HMMA"})}[engine]
    found = {name: instructions for name, instructions in machine_code().items() if engine in name and kernel in name}
    assert found
    for name, instructions in found.items():
        missing = [choice for choice in wanted if not instructions & set(choice.split("|"))]
        assert not missing and not instructions & unwanted, name


@needs_module
def test_kernels_of_the_sm90_engine_that_load_for_two_blocks_at_once():
    found = {name: instructions for name, instructions in machine_code().items() if "4sm90" in name}
    sharing = {name for name, instructions in found.items() if "UTMALDG.MULTICAST" in instructions}
    assert sharing and sharing == {name for name in found if "k_grouped_kernel" in name or "ping_pong_kernel" in name}


@needs_module
def test_gathers_of_the_sm90_engine_are_asynchronous():
    found = {name: instructions for name, instructions in machine_code().items() if "4sm90" in name}
    gathering = [name for name, instructions in found.items() if "LDGSTS" in instructions]
    assert gathering and len(gathering) < len(found), "operands that lie in order come by TMA alone"


@needs_module
def test_code_for_ampere_and_hopper_and_ptx_for_newer_cards():
    code = cuobjdump("-lelf")
    assert re.search(r"ELF file.*sm_80", code) and re.search(r"ELF file.*sm_90a", code)
    assert re.search(r"PTX file.*(sm|compute)_80", cuobjdump("-lptx"))


@needs_module
@pytest.mark.parametrize("capability, rows, elements, engine", [
    (90, 4096, 1024, "sm90"), (90, 16, 1024, "sm80"), (90, 16, 2**24, "sm90"), (80, 4096, 1024, "sm80"),
    (89, 4096, 1024, "sm80"), (100, 4096, 1024, "sm80"), (90, 2**30 + 1, 1024, "sm80")])
def test_hopper_code_is_chosen_on_hopper_alone_and_beyond_a_few_rows(capability, rows, elements, engine):
    assert schemas.compiled_module.choose_engine(rows, elements, capability) == engine


# ----------------------------------------------------------------------------------------------- the module in torch


@needs_module
def test_module_serves_every_operator_in_this_torch():
    info = moe_kernels.build_info()
    assert info["cuda_built"] and info["torch"] == torch.__version__ and "80" in str(info["architectures"])
    assert [name for name in schemas.SCHEMAS.keys() - schemas.FALLBACKS.keys()
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_kernels::{name}", "CUDA")] == []


def test_build_info_tells_whether_the_module_is_there():
    assert moe_kernels.build_info()["cuda_built"] == (module_path() is not None)


# --------------------------------------------------------------------------------------------------- how it is built


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a build reads, so that the tests leave no trace in this one."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    return folder


def build(checkout, choice):
    """Runs setup.py where there is neither a compiler nor a CUDA toolkit."""
    pytest.importorskip("setuptools")
    empty = checkout / "no-tools"
    empty.mkdir()
    environment = {**os.environ, "PATH": str(empty), "CUDA_HOME": str(empty), "MOE_BUILD_CUDA": choice}
    for name in ("CUDACXX", "CUDA_PATH", "CXX", "CC"):
        environment.pop(name, None)
    return subprocess.run([sys.executable, "setup.py", "build", "--build-base", "out", "--build-lib", "out/lib"],
                          cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)


def test_a_source_distribution_has_what_a_build_reads(checkout):
    pytest.importorskip("setuptools")
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "--dist-dir", "dist"], cwd=checkout,
                   check=True, capture_output=True, timeout=120)
    with tarfile.open(next((checkout / "dist").glob("*.tar"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    paths = (path for name in BUILD_INPUTS for path in (checkout / name, *(checkout / name).rglob("*")))
    wanted = {str(path.relative_to(checkout)) for path in paths if path.is_file()}
    assert "csrc/kernels/up_proj.cu" in wanted and wanted <= packed, sorted(wanted - packed)


@pytest.mark.parametrize("choice", ["0", "auto"])
def test_without_a_toolkit_nothing_is_compiled(checkout, choice):
    done = build(checkout, choice)
    assert done.returncode == 0, done.stderr
    library = checkout / "out" / "lib" / "moe_kernels"
    assert (library / "ops.py").exists() and (library / "model" / "transformer.py").exists()
    assert list(library.rglob("*.so")) == []


def test_insisting_on_cuda_without_nvcc_is_one_clear_line(checkout):
    done = build(checkout, "1")
    assert done.returncode != 0
    lines = [line for line in done.stderr.strip().splitlines() if "nvcc" in line]
    assert len(lines) == 1 and "MOE_BUILD_CUDA" in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_choice_is_refused(checkout):
    done = build(checkout, "maybe")
    assert done.returncode != 0 and "MOE_BUILD_CUDA" in done.stderr and "maybe" in done.stderr


# ------------------------------------------------------------------------------------------------ rules of the layout


def includes(folder):
    """(file, included header) of every include under a folder of csrc/."""
    for path in sorted((ROOT / "csrc" / folder).rglob("*")):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
                yield path.relative_to(ROOT).as_posix(), header


def test_kernels_include_no_torch_header():
    found = list(includes("kernels"))
    assert found
    assert [pair for pair in found if re.match(r"(torch|ATen|c10|pybind11|Python)\b", pair[1])] == []


def test_pybind11_and_torch_never_meet():
    by_file = {}
    for path, header in includes("."):
        by_file.setdefault(path, []).append(header)
    assert [path for path, headers in by_file.items()
            if any(header.startswith("pybind11") for header in headers)
            and any(header.startswith("torch/") for header in headers)] == []


def test_every_source_is_built():
    listed = (ROOT / "CMakeLists.txt").read_text()
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*")
               if path.suffix in (".cu", ".cpp")]
    if "GLOB" not in listed:
        assert [source for source in sources if source not in listed] == []
