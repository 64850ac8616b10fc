"""Compiles CUDA sources with g++ against the headers here, into shared libraries that run them on the CPU.

Objects and libraries are kept in build/cuda_host under names made from everything that went into them, so a second
test run compiles only what changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_host"
KEPT_SECONDS = 3 * 24 * 3600
HARNESS = sorted(HERE.glob("src/*.cpp"))

AWARE_OF_SANITIZER = [HERE / "src/fiber.cpp", HERE / "src/scheduler.cpp"]
RACES = ["-fsanitize=thread"]  # in the kernels alone: src/race.cpp takes the place of ThreadSanitizer's library

# -fno-gnu-unique: variables of two such libraries in one process must not become one.
# -ffp-contract=off: __fmul_rn and __fadd_rn must not become one instruction.
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{HERE / 'include'}"]
SKIPKERNELS_HEADERS = f"-I{ROOT / 'csrc'}"
PYTHON_HEADERS = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
SANITIZE += ["-fno-optimize-sibling-calls"]  # every function in the stack trace


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


@cache
def compiler_version() -> str:
    return subprocess.run([*compiler(), "--version"], check=True, capture_output=True, text=True).stdout


@cache
def processor_flags() -> list[str]:
    """-mfma where there is one: fmaf without it is a function call in the innermost loops."""
    cpuinfo = Path("/proc/cpuinfo")
    return ["-mfma"] if cpuinfo.exists() and " fma " in cpuinfo.read_text() else []


def environment_flags() -> list[str]:
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def job_count() -> int:
    """How many compilers run at a time."""
    return int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))


def key_of(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def compile_source(source: Path, flags: Sequence[str]) -> Path:
    """The object made from ``source``, compiled if the source, a header it includes or the command changed."""
    command = [
        *compiler(),
        *flags,
        *environment_flags(),
        *(["-x", "c++"] if source.suffix == ".cu" else []),
        "-c",
        str(source),
    ]
    plan = key_of(compiler_version(), *command)
    headers = CACHE / f"{plan}.d"

    def made_from() -> list[Path]:
        return [Path(path) for path in headers.read_text().replace("\\\n", " ").partition(": ")[2].split()]

    def object_of_contents() -> Path:
        return CACHE / f"{source.name}-{key_of(plan, *(path.read_bytes() for path in made_from()))}.o"

    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{plan}.lock"):  # two processes of one test run want the same object
        with suppress(FileNotFoundError):  # a header is gone
            if is_kept(headers) and is_kept(made := object_of_contents()):
                return made
        fresh, fresh_headers = (CACHE / f"{plan}.fresh.{suffix}" for suffix in ("o", "d"))
        while True:
            started = time.time()
            run([*command, "-o", str(fresh), "-MMD", "-MF", str(fresh_headers)])
            fresh_headers.rename(headers)
            if all(path.stat().st_mtime < started for path in made_from()):  # nobody wrote while the compiler read
                break
        made = object_of_contents()
        fresh.rename(made)
        return made


def is_kept(made: Path) -> bool:
    """Whether ``made`` exists; if so, notes that it was used."""
    try:
        os.utime(made)
    except FileNotFoundError:
        return False
    return True


def forget_unused() -> None:
    """Remove what nobody has used for some days."""
    for made in CACHE.iterdir():
        if time.time() - made.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(made) if made.is_dir() else made.unlink()


def run(command: Sequence[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stdout}")


def build_host_extension(
    sources: Sequence[Path],
    *,
    name: str = "cuda_host.so",
    sanitize: bool = False,
    races: bool = False,
    cuda_version: int = 13000,
    flags: Sequence[str] = (),
    cpp_flags: Sequence[str] = (),
    made: Sequence[str] = (),
) -> Path:
    """A shared library of ``sources`` (.cu, .cpp), the fake runtime and its controls; returns its path.

    ``cuda_version`` is the CUDART_VERSION whose signatures the headers declare, ``flags`` go to every compiler command,
    ``cpp_flags`` to those of .cpp sources, and objects that are ``made`` already are linked too. ``sanitize`` adds
    AddressSanitizer and UndefinedBehaviorSanitizer: load the library in a process that run_under_asan() started.
    ``races`` fails every launch that holds a data race.

    Raises:
        RuntimeError: A command failed; the message holds it and what it printed.
    """
    version = f"-DCUDART_VERSION={cuda_version}"
    common = [*FLAGS, *processor_flags(), *(SANITIZE if sanitize else []), version, *flags]
    own_flags = {".cu": RACES if races else [], ".cpp": cpp_flags}
    commands = [(source, [*common, *own_flags[source.suffix]]) for source in sources]
    # The harness itself is not instrumented: all libraries share most of its objects.
    commands += [(source, FLAGS) for source in HARNESS if source not in AWARE_OF_SANITIZER]
    commands += [(source, [*FLAGS, f"-DCUDA_HOST_ASAN={int(sanitize)}"]) for source in AWARE_OF_SANITIZER]
    commands += [(HERE / "controls.cpp", [*FLAGS, version])]
    with ThreadPoolExecutor(job_count()) as pool:
        objects = list(pool.map(lambda command: compile_source(*command), commands))
    link = [*compiler(), "-shared", "-pthread", *(SANITIZE if sanitize else []), *map(str, objects), *made, "-ldl"]
    library = CACHE / key_of(compiler_version(), *link, *(Path(path).read_bytes() for path in made)) / name
    if not is_kept(library.parent) or not library.exists():
        forget_unused()
        library.parent.mkdir(exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        run([*link, "-o", str(fresh)])
        fresh.rename(library)
    return library


def build_core_extension(*, cuda_version: int = 13000) -> Path:
    """The extension that setup.py builds, with its CUDA part compiled for the CPU; load it with load_core_extension.

    Its objects of csrc/cpu are those of the installed extension.
    """
    setup = load_module("skipkernels_setup", ROOT / "setup.py")
    environment = {**os.environ, "SKIPKERNELS_ISA": "usable"}  # as the Makefile has it
    units = setup.plan_units(setup.CudaBuild(None, "compiled for the CPU"), environment)
    folder = setup.object_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "cpu.lock"), ThreadPoolExecutor(job_count()) as pool:
        made = list(pool.map(lambda unit: unit.compile(folder), [unit for unit in units if is_of_cpu(unit.source)]))
    sources = [ROOT / unit.source for unit in units if not is_of_cpu(unit.source)]
    sources += [ROOT / source for source in setup.CUDA_SOURCES]
    # pybind11 must not take this module's types for those of the installed one
    cpp_flags = ["-DSKIPKERNELS_CUDA_BUILT=1", '-DPYBIND11_COMPILER_TYPE="_cuda_host"', *PYTHON_HEADERS]
    return build_host_extension(
        sources, name="_C.so", cuda_version=cuda_version, flags=[SKIPKERNELS_HEADERS], cpp_flags=cpp_flags, made=made
    )


def is_of_cpu(source: str) -> bool:
    return source.startswith("csrc/cpu/")


def load_module(name: str, path: Path) -> ModuleType:
    """The Python or extension module at ``path``; an extension's init function is that of the last part of ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def load_core_extension(library: Path) -> ModuleType:
    # an extension module is loaded once for each name, whatever its file
    return load_module(f"cuda_host_{library.parent.name}._C", library)


def run_under_asan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments`` where sanitized libraries can be loaded; an error ends it with a report on stderr.

    A test runs itself again with ``run_under_asan("-m", "pytest", "-q", "path::name")``.
    """
    # libstdc++ too: AddressSanitizer looks for __cxa_throw when it starts, and python itself does not link it
    names = ("libasan.so", "libstdc++.so")
    paths = [
        subprocess.run([*compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in names
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(path.strip() for path in paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",  # Python's own allocator has no guarded gaps
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
