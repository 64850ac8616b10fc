"""Builds the C++ extension ``skipkernels._C``; everything else is declared in pyproject.toml.

Every source is one compiler command of its own: the instruction-set units need their own flags and .cu files need
nvcc. Commands run in parallel, and a second build repeats only those whose text, source or headers changed.

Environment:
    SKIPKERNELS_CUDA=auto|gpu|0|1  build the CUDA part if nvcc is found (default), if a GPU is there too, never,
                                or fail without it
    SKIPKERNELS_CUDA_ARCH=native  compile for the GPU of this machine alone, a third of the time (default: all);
                                newest: for the last of those shipped, which shows that the sources compile
    SKIPKERNELS_ISA=native      compile for the CPU of this machine alone, a third of the time (default: all);
                                usable: for every instruction set that it can run, which its tests compare
    MAX_JOBS=N                  compilers at a time (default: one per CPU)
    CXX, CXXFLAGS, LDFLAGS      C++ compiler (default: c++), and flags appended to those below
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, SetupError

ROOT = Path(__file__).resolve().parent

# Linked in this order: of an inline function that several units emit, the linker keeps the first copy, and that must
# not be one compiled for an instruction set the machine may lack. Hence wider instruction sets come last.
CPU_SOURCES = [
    "csrc/bindings.cpp",
    "csrc/cpu/executor.cpp",
    "csrc/cpu/thread_pool.cpp",
    "csrc/cpu/bandwidth.cpp",
    "csrc/cpu/blocks.cpp",
    "csrc/cpu/embed.cpp",
    "csrc/cpu/skip_gate.cpp",
    "csrc/cpu/neuron_gate.cpp",
    "csrc/cpu/choose_experts.cpp",
    "csrc/cpu/sample.cpp",
    "csrc/cpu/advance.cpp",
    "csrc/cpu/isa_generic.cpp",
]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
X86_SOURCES = {
    "csrc/cpu/isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/isa_avx_vnni.cpp": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "csrc/cpu/isa_avx512.cpp": AVX512_FLAGS,
    "csrc/cpu/isa_avx512_vnni.cpp": [*AVX512_FLAGS, "-mavx512vnni"],
    "csrc/cpu/isa_avx512_bf16.cpp": [*AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"],
}
# Of the plain kernels on x86, where a processor with AVX2 runs others: -O3 unrolls the loops that stand for vectors and
# compiles for 200 s in place of 65. One row takes twice the time without it, so other processors, which have no other
# kernels, get -O3.
X86_GENERIC_FLAGS = ["-O2", "-finline-functions"]
# GCC's flags that Linux spells otherwise in /proc/cpuinfo
CPUINFO_NAMES = {"avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
CUDA_SOURCES = [
    str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cuda/*")) if path.suffix in (".cpp", ".cu")
]

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

OPTIMIZE = ["-std=c++17", "-O3"]
# GCC 12 otherwise moves sums behind all that goes into them, and keeps it in memory meanwhile: steps of 8 and of 16
# rows in bf16 take 3 to 4 % longer on AVX2.
GCC_KERNEL_FLAGS = ["-fno-tree-ter"]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
CUDA_ARCHITECTURES = ["arch=compute_80,code=sm_80", "arch=compute_89,code=sm_89", "arch=compute_90a,code=sm_90a"]
CUDA_PTX = "arch=compute_90,code=compute_90"
# the ratio controller's arithmetic is the same on every executor only without contraction
CUDA_FLAGS = {f"csrc/cuda/{name}.cu": ["-fmad=false"] for name in ("skip_gate", "neuron_gate", "qkv_rope_append")}
CUDA_RUNTIME = ["-lcudart_static", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]


@dataclass(frozen=True)
class CudaBuild:
    """Whether the CUDA part is built, and with which nvcc; ``note`` says why, in the build output and the extension."""

    nvcc: str | None
    note: str

    @property
    def built(self) -> bool:
        return self.nvcc is not None


def resolve_cuda(environ: Mapping[str, str], sources: Sequence[str]) -> CudaBuild:
    """Decide on the CUDA part from SKIPKERNELS_CUDA, the nvcc in CUDA_HOME or PATH, and the CUDA sources there are."""
    requested = environ.get("SKIPKERNELS_CUDA", "auto")
    if requested not in ("auto", "gpu", "0", "1"):
        raise SetupError(f"SKIPKERNELS_CUDA={requested}: expected auto, gpu, 0 or 1")
    if requested == "0":
        return CudaBuild(None, "switched off by SKIPKERNELS_CUDA=0")
    if requested == "gpu" and not NVIDIA_DRIVER.exists():
        return CudaBuild(None, "built where no NVIDIA driver is loaded")
    nvcc = find_nvcc(environ)
    note = f"nvcc {nvcc_version(nvcc)} found" if nvcc else "nvcc not found in CUDA_HOME/bin or PATH"
    if nvcc and not sources:
        note += ", no CUDA sources in this release"
    if nvcc and sources:
        return CudaBuild(nvcc, note)
    if requested == "1":
        raise SetupError(f"SKIPKERNELS_CUDA=1 cannot be met: {note}")
    return CudaBuild(None, note)


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """Path of nvcc in CUDA_HOME/bin, else in PATH, else None."""
    folders = [f"{environ['CUDA_HOME']}/bin"] if "CUDA_HOME" in environ else []
    return shutil.which("nvcc", path=os.pathsep.join([*folders, environ.get("PATH", "")]))


def nvcc_output(nvcc: str, *arguments: str) -> str:
    """Everything that nvcc prints when called with ``arguments``."""
    command = [nvcc, *arguments]
    try:
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"{shlex.join(command)} fails ({error}); SKIPKERNELS_CUDA=0 builds without it") from error


def nvcc_version(nvcc: str) -> str:
    """The release number of ``nvcc``, such as "13.0"."""
    match = re.search(r"release (\d+\.\d+)", nvcc_output(nvcc, "--version"))
    return match.group(1) if match else "of unknown version"


def toolkit_flags(nvcc: str, variable: str) -> list[str]:
    """The host compiler's flags that nvcc itself would use: ``variable`` is INCLUDES or LIBRARIES of its dry run.

    More reliable than a guess from nvcc's path, which may be a wrapper script outside the toolkit.
    """
    dry_run = nvcc_output(nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull)
    match = re.search(rf"^#\$ {variable}=(.*)$", dry_run, re.MULTILINE)
    return shlex.split(match.group(1)) if match else []


def cuda_targets(environ: Mapping[str, str]) -> list[str]:
    """nvcc's flags for the GPUs to compile for."""
    architecture = environ.get("SKIPKERNELS_CUDA_ARCH", "all")
    if architecture not in ("all", "native", "newest"):
        raise SetupError(f"SKIPKERNELS_CUDA_ARCH={architecture}: expected all, native or newest")
    if architecture == "native":
        return ["-arch=native"]
    if architecture == "newest":
        return [f"-gencode={CUDA_ARCHITECTURES[-1]}"]
    return [f"-gencode={target}" for target in (*CUDA_ARCHITECTURES, CUDA_PTX)]


def x86_sources(environ: Mapping[str, str], cpu_flags: set[str]) -> dict[str, list[str]]:
    """The instruction sets to compile for, with their flags.

    Usable are those of ``X86_SOURCES`` that a processor with ``cpu_flags`` can run, native is the last of them, the one
    chosen when it decodes.
    """
    wanted = environ.get("SKIPKERNELS_ISA", "all")
    if wanted not in ("all", "native", "usable"):
        raise SetupError(f"SKIPKERNELS_ISA={wanted}: expected all, native or usable")
    if wanted == "all":
        return X86_SOURCES
    needs = {source: {flag.removeprefix("-m") for flag in flags} for source, flags in X86_SOURCES.items()}
    runs = [source for source in X86_SOURCES if {CPUINFO_NAMES.get(n, n) for n in needs[source]} <= cpu_flags]
    return {source: X86_SOURCES[source] for source in (runs if wanted == "usable" else runs[-1:])}


def cpu_flags() -> set[str]:
    """What Linux says that this processor can do; nothing elsewhere."""
    try:
        match = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return set()
    return set(match.group(1).split()) if match else set()


def job_count(environ: Mapping[str, str]) -> int:
    """How many compilers may run at a time: MAX_JOBS, else the number of CPUs."""
    jobs = environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    if not jobs.isdecimal() or int(jobs) < 1:
        raise SetupError(f"MAX_JOBS={jobs}: expected a positive integer")
    return int(jobs)


def run_tool(command: Sequence[str], subject: str, failure: type[Exception]) -> None:
    """Run a compiler or linker in the source root, pass on what it prints, and raise ``failure`` if it fails."""
    try:
        result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        hint = "set CXX to a C++17 compiler"
        raise failure(f"{subject}: {command[0]} does not run ({error.strerror}); {hint}") from error
    print(f"  {subject}\n{result.stdout}", end="", flush=True)
    if result.returncode:
        raise failure(f"{subject}: {Path(command[0]).name} exited with status {result.returncode}")


@dataclass(frozen=True)
class Unit:
    """One source and the command that compiles it, complete but for its outputs."""

    source: str
    command: list[str]

    def compile(self, folder: Path) -> str:
        """Bring the object file in ``folder`` up to date and return its path."""
        stem = folder / self.source.replace("/", "-")
        obj, headers, record = (Path(f"{stem}.{suffix}") for suffix in ("o", "d", "cmd"))
        command = [*self.command, "-c", self.source, "-o", str(obj), "-MMD", "-MF", str(headers)]
        if not is_current(obj, headers, record, command):
            record.unlink(missing_ok=True)
            run_tool(command, self.source, CompileError)
            record.write_text(shlex.join(command))
        return str(obj)


def is_current(obj: Path, headers: Path, record: Path, command: Sequence[str]) -> bool:
    """Whether ``obj`` came from this very ``command`` and is no older than anything it was made from."""
    try:
        made_from = headers.read_text().replace("\\\n", " ").partition(": ")[2].split()
        newest = max((ROOT / path).stat().st_mtime_ns for path in made_from)
        return record.read_text() == shlex.join(command) and newest <= obj.stat().st_mtime_ns
    except OSError:
        return False


def plan_units(cuda: CudaBuild, environ: Mapping[str, str]) -> list[Unit]:
    """All compile commands of the extension, in link order."""
    x86 = x86_sources(environ, cpu_flags()) if platform.machine().lower() in ("x86_64", "amd64") else {}
    cxx = [*cxx_compiler(environ), *OPTIMIZE, *HOST_FLAGS, "-Icsrc"]
    kernel_flags = GCC_KERNEL_FLAGS if x86 and is_gcc(cxx) else []
    # only where they are needed, so that a build with another CUDA part takes over the objects of csrc/cpu
    macros = [f"-DSKIPKERNELS_CUDA_BUILT={int(cuda.built)}"]
    system_headers = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    toolkit: list[str] = []
    nvcc: list[str] = []
    if cuda.nvcc:
        toolkit = toolkit_flags(cuda.nvcc, "INCLUDES")
        targets = cuda_targets(environ)
        nvcc = [cuda.nvcc, *OPTIMIZE, *targets, f"-Xcompiler={','.join(HOST_FLAGS)}", *macros, "-Icsrc"]
    own_flags = {
        **{source: [*flags, *kernel_flags] for source, flags in x86.items()},
        **{source: [*macros, *system_headers, *toolkit] for source in CUDA_SOURCES},
        "csrc/bindings.cpp": [*macros, *system_headers, *toolkit, f'-DSKIPKERNELS_BUILD_NOTE="{cuda.note}"'],
        "csrc/cpu/executor.cpp": [f"-D{isa_macro(source)}=1" for source in x86],
        "csrc/cpu/isa_generic.cpp": X86_GENERIC_FLAGS if x86 else [],
    }
    host_flags = shlex.split(environ.get("CXXFLAGS", ""))
    return [
        Unit(source, [*nvcc, *CUDA_FLAGS.get(source, [])])
        if source.endswith(".cu")
        else Unit(source, [*cxx, *own_flags.get(source, []), *host_flags])
        for source in (*CPU_SOURCES, *(CUDA_SOURCES if cuda.built else []), *x86)
    ]


def object_folder() -> Path:
    """Where the objects of this Python's extension are kept."""
    return ROOT / "build" / f"objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def isa_macro(source: str) -> str:
    """csrc/cpu/isa_avx2.cpp -> SKIPKERNELS_HAVE_AVX2"""
    return f"SKIPKERNELS_HAVE_{Path(source).stem.removeprefix('isa_').upper()}"


def cxx_compiler(environ: Mapping[str, str]) -> list[str]:
    """The C++ compiler's command: CXX, else c++."""
    return shlex.split(environ.get("CXX", "")) or ["c++"]


def is_gcc(cxx: Sequence[str]) -> bool:
    """Clang calls itself GCC in its macros, and knows few of its flags."""
    try:
        shown = subprocess.run([*cxx, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    except OSError:  # compiling will say so
        return False
    return "__GNUC__" in shown.stdout and "__clang__" not in shown.stdout


class BuildExtension(build_ext):
    """build_ext with a command per source, in parallel, incremental also under pip."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # pip builds editable installs in a temporary folder: objects kept here instead survive until the next build.
        self.build_temp = str(object_folder())

    def build_extension(self, ext: Extension) -> None:
        cuda = resolve_cuda(os.environ, CUDA_SOURCES)
        print(f"{ext.name}: CUDA part {'built' if cuda.built else 'left out'} ({cuda.note})", flush=True)
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(job_count(os.environ)) as pool:
            # from the end: the units of instruction sets take longest, and none should be begun when all else is done
            compiled = pool.map(lambda unit: unit.compile(folder), reversed(plan_units(cuda, os.environ)))
            objects = list(compiled)[::-1]
        libraries = [*toolkit_flags(cuda.nvcc, "LIBRARIES"), *CUDA_RUNTIME] if cuda.nvcc else []
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        library.parent.mkdir(parents=True, exist_ok=True)
        link = [*cxx_compiler(os.environ), "-shared", "-pthread", *undefined, *objects, "-o", str(library), *libraries]
        run_tool([*link, *shlex.split(os.environ.get("LDFLAGS", ""))], library.name, LinkError)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("skipkernels._C", [*CPU_SOURCES, *X86_SOURCES, *CUDA_SOURCES])],
        cmdclass={"build_ext": BuildExtension},
    )
