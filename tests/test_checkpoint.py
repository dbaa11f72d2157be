import os
import pickle

import pytest
import torch

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
