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


def set_bits(byte: memoryview, bits: int) -> None:
    """Set *bits* of a *byte*, a writable view of one, whatever others do to its other bits.

    Where the system lets no program make code of its own, a bit that is cleared at the same moment
    may come back.
    """
    function = _locked_or()
    if function is None:
        byte[0] |= bits
    else:
        function(ctypes.byref(ctypes.c_char.from_buffer(byte)), bits)
