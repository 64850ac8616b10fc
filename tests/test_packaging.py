"""The build: what setup.py decides about CUDA, what the extension links, what a wheel contains."""

import importlib.util
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCES = ["csrc/cuda/graph.cpp"]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module; it builds nothing unless run as a program."""
    spec = importlib.util.spec_from_file_location("skipkernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA_HOME whose nvcc only knows its release."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    return tmp_path


def test_cuda_off(build: ModuleType, toolkit: Path) -> None:
    cuda = build.resolve_cuda({"SKIPKERNELS_CUDA": "0", "CUDA_HOME": str(toolkit)}, CUDA_SOURCES)
    assert not cuda.built
    assert "SKIPKERNELS_CUDA=0" in cuda.note


@pytest.mark.parametrize("driver", [True, False])
def test_cuda_where_a_gpu_is(build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, driver: bool) -> None:
    monkeypatch.setattr(build, "NVIDIA_DRIVER", toolkit / ("bin" if driver else "nothing"))
    cuda = build.resolve_cuda({"SKIPKERNELS_CUDA": "gpu", "CUDA_HOME": str(toolkit)}, CUDA_SOURCES)
    assert cuda.built == driver
    assert ("nvcc 13.0 found" if driver else "no NVIDIA driver") in cuda.note


def test_cuda_auto_without_nvcc_builds_for_the_cpu_and_says_so(build: ModuleType) -> None:
    cuda = build.resolve_cuda({"PATH": ""}, CUDA_SOURCES)
    assert not cuda.built
    assert "nvcc not found" in cuda.note


def test_cuda_auto_without_sources_builds_for_the_cpu_and_says_so(build: ModuleType, toolkit: Path) -> None:
    cuda = build.resolve_cuda({"PATH": str(toolkit / "bin")}, [])
    assert not cuda.built
    assert cuda.note == "nvcc 13.0 found, no CUDA sources in this release"


def test_cuda_targets_are_all_or_the_gpu_at_hand(build: ModuleType) -> None:
    assert build.cuda_targets({"SKIPKERNELS_CUDA_ARCH": "native"}) == ["-arch=native"]
    assert build.cuda_targets({"SKIPKERNELS_CUDA_ARCH": "newest"}) == [build.cuda_targets({})[-2]]
    assert "-gencode=arch=compute_90a,code=sm_90a" in build.cuda_targets({})
    with pytest.raises(SetupError, match="SKIPKERNELS_CUDA_ARCH=hopper: expected all, native or newest"):
        build.cuda_targets({"SKIPKERNELS_CUDA_ARCH": "hopper"})


AVX512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}


@pytest.mark.parametrize(
    ("cpu_flags", "sources"),
    [
        (AVX512 | {"avx512_vnni", "avx512_bf16"}, ["isa_avx512_bf16"]),
        (AVX512 | {"avx512_vnni"}, ["isa_avx512_vnni"]),
        (AVX512 | {"avx_vnni"}, ["isa_avx512"]),
        ({"avx2", "fma", "f16c", "avx_vnni"}, ["isa_avx_vnni"]),
        ({"avx2", "fma", "f16c"}, ["isa_avx2"]),
        ({"avx2", "f16c"}, []),
        (set(), []),
    ],
)
def test_a_native_build_takes_the_widest_instructions_there_are(
    build: ModuleType, cpu_flags: set[str], sources: list[str]
) -> None:
    taken = build.x86_sources({"SKIPKERNELS_ISA": "native"}, cpu_flags)
    assert [Path(source).stem for source in taken] == sources
    assert build.x86_sources({}, cpu_flags) == build.X86_SOURCES
    assert list(build.x86_sources({"SKIPKERNELS_ISA": "usable"}, cpu_flags))[-1:] == list(taken)


def test_usable_are_all_that_the_processor_can_run(build: ModuleType) -> None:
    usable = build.x86_sources({"SKIPKERNELS_ISA": "usable"}, AVX512 | {"avx512_vnni"})
    assert [Path(source).stem for source in usable] == ["isa_avx2", "isa_avx512", "isa_avx512_vnni"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_instruction_sets_that_this_processor_lacks_compile(build: ModuleType) -> None:
    """Those it has are compiled, linked and run by other tests."""
    usable = build.x86_sources({"SKIPKERNELS_ISA": "usable"}, build.cpu_flags())
    for source in build.X86_SOURCES.keys() - usable.keys():
        flags = [*build.OPTIMIZE, *build.HOST_FLAGS, "-Werror", "-Icsrc", *build.X86_SOURCES[source]]
        command = [*build.cxx_compiler(os.environ), *flags, "-fsyntax-only", source]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads Linux's /proc")
def test_a_native_build_would_take_what_decodes_here(build: ModuleType) -> None:
    from skipkernels import _C

    usable = _C.usable_isas()
    taken = [
        Path(s).stem.removeprefix("isa_") for s in build.x86_sources({"SKIPKERNELS_ISA": "native"}, build.cpu_flags())
    ]
    assert [*taken, "generic"][0] == usable[0]


@pytest.mark.parametrize("requested", ["auto", "1"])
def test_cuda_with_nvcc_and_sources(build: ModuleType, toolkit: Path, requested: str) -> None:
    cuda = build.resolve_cuda({"SKIPKERNELS_CUDA": requested, "CUDA_HOME": str(toolkit)}, CUDA_SOURCES)
    assert cuda.built
    assert cuda.nvcc == str(toolkit / "bin" / "nvcc")


def test_cuda_required_without_sources_is_an_error(build: ModuleType, toolkit: Path) -> None:
    with pytest.raises(SetupError, match=r"SKIPKERNELS_CUDA=1 .*no CUDA sources"):
        build.resolve_cuda({"SKIPKERNELS_CUDA": "1", "CUDA_HOME": str(toolkit)}, [])


def test_broken_nvcc_is_an_error(build: ModuleType, toolkit: Path) -> None:
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SetupError, match=r"nvcc --version fails .*SKIPKERNELS_CUDA=0"):
        build.resolve_cuda({"CUDA_HOME": str(toolkit)}, CUDA_SOURCES)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SKIPKERNELS_CUDA": "1"}, "SKIPKERNELS_CUDA=1 cannot be met: nvcc not found in CUDA_HOME/bin or PATH"),
        ({"SKIPKERNELS_CUDA": "2"}, "SKIPKERNELS_CUDA=2: expected auto, gpu, 0 or 1"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS=many: expected a positive integer"),
        ({"SKIPKERNELS_ISA": "avx2"}, "SKIPKERNELS_ISA=avx2: expected all, native or usable"),
    ],
)
def test_bad_settings_end_the_build_with_one_line(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, env={"PATH": "", **variables}, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"error: {message}"
    assert "Traceback" not in result.stderr


def test_portable_code_is_linked_before_wider_instruction_sets(build: ModuleType) -> None:
    units = build.plan_units(build.CudaBuild(None, "not looked for"), {})
    wide = ["-mavx" in " ".join(unit.command) for unit in units]
    assert wide == sorted(wide)
    assert not any("-march=native" in unit.command for unit in units)


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF with readelf")
def test_extension_links_no_torch() -> None:
    from skipkernels import _C

    dynamic = subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout
    needed = [line for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [line for line in needed if "torch" in line or "c10" in line or "cudart" in line]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_built_in_isolation_is_complete(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, env={**os.environ, "SKIPKERNELS_CUDA": "0"})
    (wheel,) = tmp_path.glob("skipkernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "skipkernels/py.typed" in names
    assert "skipkernels/demo/checkpoint/config.json" in names
    assert "skipkernels/demo/checkpoint/model.safetensors" in names
    assert [name for name in names if name.startswith("skipkernels/_C.") and name.endswith(".so")]
