"""What pyproject.toml cannot say: the package list (`kernels/` is `spear_fast.kernels`) and the optional extension.

SPEAR_FAST_BUILD  auto (default): build the extension, or say why not; require: fail if it cannot be built;
                  off: leave it out
SPEAR_FAST_MARCH  what the compiler's -march gets: native (default), x86-64-v3, …; empty for the compiler's own default
TORCH_CUDA_ARCH_LIST  what the CUDA kernels are built for, where torch has CUDA and nvcc of its major version is found
SPEAR_FAST_SANITIZE  what -fsanitize gets, for tests: address,undefined (`make asan`)
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
MODE = os.environ.get("SPEAR_FAST_BUILD", "auto")
MARCH = os.environ.get("SPEAR_FAST_MARCH", "native")
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
SANITIZE = os.environ.get("SPEAR_FAST_SANITIZE", "")

# compiler macro → the name that /proc/cpuinfo has for the same feature
FEATURES = {
    "__SSE4_2__": "sse4_2",
    "__POPCNT__": "popcnt",
    "__AVX__": "avx",
    "__AVX2__": "avx2",
    "__FMA__": "fma",
    "__F16C__": "f16c",
    "__BMI__": "bmi1",
    "__BMI2__": "bmi2",
    "__LZCNT__": "abm",
    "__MOVBE__": "movbe",
    "__AVX512F__": "avx512f",
    "__AVX512BW__": "avx512bw",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512CD__": "avx512cd",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16",
    "__AVXVNNI__": "avx_vnni",
    "__ARM_FEATURE_SVE": "sve",
    "__ARM_FEATURE_SVE2": "sve2",
    "__ARM_FEATURE_BF16": "bf16",
}


def say(text: str) -> None:
    print(f"spear_fast: {text}", file=sys.stderr, flush=True)


def give_up(reason: str) -> None:
    """Goes on without the extension, or stops where it is required."""
    if MODE == "require":
        raise SystemExit(f"spear_fast: the C++ extension cannot be built: {reason}")
    say(f"installing without the C++ extension ({reason}); the plain-torch ops are used")


def compiler() -> str | None:
    name = os.environ.get("CXX", "c++").split()[0]
    return shutil.which(name) or shutil.which("g++") or shutil.which("clang++")


def macros(path: str, flags: list[str]) -> set[str]:
    """Returns the macros that the compiler defines under these flags."""
    command = [path, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[1] for line in listing.splitlines() if line.startswith("#define ")}


def capability(defined: set[str]) -> str:
    """Returns the name under which at::vec knows the instruction set."""
    if {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__", "__FMA__"} <= defined:
        return "AVX512"
    if {"__AVX2__", "__FMA__", "__F16C__"} <= defined:
        return "AVX2"
    return "DEFAULT"


def sanitizers() -> tuple[list[str], list[str]]:
    """Returns compile and link flags for the sanitizers asked for; what they find ends the process."""
    if not SANITIZE:
        return [], []
    # torch hides the type information that checks of virtual calls need
    checks = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    return ["-O1", "-g1", "-fno-omit-frame-pointer", *checks], checks


def openmp(torch_lib: Path) -> tuple[list[str], list[str]]:
    """Returns compile and link flags for the OpenMP that torch uses: with a second one threads fight for the cores."""
    if sys.platform != "linux":
        return [], []
    renamed = sorted(torch_lib.glob("libgomp-*.so*")) + sorted(torch_lib.parent.parent.glob("torch.libs/libgomp-*.so*"))
    if renamed:
        return ["-fopenmp"], [f"-L{renamed[0].parent}", f"-l:{renamed[0].name}"]
    return ["-fopenmp"], ["-fopenmp"]


def find_nvcc() -> str | None:
    """Returns where nvcc is, if it is there."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = Path(home) / "bin" / "nvcc" if home else None
    return str(named) if named and named.is_file() else shutil.which("nvcc")


def nvcc_for(cuda: str | None) -> str | None:
    """Returns the nvcc that fits torch's CUDA, or None, having said why where torch has CUDA."""
    if cuda is None:
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        say("building without the CUDA kernels (no nvcc found; set CUDA_HOME); CuPy can build them at run time")
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)", said)
    if release is None or release[1] != cuda.split(".")[0]:
        which = f"nvcc is of CUDA {release[1] if release else 'unknown'} and torch of {cuda}"
        say(f"building without the CUDA kernels ({which}; set CUDA_HOME); CuPy can build them at run time")
        return None
    return nvcc


def targets() -> list[str]:
    """Returns nvcc's flags for TORCH_CUDA_ARCH_LIST: machine code for each, and PTX where it says +PTX."""
    flags = []
    for name in filter(None, re.split(r"[;, ]+", ARCHITECTURES)):
        found = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if found is None:
            raise SystemExit(f"spear_fast: TORCH_CUDA_ARCH_LIST must name versions such as 9.0+PTX, got {name!r}")
        number = found[1] + found[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def device_objects(nvcc: str, folder: Path) -> list[str]:
    """Compiles the .cu files that launch kernels, side by side; returns the objects."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in [Path(__file__), *ROOT.glob("csrc/**/*.*")])
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", *targets()]

    def build(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        if not made.is_file() or made.stat().st_mtime < newest:
            subprocess.run([nvcc, *flags, "-c", "-o", str(made), str(source)], check=True)
        return str(made)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(build, sorted(ROOT.glob("csrc/cuda/launch_*.cu"))))


def cuda_folders(nvcc: str) -> list[str]:
    """Returns where nvcc links from."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    return re.findall(r'"-L([^"]+)"', plan.stdout + plan.stderr)


def extension_settings() -> dict:
    """Returns arguments for setup() that build the extension, or nothing where it cannot be built."""
    if MODE == "off":
        say("leaving out the C++ extension, as SPEAR_FAST_BUILD=off asks")
        return {}
    if MODE not in ("auto", "require"):
        raise SystemExit(f"spear_fast: SPEAR_FAST_BUILD is one of auto, require, off; got {MODE!r}")
    cxx = compiler()
    if cxx is None:
        give_up("no C++ compiler found; install g++ or set CXX")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        give_up(f"torch is not there at build time: {error}; install torch first and use --no-build-isolation")
        return {}
    march = [f"-march={MARCH}"] if MARCH else []
    try:
        defined = macros(cxx, march)
    except subprocess.CalledProcessError as error:
        give_up(f"{cxx} does not take {' '.join(march)}: {error.stderr.strip().splitlines()[-1]}")
        return {}
    level = capability(defined)
    omp_compile, omp_link = openmp(Path(torch.__file__).parent / "lib")
    flags = [
        "-O3",
        "-g0",
        *march,
        "-std=c++20",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wno-unknown-pragmas",
        # gcc 12 thinks that its own AVX-512 header reads what it has not written
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        *omp_compile,
    ]
    sanitize_compile, sanitize_link = sanitizers()
    flags += [f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}", *sanitize_compile]

    nvcc = nvcc_for(torch.version.cuda)
    extension = cpp_extension.CppExtension(
        "spear_fast._C",
        [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])],
        depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags},
        # a symbol that nobody has is an error now, not when the library is loaded
        extra_link_args=[*omp_link, *sanitize_link, *(["-Wl,-z,defs"] if sys.platform == "linux" else [])],
    )
    facts = {
        "torch": torch.__version__,
        "compiler": cxx,
        "march": MARCH,
        "capability": level,
        "machine": platform.machine(),
        "sanitize": SANITIZE or None,
        "features": sorted(name for macro, name in FEATURES.items() if macro in defined),
        "cuda": None,
        "nvcc": None,
        "cuda_targets": None,
    }

    class BuildOptional(cpp_extension.BuildExtension):
        """Builds the extension, notes beside it what it was built for, and lets an install pass without it."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, no_python_abi_suffix=True, **kwargs)

        def add_cuda(self, nvcc):
            """Adds the CUDA kernels to the extension, or says that they cannot be built."""
            try:
                objects = device_objects(nvcc, Path(self.build_temp) / "cuda")
            except subprocess.CalledProcessError as error:
                if MODE == "require":
                    raise
                say(f"building without the CUDA kernels ({error}); CuPy can build them at run time")
                return
            extension.extra_objects += objects
            extension.sources += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cuda/*.cpp"))]
            extension.libraries += ["torch_cuda", "cudart"]
            extension.library_dirs += cuda_folders(nvcc)
            facts.update(cuda=torch.version.cuda, nvcc=nvcc, cuda_targets=ARCHITECTURES)

        def build_extensions(self):
            try:
                if nvcc is not None:
                    self.add_cuda(nvcc)
                super().build_extensions()
            except Exception as error:
                give_up(f"the compiler's own words are above; {error or type(error).__name__}")
                self.extensions = []

        def run(self):
            super().run()
            if self.extensions:
                notes = Path(self.get_ext_fullpath("spear_fast._C")).with_name("_build.json")
                notes.write_text(json.dumps(facts, indent=1) + "\n")

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildOptional}}


# what CuPy builds at run time where nvcc did not: folders of csrc, and the files in each that device code is made of
DEVICE_SOURCES = {
    "spear_fast.csrc": ["philox.h"],
    "spear_fast.csrc.cuda": ["*.cu", "*.h"],
    "spear_fast.csrc.select": ["*.h"],
}


def packages() -> list[str]:
    found = find_packages(str(ROOT), include=["spear_fast", "spear_fast.*"])
    below = find_packages(str(ROOT / "kernels"))
    return [*found, "spear_fast.kernels", *(f"spear_fast.kernels.{name}" for name in below), *DEVICE_SOURCES]


assert Extension  # setuptools must be imported before torch's build helpers
setup(
    packages=packages(),
    package_dir={"spear_fast": "spear_fast", "spear_fast.kernels": "kernels", "spear_fast.csrc": "csrc"},
    package_data={"spear_fast": ["py.typed"], **DEVICE_SOURCES},
    # the launches are nvcc's
    exclude_package_data={"spear_fast.csrc.cuda": ["launch*", "tensors.h"]},
    **extension_settings(),
)
