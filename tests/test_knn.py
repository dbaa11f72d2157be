"""k-NN: the reference's numbers, votes worked by hand, a naive double loop, edge cases, and features over a source."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import reference
from dino.data.sources import open_source
from dino.encoder.encoder import Encoder
from dino.encoder.neighbors import nearest_neighbors
from dino.evaluation.knn import knn_classify, knn_votes, run
from dino.models.backbone import Tokens
from dino.options import KnnOptions

FACTS = reference.scalars("08_knn")


def golden_set(name):
    arrays = reference.arrays("08_knn")
    return {key.removeprefix(name + "/"): array for key, array in arrays.items() if key.startswith(name)}


def random_set(n, d, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    return features, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("facts", FACTS["sets"], ids=lambda facts: facts["id"])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_accuracy_equals_the_reference(facts, num_classes):
    arrays = golden_set(facts["id"])
    got = knn_classify(
        arrays["train_features"],
        arrays["train_labels"],
        arrays["test_features"],
        arrays["test_labels"],
        ks=FACTS["ks"],
        num_classes=num_classes,
        tile=64,
    )
    for row in facts["results"]:
        assert got[f"knn_{row['k']}_top1"] == pytest.approx(row["top1"], abs=1e-6)
        assert got[f"knn_{row['k']}_top5"] == pytest.approx(row["top5_counting_only_classes_with_a_vote"], abs=1e-6)


@pytest.mark.parametrize("facts", FACTS["sets"], ids=lambda facts: facts["id"])
def test_votes_equal_the_reference(facts):
    arrays = golden_set(facts["id"])
    similarities, indices = nearest_neighbors(arrays["test_features"], arrays["train_features"], 100, tile=97)
    seen = 0
    for k, votes in knn_votes(similarities, arrays["train_labels"][indices], FACTS["ks"], 10, 0.07):
        expected = arrays[f"votes/k{k}_T0.07"].double()
        assert (votes - expected).abs().max() <= 1e-4 * expected.max()
        seen += 1
    assert seen == 4


def naive_accuracy(train, train_labels, test, test_labels, k, temperature, top, classes):
    """One test image and one train image at a time, in Python numbers."""
    hits = 0
    for query, truth in zip(test.tolist(), test_labels.tolist(), strict=True):
        similar = [(sum(a * b for a, b in zip(query, row, strict=True)), i) for i, row in enumerate(train.tolist())]
        votes = [0.0] * classes
        for similarity, i in sorted(similar, reverse=True)[:k]:
            votes[int(train_labels[i])] += math.exp(similarity / temperature)
        ranked = [c for c in sorted(range(classes), key=lambda c: -votes[c]) if votes[c] > 0]
        hits += truth in ranked[: min(top, k)]
    return 100 * hits / len(test)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 30),
    m=st.integers(1, 9),
    classes=st.integers(1, 8),
    k=st.integers(1, 40),
    tile=st.integers(1, 10),
    temperature=st.sampled_from([0.01, 0.07, 1.0]),
)
@settings(max_examples=30, deadline=None)
def test_equals_a_naive_double_loop_whatever_the_tile(seed, n, m, classes, k, tile, temperature):
    train, train_labels = random_set(n, 5, classes, seed)
    test, test_labels = random_set(m, 5, classes, seed + 1)
    train, test = train.double(), test.double()
    got = knn_classify(
        train, train_labels, test, test_labels, ks=(k, 3), temperature=temperature, num_classes=classes, tile=tile
    )
    for top in (1, 5):
        expected = naive_accuracy(train, train_labels, test, test_labels, min(k, n), temperature, top, classes)
        assert got[f"knn_{k}_top{top}"] == pytest.approx(expected)


@given(seed=st.integers(0, 10_000), tile=st.integers(1, 50), k=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_neighbors_do_not_depend_on_the_tile(seed, tile, k):
    bank, _ = random_set(40, 6, 2, seed)
    queries, _ = random_set(7, 6, 2, seed + 1)
    bank, queries = bank.double(), queries.double()  # In float32 the order of summation turns near ties round.
    similarities, indices = nearest_neighbors(queries, bank, k, tile=tile)
    order = (queries @ bank.T).argsort(dim=1, descending=True)[:, :k]
    assert torch.equal(indices, order)
    assert torch.allclose(similarities, (queries @ bank.T).gather(1, order), atol=1e-12)


def test_votes_worked_by_hand():
    # T = 1: exp(0.9) = 2.459603, exp(0.8) = 2.225541, exp(0.5) = 1.648721.
    similarities, labels = torch.tensor([[0.9, 0.8, 0.5]]), torch.tensor([[2, 0, 0]])
    got = {k: votes.tolist()[0] for k, votes in knn_votes(similarities, labels, (3, 1), 4, temperature=1.0)}
    assert got[1] == pytest.approx([0, 0, 2.459603, 0], abs=1e-5)
    assert got[3] == pytest.approx([2.225541 + 1.648721, 0, 2.459603, 0], abs=1e-5)


def test_a_class_without_a_vote_is_never_credited():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    got = knn_classify(train, torch.tensor([0, 1]), train[:1], torch.tensor([3]), ks=(2,), num_classes=4)
    assert got == {"knn_2_top1": 0.0, "knn_2_top5": 0.0}


def test_top5_of_k_below_5_looks_at_k_classes():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    got = knn_classify(train, torch.tensor([0, 1, 2]), train[:1], torch.tensor([2]), ks=(2, 3), num_classes=3)
    assert (got["knn_2_top5"], got["knn_3_top5"], got["knn_3_top1"]) == (0.0, 100.0, 0.0)


def test_leave_one_out_never_counts_the_image_itself():
    # Two pairs of twins with different labels: each image's nearest other image is its twin, so all are wrong.
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 1])
    for tile in (1, 3, 100):
        assert knn_classify(features, labels, ks=(1,), tile=tile)["knn_1_top1"] == 0
        assert (
            knn_classify(features, labels // 2 * 0 + torch.tensor([0, 0, 1, 1]), ks=(1,), tile=tile)["knn_1_top1"]
            == 100
        )


def test_more_neighbors_than_images_uses_them_all_and_says_so(caplog):
    features, labels = random_set(6, 4, 2, seed=0)
    few = knn_classify(features, labels, features, labels, ks=(6,))
    many = knn_classify(features, labels, features, labels, ks=(200,))
    assert many["knn_200_top1"] == few["knn_6_top1"]
    assert "only 6 neighbours exist" in caplog.text


def test_bad_input_is_named():
    features, labels = random_set(6, 4, 2, seed=0)
    with pytest.raises(ValueError, match="1 train and 1 test"):
        knn_classify(features[:1], labels[:1])
    with pytest.raises(ValueError, match=r"temperature 0\.0"):
        knn_classify(features, labels, temperature=0.0)
    with pytest.raises(ValueError, match=r"k = \(0,\)"):
        knn_classify(features, labels, ks=(0,))
    with pytest.raises(ValueError, match="labels run from -1 to 1"):
        knn_classify(features, labels.clone().fill_(1).index_fill(0, torch.tensor([0]), -1))
    with pytest.raises(ValueError, match="--k 0 is not allowed: at least 1 neighbour each"):
        KnnOptions(k=(0,))
    with pytest.raises(ValueError, match=r"--temperature 0\.0 is not allowed: a number above 0"):
        KnnOptions(temperature=0.0)


class MeanColor(torch.nn.Module):
    """Sees nothing but the mean colour; the sum over the batch would show if images were mixed."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3))

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        patches = torch.nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1)
        return Tokens(patches.mean((1, 2)) + self.bias, patches)


PLAIN = {"resize": 16, "size": 16, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture
def folder(tmp_path):
    """Two classes of plainly coloured images of several sizes, and one file that is no image."""
    for i in range(12):
        name, color = ("red", (250, 10 * i, 0)) if i % 2 else ("blue", (0, 10 * i, 250))
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (16 + i, 30 - i), color).save(tmp_path / name / f"{i:02}.png")
    (tmp_path / "red" / "04broken.png").write_bytes(b"no image")
    return tmp_path


def test_features_come_in_order_without_broken_images(folder, caplog):
    backbone = MeanColor().train()
    found = Encoder(backbone, batch_size=5, **PLAIN).features(open_source(folder), unit_length=False)
    expected = [(0, 10 * i, 250) for i in range(0, 12, 2)] + [(250, 10 * i, 0) for i in range(1, 12, 2)]
    assert torch.allclose(found.features, torch.tensor(expected) / 255, atol=1e-6)
    assert found.labels.tolist() == [0] * 6 + [1] * 6
    assert found.indices.tolist() == [i for i in range(13) if i != 8]
    assert "1 of 13 images cannot be read" in caplog.text
    assert "04broken.png" in caplog.text
    assert backbone.training
    assert found.features.dtype == torch.float32


def test_features_have_unit_length_and_images_are_normalised(folder):
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 0.2)
    encoder = Encoder(MeanColor(), **{**PLAIN, "mean": mean, "std": std})
    plain, unit = (encoder.features(open_source(folder), unit_length=unit) for unit in (False, True))
    assert torch.allclose(unit.features.norm(dim=1), torch.ones(12))
    assert torch.allclose(plain.features[0], (torch.tensor([0, 0, 250 / 255]) - torch.tensor(mean)) / torch.tensor(std))
    assert torch.allclose(unit.features * plain.features.norm(dim=1, keepdim=True), plain.features, atol=1e-5)


def test_the_whole_protocol_with_a_test_set_and_leave_one_out(folder):
    source = open_source(folder)
    perfect = {"knn_3_top1": 100.0, "knn_3_top5": 100.0}
    encoder, options = Encoder(MeanColor(), **PLAIN), KnnOptions(k=(3,))
    assert run(encoder, source, source.subset([0, 12]), options) == perfect
    assert run(encoder, source, options=options) == perfect


def test_sources_that_cannot_be_classified_are_named(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    encoder = Encoder(MeanColor(), **PLAIN)
    with pytest.raises(ValueError, match="k-NN needs labels"):
        run(encoder, open_source(tmp_path))
    (tmp_path / "one.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 1 images can be read \(.*one\.png"):
        encoder.features(open_source(tmp_path))


def test_a_class_that_train_never_saw_is_refused_by_name():
    source = open_source("shapes:40x32")
    train = source.subset((source.labels != 3).nonzero().flatten())
    with pytest.raises(ValueError, match=f"1 classes of the test images have no train images: {source.classes[3]}"):
        run(Encoder(torch.nn.Identity()), train, source)
