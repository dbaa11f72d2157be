"""Shards that lie elsewhere: listed once, read by ranges, tried again; and shards of any kind shared out in full."""

import collections
import http.server
import io
import itertools
import re
import tarfile
import threading
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.config import DataConfig, ReadConfig
from dino.data import remote
from dino.data.decode import BrokenImage
from dino.data.loader import Loader
from dino.data.shapes import make_shapes
from dino.data.sources import open_source

PIXELS, LABELS, _ = make_shapes(60, 16, 0)


def png(i):
    file = io.BytesIO()
    Image.fromarray(PIXELS[i].permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def tar(rows, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for i in rows:
            for name, data in ((f"{i:04d}.png", png(i)), (f"{i:04d}.cls", str(int(LABELS[i])).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def zipped(rows):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in rows:
            archive.writestr(f"{i:04d}.png", png(i))
    return file.getvalue()


def parquet(rows, group=3):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    table = pa.table({"image": [png(i) for i in rows], "label": [int(LABELS[i]) for i in rows]})
    pq.write_table(table, file, row_group_size=group)
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by ranges; the next ``failing`` requests end with code 503."""

    def __init__(self):
        self.files, self.failing, self.ranges, self.asked = {}, 0, True, collections.Counter()
        self.changed = "Wed, 25 Nov 2026 10:00:00 GMT"
        super().__init__(("localhost", 0), Handler)

    def url(self, name):
        return f"http://localhost:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        name = self.path.lstrip("/").partition("?")[0]
        data = self.server.files.get(name)
        if data is None:
            return self.answer(404, b"")
        if self.server.failing:
            self.server.failing -= 1
            return self.answer(503, b"", head)
        self.server.asked[name] += not head
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not span or not self.server.ranges:
            return self.answer(200, data, head)
        begin, end = int(span[1]), min(int(span[2]) + 1, len(data))
        return self.answer(206, data[begin:end], head, f"bytes {begin}-{end - 1}/{len(data)}")

    def answer(self, code, data, head=False, span=None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", span)
        self.send_header("Last-Modified", self.server.changed)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("DINO_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_WAIT", 0.01)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def shows(source, rows):
    assert len(source) == len(rows)
    assert all(torch.equal(source.load(i), PIXELS[row]) for i, row in enumerate(rows))


def test_shards_are_read_by_url(server):
    server.files = {
        "a-00.tar": tar(range(10)),
        "a-01.tar": tar(range(10, 20)),
        "b.tar.gz": tar(range(20, 25), "w:gz"),
        "c.zip": zipped(range(5)),
        "d.parquet": parquet(range(30, 40)),
        "e.png": png(7),
    }
    source = open_source([server.url("a-{00..01}.tar?key=x"), server.url("b.tar.gz")])
    shows(source, range(25))
    assert [source.classes[i] for i in source.labels.tolist()] == [str(int(i)) for i in LABELS[:25]]
    assert source.name(3) == server.url("a-00.tar?key=x") + "/0003.png"
    shows(open_source(server.url("c.zip")), range(5))
    shows(open_source(server.url("d.parquet")), range(30, 40))
    shows(open_source(server.url("e.png")), [7])


def test_a_shard_is_listed_once(server):
    """A second start reads its index, in place of its headers."""
    server.files = {"a.tar": tar(range(10))}
    open_source(server.url("a.tar"))
    server.asked.clear()
    source = open_source(server.url("a.tar"))
    start = server.asked["a.tar"]
    source.load(4)
    assert server.asked["a.tar"] == start + 1
    before = server.files["a.tar"]
    server.files["a.tar"], server.changed = tar(range(20, 30)), "Thu, 26 Nov 2026 10:00:00 GMT"
    assert len(server.files["a.tar"]) == len(before)
    source = open_source(server.url("a.tar"))  # Changed since: another index.
    shows(source, range(20, 30))
    assert source.name(0).endswith("a.tar/0020.png")


def test_a_read_that_fails_is_tried_again(server):
    server.files, server.failing = {"a.tar": tar(range(4))}, 3
    source = open_source(server.url("a.tar"))
    server.failing = 4
    shows(source, range(4))
    server.failing = 10**9
    with pytest.raises(BrokenImage, match=r"after 5 tries: .*503"):
        source.load(0)


def test_what_lies_nowhere_is_said(server):
    with pytest.raises(ValueError, match=r"nothing\.tar cannot be read: it does not exist"):
        open_source(server.url("nothing.tar"))
    with pytest.raises(ValueError, match=r"cannot be read: Protocol not known: nowhere"):
        open_source("nowhere://a.tar")
    server.files, server.ranges = {"a.tar": tar(range(40))}, False
    source = open_source(server.url("a.tar"))  # Small: it came in one piece.
    with pytest.raises(BrokenImage, match="sends whole files only"):
        source.load(0)


def test_workers_read_shards_by_url(server):
    server.files = {"a.tar": tar(range(30)), "b.tar": tar(range(30, 60))}
    source = open_source([server.url("a.tar"), server.url("b.tar")])
    batches = Loader(source, 10, data=DataConfig(cache="none", workers=2), seed=0, device="cpu").batches(0, 6)
    seen = torch.cat([batch.indices for batch in batches])
    assert sorted(seen.tolist()) == list(range(60))


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet"])
def test_a_shard_that_cannot_be_read_ends_the_run_or_is_left_out(tmp_path, kind, caplog):
    good, whole = {"tar": tar, "zip": zipped, "parquet": parquet}[kind], tmp_path / f"a.{kind}"
    whole.write_bytes(good(range(10)))
    (tmp_path / f"b.{kind}").write_bytes(good(range(10, 20))[: len(good(range(10, 20))) // 3 + 9])
    data = [str(whole), str(tmp_path / f"b.{kind}")]
    with pytest.raises(ValueError, match=rf"b\.{kind}.*--data\.bad-shards skip"):
        open_source(data)
    shows(open_source(data, read=ReadConfig(bad_shards="skip")), range(10))
    assert re.search(rf"b\.{kind}.*left out", caplog.text)


def test_a_bad_shard_leaves_nothing_of_it(tmp_path):
    """Compressed and damaged in the middle; with a label that cannot be unpacked, behind images that can."""
    good, packed, labels = tmp_path / "a.zip", tmp_path / "b.tar.bz2", tmp_path / "c.zip"
    good.write_bytes(zipped(range(3)))
    content = bytearray(tar(range(40), "w:bz2"))
    content[len(content) // 2] ^= 255
    packed.write_bytes(content)
    with zipfile.ZipFile(labels, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", png(1))
        archive.writestr("1.cls", "some text " * 9)
        place = archive.getinfo("1.cls").header_offset + 30 + len("1.cls")
    content = bytearray(labels.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    labels.write_bytes(content)
    for bad, reason in (
        (packed, r"b\.tar\.bz2 is not a whole compressed"),
        (labels, r"1\.cls cannot be read: damaged"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_source([str(good), str(bad)])
        shows(open_source([str(good), str(bad)], read=ReadConfig(bad_shards="skip")), range(3))


def test_an_archive_that_ends_before_its_end(tmp_path, caplog):
    """Cut in a header, a header that was damaged, and cut between two members: none is taken for the end in silence."""
    whole, path = tar(range(4)), tmp_path / "a.tar"
    for damaged in (whole[: 2048 + 100], whole[:2048] + b"x" * 100 + whole[2148:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.tar is not a whole \.tar archive: damaged at byte 2048"):
            open_source(str(path))
    path.write_bytes(whole[:2048])
    shows(open_source(str(path)), range(1))
    assert "a.tar has no mark at its end: it may have been cut short" in caplog.text


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    kind=st.sampled_from(["tar", "parquet", "both"]),
    world_size=st.sampled_from([1, 2, 3]),
    workers=st.sampled_from([0, 0, 2]),
    rows=st.integers(1, 3),
    begin=st.integers(0, 12),
    seed=st.integers(0, 3),
)
def test_shards_are_shared_out_without_loss_or_overlap(
    tmp_path_factory, counts, kind, world_size, workers, rows, begin, seed
):
    """Over any shards, processes, workers and place of resuming: in an epoch each image once, in the seed's order."""
    folder, starts = tmp_path_factory.mktemp("shards"), [sum(counts[:i]) for i in range(len(counts) + 1)]
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        of = "parquet" if kind == "parquet" or (kind == "both" and i % 2) else "tar"
        (folder / f"{i}.{of}").write_bytes((tar if of == "tar" else parquet)(range(start, end)))
    source, batch = open_source([str(path) for path in sorted(folder.iterdir())]), rows * world_size
    pixels = [source.load(i) for i in range(len(source))]
    if len(source) < batch:
        return

    def steps(first, last, workers):
        """The images of each step, process by process, and that their pixels are theirs."""
        made = []
        for rank in range(world_size):
            data = DataConfig(cache="none", workers=workers)
            loader = Loader(source, batch, data=data, seed=seed, device="cpu", rank=rank, world_size=world_size)
            made.append([(b.indices.tolist(), b.canvas) for b in loader.batches(first, last)])
        for indices, canvas in (one for process in made for one in process):
            for row, i in enumerate(indices):
                assert torch.equal(canvas.pixels[row][:, :16, :16], pixels[i])
        return [[i for process in made for i in process[step][0]] for step in range(last - first)]

    per_epoch = len(source) // batch
    last = max(begin + 1, 2 * per_epoch)
    through = steps(0, last, 0)
    for epoch in range(last // per_epoch):
        seen = [i for step in through[epoch * per_epoch : (epoch + 1) * per_epoch] for i in step]
        assert len(seen) == len({*seen}) == per_epoch * batch
    assert steps(begin, last, workers) == through[begin:]
