import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.commands.pretrain import RecipeName
from dino.config import Config, Preprocessing, replace
from dino.data.sources import open_source
from dino.method.network import build_networks
from dino.method.schedules import Schedules
from dino.models.build import build_backbone
from dino.recipes import RECIPES, Facts
from dino.run.pretrain import _what_is_wanted

IMAGENET = Facts(images=1_281_167, side=375, accelerator=True)

facts = st.builds(
    Facts,
    images=st.integers(4, 5_000_000),
    side=st.integers(16, 4000),
    accelerator=st.booleans(),
    batch_size=st.none() | st.integers(1, 4096),
    init=st.none(),
    patch_size=st.none(),
)


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=40, deadline=None)
@given(facts=facts)
def test_every_recipe_fits_whatever_it_meets(name, facts):
    if name == "adapt":  # The network is that of the weights: its patches are told.
        with pytest.raises(ValueError, match="give them with --init"):
            RECIPES[name](facts)
        config = RECIPES[name](facts._replace(init=Preprocessing.at(64), patch_size=8))
        config = replace(config, model__patch_size=8)
    else:
        config = RECIPES[name](facts)
    assert Config.from_json(config.to_json()) == config
    assert config.crops.global_size % config.model.patch_size == 0 or config.model.backbone.startswith("timm:")
    assert config.crops.local_size % config.model.patch_size == 0 or config.model.backbone.startswith("timm:")
    assert config.method.teacher_momentum < 1
    if name == "auto":
        batch_size = config.optim.batch_size
        assert batch_size == facts.batch_size or batch_size <= facts.images
    steps_per_epoch = max(facts.images // config.optim.batch_size, 1)
    schedules = Schedules(config, steps_per_epoch)
    assert schedules.total_steps > schedules.warmup_steps
    assert name == "demo" or not schedules.notes, "a recipe's own durations fit into its run"
    for step in (0, schedules.total_steps // 2, schedules.total_steps - 1):
        now = schedules.at(step)
        assert 0 <= now.lr <= schedules.peak_lr or now.lr <= config.optim.min_lr
        assert now.teacher_momentum <= 1  # It ends within rounding of 1.
        assert now.teacher_temp > 0


@settings(max_examples=60, deadline=None)
@given(facts=facts)
def test_auto_keeps_to_its_bounds(facts):
    config = RECIPES["auto"](facts)
    assert config.data.canvas >= config.crops.global_size
    assert config.crops.local_size < config.crops.global_size
    assert 1024 <= config.model.out_dim <= 65536
    assert config.method.teacher_momentum >= 0.95
    assert facts.batch_size is None or config.optim.batch_size == facts.batch_size
    if facts.batch_size is None:
        assert config.optim.batch_size <= (256 if facts.accelerator else 64)


@pytest.mark.parametrize("batch_size", [64, 128, 256])
def test_auto_counts_epochs_not_steps_when_the_batch_is_chosen(batch_size):
    few, chosen = Facts(1000, 40, False), Facts(1000, 40, False, batch_size)
    assert RECIPES["auto"](chosen).optim.length == RECIPES["auto"](few).optim.length


@pytest.mark.parametrize("images, batch_size, queue", [(10_000, None, 0), (10_000, 16, 512), (300, 16, 0)])
def test_auto_remembers_more_images_than_a_small_batch_has(images, batch_size, queue):
    """On a CPU; and not more than there are."""
    assert RECIPES["auto"](Facts(images, 40, False, batch_size)).method.queue == queue
    assert RECIPES["auto"](Facts(images, 40, True, batch_size)).method.queue == 0


def test_the_flag_knows_every_recipe():
    assert get_args(RecipeName) == tuple(RECIPES)


def test_every_recipe_says_what_it_claims():
    for name, recipe in RECIPES.items():
        assert recipe.__doc__, name
        if name not in ("auto", "adapt", "demo"):
            assert "Not re-run by us" in " ".join(recipe.__doc__.split()), name
            assert "%" in recipe.__doc__ or "mAP" in recipe.__doc__, name


def changed(name: str, facts: Facts = IMAGENET) -> dict[str, object]:
    """What a recipe sets apart from the defaults, which are those of the paper's ViT-S/16."""
    config, default = RECIPES[name](facts).flat(), Config().flat()
    return {key: value for key, value in config.items() if value != default[key]}


def test_the_defaults_are_the_papers():
    config = Config()
    assert (config.method.student_temp, config.method.teacher_temp, config.method.center_momentum) == (0.1, 0.04, 0.9)
    assert (config.method.teacher_momentum, config.model.out_dim, config.model.drop_path) == (0.996, 65536, 0.1)
    assert (config.optim.base_lr, config.optim.min_lr, config.optim.clip) == (0.0005, 1e-5, 3.0)
    assert (config.optim.weight_decay, config.optim.weight_decay_end) == (0.04, 0.4)
    assert (config.crops.global_scale, config.crops.local_scale, config.crops.local_count) == ((0.4, 1), (0.05, 0.4), 8)
    assert (config.crops.blur, config.crops.solarize) == ((1.0, 0.1, 0.5), (0.0, 0.2, 0.0))
    assert Schedules(Config(), 100).peak_lr == pytest.approx(0.0005 * 1024 / 256)


# The released commands, argument by argument (those that differ from the defaults here).
BOOST = {
    "data.val_fraction": 0.0,
    "optim.min_lr": 1e-6,
    "optim.length": "300 epochs",
    "method.teacher_temp": 0.07,
    "method.warmup_teacher_temp_for": "30 epochs",
    "model.norm_last_layer": False,
}
LONG = {
    **{key: value for key, value in BOOST.items() if key != "optim.min_lr"},
    "optim.length": "800 epochs",
    "optim.clip": 0.0,
    "crops.global_scale": (0.25, 1.0),
    "crops.local_scale": (0.05, 0.25),
    "crops.local_count": 10,
}
BASE = {
    **{key: value for key, value in LONG.items() if key != "model.norm_last_layer"},
    "model.backbone": "vit_base",
    "method.warmup_teacher_temp_for": "50 epochs",
    "optim.length": "400 epochs",
    "optim.base_lr": 0.00075,
    "optim.min_lr": 2e-6,
    "optim.clip": 0.3,
    "optim.freeze_last_layer": "3 epochs",
}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vits16_vanilla_100ep", {"optim.batch_size": 512, "optim.min_lr": 1e-6, "data.val_fraction": 0.0}),
        ("gldv2_vits16", BOOST),
        ("vits16_boost_300ep", BOOST),
        ("vits16_800ep", LONG),
        ("vits8_800ep", {**{k: v for k, v in LONG.items() if k != "optim.clip"}, "model.patch_size": 8}),
        ("vitb16_400ep", BASE),
    ],
)
def test_the_papers_runs(name, expected):
    assert changed(name) == expected


def test_the_papers_runs_hold_nothing_out():
    for name in RECIPES.keys() - {"adapt"}:  # Which begins from weights.
        assert RECIPES[name](IMAGENET).data.val_fraction == (0.1 if name in ("auto", "demo") else 0), name


def test_a_recipe_that_holds_nothing_out_learns_from_all():
    train = open_source("shapes:40x32").part("train")
    source = dataclasses.replace(train, parts={"train": train})
    for settings_, count in (({}, 40), ({"data__val_fraction": 0.25}, 30)):
        learnt_from, judged_by, config, _ = _what_is_wanted(source, "vits16_vanilla_100ep", None, None, settings_)
        assert (len(learnt_from), judged_by is None) == (count, not settings_)
        assert config.optim.min_lr == 1e-6


def test_the_convnet_of_the_paper_starts_as_released():
    """torchvision's ResNet: the last BatchNorm of a block starts at 1, where timm's starts at 0."""
    with torch.device("cpu"):
        backbone = build_backbone(RECIPES["resnet50"](IMAGENET).model, 224)
    assert all(block.bn3.weight.eq(1).all() for block in backbone.model.layer4)


def test_the_demo_builds_and_is_small():
    config = RECIPES["demo"](Facts(4000, 48, False))
    with torch.device("meta"):
        student, _ = build_networks(config)
    assert sum(p.numel() for p in student.parameters()) < 7e6
    assert {field.name for field in dataclasses.fields(config)} == {
        *("data", "crops", "model", "method", "optim", "run", "adapt")
    }
