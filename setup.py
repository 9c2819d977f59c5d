"""Builds ``ugsd_fast._C`` from csrc/ and installs kernels/ as ``ugsd_fast.kernels``.

No torch at build time: the extensions take raw pointers. ``UGSD_BUILD_CUDA`` says whether ``ugsd_fast._cuda`` is built
from csrc/cuda/: ``auto`` (where there is an nvcc and it succeeds), ``0``, or ``1`` to insist. ``UGSD_CUDA_ARCHS`` lists
what for: ``sm_`` numbers, and ``compute_`` ones for PTX, which the driver of any later GPU compiles when it loads.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sysconfig import get_path

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12 warns about its own intrinsics
MACHINE = platform.machine().lower()
if MACHINE in ("x86_64", "amd64"):
    ISAS = {"scalar": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
elif MACHINE in ("aarch64", "arm64"):
    ISAS = {"scalar": [], "neon": []}
else:
    ISAS = {"scalar": []}
SOURCES = ["csrc/bindings.cpp", *(f"csrc/cpu/{unit}.cpp" for unit in ("dispatch", "kv_compact", *ISAS))]

CUDA_HEADERS = sorted(map(str, Path("csrc/include/ugsd/cuda").glob("*.h")))
HEADERS = sorted({str(path) for path in Path("csrc").rglob("*.h")} - set(CUDA_HEADERS))
CUDA_ARCHS = "sm_90 compute_75"

# FMA contraction off: results must not depend on which expressions a compiler happens to fuse.
FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-g0"]


def find_nvcc() -> str | None:
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    path = os.pathsep.join([*(f"{folder}/bin" for folder in folders if folder), os.environ.get("PATH", "")])
    return shutil.which("nvcc", path=f"{path}{os.pathsep}/usr/local/cuda/bin")


NVCC = find_nvcc()


class BuildExtension(build_ext):
    """Compiles each translation unit with its instruction set's flags, several at a time."""

    def build_extensions(self) -> None:
        compiler = self.compiler

        def compile_all(
            sources: list, output_dir: str | None = None, macros: list | None = None, **options: list
        ) -> list:
            macros, objects, extra, arguments, build = compiler._setup_compile(
                output_dir, macros, options["include_dirs"], sources, options["depends"], options["extra_postargs"]
            )
            flags = compiler._get_cc_args(arguments, options["debug"], None)

            def compile_one(obj: str) -> None:
                source, suffix = build[obj]
                isa_flags = ISAS.get(Path(source).stem, [])
                compiler._compile(obj, source, suffix, flags, extra + isa_flags, arguments)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, build))
            return objects

        compiler.compile = compile_all
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Leave what needs nvcc to it: it knows where its headers and its runtime are."""
        if ext.name != "ugsd_fast._cuda":
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        if not self.force and not newer_group([*ext.sources, *ext.depends], str(target)):
            return
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("UGSD_CUDA_ARCHS", CUDA_ARCHS)
        flags = ["-std=c++17", "-O3", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden", f'-DUGSD_ARCHS="{archs}"']
        flags += [f"-I{path}" for path in ("csrc/include", get_path("include"), pybind11.get_include())]

        def compile_one(source: str) -> str:
            made = str(folder / f"{Path(source).name}.o")
            code = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in archs.split()]
            run_nvcc(*flags, *code, "-c", source, "-o", made)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        # The runtime is linked statically and looks for the driver at the first call: importing needs neither.
        run_nvcc("-shared", "-cudart=static", *objects, "-o", str(target))


def run_nvcc(*arguments: str) -> None:
    result = subprocess.run([NVCC, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError(f"nvcc {' '.join(arguments)}\n{result.stdout}{result.stderr}")


def cuda_extension(wanted: str) -> list[Extension]:
    """Return ``ugsd_fast._cuda`` if the wish and this machine have it so."""
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"UGSD_BUILD_CUDA is {wanted!r}, expected auto, 0 or 1")
    if wanted == "1" and not NVCC:
        raise SystemExit("UGSD_BUILD_CUDA is 1, but there is no nvcc in PATH, CUDA_HOME or /usr/local/cuda")
    if wanted == "0" or not NVCC:
        return []
    sources = sorted(map(str, Path("csrc/cuda").glob("*.c*")))
    return [Extension("ugsd_fast._cuda", sources, depends=HEADERS + CUDA_HEADERS, optional=wanted == "auto")]


setup(
    packages=[*find_packages(include=["ugsd_fast*"]), "ugsd_fast.kernels"],
    package_dir={"ugsd_fast.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "ugsd_fast._C",
            SOURCES,
            include_dirs=["csrc/include"],
            depends=HEADERS,
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            cxx_std=17,
        ),
        *cuda_extension(os.environ.get("UGSD_BUILD_CUDA", "auto")),
    ],
    cmdclass={"build_ext": BuildExtension},
)
