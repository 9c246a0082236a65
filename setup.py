"""Everything that is static is in pyproject.toml. This file is only for the optional native extension: sources in
csrc/, bound as icon2_rt._native. It is optional in the strict sense: without sources, without pybind11 or without a
compiler the install is pure Python, and `icon2 doctor` says so.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = [
    "csrc/bind.cpp",
    "csrc/cpu/begin_step.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
    "csrc/cpu/isa_portable.cpp",
    "csrc/cpu/parallel.cpp",
]

# Contraction is off so that a multiply and an add are two roundings in every build; what is fused says so.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-g0",
]


def extensions() -> list[Extension]:
    root = Path(__file__).resolve().parent
    if not (root / SOURCES[0]).is_file():
        return []
    try:
        import pybind11
    except ImportError:
        return []
    headers = [str(path.relative_to(root)) for path in sorted((root / "csrc").rglob("*.h"))]
    return [
        Extension(
            "icon2_rt._native",
            SOURCES,
            include_dirs=["csrc", pybind11.get_include()],
            depends=headers,
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions())
