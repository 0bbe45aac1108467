"""Fetching, from sources that the test makes: no network."""

import io
import multiprocessing
import tarfile
import zipfile

import pytest

from common.foundation import assets
from common.foundation.files import sha256_bytes

TEXT = b"To be, or not to be\n" * 50


def make_archive(folder, kind):
    """A wheel or source archive with two texts in it; returns (name, sha256)."""
    members = {"box/plays/a.md": TEXT, "box/plays/b.md": TEXT[::-1], "box/code.py": b"raise SystemExit"}
    if kind == "wheel":
        path = folder / "box-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        path = folder / "box-1.0.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path.name, sha256_bytes(path.read_bytes())


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache, a mirror folder, and a catalogue that the test fills."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    monkeypatch.setenv("SPINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPINE_ASSETS", str(mirror))
    entries = {}
    monkeypatch.setattr(assets, "catalogue", lambda: entries)
    return mirror, entries


def one_file(**fields):
    return assets.Asset("text", "a text", "public domain", sha256_bytes(TEXT), file="text.md", **fields)


def test_from_the_mirror_file(place):
    mirror, entries = place
    entries["text"] = one_file(mirror="original.md")
    (mirror / "original.md").write_bytes(TEXT)
    assert assets.asset("text").read_bytes() == TEXT
    (mirror / "original.md").unlink()
    assert assets.asset("text").read_bytes() == TEXT, "the second time from the cache"


@pytest.mark.parametrize("kind", ["wheel", "source"])
def test_from_an_archive_in_the_mirror(place, kind):
    mirror, entries = place
    name, digest = make_archive(mirror, kind)
    entries["text"] = one_file(archive=name, archive_sha256=digest, members="box/plays/a.md")
    assert assets.asset("text").read_bytes() == TEXT


def test_a_folder_of_members(place):
    mirror, entries = place
    name, digest = make_archive(mirror, "wheel")
    members = {"box/plays/a.md": TEXT, "box/plays/b.md": TEXT[::-1]}
    entries["plays"] = assets.Asset(
        "plays", "two", "-", assets._members_hash(members), archive=name, archive_sha256=digest, members="box/plays/*"
    )
    folder = assets.asset("plays")
    assert sorted(p.name for p in folder.rglob("*.md")) == ["a.md", "b.md"]
    next(folder.rglob("a.md")).write_bytes(b"altered")
    assert next(assets.asset("plays").rglob("a.md")).read_bytes() == TEXT


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b.replace(b"be", b"bee", 1), lambda b: b""])
def test_a_damaged_copy_is_fetched_again(place, damage):
    mirror, entries = place
    entries["text"] = one_file(mirror="original.md")
    (mirror / "original.md").write_bytes(TEXT)
    path = assets.asset("text")
    path.write_bytes(damage(TEXT))
    assert not assets.is_cached("text")
    assert assets.asset("text").read_bytes() == TEXT


def test_a_desktops_dot_files_do_not_matter(place):
    mirror, entries = place
    name, digest = make_archive(mirror, "wheel")
    members = {"box/plays/a.md": TEXT, "box/plays/b.md": TEXT[::-1]}
    entries["plays"] = assets.Asset(
        "plays", "two", "-", assets._members_hash(members), archive=name, archive_sha256=digest, members="box/plays/*"
    )
    (assets.asset("plays") / ".DS_Store").write_text("x")
    assert assets.is_cached("plays")


def test_a_wrong_source_is_passed_over_for_the_next(place):
    mirror, entries = place
    (mirror / "original.md").write_bytes(b"another edition")
    name, digest = make_archive(mirror, "wheel")
    entries["text"] = one_file(mirror="original.md", archive=name, archive_sha256=digest, members="box/plays/a.md")
    assert assets.asset("text").read_bytes() == TEXT


def test_with_no_source_the_error_names_asset_sources_and_remedy(place):
    mirror, entries = place
    (mirror / "original.md").write_bytes(b"another edition")
    name, _ = make_archive(mirror, "wheel")
    entries["text"] = one_file(
        mirror="original.md", archive=name, archive_sha256="0" * 64, members="box/plays/a.md", url="file:///nowhere/x"
    )
    with pytest.raises(assets.AssetUnavailable) as caught:
        assets.asset("text")
    message = str(caught.value)
    assert "asset 'text' (a text)" in message
    assert message.count("mirror ") == 2, "the file and the archive"
    assert "expected" in message
    assert "file:///nowhere/x" in message
    assert "SPINE_ASSETS" in message
    assert not list((mirror.parent / "cache").rglob("text.md")), "nothing half-fetched stays"


def test_public_address(place, tmp_path):
    _, entries = place
    (tmp_path / "web.md").write_bytes(TEXT)
    entries["text"] = one_file(url=(tmp_path / "web.md").as_uri())
    assert assets.asset("text").read_bytes() == TEXT


def test_a_member_cannot_leave_its_folder(place):
    mirror, entries = place
    path = mirror / "evil-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("box/../../evil.md", TEXT)
    digest = sha256_bytes(path.read_bytes())
    entries["evil"] = assets.Asset("evil", "-", "-", "0", archive=path.name, archive_sha256=digest, members="box/*")
    with pytest.raises(assets.AssetUnavailable, match="outside its folder"):
        assets.asset("evil")


def test_unknown_name_lists_the_known(place):
    _, entries = place
    entries["text"] = one_file()
    with pytest.raises(ValueError, match="it has text"):
        assets.asset("txet")


def _ask(cache, mirror, queue):
    import os

    os.environ.update(SPINE_CACHE=str(cache), SPINE_ASSETS=str(mirror))
    entry = one_file(mirror="original.md")
    assets.catalogue = lambda: {"text": entry}
    queue.put(assets.asset("text").read_bytes() == TEXT)


def test_two_processes_may_ask_at_once(place, tmp_path):
    mirror, _ = place
    (mirror / "original.md").write_bytes(TEXT)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_ask, args=(tmp_path / "cache", mirror, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=900) for _ in workers] == [True, True]
    for worker in workers:
        worker.join()


def test_the_real_catalogue_is_complete():
    for name, entry in assets.catalogue.__wrapped__().items():
        assert len(entry.sha256) == 64, name
        assert entry.licence, name
        assert entry.package or entry.url, name
        if entry.package:
            assert len(entry.archive_sha256) == 64, name
            assert entry.members, name
            assert "==" in entry.package, name
