"""Real inputs by pinned name and hash: `asset("shakespeare")` is a path whose content has just been verified.

The sources of each asset are listed in assets.toml and tried in order: a local mirror, a package archive (read as a zip or
tar file, never installed), the public address of the original. For a source archive pip may run its build backend to read
its metadata; it does so after checking the pinned hash. A wrong hash is an error of that source, never
a result. What was fetched is kept in `$SPINE_CACHE`, or in the user's cache folder, and checked at every use.
"""

import fnmatch
import functools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import filelock
import platformdirs
from tqdm import tqdm

from common.foundation.files import atomic_path, sha256_bytes, sha256_file

MANIFEST = Path(__file__).with_name("assets.toml")


class AssetUnavailable(RuntimeError):
    """No source of an asset could be reached, or none had the right content."""


@dataclass(frozen=True)
class Asset:
    """One entry of assets.toml, whose head explains the fields."""

    name: str
    about: str
    licence: str
    sha256: str
    file: str | None = None
    mirror: str | None = None
    package: str | None = None
    archive: str | None = None
    archive_sha256: str | None = None
    members: str | None = None
    url: str | None = None

    @property
    def is_folder(self) -> bool:
        return self.file is None


@functools.cache
def catalogue(manifest: Path = MANIFEST) -> dict[str, Asset]:
    """Every asset by name."""
    return {name: Asset(name, **entry) for name, entry in tomllib.loads(manifest.read_text(encoding="utf-8")).items()}


def find(name: str) -> Asset:
    if name not in catalogue():
        raise ValueError(f"asset {name!r} is not in {MANIFEST.name}; it has {', '.join(catalogue())}")
    return catalogue()[name]


def pinned_hash(name: str) -> str:
    """The sha256 that the content of this asset must have. No download."""
    return find(name).sha256


def cache_directory() -> Path:
    """`$SPINE_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("SPINE_CACHE") or platformdirs.user_cache_dir("foundations-to-reasoning"))


def is_cached(name: str) -> bool:
    """True if the asset is in the cache with the right content."""
    return _verified(find(name), _place(find(name)))


def asset(name: str) -> Path:
    """The path of the asset: a file, or a folder where it has several members. Fetched first if needed.

    Safe when several processes ask at once: one fetches, the others wait. A file that was truncated or altered since
    it was fetched is noticed and fetched again.

    Raises:
        ValueError: no asset has this name.
        AssetUnavailable: names the asset, every source that was tried, and what to do.
    """
    entry = find(name)
    target = _place(entry)
    if _verified(entry, target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target.parent}.lock"):
        if not _verified(entry, target):  # another process may have fetched it while we waited
            _fetch(entry, target)
    return target


def _place(entry: Asset) -> Path:
    return cache_directory() / "assets" / entry.name / (entry.file or "members")


def _verified(entry: Asset, path: Path) -> bool:
    if not path.exists():
        return False
    return (_folder_hash(path) if entry.is_folder else sha256_file(path)) == entry.sha256


def _folder_hash(folder: Path) -> str:
    return _members_hash({p.relative_to(folder).as_posix(): p.read_bytes() for p in _visible_files(folder)})


def _visible_files(folder: Path) -> list[Path]:
    """Without the dot files that a desktop leaves behind."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _members_hash(members: dict[str, bytes]) -> str:
    return sha256_bytes("".join(f"{sha256_bytes(members[name])}  {name}\n" for name in sorted(members)).encode())


def _fetch(entry: Asset, target: Path) -> None:
    tried: list[str] = []
    print(f"fetching {entry.name}: {entry.about}", file=sys.stderr)
    for label, source in _sources(entry):
        try:
            members = source()
            found = _members_hash(members) if entry.is_folder else sha256_bytes(members[entry.file])
            if found != entry.sha256:
                raise ValueError(f"its content has sha256 {found[:12]}…, expected {entry.sha256[:12]}…")
            _store(entry, members, target)
            return
        except Exception as error:
            tried.append(f"  {label}: {_first_line(error)}")
    raise AssetUnavailable(
        f"asset {entry.name!r} ({entry.about}) could not be fetched. Tried:\n" + "\n".join(tried) + "\n"
        "Connect to the network and try again, or put "
        f"{entry.mirror or entry.archive or entry.file!r} into a folder and set SPINE_ASSETS to that folder."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _sources(entry: Asset) -> Iterator[tuple[str, Callable[[], dict[str, bytes]]]]:
    """(label, function that returns {name: content}) for each source, in the order in which they are tried."""
    mirror = os.environ.get("SPINE_ASSETS")
    if not mirror:
        yield "mirror", lambda: _fail("SPINE_ASSETS is not set")
    elif entry.mirror:
        yield f"mirror {mirror}", lambda: {entry.file: (Path(mirror) / entry.mirror).read_bytes()}
    if mirror and entry.archive:
        yield f"mirror {mirror}", lambda: _read_archive(entry, Path(mirror) / entry.archive)
    if entry.package:
        yield f"package {entry.package}", lambda: _from_package(entry)
    if entry.url:
        yield f"address {entry.url}", lambda: {entry.file: _download(entry.url)}


def _fail(why: str) -> dict[str, bytes]:
    raise FileNotFoundError(why)


def _store(entry: Asset, members: dict[str, bytes], target: Path) -> None:
    """Put the content in place whole or not at all; an older, damaged copy is replaced."""
    if not entry.is_folder:
        with atomic_path(target) as temporary:
            temporary.write_bytes(members[entry.file])
        return
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".members."))
    try:
        for name, content in members.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        temporary.chmod(0o755)  # mkdtemp makes it private
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _from_package(entry: Asset) -> dict[str, bytes]:
    """Fetch the archive with pip, which checks its hash before it opens it, and read the members out of it."""
    kept = cache_directory() / "archives" / entry.archive
    kept.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{kept}.lock"):
        if not kept.exists() or sha256_file(kept) != entry.archive_sha256:
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                wanted = Path(folder) / "wanted.txt"
                wanted.write_text(f"{entry.package} --hash=sha256:{entry.archive_sha256}\n", encoding="utf-8")
                name = entry.package.partition("==")[0]
                binary = (
                    ["--only-binary", name, *_tags(entry.archive)]
                    if entry.archive.endswith(".whl")
                    else ["--no-binary", name]
                )
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *binary]
                command += ["--disable-pip-version-check", "--dest", folder, "--requirement", str(wanted)]
                # pip draws its own progress bar; file descriptor 2 keeps it out of our standard output.
                done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                    raise OSError("pip download failed: " + (lines[-1] if lines else f"exit code {done.returncode}"))
                os.replace(Path(folder) / entry.archive, kept)
    return _read_archive(entry, kept)


def _tags(wheel: str) -> list[str]:
    """What makes pip fetch this very wheel on any machine: its content is read, not run.

    >>> _tags("gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl")[:4]
    ['--implementation', 'cp', '--python-version', '311']
    """
    python, abi, platforms = wheel.removesuffix(".whl").split("-")[-3:]
    if platforms == "any":
        return []
    found = ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
    return found + [part for platform in platforms.split(".") for part in ("--platform", platform)]


def _read_archive(entry: Asset, path: Path) -> dict[str, bytes]:
    """The members of a wheel or source archive that match the entry's pattern, read without extracting the rest."""
    if sha256_file(path) != entry.archive_sha256:
        raise ValueError(f"{path} has another sha256 than {entry.archive_sha256[:12]}…")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            found = {name: archive.read(name) for name in archive.namelist() if fnmatch.fnmatch(name, entry.members)}
    else:
        with tarfile.open(path) as archive:
            names = [name for name in archive.getnames() if fnmatch.fnmatch(name, entry.members)]
            found = {name: archive.extractfile(name).read() for name in names}
    if not found:
        raise ValueError(f"{path} has no member {entry.members}")
    if entry.is_folder:
        unsafe = [name for name in found if ".." in PurePosixPath(name).parts or name.startswith("/")]
        if unsafe:
            raise ValueError(f"{path}: member {unsafe[0]!r} would land outside its folder")
        return found
    (content,) = found.values()
    return {entry.file: content}


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        total = int(answer.headers.get("Content-Length") or 0)
        chunks = []
        with tqdm(total=total or None, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], delay=1) as bar:
            while chunk := answer.read(1 << 16):
                chunks.append(chunk)
                bar.update(len(chunk))
    content = b"".join(chunks)
    if total and len(content) != total:
        raise OSError(f"the download stopped at {len(content):,} of {total:,} bytes")
    return content
