"""The run report: finished runs, runs in progress, runs that go wrong; nothing from outside, nothing unescaped."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.config import Config, Preprocessing, replace
from dino.models.card import CardFacts, write_card
from dino.pictures.charts import line_chart
from dino.run.report import read_metrics, write_report


class Page(HTMLParser):
    """Text, tags, attributes, and a check that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def make_run(folder, steps=200, knn=True, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(replace(Config(), model__out_dim=1024, **config).to_json())
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(10, steps + 1, 10):
            row = {
                "step": step,
                "loss": 6.9 - step / 100,
                "teacher_entropy": 5.0,
                "teacher_entropy_ratio": 0.72,
                "lr": 1e-4,
            }
            file.write(json.dumps({**row, "kl": 1.9 - step / 100, "rankme": 12.5, "mystery": 3.25}) + "\n")
            if knn and step % 100 == 0:
                file.write(
                    json.dumps({"step": step, "knn_20_top1": 61.25, "knn_20_top5": 90.5, "knn_200_top1": 40}) + "\n"
                )
    return folder


def read(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run(tmp_path):
    run = make_run(tmp_path / "run 1", optim__batch_size=77)
    (run / "results.json").write_text("{}")
    Image.new("RGB", (8, 8), "red").save(run / "attention_maps.png")
    page = read(run)
    text = " ".join(page.text)
    assert "run 1" in text
    assert "Healthy: no warning." in text
    assert {"200, finished", "4.9", "61.2 %", "61.2 % at first", "15,400 images seen"} <= set(page.text)
    assert "teacher entropy 0.72 of ln K" in text
    assert f"dino eval knn '{run}' LABELLED_IMAGES" in text
    assert f"ln K = {math.log(1024):.2f}" in text
    assert {"k-NN accuracy, %", "Loss, nats", "KL divergence, nats", "Learning rate", "mystery", "77"} <= set(page.text)
    assert "attention maps" in text
    (picture,) = [value for name, value in page.attributes if name == "src"]
    assert base64.b64decode(picture.removeprefix("data:image/png;base64,")) == (run / "attention_maps.png").read_bytes()


def test_nothing_is_loaded_from_outside_and_nothing_is_left_behind(tmp_path):
    run = make_run(tmp_path / "run")
    page = read(run)
    html = (run / "report.html").read_text()
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|url\((?!#)|@import|=\"//", html)
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


def test_a_run_in_progress_without_knn_and_with_half_a_line(tmp_path):
    run = make_run(tmp_path / "run", knn=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 210, "loss": 4.')
    text = " ".join(read(run).text)
    assert "200, not finished" in text
    assert "it needs labels, or comes later" in text
    assert "k-NN accuracy" not in text
    assert "dino embed" not in text


def test_the_model_card_says_on_what(tmp_path):
    run = make_run(tmp_path / "run")
    facts = CardFacts("vit_tiny", 5_400_000, 192, 4, Preprocessing(), images=12345, classes=7, side=48)
    write_card(run / "model_card.md", facts)
    (run / "map of all.html").write_text("")
    page = read(run)
    assert {"12,345", "7 classes, which training does not read; median side 48 px"} <= set(page.text)
    assert "5.4 M parameters, 192 numbers an image" in page.text
    assert ("href", "map%20of%20all.html") in page.attributes
    (run / "model_card.md").write_text("# mine\n")
    assert "12,345" not in read(run).text


def test_an_empty_folder_and_a_missing_one(tmp_path):
    assert "Nothing logged yet." in " ".join(read(tmp_path).text)
    with pytest.raises(ValueError, match="not a run folder"):
        write_report(tmp_path / "none")


def test_warnings_and_a_loss_that_is_not_finite(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "warnings.txt").write_text("step 50: first\nstep 90: collapse to a single prototype\n")
    page = read(run)
    assert "step 90: collapse to a single prototype" in " ".join(page.text)
    assert "Earlier warnings (1)" in page.text
    assert "Healthy" not in " ".join(page.text)
    assert ("style", "--state: var(--warn)") in page.attributes
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 210, "loss": null, "kl": NaN}\n')
    page = read(run)
    assert "The loss is not finite at step 210." in page.text
    assert ("style", "--state: var(--bad)") in page.attributes


def test_text_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\"quoted\".jpg"
    run = make_run(tmp_path / "run <b>&", model__backbone=evil)
    (run / "broken.txt").write_text(f"{evil}\tthe file is empty\n" * 300)
    (run / "warnings.txt").write_text(evil + "\n")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 300, "<i>bad</i>": 1}) + "\n")
    page = read(run)
    assert not {"script", "i>bad"} & set(page.tags)
    assert "run <b>&" in page.text
    assert evil in page.text
    assert "Files that cannot be read (300)" in page.text
    assert "… and 100 more." in page.text


def test_a_run_of_another_version_and_a_broken_config_still_show(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text('{"model": {"out_dim": 1024, "future": [1, 2]}, "seed": 3}')
    assert {"future", "1, 2"} <= set(read(run).text)
    (run / "config.json").write_text("{")
    assert "Settings" not in read(run).text


def test_metrics_merge_lines_of_a_step_and_the_later_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 20, "loss": 2}\n{"step": 10, "loss": 3}\nnot json\n[1]\n{"step": 20, "loss": 1, "knn_5_top1": 9}\n'
    )
    metrics = read_metrics(path)
    assert metrics["loss"] == [(10, 3.0), (20, 1.0)]
    assert metrics["knn_5_top1"] == [(20, 9.0)]


def numbers(chart, name):
    return [float(n) for n in re.findall(rf' {name}="([^"]*)"', chart)]


@given(
    points=st.lists(st.tuples(st.integers(0, 10**6).map(float), st.floats(-1e9, 1e9)), min_size=1, max_size=30),
    level=st.none() | st.floats(0, 12),
)
@settings(max_examples=15, deadline=None)
def test_charts_stay_inside_their_frame(points, level):
    chart = line_chart({"one": sorted(points)}, None if level is None else (level, "ln K"))
    width, height = (float(n) for n in re.match(r'<svg viewBox="0 0 (\S+) (\S+)" role="img">', chart).groups())
    frame = [numbers(chart[chart.index("<clipPath") :], name)[0] for name in ("x", "y", "width", "height")]
    assert 0 < frame[0] < frame[0] + frame[2] <= width
    assert 0 <= frame[1] < frame[1] + frame[3] <= height
    assert all(0 <= x <= width for x in numbers(chart, "x"))
    assert all(0 <= y <= height for y in numbers(chart, "y"))
    assert chart.count("<use") == len(points)
    assert len(Page(chart).tags) > 20


def test_a_curve_passes_through_its_points():
    points = [(float(step), value) for step, value in ((0, 1.0), (50, 3.0), (100, 2.0))]
    chart = line_chart({"one": points})
    marks = re.findall(r'<use xlink:href="[^"]*" x="([^"]*)" y="([^"]*)"', chart)
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in marks]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.05)
    assert y0 - y2 == pytest.approx((y0 - y1) / 2, abs=0.05)
    assert y1 < y2 < y0  # Up is more.


def test_charts_take_the_colours_of_the_page_and_no_name_twice():
    chart = line_chart({str(i): [(0.0, float(i)), (1.0, i + 1.0)] for i in range(6)}, (2.0, "ln K < 3 & <b>"))
    assert "#0000" not in chart
    assert {f"var(--c{i})" for i in range(5)} | {"var(--soft)", "var(--line)"} == set(
        re.findall(r"var\(--\w+\)", chart)
    )
    names = re.findall(r' id="([^"]*)"', chart)
    assert len(names) == len(set(names))
    assert "ln K &lt; 3 &amp; &lt;b&gt;" in chart


def test_charts_tell_close_values_apart_and_skip_what_is_not_finite():
    close = line_chart({"momentum": [(0.0, 0.9995), (100.0, 1.0)], "none": [(0.0, math.nan)]})
    labels = re.findall(r">([^<]+)</text>", close)
    levels = [float(label) for label in labels if label.startswith("0.9")]
    assert len(set(levels)) == len(levels) >= 3
    assert all(0.999 < level < 1 for level in levels)
    assert line_chart({"none": [(0.0, math.inf)]}) == ""
    assert ">-" not in line_chart({"skipped": [(0.0, 0.0), (9.0, 0.0)]})


def test_a_long_run_stays_small_and_shows_its_peaks():
    points = [(float(step), math.sin(step / 500)) for step in range(100_000)]
    flat = line_chart({"loss": points})
    points[77_777] = (77_777.0, 50.0)
    peak = line_chart({"loss": points})
    assert len(peak) < 15_000
    assert "fill: var(--c0); opacity" in peak  # The band.
    assert "45</text>" in peak
    assert "45</text>" not in flat
