"""Order in memory that a guest shares: a barrier, and OR into a byte that the guest changes too.

The latter is the one locked instruction that Python lacks.

Python reads, computes and writes, and a guest that clears another bit in between finds it set
again. Most drivers look once more and find nothing; a daemon of ``uio_hv_generic``, as for file
copies, leaves its interrupts off after that and is never heard of again.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from functools import cache

_fence = threading.Lock()


def barrier() -> None:
    """A full memory barrier: a lock taken and given back is one, and the cheapest Python has."""
    with _fence:
        pass


_CODE = bytes.fromhex("f0 40 08 37 c3")  # lock or %sil, (%rdi); ret


@cache
def _locked_or() -> Callable[[object, int], None] | None:
    """The instruction as a function of an address and bits; ``None`` where no code may be made."""
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    code.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    prototype = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint8)
    function = prototype(address)
    function.code = code  # type: ignore[attr-defined] # it lives as long as the function
    return function


class SharedBytes:
    """Bytes in which others set and clear bits meanwhile; *view* is writable and stays."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._locked_or = _locked_or()
        # ctypes keeps no reference of its own to what an address is of.
        self._first = ctypes.c_char.from_buffer(view)
        self._address = ctypes.addressof(self._first)

    def set_bits(self, index: int, bits: int) -> None:
        """Set *bits* of a byte, whatever others do to its other bits.

        Where the system lets no program make code of its own, a bit that is cleared at the same
        moment may come back.
        """
        if not 0 <= index < len(self._view):
            raise IndexError(f"there is no byte {index} of {len(self._view)}.")
        if self._locked_or is None:
            self._view[index] |= bits
        else:
            self._locked_or(self._address + index, bits)
