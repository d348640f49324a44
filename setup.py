"""Build script: all metadata is in pyproject.toml; the native CPU operators (csrc/) are built here.

They become one plain shared library, which torch loads: it needs nothing of Python, and of torch
only the stable ABI, so one binary serves every Python and every torch from TORCH_TARGET on. What a
build takes is a C++17 compiler and the headers of an installed torch. Without them, or with
HAL_KERNELS_BUILD=0, the package installs without the library and runs on plain PyTorch.

CXX, CXXFLAGS and LDFLAGS are honoured. Importing torch in this file is not allowed: reading the
metadata must work without it.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TORCH_TARGET = (2, 10)
WANTED = os.environ.get("HAL_KERNELS_BUILD", "1") != "0"
LIBRARY = Path("hal_kernels", "libhal_kernels.so")


def torch_folder() -> Path | None:
    """Where torch is installed, without importing it.

    pip builds in an environment of its own, without torch; but only headers are needed, and those
    may come from the environment that is installed into.
    """
    spec = importlib.util.find_spec("torch")
    found = Path(spec.origin).parent if spec and spec.origin else None
    folder = found or Path(sysconfig.get_path("platlib"), "torch")
    return folder if (folder / "include/torch/csrc/stable/library.h").exists() else None


def compile_flags(torch: Path) -> list[str]:
    major, minor = TORCH_TARGET
    return [
        "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
        "-Wall", "-Wextra", "-Wno-psabi",
        f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#x}",
        f"-isystem{torch / 'include'}",
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]  # fmt: skip


def link_flags(torch: Path) -> list[str]:
    flags = shlex.split(os.environ.get("LDFLAGS", ""))
    if sys.platform == "darwin":
        return ["-dynamiclib", "-undefined", "dynamic_lookup", *flags]
    # Named, so that its symbols are found; "now", so that a missing one shows when it is loaded.
    needed = ["-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]
    return ["-shared", "-Wl,-z,now", f"-L{torch / 'lib'}", *needed, *flags]


class BuildNative(build_ext):
    """Compiles the library; where that is not possible, says why once and goes on."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        # One of an earlier build would be taken for this one's.
        for built in (Path(self.build_lib) / LIBRARY, *([LIBRARY] if self.inplace else [])):
            built.unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile(ext)
        except (OSError, RuntimeError) as error:
            print(
                f"hal_kernels: the native CPU operators were not built: {error}. "
                "Plain PyTorch serves instead.",
                file=sys.stderr,
            )

    def compile(self, ext: Extension) -> None:
        torch = torch_folder()
        if torch is None:
            raise RuntimeError("no torch is installed to build against (install torch first)")
        command = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(command[0]) is None:
            raise RuntimeError(f"there is no C++ compiler {command[0]!r} (CXX names another one)")
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = compile_flags(torch)

        def run(arguments: list[str]) -> None:
            line = [*command, *arguments]
            if subprocess.run(line).returncode != 0:  # the compiler has said why
                raise RuntimeError(f"this command failed: {shlex.join(line)}")

        def compile_one(source: str) -> str:
            made = str(objects / f"{Path(source).stem}.o")
            run([*flags, "-c", source, "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile_one, ext.sources))
        run([*made, *link_flags(torch), "-o", str(target)])


class Wheel(bdist_wheel):
    """A wheel with the library is for one platform, but for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


native = Extension(
    "hal_kernels.libhal_kernels",
    sources=sorted(map(str, Path("csrc").glob("*.cpp"))),
    depends=sorted(map(str, Path("csrc").glob("*.h"))),
    optional=True,
)
if not WANTED:
    if "editable_wheel" in sys.argv:  # pip install -e: an earlier one's library is not wanted now
        LIBRARY.unlink(missing_ok=True)
    print("hal_kernels: HAL_KERNELS_BUILD=0: plain PyTorch serves.", file=sys.stderr)

setup(
    ext_modules=[native] if WANTED else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
