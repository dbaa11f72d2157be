"""The model card: what it says, that the hub reads it, that its facts come back, and that its three lines run."""

import re

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

import dino
from dino.config import Config, Preprocessing, replace
from dino.models.card import CardFacts, read_card, write_card


@pytest.fixture
def facts():
    config = replace(
        Config(),
        model__backbone="vit_tiny",
        run__log_every=7,
        optim__batch_size=32,
        data__workers=3,
        crops__blur=(1.0, 0.0, 0.0),
        run__seed=5,
    )
    return CardFacts.of(
        dino.VisionTransformer(32, 8, 3, 48, 2, 3),
        Preprocessing.at(32, std=(0.5,)),
        config,
        {"knn_20_top1": 61.25, "knn": {"raw": 1}, "loss": None},
        images=1234,
        classes=5,
        side=48,
        recipe="auto",
    )


def test_it_says_what_the_weights_are(tmp_path, facts):
    text = write_card(tmp_path / "model_card.md", facts).read_text()
    assert "# vit_tiny, trained with DINO" in text
    assert "**48 numbers an image**" in text
    assert "patch of 8 x 8 pixels" in text
    assert "shorter side 37 px (bicubic), centre crop 32 px, 3 channels" in text
    assert "mean (0.485, 0.456, 0.406), divided by standard deviation (0.5, 0.5, 0.5)" in text
    assert "1,234 images, median of the shorter sides 48 px; 5 classes" in text
    assert "| knn_20_top1 | 61.25 |" in text
    assert "| `optim.batch_size` | `32` |" in text
    assert "| `crops.blur` | `1.0, 0.0, 0.0` |" in text
    assert "| `run.seed` | `5` |" in text
    assert not re.search(r"workers|log_every|\| knn \||None", text)


def test_little_is_known_of_foreign_weights(tmp_path):
    facts = CardFacts.of(dino.VisionTransformer(32, 8, 3, 48, 2, 3), Preprocessing())
    text = write_card(tmp_path / "model_card.md", facts, usage="import timm\n", library="timm").read_text()
    assert "Not known to the program that wrote this card." in text
    assert "None were measured" in text
    assert "```python\nimport timm\n```" in text
    assert "\n\n\n" not in text


def test_the_hub_reads_its_front_matter(tmp_path, facts):
    card = ModelCard.load(write_card(tmp_path / "README.md", facts, library="timm"))
    assert card.data.license == "unknown"
    assert card.data.library_name == "timm"
    assert {"dino", "self-supervised-learning"} <= set(card.data.tags)
    assert card.data["dino"]["images"] == 1234


def test_facts_come_back(tmp_path, facts):
    path = write_card(tmp_path / "model_card.md", facts)
    assert read_card(path) == facts
    path.write_text("# a page of somebody else\n")
    with pytest.raises(ValueError, match="not a model card of dino"):
        read_card(path)
    path.write_text('dino: {"future": 1}\n')
    with pytest.raises(ValueError, match="perhaps another version wrote it"):
        read_card(path)


@given(name=st.text(max_size=30), results=st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False), max_size=3))
def test_any_name_and_number_comes_back(tmp_path_factory, name, results):
    facts = CardFacts(name, 1, 2, 3, Preprocessing(), results=results, began_from=name)
    path = write_card(tmp_path_factory.mktemp("card") / "model_card.md", facts)
    assert read_card(path) == facts
    ModelCard.load(path)
