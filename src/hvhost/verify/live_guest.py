"""Guests of images on disk, fitted to what the runner asks for (:mod:`hvhost.verify.guest`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hvhost.guests.apt import NATIVE
from hvhost.guests.build import GuestImages, prepare_guest
from hvhost.guests.catalog import DEFAULT_GUEST, check_guest, recipe
from hvhost.manager.definition import define
from hvhost.verify.guest import ANY_SHAPE, Machine, Modules, Shape
from hvhost.verify.live import LiveMachine
from hvhost.verify.options import VerifyOptions

# A guest that panics stays where it is, so that the host is the one to notice.
COMMAND_LINE = "console=ttyS0 panic=0"


@dataclass(frozen=True, slots=True)
class LiveGuest:
    """:class:`hvhost.verify.guest.PreparedGuest` of images on disk."""

    images: GuestImages
    options: VerifyOptions
    progress: Callable[[str], None] = lambda text: None

    @property
    def os_name(self) -> str:
        return self.images.title

    @property
    def release(self) -> str:
        return self.images.release

    @property
    def modules(self) -> Modules | None:
        return self.images.modules

    @property
    def daemons(self) -> frozenset[str]:
        return frozenset(self.images.daemons)

    @property
    def daemons_of(self) -> str:
        return self.images.daemons_of

    @property
    def is_64_bit(self) -> bool:
        return self.images.architecture == NATIVE

    def pae_sibling(self) -> LiveGuest | None:
        if not self.is_64_bit:
            return self
        if self.options.kernel is not None or self.options.debs:
            return None
        name = recipe(self.options.guest or DEFAULT_GUEST).pae
        if name is None:
            return None
        options = replace(self.options, guest=name)
        return LiveGuest(prepare_guest(name, progress=self.progress), options, self.progress)

    def start(self, *, verbose: bool, shape: Shape = ANY_SHAPE) -> Machine:
        return LiveMachine(
            shape.apply(
                define(
                    kernel=self.images.kernel,
                    initrd=self.images.initrd,
                    command_line=" ".join(
                        filter(
                            None,
                            (
                                COMMAND_LINE,
                                self.images.command_line,
                                "" if verbose else "quiet",
                                self.options.append,
                            ),
                        )
                    ),
                    cpus=self.options.cpus,
                    memory=self.options.memory,
                    transport=self.options.transport,
                )
            ),
            self.progress,
        )


def prepare(options: VerifyOptions, progress: Callable[[str], None]) -> LiveGuest:
    """The guest that *options* names, downloaded and built; *progress* hears what is being done."""
    if options.guest is not None:
        check_guest(options.guest, "give a kernel with --kernel or --deb")
    images = prepare_guest(
        options.guest,
        kernel=options.kernel,
        modules=options.modules,
        debs=options.debs,
        daemons=options.daemons,
        progress=progress,
    )
    return LiveGuest(images, options, progress)
