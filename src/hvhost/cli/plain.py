"""``hvhost run`` in its plainest form, and ``--version``, without the command line's library.

Where Python is slow, as on a KVM host in software, that library takes longer to import than a
machine takes to start. What is not understood here, the wrong as well as the rare, is left to
:mod:`hvhost.cli.run`, which says the same of what both understand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvhost.machine.kinds import Transport

_OPTIONS = {
    "--kernel": "kernel",
    "--initrd": "initrd",
    "--append": "command_line",
    "--name": "name",
    "--cpus": "cpus",
    "--memory": "memory",
    "--kvm": "transport",
}


def parse(arguments: Sequence[str]) -> dict[str, Any] | None:
    """The options of ``run`` (without that word), or None if there is more to them.

    By the names that :func:`hvhost.manager.definition.define` has for them.
    """
    found: dict[str, Any] = {}
    left = list(arguments)
    while left:
        option, equals, value = left.pop(0).partition("=")
        key = _OPTIONS.get(option)
        if key is None or key in found:
            return None
        if not equals:
            if not left or left[0].startswith("-"):
                return None
            value = left.pop(0)
        if key == "cpus":
            if not value.isdecimal():
                return None
            found["cpus"] = int(value)
        elif key == "transport":
            if value not in tuple(Transport):
                return None
            found["transport"] = Transport(value)
        else:
            found[key] = value
    return found if "kernel" in found else None


def run(arguments: Sequence[str]) -> bool:
    """Do what a whole command line says if it is as plain as that; otherwise False, and nothing."""
    if list(arguments) == ["--version"]:
        from hvhost.version import say_version

        say_version()
        return True
    if arguments[:1] != ["run"] or (options := parse(arguments[1:])) is None:
        return False
    from hvhost.cli.progress import say
    from hvhost.manager import foreground
    from hvhost.manager.definition import define

    foreground.run(define(**options), progress=say)
    return True
