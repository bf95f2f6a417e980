"""apt against small signed repositories on disk; nothing leaves the computer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_deb

from hvhost.errors import HvHostError
from hvhost.guests import apt
from hvhost.guests.apt import Mirror, Source, debian_mirror, download, suite_sources

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://secure.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""
ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] http://one.example/debian bookworm main # end
deb-src http://one.example/debian bookworm main
deb http://tools.example/debian stable tools
"""


def test_deb822_sources_are_read() -> None:
    assert apt.parse_deb822(DEB822) == [
        Source(
            "http://mirror.example/debian",
            ("bookworm", "bookworm-updates"),
            ("main", "contrib"),
            "/usr/share/keyrings/debian-archive-keyring.gpg",
        ),
        Source("http://secure.example/debian-security", ("bookworm-security",)),
    ]


def test_empty_lines_and_comments_of_deb822_may_be_anywhere() -> None:
    text = """
Types: deb


# Moved: in 2024
URIs: http://other.example/debian
"""
    assert apt.parse_deb822(text) == []
    (source,) = apt.parse_deb822(
        "\nTypes: deb\nURIs: http://m.example/debian\nComponents: main\nSuites: bookworm\n"
        "# bookworm-backports: not yet\n bookworm-updates\n \n"
    )
    assert source.suites == ("bookworm", "bookworm-updates")


def test_one_line_sources_are_read() -> None:
    assert apt.parse_one_line(ONE_LINE) == [
        Source("http://one.example/debian", ("bookworm",), ("main",), "/usr/share/keyrings/k.gpg"),
        Source("http://tools.example/debian", ("stable",), ("tools",)),
    ]


def test_all_files_of_the_system_are_read_and_others_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text(ONE_LINE)
    (parts / "debian.sources").write_text(DEB822)
    (parts / "old.list.save").write_text("deb http://saved.example/debian x main")
    uris = [source.uri for source in apt.system_sources(tmp_path)]
    assert uris[0] == "http://one.example/debian"
    assert "http://mirror.example/debian" in uris
    assert "http://saved.example/debian" not in uris
    assert apt.system_sources(tmp_path / "none") == []
    assert not caplog.records, "newer systems have no sources.list, which is nothing to tell of"


def test_the_mirror_is_the_systems_own() -> None:
    assert debian_mirror(apt.parse_deb822(DEB822)) == Mirror(
        "http://mirror.example/debian", "http://secure.example/debian-security"
    )
    assert debian_mirror(apt.parse_one_line(ONE_LINE)) == Mirror(
        "http://one.example/debian", "http://one.example/debian-security"
    )


def test_a_vendors_own_archive_is_not_taken_for_debians() -> None:
    vendor = Source("https://vendor.example/linux/debian", ("bookworm",), ("stable",))
    mirror = debian_mirror([vendor, *apt.parse_deb822(DEB822)])
    assert mirror.archive == "http://mirror.example/debian"


def test_the_mirror_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(apt.MIRROR_VARIABLE, "http://near.example/debian/")
    assert debian_mirror(apt.parse_deb822(DEB822)) == Mirror(
        "http://near.example/debian", "http://near.example/debian-security"
    )


def test_a_computer_without_a_debian_mirror_is_told_what_to_set() -> None:
    with pytest.raises(HvHostError, match=apt.MIRROR_VARIABLE):
        debian_mirror([Source("http://x.example/ubuntu", ("noble",))])


def test_suites_have_their_updates_where_they_exist() -> None:
    mirror = Mirror("http://m/debian", "http://m/debian-security")
    assert suite_sources("sid", mirror) == [Source("http://m/debian", ("sid",))]
    assert suite_sources("trixie", mirror) == [
        Source("http://m/debian", ("trixie", "trixie-updates")),
        Source("http://m/debian-security", ("trixie-security",)),
    ]
    assert suite_sources("bookworm-backports", mirror) == [
        Source("http://m/debian", ("bookworm", "bookworm-backports"))
    ]


def test_a_meta_package_names_its_kernel() -> None:
    assert apt.versioned_kernel_dependencies(
        "linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), foo | linux-image-6.0-x"
    ) == ["linux-image-6.1.0-56-cloud-amd64"]
    assert apt.versioned_kernel_dependencies(
        "kmod, linux-base (>= 4.3~), linux-modules-7.2-amd64 (= 1), linux-binary-7.2-amd64 (= 1)"
    ) == ["linux-modules-7.2-amd64", "linux-binary-7.2-amd64"]


@dataclass
class Signer:
    """A key pair of its own."""

    home: Path
    keyring: Path

    @classmethod
    def make(cls, directory: Path) -> Signer:
        directory.mkdir(parents=True)
        # gpg's agent needs a short path for its socket; without a passphrase it still starts one.
        home = Path("/tmp") / f"hvhost-gpg-{os.getpid()}-{directory.name}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(mode=0o700)
        signer = cls(home, directory / "keyring.gpg")
        signer.gpg("--quick-generate-key", "--passphrase", "", directory.name, "default", "sign")
        signer.keyring.write_bytes(signer.gpg("--export"))
        return signer

    def gpg(self, *arguments: str, data: bytes = b"") -> bytes:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--yes", *arguments]
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=False)
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Signer]:
    if shutil.which("gpg") is None:
        pytest.skip("needs gpg to sign test repositories")
    base = tmp_path_factory.mktemp("keys")
    return {name: Signer.make(base / name) for name in ("old", "new")}


@pytest.fixture(scope="module", autouse=True)
def no_agents_left(request: pytest.FixtureRequest) -> None:
    def finish() -> None:
        for home in Path("/tmp").glob(f"hvhost-gpg-{os.getpid()}-*"):
            Signer(home, home).close()

    request.addfinalizer(finish)


class Repository:
    """A Debian archive in a directory, read by apt through its ``copy`` method."""

    def __init__(self, root: Path) -> None:
        self.root = root / "debian"
        self.uri = f"copy:{self.root}"

    def package(self, name: str, version: str = "1", depends: str = "") -> Path:
        path = self.root / "pool" / f"{name}_{version}_amd64.deb"
        content = tiny_deb.files({f"usr/lib/{name}": version.encode()})
        return tiny_deb.write(path, content, version=version, depends=depends)

    def publish(
        self, suite: str, packages: Sequence[Path], signer: Signer | None, root: Path | None = None
    ) -> None:
        root = root or self.root
        directory = root / "dists" / suite
        index = directory / "main/binary-amd64/Packages"
        index.parent.mkdir(parents=True, exist_ok=True)
        stanzas = []
        for path in packages:
            control = subprocess.run(
                ["dpkg-deb", "--field", str(path)], capture_output=True, text=True, check=True
            ).stdout.strip()
            content = path.read_bytes()
            stanzas.append(
                f"{control}\nFilename: pool/{path.name}\nSize: {len(content)}\n"
                f"SHA256: {hashlib.sha256(content).hexdigest()}\n"
            )
        index.write_text("\n".join(stanzas))
        text = index.read_bytes()
        release = (
            f"Origin: Debian\nSuite: {suite}\nCodename: {suite}\nComponents: main\n"
            "Architectures: amd64\nDate: Sat, 01 Jan 2022 00:00:00 UTC\nSHA256:\n"
            f" {hashlib.sha256(text).hexdigest()} {len(text)} main/binary-amd64/Packages\n"
        ).encode()
        if signer is None:
            (directory / "Release").write_bytes(release)
        else:
            (directory / "InRelease").write_bytes(signer.gpg("--clearsign", data=release))

    def publish_all(self, suite: str, packages: Sequence[Path], signer: Signer | None) -> None:
        self.publish(suite, packages, signer)
        self.publish(f"{suite}-updates", [], signer)
        security = self.root.with_name("debian-security")
        self.publish(f"{suite}-security", [], signer, security)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    repository = Repository(tmp_path)
    monkeypatch.setenv(apt.MIRROR_VARIABLE, repository.uri)
    return repository


@pytest.fixture
def old_key(signers: dict[str, Signer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Signer:
    """This computer's keyring holds the old key only."""
    keyrings = tmp_path / "keyrings"
    keyrings.mkdir()
    shutil.copy(signers["old"].keyring, keyrings / "debian-archive-keyring.gpg")
    monkeypatch.setattr(apt, "KEYRING_DIRECTORY", keyrings)
    return signers["old"]


def test_a_meta_package_is_resolved_and_downloaded_once(
    repository: Repository, old_key: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = [
        repository.package("linux-image-cloud-amd64", depends="linux-image-6.1.0-9-cloud-amd64"),
        repository.package(
            "linux-image-6.1.0-9-cloud-amd64",
            depends="kmod, linux-modules-6.1.0-9-cloud-amd64, linux-binary-6.1.0-9-cloud-amd64",
        ),
        repository.package("linux-modules-6.1.0-9-cloud-amd64", depends="libc6"),
        repository.package(
            "linux-binary-6.1.0-9-cloud-amd64", depends="linux-modules-6.1.0-9-cloud-amd64"
        ),
        repository.package("busybox-static"),
    ]
    repository.publish_all("bookworm", packages, old_key)
    said: list[str] = []
    wanted = ("linux-image-cloud-amd64", "busybox-static")
    first = download("bookworm", wanted, progress=said.append)
    assert [path.name.split("_")[0] for path in first] == [
        "linux-image-6.1.0-9-cloud-amd64",
        "linux-modules-6.1.0-9-cloud-amd64",
        "linux-binary-6.1.0-9-cloud-amd64",
        "busybox-static",
    ]
    assert first[0].read_bytes() == packages[1].read_bytes()
    assert any("package lists of bookworm" in line for line in said)

    # The second time neither the mirror nor apt is needed.
    shutil.rmtree(repository.root)
    monkeypatch.setenv("PATH", "")
    said.clear()
    assert download("bookworm", wanted, progress=said.append) == first
    assert said == []
    monkeypatch.undo()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", '{"busybox-static": 7}', '{"busybox-static": [7]}', '{"busybox-static": "a"}'],
)
def test_an_index_that_nobody_here_wrote_is_made_anew(tmp_path: Path, text: str) -> None:
    index, package = tmp_path / "resolved.json", tmp_path / "packages" / "a"
    package.parent.mkdir()
    package.touch()
    index.write_text(text)
    assert apt._cached(tmp_path, "busybox-static") is None
    apt._remember(tmp_path, "busybox-static", ["a"])
    assert apt._cached(tmp_path, "busybox-static") == [package]
    assert json.loads(index.read_text()) == {"busybox-static": ["a"]}


def test_a_file_that_was_lost_is_downloaded_again(repository: Repository, old_key: Signer) -> None:
    packages = [repository.package("busybox-static"), repository.package("hyperv-daemons")]
    repository.publish_all("bookworm", packages, old_key)
    (path,) = download("bookworm", ["busybox-static"])
    path.unlink()
    assert download("bookworm", ["busybox-static"]) == [path]
    assert path.is_file()
    (other,) = download("bookworm", ["hyperv-daemons"])
    assert other.read_bytes() == packages[1].read_bytes()


def test_refresh_asks_again(repository: Repository, old_key: Signer) -> None:
    repository.publish_all("bookworm", [repository.package("busybox-static", "1")], old_key)
    (first,) = download("bookworm", ["busybox-static"])
    repository.publish_all("bookworm", [repository.package("busybox-static", "2")], old_key)
    assert download("bookworm", ["busybox-static"]) == [first]
    (second,) = download("bookworm", ["busybox-static"], refresh=True)
    assert second.name == "busybox-static_2_amd64.deb"


def test_a_missing_security_archive_does_not_keep_a_guest_back(
    repository: Repository, old_key: Signer
) -> None:
    repository.publish_all("bookworm", [repository.package("busybox-static")], old_key)
    shutil.rmtree(repository.root.with_name("debian-security"))
    said: list[str] = []
    (path,) = download("bookworm", ["busybox-static"], progress=said.append)
    assert path.is_file()
    assert any("security archive cannot be read" in line for line in said)
    # The archive itself has to be there.
    shutil.rmtree(repository.root / "dists")
    with pytest.raises(HvHostError, match="does not carry Debian's bookworm"):
        download("bookworm", ["busybox-static"], refresh=True)


def test_other_architectures_have_their_own_lists(repository: Repository, old_key: Signer) -> None:
    native = repository.package("busybox-static")
    repository.publish_all("bookworm", [native], old_key)
    (path,) = download("bookworm", ["busybox-static"])
    with pytest.raises(HvHostError, match="no package busybox-static for i386"):
        download("bookworm", ["busybox-static"], architecture=apt.I386)
    assert download("bookworm", ["busybox-static"]) == [path]


def test_backports_are_preferred_only_there(repository: Repository, old_key: Signer) -> None:
    repository.publish_all("bookworm", [repository.package("linux-image-amd64", "1")], old_key)
    newer = repository.package("linux-image-amd64", "2")
    repository.publish("bookworm-backports", [newer], old_key)
    (path,) = download("bookworm-backports", ["linux-image-amd64"])
    assert path.name == "linux-image-amd64_2_amd64.deb"
    (path,) = download("bookworm", ["linux-image-amd64"])
    assert path.name == "linux-image-amd64_1_amd64.deb"


def test_an_older_version_serves_when_the_mirror_lost_the_newest(
    repository: Repository, old_key: Signer
) -> None:
    versions = [repository.package("hyperv-daemons", version) for version in ("1", "2")]
    repository.publish_all("bookworm", versions, old_key)
    versions[1].unlink()
    said: list[str] = []
    (path,) = download("bookworm", ["hyperv-daemons"], progress=said.append)
    assert path.name == "hyperv-daemons_1_amd64.deb"
    assert any("trying older" in line for line in said)


def test_a_package_of_other_content_than_signed_is_refused(
    repository: Repository, old_key: Signer, private_cache: Path
) -> None:
    package = repository.package("busybox-static")
    repository.publish_all("bookworm", [package], old_key)
    content = bytearray(package.read_bytes())
    content[-20] ^= 1
    package.write_bytes(content)
    with pytest.raises(HvHostError, match="Downloading busybox-static"):
        download("bookworm", ["busybox-static"])
    assert not list((private_cache / "apt/bookworm/packages").iterdir())


@pytest.mark.parametrize("signed", ["not", "by a stranger"])
def test_a_suite_nobody_vouches_for_is_refused(
    repository: Repository, old_key: Signer, signers: dict[str, Signer], signed: str
) -> None:
    signer = signers["new"] if signed == "by a stranger" else None
    repository.publish_all("bookworm", [repository.package("busybox-static")], signer)
    with pytest.raises(HvHostError, match="cannot verify Debian's bookworm"):
        download("bookworm", ["busybox-static"])


def test_newer_keys_come_from_a_suite_that_is_trusted(
    repository: Repository, old_key: Signer, signers: dict[str, Signer]
) -> None:
    place = "usr/share/keyrings/debian-archive-keyring.gpg"
    keys = repository.root / "pool/debian-archive-keyring_2_all.deb"
    where = str(apt.KEYRING_DIRECTORY).lstrip("/")
    content = {f"{where}/{Path(place).name}": signers["new"].keyring.read_bytes()}
    tiny_deb.write(keys, tiny_deb.files(content), version="2")
    # apt itself names the file by its architecture field.
    keys = keys.rename(keys.with_name("debian-archive-keyring_2_amd64.deb"))
    repository.publish_all("trixie", [keys], old_key)
    repository.publish("sid", [repository.package("busybox-static")], signers["new"])
    said: list[str] = []
    (path,) = download("sid", ["busybox-static"], progress=said.append)
    assert path.is_file()
    assert any("asking trixie" in line for line in said)


def test_keys_of_a_suite_that_is_not_trusted_do_not_help(
    repository: Repository, old_key: Signer, signers: dict[str, Signer]
) -> None:
    for suite in apt.KEYRING_SUITES:
        repository.publish_all(suite, [], signers["new"])
    repository.publish("sid", [repository.package("busybox-static")], signers["new"])
    with pytest.raises(HvHostError, match="cannot verify Debian's sid"):
        download("sid", ["busybox-static"])


def test_what_the_suite_does_not_have_is_named(repository: Repository, old_key: Signer) -> None:
    repository.publish_all("bookworm", [repository.package("busybox-static")], old_key)
    with pytest.raises(HvHostError, match="bookworm has no package nonesuch"):
        download("bookworm", ["nonesuch"])


def test_a_suite_the_mirror_does_not_carry(repository: Repository, old_key: Signer) -> None:
    repository.publish_all("bookworm", [], old_key)
    with pytest.raises(HvHostError, match=r"bullseye .*set HVHOST_DEBIAN_MIRROR"):
        download("bullseye", ["busybox-static"])


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch, old_key: Signer) -> None:
    monkeypatch.setenv(apt.MIRROR_VARIABLE, "http://127.0.0.1:1/debian")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(HvHostError, match=r"could not be read .*check the network"):
        download("bookworm", ["busybox-static"])


def test_a_network_that_is_away_is_not_blamed_on_the_security_archive() -> None:
    lost = "E: Failed to fetch http://m/debian-security/dists/x-security/InRelease  {}\n"
    away = apt._explain_update("bookworm", lost.format("Could not connect to m:80 (10.0.0.1)"))
    assert "check the network" in str(away)
    gone = apt._explain_update("bookworm", lost.format("404  Not Found [IP: 10.0.0.1 80]"))
    assert "security archive of Debian's bookworm" in str(gone)


def test_a_missing_keyring_is_said(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apt, "KEYRING_DIRECTORY", tmp_path / "none")
    with pytest.raises(HvHostError, match="install the package debian-archive-keyring"):
        download("bookworm", ["busybox-static"])
