"""Builds ``ugsd_fast._C`` from csrc/ and installs kernels/ as ``ugsd_fast.kernels``.

No torch at build time: the extension takes raw pointers. ``UGSD_BUILD_CUDA`` is ``auto``, ``0``, or ``1`` to require
CUDA sources, of which this version has none.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

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

# FMA contraction off: results must not depend on which expressions a compiler happens to fuse.
FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-g0"]


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


wanted = os.environ.get("UGSD_BUILD_CUDA", "auto")
if wanted not in ("auto", "0"):
    raise SystemExit(f"UGSD_BUILD_CUDA is {wanted!r}, expected auto or 0 (this version has no CUDA sources)")

setup(
    packages=[*find_packages(include=["ugsd_fast*"]), "ugsd_fast.kernels"],
    package_dir={"ugsd_fast.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "ugsd_fast._C",
            SOURCES,
            include_dirs=["csrc/include"],
            depends=sorted(map(str, Path("csrc").rglob("*.h"))),
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
