"""Build csrc/ into guardengine/_C.so: a plain C ABI, loaded through ctypes.

No torch headers (they alone cost 20 s a file), no -march=native, no -ffast-math: one build runs on every
CPU of the architecture, and the instruction set is chosen at run time.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildSharedLibrary(build_ext):
    """Name the library `_C.so` without a Python ABI tag: it never touches the Python C API."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)  # no PyInit_*: this is not a Python module


setup(
    ext_modules=[
        Extension(
            "guardengine._C",
            sources=sorted(str(p) for p in Path("csrc").glob("*.cpp")),
            depends=sorted(str(p) for p in Path("csrc").glob("*.h")),
            extra_compile_args=Path("csrc/compile_flags.txt").read_text().split(),
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildSharedLibrary},
)
