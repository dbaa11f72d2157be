"""Loader: which images a step sees depends on seed and step alone; broken files neither stop a run nor pass unseen."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dino.config import DataConfig
from dino.data import loader as module
from dino.data.loader import Loader, iterate_once, rows_of_step
from dino.data.sources import open_source
from dino.encoder.sizes import center_crop

STREAM, WORKERS, RAM = DataConfig(cache="none", workers=0), DataConfig(cache="none", workers=2), DataConfig(cache="ram")
WAYS = pytest.mark.parametrize("data", [STREAM, WORKERS, RAM], ids=["in process", "workers", "ram"])


def make_folder(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Images whose red is their index, of these (width, height), all with noise in blue."""
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[..., 0] = i
        Image.fromarray(pixels).save(root / f"{i:03d}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path, [(8 + i % 3, 6 + i % 2) for i in range(20)])


@pytest.fixture
def damaged(folder):
    """Four broken files, two of them neighbours and one the last."""
    (folder / "003.png").write_bytes(b"")
    (folder / "004.png").write_bytes((folder / "005.png").read_bytes()[:80])
    (folder / "010.png").write_text("not an image")
    (folder / "019.png").unlink()
    (folder / "019.png").mkdir()
    return folder


def make(folder, batch_size: int = 4, data: DataConfig = STREAM, **options) -> Loader:
    return Loader(open_source(folder), batch_size, data=data, seed=0, device="cpu", **options)


def assert_true_images(batch, source) -> None:
    for pixels, size, i in zip(*batch.canvas, batch.indices, strict=True):
        image = source.load(int(i))
        assert size.tolist() == list(image.shape[1:])
        assert torch.equal(pixels[:, : size[0], : size[1]], image)


@given(
    count=st.integers(1, 60),
    share=st.integers(1, 8),
    world=st.integers(1, 4),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_an_epoch_sees_no_image_twice_and_processes_split_each_batch(count, share, world, seed, epoch):
    batch_size = share * world
    if batch_size > count:
        return
    steps = range(epoch * (count // batch_size), (epoch + 1) * (count // batch_size))
    seen = []
    for step in steps:
        parts = [rows_of_step(step, count, batch_size, seed, rank, world) for rank in range(world)]
        assert all(len(part) == share for part in parts)
        alone = rows_of_step(step, count, batch_size, seed)
        assert torch.equal(torch.cat(parts), alone)
        seen += alone.tolist()
    assert len(set(seen)) == len(seen) == count // batch_size * batch_size
    assert set(seen) <= set(range(count))


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(rows_of_step(step, 50, 50, seed).tolist()) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


@WAYS
def test_every_image_once_an_epoch_with_its_own_pixels(folder, data):
    loader = make(folder, data=data)
    source = open_source(folder)
    assert loader.steps_per_epoch == 5
    seen = []
    for batch in loader.batches(5, 10):
        assert_true_images(batch, source)
        assert tuple(batch.canvas.pixels.shape[2:]) in {(height, width) for height in (6, 7) for width in (8, 9, 10)}
        seen += batch.indices.tolist()
    assert sorted(seen) == list(range(20))
    assert loader.broken == {}


@WAYS
def test_resuming_gives_the_same_batches(folder, data):
    through = [batch.indices for batch in make(folder, data=data).batches(0, 12)]
    resumed = [batch.indices for batch in make(folder, data=data).batches(7, 12)]
    assert torch.equal(torch.stack(through[7:]), torch.stack(resumed))


@WAYS
def test_two_processes_see_what_one_sees(damaged, data):
    data = replace(data, max_broken=0.5)
    one = make(damaged, data=data).batches(0, 6)
    two = [make(damaged, data=data, rank=rank, world_size=2).batches(0, 6) for rank in (0, 1)]
    for whole, *halves in zip(one, *two, strict=True):
        assert torch.equal(whole.indices, torch.cat([half.indices for half in halves]))


@WAYS
def test_a_broken_file_is_replaced_by_the_next_good_one_and_noted(damaged, data):
    data = replace(data, max_broken=0.2)
    loader = make(damaged, data=data)
    source = open_source(damaged)
    stand_ins = {3: 5, 4: 5, 10: 11, 19: 0}
    for step, batch in enumerate(loader.batches(0, 5)):
        wanted = rows_of_step(step, 20, 4, seed=0).tolist()
        assert batch.indices.tolist() == [stand_ins.get(i, i) for i in wanted]
        assert_true_images(batch, source)
    assert {Path(name).name for name in loader.broken} == {"003.png", "004.png", "010.png", "019.png"}
    assert loader.broken[str(damaged / "003.png")] == "the file is empty"


@WAYS
def test_too_many_broken_files_stop_the_run(damaged, data):
    data = replace(data, max_broken=0.19)
    message = (
        r"4 of 20 images \(20.0%\) cannot be read, more than --data.max-broken 0.19 allows: \S+png \(.+\); \S+png \("
    )
    with pytest.raises(ValueError, match=message) as error:
        list(make(damaged, data=data).batches(0, 5))
    assert "\n" not in str(error.value)


@WAYS
def test_nothing_but_broken_files_ends(tmp_path, data):
    for i in range(8):
        (tmp_path / f"{i}.png").touch()
    data = replace(data, max_broken=1.0)
    with pytest.raises(ValueError, match=r"8 of 8 images \(100.0%\) cannot be read"):
        list(make(tmp_path, data=data).batches(0, 2))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_broken(folder):
    (folder / "000.png").chmod(0)
    loader = make(folder, data=RAM)
    assert loader.broken == {str(folder / "000.png"): "Permission denied"}


@WAYS
def test_reading_leaves_the_global_generator_alone(folder, data):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make(folder, data=data).batches(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_large_images_are_shrunk_to_the_canvas(tmp_path):
    make_folder(tmp_path, [(100, 50), (30, 60), (10, 10), (200, 200)])
    for data in (DataConfig(canvas=40, cache="ram"), DataConfig(canvas=40, cache="none", workers=0)):
        sizes = {}
        for batch in make(tmp_path, 2, data=data).batches(0, 2):
            sizes |= dict(zip(batch.indices.tolist(), batch.canvas.sizes.tolist(), strict=True))
        assert sizes == {0: [20, 40], 1: [40, 20], 2: [10, 10], 3: [40, 40]}


def test_images_of_one_size_fill_the_canvas(tmp_path):
    loader = make(make_folder(tmp_path, [(9, 7)] * 4), 2, data=RAM)
    assert next(loader.batches(0, 1)).canvas.pixels.shape == (2, 3, 7, 9)


def test_auto_keeps_what_fits_in_a_quarter_of_the_memory(folder, monkeypatch):
    needed = 20 * 3 * 7 * 10  # Images of at most 7 x 10 pixels.
    monkeypatch.setattr(module, "_free_memory", lambda: 4 * needed)
    assert make(folder, data=DataConfig()).cache == "ram"
    assert make(folder, data=DataConfig(), world_size=2).cache == "none"  # Each process keeps its own.
    monkeypatch.setattr(module, "_free_memory", lambda: 4 * needed - 1)
    assert make(folder, data=DataConfig()).cache == "none"


def test_free_memory_is_plausible():
    assert 2**27 < module._free_memory() < 2**45


def test_wrong_batches_are_one_clear_line(folder):
    with pytest.raises(ValueError, match=r"--optim.batch-size 21 is more than the 20 images"):
        make(folder, 21)
    with pytest.raises(ValueError, match=r"--optim.batch-size 5 does not divide over 2 processes"):
        make(folder, 5, world_size=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_iterate_once_gives_every_readable_image_in_order(damaged, workers):
    source = open_source(damaged)
    broken: dict[str, str] = {}
    batches = list(iterate_once(source, 6, workers=workers, broken=broken))
    for batch in batches:
        assert_true_images(batch, source)
    assert [len(batch.indices) for batch in batches] == [4, 5, 6, 1]
    assert torch.cat([batch.indices for batch in batches]).tolist() == [i for i in range(20) if i not in (3, 4, 10, 19)]
    assert len(broken) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_iterate_once_prepares_whole_images_where_they_are_read(tmp_path, workers):
    """Not shrunk to a canvas first, as training images are."""
    source = open_source(make_folder(tmp_path, [(1500, 9), (20, 30)]))
    (batch,) = iterate_once(source, 2, prepare=center_crop(8, 4), workers=workers)
    assert batch.canvas.pixels.shape == (2, 3, 4, 4)
    for i, pixels in enumerate(batch.canvas.pixels):
        assert torch.equal(pixels, center_crop(8, 4)(source.load(i)))


def test_iterate_once_skips_a_batch_that_is_all_broken(damaged):
    batches = iterate_once(open_source(damaged), 2, workers=0)
    sizes = [len(batch.indices) for batch in batches]
    assert min(sizes) > 0
    assert sum(sizes) == 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("cache", ["auto", "none", "ram", "device"])
def test_batches_are_on_the_gpu(folder, cache):
    loader = Loader(open_source(folder), 4, data=DataConfig(cache=cache, workers=1), seed=0, device="cuda")
    for cpu, gpu in zip(make(folder).batches(0, 5), loader.batches(0, 5), strict=True):
        assert gpu.canvas.pixels.is_cuda
        assert torch.equal(gpu.indices, cpu.indices)
        height, width = cpu.canvas.pixels.shape[2:]
        assert torch.equal(gpu.canvas.pixels[:, :, :height, :width].cpu(), cpu.canvas.pixels)


def test_a_signal_to_all_processes_leaves_the_workers_alive(folder):
    """Ctrl-C and a scheduler's SIGTERM reach them too; only the first process decides what that means."""
    batches = iterate_once(open_source(folder), 2, workers=1)
    seen = len(next(batches).indices)
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        for each in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, each)
    assert seen + sum(len(batch.indices) for batch in batches) == 20
