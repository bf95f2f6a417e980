"""An interrupt line with several devices on it (COM1 and COM3, COM2 and COM4)."""

from __future__ import annotations

import threading
from collections.abc import Callable


class SharedIrqLine:
    """Raises the line while any of its sources does; *set_irq* gets each change, 0 or 1."""

    def __init__(self, set_irq: Callable[[int], None]) -> None:
        self._set_irq = set_irq
        self._lock = threading.Lock()
        self._levels: list[int] = []

    def source(self) -> Callable[[int], None]:
        """A new source's own ``set_irq``."""
        index = len(self._levels)
        self._levels.append(0)

        def set_level(level: int) -> None:
            with self._lock:
                before = any(self._levels)
                self._levels[index] = level
                after = any(self._levels)
                if after != before:
                    self._set_irq(int(after))

        return set_level
