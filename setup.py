"""Build csrc/ into guardengine/_C.so: a plain C ABI, loaded through ctypes.

No torch headers (they alone cost 20 s a file), no -march=native, no -ffast-math: one build runs on every
CPU of the architecture, and the instruction set is chosen at run time.
"""

import hashlib
import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = Path("csrc/compile_flags.txt").read_text().split()


class BuildSharedLibrary(build_ext):
    """Compile what has changed, several files at a time, and name the library `_C.so`, without a Python ABI tag."""

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = [*FLAGS, "-fPIC", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        folder = Path("build", f"objects-{platform.machine()}")
        folder.mkdir(parents=True, exist_ok=True)
        headers = b"".join(path.read_bytes() for path in sorted(Path("csrc").glob("*.h")))
        command = shlex.join([*compiler, *flags])
        try:
            version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        except OSError as error:
            raise CompileError(
                f"a C++17 compiler is needed: install g++ or clang, or set CXX ({error})"
            ) from None

        def compile_one(source: str) -> str:
            # Named by all that goes in, so that nothing stale is ever linked, whatever the clock says.
            content = b"\0".join((version, command.encode(), headers, Path(source).read_bytes()))
            target = folder / f"{Path(source).stem}-{hashlib.sha256(content).hexdigest()[:16]}.o"
            if not target.exists():
                unfinished = target.with_suffix(f".{os.getpid()}")
                subprocess.run([*compiler, *flags, "-c", source, "-o", str(unfinished)], check=True)
                for old in folder.glob(f"{Path(source).stem}-*.o"):
                    old.unlink(missing_ok=True)
                unfinished.replace(target)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        linked = library.with_suffix(f".{os.getpid()}")  # a running process keeps the library that it has
        link = [*compiler, "-shared", "-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))]
        subprocess.run([*link, *objects, "-o", str(linked)], check=True)
        linked.replace(library)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class AnyPythonWheel(bdist_wheel):
    """The library never touches the Python C API, so one wheel serves every Python 3 of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# kernels/ is installed as guardengine.kernels: pyproject.toml says so.
_KERNELS = ["guardengine.kernels", "guardengine.kernels.gpu"]

setup(
    packages=[
        *find_packages(include=["guardengine", "guardengine.*"], exclude=["guardengine.kernels*"]),
        *_KERNELS,
    ],
    ext_modules=[
        Extension(
            "guardengine._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            # Without a compiler the rest is installed: a client needs no library, and an engine's error names the mend.
            optional=True,
            depends=["csrc/compile_flags.txt", *sorted(str(path) for path in Path("csrc").glob("*.h"))],
        )
    ],
    cmdclass={"build_ext": BuildSharedLibrary, "bdist_wheel": AnyPythonWheel},
)
