"""Builds csrc/ into stepdpo_kernels._C, and nothing else; the metadata is in pyproject.toml.

The package works without the extension (see stepdpo_kernels/ops/linear_logprob/cpu_kernel.py), so a missing compiler
or torch, or a failed compilation, is said and not fatal. STEPDPO_REQUIRE_EXTENSION=1 makes it fatal.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from setuptools import setup

# Build frontends also run this file for metadata alone.
BUILDING = not {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}.isdisjoint(sys.argv)
REQUIRED = os.environ.get("STEPDPO_REQUIRE_EXTENSION") == "1"


def say(message: str) -> None:
    print(f"stepdpo-kernels: {message}", file=sys.stderr)


def extension() -> dict[str, Any]:
    """The arguments of setup() that build the extension, none if torch is not there to build against."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if REQUIRED:
            raise
        if BUILDING:
            say(f"installing without the C++ extension, torch cannot be imported here ({error})")
        return {}

    class OptionalBuildExtension(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if REQUIRED:
                    raise
                self.extensions: list[Any] = []
                self.distribution.ext_modules = []
                say(f"installing without the C++ extension, it did not compile ({type(error).__name__}: {error})")
            else:
                say("built the C++ extension")

    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    compile_args = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", *openmp]
    module = CppExtension(
        "stepdpo_kernels._C",
        ["csrc/linear_logprob.cpp"],
        depends=["csrc/head.h", "csrc/tile.h"],
        extra_compile_args=compile_args,
        extra_link_args=openmp,
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
