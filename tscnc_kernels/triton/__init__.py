"""Triton kernels and their launchers, one file per op. Imported only where Triton is installed.

Every file lists in `VARIANTS` the configurations that its launchers use, so that all of them can be
compiled, and their registers and spills counted, on a machine without a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One configuration of a kernel.

    Args:
        kernel: the function under `triton.jit`.
        arguments: type of every run-time parameter: "*fp32" (a pointer), "i32", "fp64", ...; a
            tuple of them for a parameter that is one.
        constants: value of every other parameter, `tl.constexpr` or None.
        multiples_of_16: integer parameters that are multiples of 16; pointers are taken as such.
        num_warps: as in a launch.
        num_stages: as in a launch.
    """

    kernel: Any
    arguments: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any]
    multiples_of_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        """Kernel name and what tells this configuration from the others."""
        first = next(iter(self.arguments.values()))
        kind = (first if isinstance(first, str) else first[0]).removeprefix("*")
        constants = [
            name if value is True else f"{name}={value}"
            for name, value in self.constants.items()
            if value is not None and value is not False
        ]
        return f"{self.kernel.__name__}[{', '.join([kind, *constants])}]"
