"""What pyproject.toml cannot say: the package list (`kernels/` is `spear_fast.kernels`) and the optional extension.

SPEAR_FAST_BUILD  auto (default): build the extension, or say why not; require: fail if it cannot be built;
                  off: leave it out
SPEAR_FAST_MARCH  what the compiler's -march gets, for one variant alone: native, x86-64-v3, …; empty for the compiler's
                  own default. Left out, an x86-64 machine builds a variant for AVX2 and one for AVX-512, of which a
                  machine loads what it can run, and any other machine builds for itself
TORCH_CUDA_ARCH_LIST  what the CUDA kernels are built for, where torch has CUDA and nvcc of its major version is found
SPEAR_FAST_SANITIZE  what -fsanitize gets, for tests: address,undefined (`make asan`)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
MODE = os.environ.get("SPEAR_FAST_BUILD", "auto")
MARCH = os.environ.get("SPEAR_FAST_MARCH")
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
SANITIZE = os.environ.get("SPEAR_FAST_SANITIZE", "")

# variant → what its -march gets, the fastest first; an x86-64 CPU that runs neither is served by torch
X86_VARIANTS = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
}

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


class Job(NamedTuple):
    """A source to be compiled, and the command that does it, without input and output."""

    source: Path
    command: list[str]


def compiled(jobs: list[Job], folder: Path) -> list[Path]:
    """Compiles side by side what has not been compiled; returns the objects.

    An object's name tells all that it was made of, so that no clock decides whether it is still right.
    """
    folder.mkdir(parents=True, exist_ok=True)
    headers = digest(path.read_bytes() for path in sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cu")]))
    compilers = {
        path: subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        for path in {job.command[0] for job in jobs}
    }
    ccache = shutil.which("ccache")

    def build(job: Job) -> Path:
        made_of = job.source.read_bytes(), headers, compilers[job.command[0]], job.command
        made = folder / f"{job.source.stem}-{digest(map(str, made_of))}.o"
        if not made.is_file():
            unfinished = made.with_suffix(f".{os.getpid()}.tmp")
            cached = [ccache] if ccache and job.source.suffix == ".cpp" else []
            subprocess.run([*cached, *job.command, "-c", "-o", str(unfinished), str(job.source)], check=True)
            unfinished.replace(made)
        return made

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        # the largest first, so that none is left for a single core
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].source.stat().st_size)
        made = dict(zip(order, pool.map(build, [jobs[i] for i in order]), strict=True))
    for outdated in set(folder.glob("*.o")) - set(made.values()):
        outdated.unlink()
    return [made[i] for i in range(len(jobs))]


def digest(parts: Iterable[bytes | str]) -> str:
    """Returns 16 characters that stand for the parts and their order."""
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]


def device_jobs(nvcc: str) -> list[Job]:
    """Returns how the .cu files that launch kernels are compiled."""
    command = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", *targets()]
    return [Job(source, command) for source in sorted(ROOT.glob("csrc/cuda/launch_*.cu"))]


def cuda_folders(nvcc: str) -> list[str]:
    """Returns where nvcc links from."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    return re.findall(r'"-L([^"]+)"', plan.stdout + plan.stderr)


def variants() -> dict[str, list[str]]:
    """Returns the variants to be built: name → flags that choose the instruction set."""
    if MARCH is not None:
        return {MARCH or "default": [f"-march={MARCH}"] if MARCH else []}
    # tests watched by a sanitizer want one, quickly
    if platform.machine() in ("x86_64", "AMD64") and not SANITIZE:
        return X86_VARIANTS
    return {"native": ["-march=native"]}


class Build(NamedTuple):
    """How C++ sources are compiled and linked: what all variants share, and the flags of each."""

    command: list[str]
    link: list[str]
    variants: dict[str, list[str]]

    def jobs(self, variant: str, sources: Iterable[Path]) -> list[Job]:
        return [Job(source, [*self.command, *self.variants[variant]]) for source in sources]


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
    flags, described = {}, {}
    for name, march in variants().items():
        try:
            defined = macros(cxx, march)
        except subprocess.CalledProcessError as error:
            give_up(f"{cxx} does not take {' '.join(march)}: {error.stderr.strip().splitlines()[-1]}")
            return {}
        level = capability(defined)
        flags[name] = [*march, f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}"]
        features = sorted(feature for macro, feature in FEATURES.items() if macro in defined)
        described[name] = {"march": " ".join(march), "capability": level, "features": features}
    omp_compile, omp_link = openmp(Path(torch.__file__).parent / "lib")
    sanitize_compile, sanitize_link = sanitizers()
    include = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
    command = [
        cxx,
        "-O3",
        "-g0",
        "-DNDEBUG",
        "-fPIC",
        "-std=c++20",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
        # gcc 12 thinks that its own AVX-512 header reads what it has not written
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        *include,
        *omp_compile,
        *sanitize_compile,
    ]
    # a symbol that nobody has is an error now, not when the library is loaded
    link = [*omp_link, *sanitize_link, *(["-Wl,-z,defs"] if sys.platform == "linux" else [])]
    build = Build(command, link, flags)
    nvcc = nvcc_for(torch.version.cuda)
    facts = {
        "torch": torch.__version__,
        "compiler": cxx,
        "machine": platform.machine(),
        "sanitize": SANITIZE or None,
        "sources": runpy.run_path(str(ROOT / "spear_fast" / "ops" / "extension.py"))["fingerprint"](ROOT / "csrc"),
        "variants": described,
        "cuda": None,
        "nvcc": None,
        "cuda_targets": None,
    }
    extensions = [
        cpp_extension.CppExtension(f"spear_fast._C_{name}", [], language="c++", extra_link_args=build.link)
        for name in build.variants
    ]

    class BuildOptional(cpp_extension.BuildExtension):
        """Builds the variants, notes beside them what they were built for, and lets an install pass without them."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, no_python_abi_suffix=True, use_ninja=False, **kwargs)

        def add_cuda(self, nvcc):
            """Adds the CUDA kernels to all variants, or says that they cannot be built; returns further sources."""
            try:
                objects = compiled(device_jobs(nvcc), Path(self.build_temp) / "cuda")
            except subprocess.CalledProcessError as error:
                if MODE == "require":
                    raise
                say(f"building without the CUDA kernels ({error}); CuPy can build them at run time")
                return []
            for extension in self.extensions:
                extension.extra_objects += map(str, objects)
                extension.libraries += ["torch_cuda", "cudart"]
                extension.library_dirs += cuda_folders(nvcc)
            facts.update(cuda=torch.version.cuda, nvcc=nvcc, cuda_targets=ARCHITECTURES)
            return sorted(ROOT.glob("csrc/cuda/*.cpp"))

        def build_extensions(self):
            # the objects know whether they are new; linking takes a second
            self.force = True
            sources = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
            try:
                if nvcc is not None:
                    sources += self.add_cuda(nvcc)
                jobs = [job for name in build.variants for job in build.jobs(name, sources)]
                objects = compiled(jobs, Path(self.build_temp) / "objects")
                for i, extension in enumerate(self.extensions):
                    extension.extra_objects += map(str, objects[i * len(sources) : (i + 1) * len(sources)])
                super().build_extensions()
            except Exception as error:
                give_up(f"the compiler's own words are above; {error or type(error).__name__}")
                self.extensions = []

        def run(self):
            super().run()
            if not self.extensions:
                return
            made = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
            for other in set(made[0].parent.glob("_C*.so")) - set(made):
                # of an earlier build: nothing loads it any more
                other.unlink()
            made[0].with_name("_build.json").write_text(json.dumps(facts, indent=1) + "\n")

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildOptional}}


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
