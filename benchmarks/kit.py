"""What a GPU machine without a network would spend its first minutes on, made beforehand on one without a GPU.

    python -m benchmarks.kit build                        # make gpu-kit, into build/gpu-kit
    python -m benchmarks.kit use build/gpu-kit            # there, in a checkout of the same sources

The extension with its CUDA kernels, Triton's compiled kernels, and the reference package: each fits one version of
Python, torch and Triton, and these sources. `use` takes what fits and says what does not, which is then built there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.build import link_kernels
from benchmarks.machine import REPOSITORY

FOLDER = REPOSITORY / "build" / "gpu-kit"
# what may be carried is bounded, and so is what this may hold
MOST_BYTES = 60 << 20
# of a compiled kernel's files only these are read again
KEPT = (".cubin", ".json")
REFERENCE = ("-r", "tests/requirements-reference.txt", "einops", "beartype")
FACTS = "import sys, torch, triton; print(*sys.version_info[:2], torch.__version__, triton.__version__)"


def facts(python: str) -> dict[str, str]:
    """Returns the versions that a kit is made for: of this Python, its torch and its Triton."""
    said = subprocess.run([python, "-c", FACTS], capture_output=True, text=True, check=True).stdout.split()
    return {"python": ".".join(said[:2]), "torch": said[2], "triton": said[3]}


def environment(folder: Path, python: str, torch: str) -> str:
    """Returns the Python of an environment with that torch, made where it is not there yet: some gigabytes, once."""
    own = folder.parent / f"{folder.name}-env"
    found = own / "bin" / "python"
    if not (own / ".made").is_file():
        print(f"gpu-kit: an environment with torch {torch}, in {own}", flush=True)
        shutil.rmtree(own, ignore_errors=True)
        subprocess.run([python, "-m", "venv", str(own)], check=True)
        packages = [f"torch=={torch}", "numpy", "setuptools>=77", "ninja", "packaging", "safetensors"]
        pip = [str(found), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, *packages], check=True)
        (own / ".made").touch()
    return str(found)


def build(folder: Path, python: str, torch: str, architecture: int) -> None:
    """Makes the kit. Raises ValueError where it grows too large, CalledProcessError where a part cannot be built."""
    own = environment(folder, python, torch)
    folder.mkdir(parents=True, exist_ok=True)
    targets = "{}.{}".format(*divmod(architecture, 10))
    print("gpu-kit: the extension with its CUDA kernels", flush=True)
    command = [own, "setup.py", "-q", "build", "--build-base", str(folder.parent / f"{folder.name}-build")]
    shutil.rmtree(folder / "lib", ignore_errors=True)
    _run([*command, "--build-lib", str(folder / "lib")], SPEAR_FAST_BUILD="require", TORCH_CUDA_ARCH_LIST=targets)
    package = folder / "lib" / "spear_fast"
    for path in sorted(package.rglob("*"), reverse=True):
        # the checkout there has the sources
        if path.is_dir():
            _remove_empty(path)
        elif path.suffix != ".so" and path.name != "_build.json":
            path.unlink()
    print("gpu-kit: Triton's kernels, twice: to compile them, and to see that they are found", flush=True)
    cache = folder / "triton"
    shutil.rmtree(cache, ignore_errors=True)
    for attempt in range(2):
        arguments = ["-m", "benchmarks.triton_cache", "--architecture", str(architecture)]
        arguments += ["--nothing-new"] if attempt else []
        # not the checkout's folder first, whose extension may be another Python's
        paths = os.pathsep.join(map(str, (_importable(folder), REPOSITORY)))
        _run([own, *arguments], TRITON_CACHE_DIR=str(cache), PYTHONPATH=paths, PYTHONSAFEPATH="1")
        slim(cache)
    print("gpu-kit: the reference package", flush=True)
    shutil.rmtree(folder / "reference", ignore_errors=True)
    pip = [own, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    _run([*pip, "--target", str(folder / "reference"), *REFERENCE])
    for unread in (*folder.glob("reference/bin"), *folder.glob("reference/**/__pycache__")):
        shutil.rmtree(unread)
    about = {**facts(own), "architecture": architecture, "sources": _sources(package)}
    (folder / "kit.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise ValueError(f"the kit has {size >> 20} MiB, wanted at most {MOST_BYTES >> 20}; compile fewer cases.")
    print(f"gpu-kit: {size / 2**20:.0f} MiB in {folder} for Python {about['python']}, torch {about['torch']}")
    print(f"gpu-kit: carry it, and there: python -m benchmarks.kit use {_shown(folder)}; make gpu does that by itself")


def slim(cache: Path) -> None:
    """Leaves of Triton's cache what is read when a compiled kernel is loaded."""
    for path in cache.glob("*/*"):
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()


def relocate(cache: Path) -> int:
    """Lets Triton find a cache that has been moved: its groups hold whole paths. Returns how many kernels it has."""
    count = 0
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        moved = {name: str(group.parent.resolve() / name) for name in paths}
        group.write_text(json.dumps({"child_paths": moved}))
        count += 1
    return count


def use(folder: Path, checkout: Path = REPOSITORY) -> tuple[dict[str, str], list[str]]:
    """Puts a kit where it is found; returns what the environment then needs, and what does not fit, a sentence each.

    Raises FileNotFoundError where there is no kit.
    """
    about = json.loads((folder / "kit.json").read_text())
    link_kernels(checkout)
    own, wrong = facts(sys.executable), []
    different = [f"{name} {about[name]}, here {own[name]}" for name in own if about[name] != own[name]]
    variables: dict[str, str] = {}
    if different:
        wrong.append(f"the kit is for {'; '.join(different)}: everything is built here")
    else:
        variables["TRITON_CACHE_DIR"] = str((folder / "triton").resolve())
        relocate(folder / "triton")
        for path in (folder / "lib" / "spear_fast").iterdir():
            shutil.copy2(path, checkout / "spear_fast" / path.name)
        wrong += _stale(checkout)
    reference = str((folder / "reference").resolve())
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (reference, os.environ.get("PYTHONPATH"))))
    return variables, wrong


def outdated(folder: Path = FOLDER, checkout: Path = REPOSITORY) -> str | None:
    """Returns in words that a kit's extension is of other sources than lie in the checkout; None also without a kit.

    Triton's kernels need no such word: they are found by what they were compiled from.
    """
    # not above: the extension is loaded with it, which `use` overwrites
    from spear_fast.ops.extension import fingerprint

    file = folder / "kit.json"
    if not file.is_file() or json.loads(file.read_text())["sources"] == fingerprint(checkout / "csrc"):
        return None
    return f"the kit in {_shown(folder)} is of other sources than lie in csrc now; make gpu-kit again"


def _stale(checkout: Path) -> list[str]:
    """Returns why the extension that was copied is none of these sources, or nothing."""
    script = "import torch; from spear_fast.ops import extension; print(extension.missing() or '')"
    said = subprocess.run([sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True, check=False)
    reason = said.stdout.strip() or (said.stderr.strip().splitlines()[-1:] or [""])[0]
    return [reason] if reason else []


def _importable(folder: Path) -> Path:
    """Returns a folder from which this checkout's package, its kernels and the kit's extension are imported."""
    own = folder.parent / f"{folder.name}-path"
    shutil.rmtree(own, ignore_errors=True)
    package = own / "spear_fast"
    package.mkdir(parents=True)
    for path in (REPOSITORY / "spear_fast").iterdir():
        if path.suffix != ".so" and path.name not in ("_build.json", "__pycache__", "kernels"):
            (package / path.name).symlink_to(path)
    for path in (folder / "lib" / "spear_fast").iterdir():
        (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(REPOSITORY / "kernels")
    return own


def _sources(package: Path) -> str:
    return str(json.loads((package / "_build.json").read_text())["sources"])


def _remove_empty(path: Path) -> None:
    if not any(path.iterdir()):
        path.rmdir()


def _run(command: Sequence[str], **environment: str) -> None:
    subprocess.run(command, cwd=REPOSITORY, check=True, env={**os.environ, **environment})


def _shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kit", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="make it, on a machine with nvcc and a network")
    building.add_argument("--python", default="python3.12", help="of the GPU machine's version (python3.12)")
    building.add_argument("--torch", default="2.11.*", help="of the GPU machine (2.11.*)")
    building.add_argument("--architecture", type=int, default=90, help="compute capability, 90 for 9.0: H100, H200")
    using = commands.add_parser("use", help="put it where it is found, on the GPU machine")
    for each in (building, using):
        each.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    chosen = parser.parse_args(arguments)
    if chosen.command == "build":
        try:
            build(chosen.folder.resolve(), chosen.python, chosen.torch, chosen.architecture)
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            print(f"gpu-kit: {error}", file=sys.stderr)
            return 1
        return 0
    variables, wrong = use(chosen.folder)
    for reason in wrong:
        print(f"gpu-kit: {reason}", file=sys.stderr)
    print(exports(variables))
    return 0


def exports(variables: Mapping[str, str]) -> str:
    """Returns the lines of a shell that set variables."""
    return "\n".join(f"export {name}={value}" for name, value in variables.items())


if __name__ == "__main__":
    sys.exit(main())
