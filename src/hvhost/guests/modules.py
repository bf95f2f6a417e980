"""A kernel's modules: which driver serves a device, what it depends on, and what is built in.

A package's tree has no ``modules.dep`` or ``modules.alias`` (depmod writes them at installation),
so both are computed here from each module's ``.modinfo`` section, and ``modules.builtin`` with
``modules.builtin.modinfo`` tells what the kernel itself contains (kernel.org: kbuild/kbuild.rst).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.guests import elf
from hvhost.guests.compression import decompress
from hvhost.paths import cache_dir

log = logging.getLogger(__name__)

_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_INDEX_VERSION = 1
MODULE_DIRECTORIES = ("lib/modules", "usr/lib/modules")


def module_name(name: str) -> str:
    """The kernel's name of a module: dashes are underscores, no directory, no suffix."""
    return name.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


@dataclass(frozen=True, slots=True)
class Module:
    """One loadable module; ``path`` is relative to the tree, ``softdeps`` may be absent."""

    name: str
    path: str
    depends: tuple[str, ...]
    softdeps: tuple[str, ...]
    aliases: tuple[str, ...]


def read_module(path: Path) -> bytes:
    """A module's ELF image, decompressed. Raises HvHostError if it is damaged."""
    try:
        return decompress(path.read_bytes(), path.suffix)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise HvHostError(f"The module {path} cannot be read ({why}); install it again.") from error


def parse_modinfo(content: bytes) -> list[tuple[str, str]]:
    """The ``key=value`` strings of a ``.modinfo`` section, in their order."""
    pairs = []
    for item in content.split(b"\0"):
        key, separator, value = item.decode("utf-8", "replace").partition("=")
        if separator:
            pairs.append((key, value))
    return pairs


def _soft_dependencies(value: str) -> Iterator[str]:
    """Names from ``pre: a b post: c`` that should be loaded first (modprobe.d(5), softdep)."""
    wanted = False
    for word in value.split():
        if word.endswith(":"):
            wanted = word == "pre:"
        elif wanted:
            yield word


def _modinfo_section(file: Path) -> bytes:
    if file.suffix != ".ko" or not file.stat().st_size:
        return elf.section(read_module(file), ".modinfo") or b""
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data,
        memoryview(data) as view,
    ):
        return elf.section(view, ".modinfo") or b""


def _describe(tree: Path, path: str) -> Module:
    try:
        content = _modinfo_section(tree / path)
    except elf.ElfError as error:
        raise HvHostError(f"The module {tree / path} is damaged; install it again.") from error
    depends: list[str] = []
    softdeps: list[str] = []
    aliases: list[str] = []
    for key, value in parse_modinfo(content):
        if key == "depends":
            depends += [module_name(name) for name in value.split(",") if name]
        elif key == "softdep":
            softdeps += _soft_dependencies(value)
        elif key == "alias":
            aliases.append(value)
    return Module(module_name(path), path, tuple(depends), tuple(softdeps), tuple(aliases))


def _find(tree: Path) -> list[str]:
    found = []
    for directory, names, files in os.walk(tree):
        # An installed tree may link to its sources here, which hold modules of their own.
        names[:] = sorted(name for name in names if name not in ("build", "source"))
        base = os.path.relpath(directory, tree)
        found += [f"{base}/{name}" for name in files if name.endswith(_SUFFIXES)]
    return sorted(name.removeprefix("./") for name in found)


def _read_builtin(tree: Path) -> dict[str, list[str]]:
    """Built-in modules with their aliases."""
    builtin: dict[str, list[str]] = {}
    names = tree / "modules.builtin"
    if names.is_file():
        for line in names.read_text().split():
            builtin.setdefault(module_name(line), [])
    info = tree / "modules.builtin.modinfo"
    if info.is_file():
        for key, value in parse_modinfo(info.read_bytes()):
            name, _, field = key.rpartition(".")
            if field == "alias" and name:
                builtin.setdefault(module_name(name), []).append(value)
    return builtin


class ModuleTree:
    """The modules of one kernel: ``path`` is a ``lib/modules/RELEASE`` directory.

    The index is computed once and cached. Raises HvHostError when ``path`` holds no modules.
    """

    def __init__(self, path: Path) -> None:
        self.root = path
        self.release = path.name
        files = _find(path) if path.is_dir() else []
        if not files and not (path / "modules.builtin").is_file():
            raise HvHostError(
                f"{path} holds no kernel modules; give the directory lib/modules/RELEASE of the "
                "kernel."
            )
        self._modules, self._builtin = self._load(files)

    def _load(self, files: list[str]) -> tuple[dict[str, Module], dict[str, list[str]]]:
        signature = hashlib.sha256(str(self.root.resolve()).encode())
        for name in [*files, "modules.builtin", "modules.builtin.modinfo"]:
            try:
                status = (self.root / name).stat()
            except FileNotFoundError:
                continue
            signature.update(f"\0{name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
        cached = cache_dir("modules") / f"{self.release}-{signature.hexdigest()[:16]}.json"
        if cached.exists():
            try:
                saved = json.loads(cached.read_text())
                if saved["version"] == _INDEX_VERSION:
                    modules = [
                        Module(name, file, tuple(depends), tuple(softdeps), tuple(aliases))
                        for name, file, depends, softdeps, aliases in saved["modules"]
                    ]
                    return {module.name: module for module in modules}, saved["builtin"]
            except (ValueError, KeyError, TypeError) as error:
                log.warning("the index %s is computed again: %s", cached, error)
        with ThreadPoolExecutor() as pool:  # decompression runs outside the interpreter's lock
            modules = list(pool.map(lambda name: _describe(self.root, name), files))
        builtin = _read_builtin(self.root)
        text = json.dumps(
            {
                "version": _INDEX_VERSION,
                "modules": [[m.name, m.path, m.depends, m.softdeps, m.aliases] for m in modules],
                "builtin": builtin,
            }
        )
        temporary = cached.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(cached)
        return {module.name: module for module in modules}, builtin

    def __contains__(self, name: str) -> bool:
        """Whether the kernel has ``name``, built in or as a module."""
        name = module_name(name)
        return name in self._modules or name in self._builtin

    def module(self, name: str) -> Module | None:
        """The loadable module ``name``; ``None`` if built in or absent."""
        return self._modules.get(module_name(name))

    def is_builtin(self, name: str) -> bool:
        """Whether the kernel itself contains ``name``."""
        return module_name(name) in self._builtin

    def option(self, name: str) -> bool | None:
        """Whether the kernel was built with an option such as ``CONFIG_MEMORY_HOTPLUG``.

        ``None`` where its configuration is not at hand: distributions put it into ``/boot`` or
        beside the modules.
        """
        text = self._configuration()
        if text is None:
            return None
        return re.search(rf"^{re.escape(name)}=[ym]$", text, re.MULTILINE) is not None

    def _configuration(self) -> str | None:
        boots = [
            self.root.parents[len(Path(base).parts)] / "boot" / f"config-{self.release}"
            for base in MODULE_DIRECTORIES
            if len(self.root.parents) > len(Path(base).parts)
        ]
        for path in (self.root / "config", *boots):
            if path.is_file():
                return path.read_text(encoding="utf-8", errors="replace")
        return None

    def path(self, name: str) -> Path:
        """The file of a loadable module; HvHostError if the kernel has no such module."""
        module = self.module(name)
        if module is None:
            raise HvHostError(
                f"The kernel {self.release} has no module {name}; check the name, or choose a "
                "kernel that has it."
            )
        return self.root / module.path

    def drivers_for(self, modalias: str) -> list[str]:
        """Names of all drivers whose aliases match a device's modalias, built-in ones first.

        ``modalias`` may itself hold wildcards: ``vmbus:f8e65716*``.
        """
        built_in = [n for n, aliases in self._builtin.items() if _matches(aliases, modalias)]
        loadable = [n for n, m in self._modules.items() if _matches(m.aliases, modalias)]
        return sorted(built_in) + sorted(set(loadable) - set(built_in))

    def driver_for(self, modalias: str) -> str | None:
        """The first of :meth:`drivers_for`; ``None`` means that the guest lacks the driver."""
        return next(iter(self.drivers_for(modalias)), None)

    def closure(self, names: Iterable[str]) -> list[Module]:
        """The modules ``names`` and all they need, in load order; built-in ones are left out.

        Raises HvHostError for a name, or a dependency, that the kernel does not have.
        """
        ordered: dict[str, Module] = {}
        visited: set[str] = set()

        def visit(name: str) -> None:
            if name in visited or self.is_builtin(name):
                return
            module = self._modules.get(name)
            if module is None:
                self.path(name)
                return
            visited.add(name)
            for soft in module.softdeps:
                for target in self._by_name_or_alias(soft):
                    visit(target)
            for needed in module.depends:
                visit(needed)
            ordered[name] = module

        for name in names:
            visit(module_name(name))
        return list(ordered.values())

    def _by_name_or_alias(self, name: str) -> list[str]:
        plain = module_name(name)
        if plain in self:
            return [plain]
        return [m.name for m in self._modules.values() if name in m.aliases or plain in m.aliases]


def _matches(aliases: Iterable[str], modalias: str) -> bool:
    bus = modalias[:3]
    return any(
        fnmatch.fnmatchcase(modalias, alias) or fnmatch.fnmatchcase(alias, modalias)
        for alias in aliases
        # Most aliases are of other buses, and a pattern is slow to compile.
        if alias[:3] == bus or alias[:3].find("*") >= 0
    )


def find_tree(directory: Path, release: str | None = None) -> Path:
    """The ``lib/modules/RELEASE`` directory in or at ``directory``.

    Raises HvHostError when there is none, several, or only one of another release.
    """
    candidates = [directory] if _is_tree(directory) else []
    for base in (*MODULE_DIRECTORIES, "."):
        if candidates:
            break
        children = (directory / base).iterdir() if (directory / base).is_dir() else iter(())
        candidates = sorted(child for child in children if _is_tree(child))
    if not candidates:
        raise HvHostError(
            f"{directory} holds no kernel modules; give the directory lib/modules/RELEASE of the "
            "kernel."
        )
    if release is not None:
        fitting = [path for path in candidates if path.name == release]
        if not fitting:
            raise HvHostError(
                f"The modules in {directory} are of {', '.join(p.name for p in candidates)}, the "
                f"kernel is {release}; give the modules of the same build."
            )
        candidates = fitting
    if len(candidates) > 1:
        raise HvHostError(
            f"{directory} holds modules of several kernels "
            f"({', '.join(p.name for p in candidates)}); give the directory of one."
        )
    return candidates[0]


def _is_tree(path: Path) -> bool:
    return (path / "kernel").is_dir() or (path / "modules.builtin").is_file()
