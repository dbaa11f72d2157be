import errno
import hashlib
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dino.machine.files import write_text
from dino.run import checkpoint


def save(folder, step, keep=2):
    return checkpoint.save(folder, step, {"step": step, "weights": torch.arange(3.0)}, keep)


def steps(folder):
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder)]


def test_the_newest_are_kept_and_the_newest_is_read(tmp_path):
    assert checkpoint.load_latest(tmp_path / "checkpoints") is None
    for step in (5, 90, 100, 1000):  # By number, not by name.
        save(tmp_path / "checkpoints", step)
    assert steps(tmp_path / "checkpoints") == [100, 1000]
    latest = checkpoint.load_latest(tmp_path / "checkpoints")
    assert latest is not None
    assert latest["step"] == 1000
    assert torch.equal(latest["weights"], torch.arange(3.0))


@pytest.mark.parametrize("moment", ["dino.run.checkpoint.save_file", "os.fsync", "os.replace"])
def test_a_death_while_it_is_written_leaves_the_ones_before(moment, tmp_path, monkeypatch):
    save(tmp_path, 1), save(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in checkpoint.checkpoints(tmp_path)}

    def power_cut(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(moment, power_cut)
        with pytest.raises(OSError, match="no space left"):
            save(tmp_path, 3)
    assert {path.name: path.read_bytes() for path in checkpoint.checkpoints(tmp_path)} == before
    latest = checkpoint.load_latest(tmp_path)
    assert latest is not None
    assert latest["step"] == 2
    save(tmp_path, 3)
    assert steps(tmp_path) == [2, 3]
    assert len(list(tmp_path.iterdir())) == 2


def test_unreadable_ones_are_passed_over_and_never_outlive_good_ones(tmp_path, capsys):
    """With one kept, the broken file of a later step must not be the one."""
    save(tmp_path, 3), save(tmp_path, 6)
    os.truncate(tmp_path / "step_00000006.safetensors", 100)
    latest = checkpoint.load_latest(tmp_path)
    assert latest is not None
    assert latest["step"] == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert "step_00000006.safetensors is passed over" in output.err
    save(tmp_path, 4, keep=1)
    assert steps(tmp_path) == [4]


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "step_00000006.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints .* can be read"):
        checkpoint.load_latest(tmp_path)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"step": 1, "payload": Payload()}, tmp_path / "step_00000001.pt", pickle_module=pickle)
    with pytest.raises(ValueError, match="can be read"):
        checkpoint.load_latest(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_other_files_are_no_checkpoints(tmp_path):
    save(tmp_path, 1)
    for name in ("step_2.safetensors.partial", "step_x.safetensors", "best.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert steps(tmp_path) == [1]
    with pytest.raises(ValueError, match=r"not step_NUMBER\.safetensors"):
        checkpoint.step_of(tmp_path / "best.safetensors")


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_text(path, "first")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: pytest.fail("as a power cut"))
        with pytest.raises(pytest.fail.Exception):
            write_text(path, "second")
    assert path.read_text() == "first"
    write_text(path, "second")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


STATE = {
    "step": 3,
    "config": '{"a": 1}',
    "optimizer": {"state": {0: {"exp_avg": torch.randn(2, 3), "step": torch.tensor(3.0)}}, "betas": (0.9, 0.999)},
    "half": torch.arange(5).to(torch.bfloat16),
    "groups": [{"params": [0, 1], "fused": True, "decay": None}],
    "nothing": {},
}


def test_whatever_a_state_holds_comes_back(tmp_path):
    tiny.assert_same(checkpoint.read(checkpoint.save(tmp_path, 3, STATE, 1)), STATE)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_is_noticed_wherever_it_is(data):
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), 3, STATE, 1)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            tiny.assert_same(checkpoint.read(path), STATE)  # Where it changes nothing: a space of the header, say.
        except ValueError as error:
            assert "checksum differs" in str(error) or "cannot be read" in str(error)  # noqa: PT017


def test_a_flipped_bit_in_a_tensor_is_passed_over_for_the_one_before(tmp_path, capsys):
    save(tmp_path, 1), save(tmp_path, 2)
    newest = tmp_path / "step_00000002.safetensors"
    content = bytearray(newest.read_bytes())
    content[-2] ^= 1
    newest.write_bytes(content)
    latest = checkpoint.load_latest(tmp_path)
    assert latest is not None
    assert latest["step"] == 1
    assert "its checksum differs" in capsys.readouterr().err


def test_checksums_of_earlier_versions_are_checked(tmp_path):
    def of_before(tensors, text):
        digest = hashlib.blake2b(digest_size=16)
        for piece in checkpoint._pieces(tensors, text):
            digest.update(piece)
        return digest.hexdigest()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_checksum", of_before)
        path = checkpoint.save(tmp_path, 3, STATE, 1)
    tiny.assert_same(checkpoint.read(path), STATE)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its checksum differs"):
        checkpoint.read(path)


def test_states_that_change_their_shape_are_copied_anew(tmp_path):
    """Each copy takes the memory of the one before: what grew, came or went since must not be kept from it."""
    saver = checkpoint.Saver(tmp_path, minutes=None, steps=1, keep=9, milestones=0, warn=pytest.fail)
    states = [
        {"a": torch.ones(3), "more": [torch.ones(2), 5]},
        {"a": torch.zeros(4), "more": [torch.ones(2, dtype=torch.float64)], "new": (torch.ones(1), "x")},
        {"a": torch.full((4,), 7.0), "more": [torch.zeros(2, dtype=torch.float64), {"b": torch.ones(1)}]},
    ]
    for step, state in enumerate(states):
        saver.save(step, state)
    assert saver.wait()
    saver.close()
    for step, state in enumerate(states):
        tiny.assert_same(checkpoint.read(tmp_path / f"step_{step:08d}.safetensors"), state)


def test_milestones_stay(tmp_path):
    for step in range(1, 10):
        checkpoint.save(tmp_path, step, {"step": step}, keep=1, milestones=4)
    assert steps(tmp_path) == [4, 8, 9]


def saver(folder, **changes):
    options = {"minutes": None, "steps": 1, "keep": 2, "milestones": 0, "warn": pytest.fail} | changes
    return checkpoint.Saver(folder, **options)


def test_what_is_written_in_the_background_is_the_state_of_that_moment(tmp_path):
    writing = saver(tmp_path)
    weights = torch.zeros(1000)
    for step in range(1, 5):
        weights += 1
        writing.save(step, {"step": step, "weights": weights})
    weights += 100
    assert writing.wait()
    assert [checkpoint.read(path)["weights"].unique().tolist() for path in checkpoint.checkpoints(tmp_path)] == [
        [3],
        [4],
    ]


def test_a_full_disk_is_a_warning_and_the_next_one_is_tried(tmp_path, monkeypatch):
    warnings: list[str] = []
    writing = saver(tmp_path, warn=warnings.append)
    writing.save(1, {"step": 1})
    assert writing.wait()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("dino.run.checkpoint.save_file", full)
        writing.save(2, {"step": 2})
        assert not writing.wait()
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert steps(tmp_path) == [1]
    writing.save(3, {"step": 3})
    assert writing.wait()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step_00000001.safetensors",
        "step_00000003.safetensors",
    ]


def test_saving_by_the_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    writing = saver(tmp_path, minutes=2.0, milestones=50)
    assert not writing.due(1)
    now[0] += 121
    assert writing.due(2)
    writing.save(2, {"step": 2})
    assert not writing.due(3)
    assert writing.due(50)
    writing.wait()


def test_what_a_killed_process_was_writing_goes(tmp_path):
    (tmp_path / ".partial1.step_00000002.safetensors").write_bytes(b"half")
    save(tmp_path, 1)
    saver(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.safetensors"]
