"""Distribution packages from any Debian suite, without touching the system's own apt.

Each suite has a private apt root below the cache directory: its own lists, cache and status, so an
ordinary user can use it and the system's package state is neither read nor changed. What is taken
from the system is what only its administrator can know: the mirror, and the ``Acquire`` settings
(proxy, date checks). Signatures are always verified against the Debian keyring.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.guests import deb
from hvhost.paths import cache_dir

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

MIRROR_VARIABLE = "HVHOST_DEBIAN_MIRROR"
KEYRING_DIRECTORY = Path("/usr/share/keyrings")
KEYRING_NAMES = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
# Suites whose keyring package may know keys that are newer than this computer's keyring.
KEYRING_SUITES = ("trixie", "bookworm")
LISTS_FRESH_SECONDS = 3600
NATIVE, I386 = "amd64", "i386"
UPDATE_TIMEOUT = 300
DOWNLOAD_TIMEOUT = 900
_INDEX = "resolved.json"
# Meta packages name the real kernel by its version; newer suites split it into several packages.
_VERSIONED_KERNEL = re.compile(r"linux-(?:image|binary|modules|base)-\d\S*")
_UNTRUSTED = re.compile(
    r"NO_PUBKEY|EXPKEYSIG|REVKEYSIG|BADSIG|is not signed|couldn't be verified|no longer signed"
)
_UNREACHABLE = re.compile(
    r"Could not (?:connect|resolve)|Temporary failure|timed out|gave up after"
)
_INHERITED_SETTINGS = re.compile(
    r"^Acquire::(?:(?:https?|ftp)::\S*|Check-Date|Check-Valid-Until|Retries|ForceIPv[46])$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of apt's sources: where, which suites, which components, trusted by which keys."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...] = ("main",)
    signed_by: str | None = None


def parse_deb822(text: str) -> list[Source]:
    """The enabled binary sources of a ``.sources`` file (sources.list(5), deb822 style)."""
    found = []
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0] in " \t":
                if name:
                    fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        signed_by = fields.get("signed-by", "")
        found += [
            Source(
                uri.rstrip("/"),
                tuple(fields.get("suites", "").split()),
                tuple(fields.get("components", "").split()),
                signed_by if signed_by.startswith("/") else None,
            )
            for uri in fields.get("uris", "").split()
        ]
    return found


def parse_one_line(text: str) -> list[Source]:
    """The binary sources of a ``.list`` file (sources.list(5), one-line style)."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if match is None:
            continue
        options, uri, suite, components = match.groups()
        signed_by = re.search(r"signed-by=(/\S+)", options or "", re.IGNORECASE)
        found.append(
            Source(
                uri.rstrip("/"),
                (suite,),
                tuple(components.split()),
                signed_by.group(1) if signed_by else None,
            )
        )
    return found


def system_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Every binary source the system's apt is configured with, in apt's reading order."""
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    found: list[Source] = []
    for file in files:
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            log.warning("%s is left out: %s", file, error)
            continue
        if file.suffix == ".sources":
            found += parse_deb822(text)
        elif file.suffix == ".list":
            found += parse_one_line(text)
    return found


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where Debian's packages come from: the archive and its security archive (URIs)."""

    archive: str
    security: str


def debian_mirror(sources: Sequence[Source] | None = None) -> Mirror:
    """The mirror to use: ``HVHOST_DEBIAN_MIRROR``, or the one the system's own apt uses.

    A mirror's security archive is its neighbour with ``-security`` after its name, unless the
    system names another. Raises HvHostError when neither names a Debian archive.
    """
    override = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
    if override:
        return Mirror(override, f"{override}-security")
    archive = security = None
    for source in system_sources() if sources is None else sources:
        if "main" not in source.components:
            continue
        if any(suite.endswith(("-security", "/updates")) for suite in source.suites):
            security = security or source.uri
        elif re.search(r"/debian$", source.uri):
            archive = archive or source.uri
    if archive is None:
        raise HvHostError(
            "The apt configuration of this computer names no Debian archive; set "
            f"{MIRROR_VARIABLE} to the address of a Debian mirror (one ending in /debian)."
        )
    return Mirror(archive, security or f"{archive}-security")


def suite_sources(suite: str, mirror: Mirror) -> list[Source]:
    """The sources that make up one suite: with updates and security where the suite has them."""
    if suite in ("sid", "unstable", "experimental"):
        return [Source(mirror.archive, (suite,))]
    if suite.endswith("-backports"):
        return [Source(mirror.archive, (suite.removesuffix("-backports"), suite))]
    return [
        Source(mirror.archive, (suite, f"{suite}-updates")),
        Source(mirror.security, (f"{suite}-security",)),
    ]


def keyring() -> Path:
    """The Debian archive's keyring on this computer; HvHostError if it is not installed."""
    for name in KEYRING_NAMES:
        path = KEYRING_DIRECTORY / name
        if path.is_file():
            return path
    raise HvHostError(
        f"There is no Debian keyring in {KEYRING_DIRECTORY}, so no package could be verified; "
        "install the package debian-archive-keyring."
    )


def versioned_kernel_dependencies(depends: str) -> list[str]:
    """The packages of a Depends field that carry a kernel of one version, by name."""
    first_choices = (entry.split("|")[0].strip() for entry in depends.split(","))
    names = (re.split(r"[\s(:\[]", entry, maxsplit=1)[0] for entry in first_choices if entry)
    return [name for name in names if _VERSIONED_KERNEL.fullmatch(name)]


def inherited_settings() -> list[str]:
    """The system's own transport settings, as lines of an apt.conf."""
    done = subprocess.run(
        ["apt-config", "dump", "--format", "%F\t%v%n", "Acquire"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = []
    for line in done.stdout.splitlines():
        name, _, value = line.partition("\t")
        if value and '"' not in value and _INHERITED_SETTINGS.match(name):
            lines.append(f'{name} "{value}";')
    return lines


class _UntrustedError(HvHostError):
    """A suite is signed by keys that the keyring does not have, or not signed."""


class _SecurityArchiveError(HvHostError):
    """What failed is the suite's security archive, which a mirror may carry half of."""


class _PrivateApt:
    """apt with its root in one directory; one suite and one architecture each."""

    def __init__(
        self, suite: str, directory: Path, progress: Progress, architecture: str = NATIVE
    ) -> None:
        self.suite = suite
        self.architecture = architecture
        self.root = directory
        self.packages = directory / "packages"
        self._progress = progress
        self._updated = directory / "updated"
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("LC_")},
            "APT_CONFIG": str(directory / "apt.conf"),
            "LANG": "C",
            "LC_ALL": "C",
        }

    def configure(self, mirror: Mirror, keys: Path, *, security: bool = True) -> None:
        for name in ("etc/none", "lists/partial", "cache/archives/partial", "packages"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        nothing = self.root / "etc/none"
        settings = [
            f'Dir "{self.root}";',
            'Dir::Etc "etc";',
            f'Dir::Etc::Parts "{nothing}";',
            f'Dir::Etc::PreferencesParts "{nothing}";',
            f'Dir::Etc::SourceList "{self.root}/etc/suite.sources";',
            f'Dir::Etc::SourceParts "{nothing}";',
            f'Dir::Etc::Trusted "{nothing}/none";',
            f'Dir::Etc::TrustedParts "{nothing}";',
            f'Dir::State "{self.root}";',
            'Dir::State::Lists "lists";',
            f'Dir::State::Status "{self.root}/status";',
            f'Dir::Cache "{self.root}/cache";',
            'Dir::Bin::Methods "/usr/lib/apt/methods";',
            f'APT::Architecture "{self.architecture}";',
            f'APT::Architectures "{self.architecture}";',
            # The directory is its owner's alone, so apt's own unprivileged user cannot enter it.
            'APT::Sandbox::User "";',
            'APT::Update::Error-Mode "any";',
            'APT::Get::AllowUnauthenticated "false";',
            'Acquire::AllowInsecureRepositories "false";',
            'Acquire::Languages "none";',
            'Acquire::GzipIndexes "true";',
            'Acquire::http::Timeout "30";',
            'Acquire::https::Timeout "30";',
            'Acquire::Retries "2";',
            *inherited_settings(),
        ]
        sources = [
            f"Types: deb\nURIs: {source.uri}\nSuites: {' '.join(source.suites)}\n"
            f"Components: main\nSigned-By: {keys}\n"
            for source in suite_sources(self.suite, mirror)
            if security or source.uri == mirror.archive
        ]
        (self.root / "apt.conf").write_text("\n".join(settings) + "\n")
        (self.root / "etc/suite.sources").write_text("\n".join(sources))

    def _run(self, command: list[str], cwd: Path, limit: float) -> tuple[int, str]:
        """Run an apt program, reporting what it fetches; exit status and its whole output."""
        output: list[str] = []
        deadline = time.monotonic() + limit
        try:
            process = subprocess.Popen(
                ["timeout", "--kill-after=5", str(int(limit)), *command],
                cwd=cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except FileNotFoundError as error:
            raise HvHostError(
                f"{command[0]} is not on this computer; guests are built from Debian packages "
                "and need apt (on another distribution, give --kernel and --modules)."
            ) from error
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line)
                if match := re.match(r"Get:\d+ \S+ (.*) \[(.*)\]", line):
                    words = match[1].split()
                    what = words[2] if len(words) > 3 else " ".join(words)
                    self._progress(f"fetching {what} ({match[2]})")
        if time.monotonic() > deadline:
            output.append(f"E: gave up after {limit:.0f} s\n")
        return process.returncode, "".join(output)

    def update(self) -> None:
        self._progress(f"reading the package lists of {self.suite}")
        status, output = self._run(["apt-get", "-q", "update"], self.root, UPDATE_TIMEOUT)
        if status != 0:
            raise _explain_update(self.suite, output)
        self._updated.touch()

    def lists_age(self) -> float:
        """Seconds since the lists were read; infinite if they never were."""
        if not self._updated.exists():
            return float("inf")
        age = time.time() - self._updated.stat().st_mtime
        return age if age >= 0 else float("inf")

    def depends(self, package: str) -> str:
        """The Depends field of the newest version of ``package``; HvHostError if unknown."""
        status, output = self._run(
            ["apt-cache", "show", "--no-all-versions", *self._target(), package], self.root, 60
        )
        if status != 0:
            raise HvHostError(
                f"Debian's {self.suite} has no package {package} for {self.architecture}; check "
                "its name, or choose another suite."
            )
        match = re.search(r"^Depends: (.*)$", output, re.MULTILINE)
        return match[1] if match else ""

    def _target(self) -> list[str]:
        return ["-t", self.suite] if self.suite.endswith("-backports") else []

    def resolve(self, names: Sequence[str]) -> list[str]:
        """``names`` with each kernel meta package replaced by the packages it stands for."""
        resolved: list[str] = []
        pending = list(reversed(names))
        seen: set[str] = set()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            kernels = versioned_kernel_dependencies(self.depends(name))
            is_meta = bool(kernels) and not _VERSIONED_KERNEL.fullmatch(name)
            if not is_meta:
                resolved.append(name)
            pending += reversed(kernels)
        return resolved

    def _older_versions(self, package: str) -> list[str]:
        _, output = self._run(["apt-cache", "madison", package], self.root, 60)
        versions = re.findall(r"^\s*\S+\s*\|\s*(\S+)\s*\|", output, re.MULTILINE)
        return list(dict.fromkeys(versions))[1:]

    def fetch(self, package: str) -> str:
        """Download one package into the cache; the name of its file.

        A mirror may list a version that it does not carry (any more); an older one of the same
        suite is taken then.
        """
        incoming = self.root / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        choices = [package]
        for choice in choices:
            status, output = self._run(
                ["apt-get", "-q", "download", *self._target(), choice], incoming, DOWNLOAD_TIMEOUT
            )
            files = sorted(incoming.glob("*.deb"))
            if status == 0 and len(files) == 1:
                files[0].replace(self.packages / files[0].name)
                return files[0].name
            if choice == package and re.search(r"404 +Not Found|No such file", output):
                choices += [f"{package}={version}" for version in self._older_versions(package)]
                self._progress(f"the mirror lacks the newest {package}, trying older ones")
        raise HvHostError(
            f"Downloading {package} of Debian's {self.suite} failed ({_last_error(output)}); "
            "check the network and try again."
        )


def _last_error(output: str) -> str:
    errors = re.findall(r"^[EW]: (.*)$", output, re.MULTILINE)
    text = errors[0] if errors else (output.strip().splitlines() or ["apt said nothing"])[-1]
    return re.sub(r"\s+", " ", text)[:300].rstrip(".")


def _explain_update(suite: str, output: str) -> HvHostError:
    reason = _last_error(output)
    if _UNTRUSTED.search(output):
        return _UntrustedError(
            f"The keyring of this computer cannot verify Debian's {suite} ({reason}); install the "
            "newest debian-archive-keyring."
        )
    if "-security" in reason and not _UNREACHABLE.search(output):
        return _SecurityArchiveError(
            f"The security archive of Debian's {suite} could not be read ({reason})."
        )
    if re.search(r"404 +Not Found|does not have a Release file", output):
        return HvHostError(
            f"The mirror does not carry Debian's {suite}, which may have moved to the archive of "
            f"old releases ({reason}); set {MIRROR_VARIABLE} to a mirror that has it."
        )
    return HvHostError(
        f"The package lists of Debian's {suite} could not be read ({reason}); check the network "
        "and try again."
    )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _resolved(index: Path) -> dict[str, list[str]]:
    """What *index* remembers of earlier downloads; nothing of what :func:`_remember` never wrote.

    It lies in the user's cache, where a full disk or an editor may have been at it.
    """
    try:
        known = json.loads(index.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: names for key, names in known.items() if _are_names(names)}


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _cached(directory: Path, key: str) -> list[Path] | None:
    names = _resolved(directory / _INDEX).get(key)
    if not names:
        return None
    paths = [directory / "packages" / name for name in names]
    return paths if all(path.is_file() for path in paths) else None


def _remember(directory: Path, key: str, names: list[str]) -> None:
    index = directory / _INDEX
    known = _resolved(index)
    known[key] = names
    temporary = index.with_suffix(".new")
    temporary.write_text(json.dumps(known, indent=1))
    temporary.replace(index)


def silent(_message: str) -> None:
    """A progress callback that shows nothing."""


def _newer_keyring(suite: str, progress: Progress) -> Path:
    """The keyring of a suite that this computer's own keyring can verify."""
    names = ("debian-archive-keyring",)
    (package,) = _download(suite, names, refresh=False, progress=progress, only_our_keys=True)
    root = deb.extract([package], progress)
    for name in KEYRING_NAMES:
        path = root / KEYRING_DIRECTORY.relative_to("/") / name
        if path.is_file():
            return path
    raise HvHostError(f"{package.name} holds no keyring; install debian-archive-keyring.")


def _update(apt: _PrivateApt, mirror: Mirror, progress: Progress, *, only_our_keys: bool) -> None:
    """Read the lists; keys this computer lacks come from a suite whose keys it has."""
    try:
        apt.update()
        return
    except _SecurityArchiveError as error:
        # A guest to test with is better than none; its packages are verified all the same.
        log.warning("%s Its packages are taken as they were released.", error)
        progress(f"{apt.suite}'s security archive cannot be read, going on without it")
        apt.configure(mirror, keyring(), security=False)
        apt.update()
        return
    except _UntrustedError as error:
        if only_our_keys:
            raise
        refused = error
    for suite in KEYRING_SUITES:
        if suite == apt.suite:
            continue
        progress(f"{apt.suite} is signed by keys unknown here; asking {suite} for them")
        try:
            apt.configure(mirror, _newer_keyring(suite, progress))
            apt.update()
            return
        except HvHostError as error:
            log.info("%s does not help to verify %s: %s", suite, apt.suite, error)
    raise refused


def download(
    suite: str,
    package_names: Sequence[str],
    *,
    architecture: str = NATIVE,
    refresh: bool = False,
    progress: Progress = silent,
) -> list[Path]:
    """The .deb files of packages of a Debian suite, verified and cached.

    A kernel meta package stands for the packages of the kernel it names. What an earlier call
    downloaded is returned without asking the mirror, unless ``refresh``. Raises HvHostError when
    the suite or a package cannot be had, or cannot be verified.
    """
    return _download(
        suite,
        package_names,
        refresh=refresh,
        progress=progress,
        only_our_keys=False,
        architecture=architecture,
    )


def verified_sources(suite: str, progress: Progress = silent) -> list[Source]:
    """The sources of a Debian suite, each with the keyring that verifies it.

    Raises HvHostError when the mirror does not have them, or no keyring at hand verifies them.
    """
    directory = cache_dir("apt") / suite
    directory.mkdir(exist_ok=True)
    with _locked(directory):
        apt = _PrivateApt(suite, directory, progress)
        mirror = debian_mirror()
        apt.configure(mirror, keyring())
        _update(apt, mirror, progress, only_our_keys=False)
        return parse_deb822((directory / "etc/suite.sources").read_text())


def _download(
    suite: str,
    package_names: Sequence[str],
    *,
    refresh: bool,
    progress: Progress,
    only_our_keys: bool,
    architecture: str = NATIVE,
) -> list[Path]:
    directory = cache_dir("apt") / (suite if architecture == NATIVE else f"{suite}-{architecture}")
    directory.mkdir(exist_ok=True)
    key = " ".join(package_names)
    with _locked(directory):
        cached = None if refresh else _cached(directory, key)
        if cached is not None:
            return cached
        apt = _PrivateApt(suite, directory, progress, architecture)
        mirror = debian_mirror()
        apt.configure(mirror, keyring())
        if refresh or apt.lists_age() > LISTS_FRESH_SECONDS:
            _update(apt, mirror, progress, only_our_keys=only_our_keys)
        names = [apt.fetch(package) for package in apt.resolve(package_names)]
        log.debug("%s: %s", suite, names)
        _remember(directory, key, names)
        return [apt.packages / name for name in names]


if __name__ == "__main__":
    for path in download(sys.argv[1], sys.argv[2:], progress=print):
        print(path)
