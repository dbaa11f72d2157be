"""The kept index of a .tar says what its headers say, is made again when damaged, and never outlives the archive."""

import io
import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dino.data import tar_index
from dino.data.files import read
from dino.data.walk import walk


@pytest.fixture(autouse=True)
def every_archive_is_large(monkeypatch, tmp_path):
    monkeypatch.setattr(tar_index, "WORTH_IT", 0)
    monkeypatch.setenv("DINO_DATA", str(tmp_path / "cache"))


def write(path, contents):
    with tarfile.open(path, "w") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


names = st.text(st.characters(exclude_characters="\0/\\", exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names.map(lambda n: f"a/x{n}.png"), st.binary(max_size=600), max_size=6))
def test_the_second_listing_is_the_first(tmp_path, contents):
    path = tmp_path / "shard.tar"
    write(path, contents)
    first, again = list(walk(str(path))), list(walk(str(path)))
    assert first == again
    assert [read(found) for found in again] == [contents[found.folder + found.file] for found in first]


def test_it_is_read_from_the_index(tmp_path, monkeypatch):
    write(tmp_path / "shard.tar", {"a/1.png": b"one", "a/2.png": b"two"})
    first = list(walk(str(tmp_path / "shard.tar")))
    monkeypatch.setattr(tar_index, "_headers", lambda _: pytest.fail("the headers were read again"))
    assert list(walk(str(tmp_path / "shard.tar"))) == first


def test_another_archive_or_a_damaged_index_is_read_anew(tmp_path):
    path = tmp_path / "shard.tar"
    write(path, {"a/1.png": b"one"})
    list(walk(str(path)))
    write(path, {"b/2.png": b"two", "b/3.png": b"three"})
    os.utime(path, ns=(1, 1))
    assert [found.key for found in walk(str(path))] == ["b/2.png", "b/3.png"]
    for index in (tmp_path / "cache" / "indexes").iterdir():
        index.write_bytes(index.read_bytes()[:50])
    assert [found.key for found in walk(str(path))] == ["b/2.png", "b/3.png"]


def test_where_nothing_can_be_kept_it_is_listed_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_DATA", "/dev/null/cache")
    write(tmp_path / "shard.tar", {"a/1.png": b"one"})
    assert [found.key for found in walk(str(tmp_path / "shard.tar"))] == ["a/1.png"]
