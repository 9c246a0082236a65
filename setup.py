"""Everything that is static is in pyproject.toml. This file is only for the optional native extension: sources in
csrc/, bound as icon2_rt._native. It is optional in the strict sense: without sources, without pybind11 or without a
compiler the install is pure Python (ICON2_NATIVE=0 makes it so anywhere), without nvcc it has no CUDA part, and `icon2
doctor` says so.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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

CUDA_SOURCES = ["csrc/cuda/bind_cuda.cpp", "csrc/cuda/sample.cu", "csrc/cuda/skinny_linear.cu"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-g0"]
# sm_80 also runs on 8.6 and 8.9, sm_100 on 10.3; what is compiled for sm_90a runs there only. For every other device
# (12.0, and what comes) the PTX of the oldest lies beside them, which the driver compiles at the first use.
ARCHITECTURES = ["80", "90a", "100"]


class Nvcc:
    """The CUDA part: one nvcc for each file, running beside the C++ compiler."""

    def __init__(self, path: str) -> None:
        self.path = path
        known = self._says("--list-gpu-arch")
        self.architectures = [a for a in ARCHITECTURES if f"compute_{a.rstrip('a')}" in known.split()]
        # As nvcc may be a script somewhere else, it is asked where its libraries are.
        told = re.search(r"^#\$ LIBRARIES=(.*)$", self._says("-dryrun", "-x", "cu", os.devnull), re.MULTILINE)
        folders = [Path(part[2:]) for part in shlex.split(told[1])] if told else []
        self.runtime = next((f for d in folders if (f := d / "libcudart_static.a").is_file()), None)
        if not self.architectures or self.runtime is None:
            raise OSError(f"{path} knows none of {ARCHITECTURES}, or has no libcudart_static.a beside it")
        self.running: list[tuple[str, subprocess.Popen]] = []

    @classmethod
    def find(cls) -> "Nvcc | None":
        """ICON2_CUDA=0 leaves the CUDA part out; CUDA_HOME says where CUDA is, else the PATH does."""
        if os.environ.get("ICON2_CUDA") == "0":
            return None
        home = os.environ.get("CUDA_HOME")
        path = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
        return cls(path) if path else None

    def start(self, folder: Path, includes: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        code, names = self.targets()
        for source in CUDA_SOURCES:
            target = str(folder / f"{Path(source).stem}.o")
            arguments = [*CUDA_FLAGS, *code, f'-DICON2_CUDA_BUILD="{names}"', *(f"-I{i}" for i in includes)]
            command = [self.path, *arguments, "-c", source, "-o", target]
            run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self.running.append((target, run))

    def targets(self) -> tuple[list[str], str]:
        """nvcc's options for the machine code and the PTX, and their names."""
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        names = [f"sm_{a}" for a in self.architectures]
        oldest = self.architectures[0].rstrip("a")
        code.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
        return code, ", ".join([*names, f"PTX of compute_{oldest}"])

    def finish(self) -> list[str]:
        """The object files. OSError with what nvcc said where one did not come to be."""
        said = [run.communicate()[0] for _, run in self.running]
        for (target, run), output in zip(self.running, said, strict=True):
            if run.returncode != 0:
                raise OSError(f"{self.path} does not make {Path(target).name}:\n{output}")
        return [target for target, _ in self.running]

    def _says(self, *arguments: str) -> str:
        run = subprocess.run([self.path, *arguments], capture_output=True, text=True)
        return run.stdout + run.stderr


class Build(build_ext):
    """The usual one, with the objects of nvcc where there are any. Without them the extension is the CPU's alone."""

    def build_extension(self, ext: Extension) -> None:
        compile_usual = self.compiler.compile
        try:
            nvcc = Nvcc.find()
            if nvcc is not None:
                python = sysconfig.get_path("include")
                nvcc.start(Path(self.build_temp) / "csrc" / "cuda", [*ext.include_dirs, python])
        except OSError as error:
            nvcc = None
            self.warn(f"built without CUDA: {error}")

        def compile_all(*args: object, **options: object) -> list[str]:
            objects = compile_usual(*args, **options)
            if nvcc is not None:
                try:
                    objects += nvcc.finish()
                    ext.extra_link_args = [str(nvcc.runtime), "-ldl", "-lrt", "-lpthread"]
                except OSError as error:
                    self.warn(f"built without CUDA: {error}")
            return objects

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_usual


def extensions() -> list[Extension]:
    root = Path(__file__).resolve().parent
    if os.environ.get("ICON2_NATIVE") == "0" or not (root / SOURCES[0]).is_file():
        return []
    try:
        import pybind11
    except ImportError:
        return []
    beside = {".h", ".cuh", ".cu"}
    depends = [str(path.relative_to(root)) for path in sorted((root / "csrc").rglob("*")) if path.suffix in beside]
    return [
        Extension(
            "icon2_rt._native",
            SOURCES,
            include_dirs=["csrc", pybind11.get_include()],
            depends=[*depends, CUDA_SOURCES[0]],
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
