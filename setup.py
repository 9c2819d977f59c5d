"""Builds ``ugsd_fast._C`` from csrc/ and installs kernels/ as ``ugsd_fast.kernels``.

No torch at build time: the extension takes raw pointers. ``UGSD_BUILD_CUDA`` is ``auto`` (build csrc/cuda where
nvcc is found), ``1`` (require it) or ``0``.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

# gcc 12 warns about its own AVX-512 intrinsics.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
MACHINE = platform.machine().lower()
if MACHINE in ("x86_64", "amd64"):
    ISAS = {"scalar": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
elif MACHINE in ("aarch64", "arm64"):
    ISAS = {"scalar": [], "neon": []}
else:
    ISAS = {"scalar": []}

# FMA contraction off: results must not depend on which expressions a compiler happens to fuse.
FLAGS = ["-O2", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-g0"]


class BuildExtension(build_ext):
    """Compiles each translation unit with its instruction set's flags, several at a time."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def with_isa(obj: str, source: str, ext: str, arguments: list, extra: list, options: list) -> None:
            compile_one(obj, source, ext, arguments, extra + ISAS.get(Path(source).stem, []), options)

        def compile_all(sources: list, output_dir: str | None = None, **options: object) -> list:
            macros = options.get("macros")
            _, objects, extra, arguments, build = self.compiler._setup_compile(
                output_dir, macros, options.get("include_dirs"), sources, options.get("depends"), options["extra_postargs"]
            )
            flags = self.compiler._get_cc_args(arguments, options.get("debug"), options.get("extra_preargs"))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda obj: with_isa(obj, *build[obj], flags, extra, arguments) if obj in build else None, objects))
            return objects

        self.compiler.compile = compile_all
        super().build_extensions()


def cuda_sources() -> list[str]:
    """Return the CUDA sources to build, as ``UGSD_BUILD_CUDA`` and the machine say."""
    wanted = os.environ.get("UGSD_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"UGSD_BUILD_CUDA is {wanted!r}, expected auto, 0 or 1")
    sources = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    if wanted == "1" and not shutil.which("nvcc"):
        raise SystemExit("UGSD_BUILD_CUDA=1, but there is no nvcc on the PATH")
    return sources if wanted != "0" and shutil.which("nvcc") else []


setup(
    packages=[*find_packages(include=["ugsd_fast*"]), "ugsd_fast.kernels"],
    package_dir={"ugsd_fast.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "ugsd_fast._C",
            ["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/kv_compact.cpp", *(f"csrc/cpu/{isa}.cpp" for isa in ISAS)],
            include_dirs=["csrc/include"],
            depends=sorted(map(str, Path("csrc").rglob("*.h"))),
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
