"""Whether a guest has what a row needs: asked of its module tree, never of what happened to bind.

A driver that is there and did not bind is a failure to be shown; only a driver that the kernel
does not have at all excuses a row.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from hvhost.verify.contract import Driver, Row
from hvhost.verify.guest import Modules


def has_driver(driver: Driver, modules: Modules) -> bool:
    """Whether ``modules.alias`` or ``modules.builtin`` of this kernel names the driver."""
    if any(modules.is_builtin(name) for name in driver.modules):
        return True
    if driver.alias is None:
        return any(name in modules for name in driver.modules)
    return not set(driver.modules).isdisjoint(modules.drivers_for(driver.alias))


def what_guest_lacks(row: Row, modules: Modules | None, daemons: AbstractSet[str]) -> str | None:
    """A sentence naming the first driver, option or daemon that *row*'s guest lacks, or ``None``.

    Of a kernel whose modules are not at hand no driver is said to be lacking, of one whose
    configuration is not, no option.
    """
    for driver in row.drivers if modules is not None else ():
        assert modules is not None
        if not has_driver(driver, modules):
            return (
                f"kernel {modules.release} has no driver {driver}: "
                "neither modules.alias nor modules.builtin names it"
            )
    for option in row.options if modules is not None else ():
        assert modules is not None
        if modules.option(option) is False:
            return f"kernel {modules.release} is built without {option}, says its configuration"
    if row.daemons and not daemons & set(row.daemons):
        return f"the distribution has no {' or '.join(row.daemons)}"
    return None if modules is None else _misfit(row, modules, daemons)


def lacks_only_a_program(row: Row, modules: Modules | None, daemons: AbstractSet[str]) -> bool:
    """Whether *row*'s guest lacks one of its daemons, and its kernel nothing."""
    lacks = what_guest_lacks(row, modules, daemons)
    whole = what_guest_lacks(row, modules, daemons | set(row.daemons))
    return lacks is not None and whole is None


def _misfit(row: Row, modules: Modules, daemons: AbstractSet[str]) -> str | None:
    """What is wrong with daemons that are there, but for a driver that this kernel has not."""
    for driver, daemon in row.served:
        if driver.alias is None:
            there = has_driver(driver, modules)
        else:
            there = not set(driver.modules).isdisjoint(modules.drivers_for(driver.alias))
            if not there and any(map(modules.is_builtin, driver.modules)):
                return None  # built in, and perhaps without a list of its devices: nobody can tell
        if there and daemon not in daemons:
            others = " and ".join(sorted(daemons & set(row.daemons)))
            return (
                f"kernel {modules.release} serves {row.id} through {driver}, which goes with "
                f"{daemon}; the guest was given {others}, which needs another driver"
            )
        if there:
            return None
    return None
