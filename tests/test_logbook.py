import json
import math
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dino.run import logbook
from dino.run.logbook import Logbook

VALUES = {"loss": 1.5, "images_per_second": 100.0, "data_wait": 0.25, "teacher_entropy_ratio": 0.5}


def lines(folder):
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_one_object_a_line_with_null_for_what_is_not_finite(tmp_path):
    book = Logbook(tmp_path, total_steps=3, quiet=True)
    book.write(1, {"loss": 0.1, "lr": 1e-9})
    book.write(2, {"loss": math.nan, "kl": math.inf, "skipped": 1})
    book.close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 0.1, "lr": 1e-9},
        {"step": 2, "loss": None, "kl": None, "skipped": 1},
    ]


def test_small_numbers_keep_their_digits(tmp_path):
    """A learning rate is often below a millionth."""
    book = Logbook(tmp_path, total_steps=1, quiet=True)
    book.write(1, {"lr": 1.2345678901e-8})
    book.close()
    assert lines(tmp_path)[0]["lr"] == pytest.approx(1.2345678901e-8, rel=1e-6)


def test_a_resumed_run_drops_the_lines_that_it_repeats(tmp_path):
    book = Logbook(tmp_path, total_steps=9, quiet=True)
    for step in (1, 2, 3, 4):
        book.write(step, {"loss": float(step)})
    book.warn("something")
    book.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss"')
    time.sleep(1.1)  # TensorBoard's files are in order of the second they were opened in.
    book = Logbook(tmp_path, total_steps=9, start_step=2, quiet=True)
    book.write(3, {"loss": 33.0})
    book.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 33.0)]
    assert (tmp_path / "warnings.txt").read_text() == "something\n"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 33.0)]


def test_a_death_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    book = Logbook(tmp_path, total_steps=9, quiet=True)
    book.write(1, {"loss": 1.0})
    book.close()

    def power_cut(*_):
        raise OSError

    monkeypatch.setattr("os.replace", power_cut)
    with pytest.raises(OSError):  # noqa: PT011
        Logbook(tmp_path, total_steps=9, start_step=1, quiet=True)
    assert len(lines(tmp_path)) == 1


def test_a_new_run_starts_with_empty_files(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    (tmp_path / "warnings.txt").write_text("of a run that is gone\n")
    Logbook(tmp_path, total_steps=3, quiet=True).close()
    assert lines(tmp_path) == []
    assert not (tmp_path / "warnings.txt").exists()


def test_only_the_first_process_writes_and_speaks(tmp_path, capsys):
    book = Logbook(tmp_path, total_steps=3, main=False)
    book.write(1, VALUES)
    book.progress(1, VALUES)
    book.say("hello")
    book.warn("careful")
    book.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_quiet_writes_warnings_but_shows_nothing(tmp_path, capsys):
    book = Logbook(tmp_path, total_steps=3, quiet=True)
    book.progress(1, VALUES)
    book.say("hello")
    book.warn("careful [bold]")
    book.close()
    assert (tmp_path / "warnings.txt").read_text() == "careful [bold]\n"
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_line_now_and_then_and_one_at_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logbook.time, "monotonic", iter([100.0, 100.0, 105.0, 110.5, 110.5, 111.0, 111.0]).__next__)
    book = Logbook(tmp_path, total_steps=4)
    for step in (1, 2, 3, 4):  # At 100, 105, 110.5 and 111 seconds.
        book.progress(step, VALUES)
    book.close()
    output = capsys.readouterr()
    assert output.out == ""
    shown = [line for line in output.err.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in shown] == ["1/4", "3/4", "4/4"]
    assert "loss 1.500  100 img/s  data wait 25%  teacher entropy 0.50 ln K" in shown[0]
