"""Recipes: functions that return a configuration. The docstring of each carries the claim: hardware, expected
numbers, source.

``auto`` fits any folder; the others are the paper's runs and the demo. A recipe sees only ``Facts``; whatever it
chooses can be changed by flags.
"""

from collections.abc import Callable
from typing import NamedTuple

from dino.config import (
    Config,
    CropConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    Preprocessing,
    RunConfig,
    replace,
)


class Facts(NamedTuple):
    """What a recipe may know about the data and the machine."""

    images: int  # In the train part.
    side: int  # Median shorter side in pixels.
    accelerator: bool  # Trains on a GPU.
    batch_size: int | None = None  # When the user chose it.
    init: Preprocessing | None = None  # How the weights that training begins from are shown images.
    patch_size: int | None = None  # Theirs, in pixels.


def _power_of_two(value: float, low: int, high: int) -> int:
    """The power of two at or below ``value``, within bounds that are powers of two themselves."""
    return min(max(1 << max(int(value), 1).bit_length() - 1, low), high)


def auto(facts: Facts) -> Config:
    """Fits the method to the data: the table in docs/recipes.md, with its reasons and what each was measured on.

    No published number stands behind it; it is what we use where the paper has no recipe: between a few hundred and a
    few million images of any size, on a GPU (by reasoning) or a laptop's CPU (by docs/learning.md).
    """
    return _auto_gpu(facts) if facts.accelerator else _auto_cpu(facts)


def _auto_gpu(facts: Facts) -> Config:
    medium, small = facts.side <= 128, facts.side <= 48
    global_size, local_size, patch_size = (32, 16, 4) if small else (64, 32, 8) if medium else (224, 96, 16)
    batch_size = facts.batch_size or _power_of_two(facts.images / 4, 1, 256)
    # At least 20M images' worth of steps (100 epochs of ImageNet is 128M).
    epochs = min(max(round(20_000_000 / facts.images), 100), 800)
    total_steps = max(facts.images // batch_size, 1) * epochs
    # The teacher averages over about 1 / (1 - m) steps: 250 in the paper; never more than a tenth of a short run.
    teacher_momentum = round(1 - max(0.004 * min(batch_size / 1024, 1.0) ** 0.5, min(10 / total_steps, 0.05)), 5)
    return Config(
        data=_data(global_size),
        crops=_crops(global_size, local_size, local_count=8),
        model=ModelConfig(patch_size=patch_size, out_dim=_power_of_two(facts.images / 4, 1024, 65536)),
        method=MethodConfig(teacher_momentum=teacher_momentum),
        optim=OptimConfig(length=f"{epochs} epochs", batch_size=batch_size, warmup=f"{max(epochs // 10, 1)} epochs"),
        run=_run(epochs),
    )


def _auto_cpu(facts: Facts) -> Config:
    """What a CPU can do is a short run: a small convnet learns most in it, with targets that no batch can starve."""
    global_size, local_size = (32, 16) if facts.side <= 48 else (64, 32)
    batch_size = facts.batch_size or _power_of_two(facts.images / 4, 1, 64)
    epochs = min(max(round(200_000 / facts.images), 20), 800)
    return Config(
        data=_data(global_size),
        crops=_crops(global_size, local_size, local_count=4),
        model=ModelConfig(
            backbone="timm:test_resnet",
            drop_path=0.0,
            out_dim=_power_of_two(facts.images / 8, 1024, 65536),
            hidden_dim=512,
            bottleneck_dim=128,
        ),
        method=MethodConfig(
            targets="sinkhorn",
            teacher_temp=0.02,
            warmup_teacher_temp=0.02,
            teacher_momentum=0.98,
            queue=512 if batch_size < 64 and facts.images >= 1024 else 0,
        ),
        optim=OptimConfig(
            length=f"{epochs} epochs",
            batch_size=batch_size,
            base_lr=0.006,
            warmup=f"{max(epochs // 10, 1)} epochs",
        ),
        run=_run(epochs),
    )


def adapt(facts: Facts) -> Config:
    """``dino adapt``: goes on from weights that are there, on other images, without ruining them.

    No published number stands behind it. Images are shown at the size that the weights know, whatever their own. The
    head is new: for a tenth of the run it is trained alone. Then the backbone follows at a quarter of the learning
    rate from scratch, its lower layers slower still, and is pulled towards its initial features.
    """
    if facts.init is None or facts.patch_size is None:
        raise ValueError("--recipe adapt begins from weights: give them with --init, or as dino adapt WEIGHTS DATA")
    base = auto(facts)
    patch, size = facts.patch_size, facts.init.size
    # Local crops of 96 pixels beside global ones of 224, in whole patches: two of them a side, if that is half at most.
    local_size = max(-(-size * 96 // 224 // patch), min(2, size // 2 // patch), 1) * patch
    epochs = max(round(float(base.optim.length.split()[0]) / 2), 5)
    tenth = f"{max(epochs // 10, 1)} epochs"
    return replace(
        base,
        data__canvas=round(size * 16 / 7),
        crops__global_size=size,
        crops__local_size=min(local_size, size),
        crops__blur_sigma=(0.1, max(2.0 * size / 224, 0.5)),
        model__drop_path=0.0,
        optim__length=f"{epochs} epochs",
        optim__base_lr=base.optim.base_lr / 4,
        optim__min_lr=1e-6,
        optim__warmup=tenth,
        adapt__warm_head=tenth,
        adapt__layer_decay=0.75,
        adapt__pull=1.0,
        run__knn_every=tenth,
    )


def _data(global_size: int) -> DataConfig:
    """A local crop of 5 % of the area still has as many pixels as it shows."""
    return DataConfig(canvas=round(global_size * 16 / 7))


def _crops(global_size: int, local_size: int, local_count: int) -> CropConfig:
    """The scales of the paper's best runs. A blur's width is in pixels of a 224 px crop: smaller crops take less."""
    return CropConfig(
        global_size=global_size,
        local_size=local_size,
        local_count=local_count,
        global_scale=(0.25, 1.0),
        local_scale=(0.05, 0.25),
        blur_sigma=(0.1, max(2.0 * global_size / 224, 0.5)),
    )


def _run(epochs: int) -> RunConfig:
    return RunConfig(knn_every=f"{max(epochs // 10, 1)} epochs")


def vits16_vanilla_100ep(_: Facts) -> Config:
    """ViT-S/16, 100 epochs of ImageNet, 8 GPUs: k-NN 69.3 %, linear 74.0 %, 1.75 days on 8 V100 (released README).
    Not re-run by us.

    ``torchrun --nproc-per-node 8 -m dino pretrain IMAGENET/train --recipe vits16_vanilla_100ep --out DIR``

    As all of the paper's runs, on all images: nothing is held out unless ``--data.val-fraction`` asks for it.
    """
    return Config(data=DataConfig(val_fraction=0.0), optim=OptimConfig(batch_size=512, min_lr=1e-6))


def vits16_boost_300ep(facts: Facts) -> Config:
    """ViT-S/16, 300 epochs, 16 GPUs, batch 1024: k-NN 73.3 %, linear 76.0 %, 2.6 days (released README). Not re-run
    by us.

    Longer, a warmer teacher, and free prototype lengths (safe for ViT-S only).
    """
    return replace(
        vits16_vanilla_100ep(facts),
        optim__length="300 epochs",
        optim__batch_size=1024,
        method__teacher_temp=0.07,
        method__warmup_teacher_temp_for="30 epochs",
        model__norm_last_layer=False,
    )


def vits16_800ep(facts: Facts) -> Config:
    """ViT-S/16, 800 epochs, 2 x 224 + 10 x 96 crops, batch 1024: k-NN 74.5 %, linear 77.0 % (table 2). Not re-run by
    us."""
    return replace(
        vits16_boost_300ep(facts),
        optim__length="800 epochs",
        optim__min_lr=1e-5,
        optim__clip=0.0,
        crops__global_scale=(0.25, 1.0),
        crops__local_scale=(0.05, 0.25),
        crops__local_count=10,
    )


def vits8_800ep(facts: Facts) -> Config:
    """ViT-S/8, 800 epochs, batch 1024: k-NN 78.3 %, linear 79.7 % (table 2). Not re-run by us."""
    return replace(vits16_800ep(facts), model__patch_size=8, optim__clip=3.0)


def vitb16_400ep(facts: Facts) -> Config:
    """ViT-B/16, 400 epochs, batch 1024: k-NN 76.1 %, linear 78.2 % (table 2). Not re-run by us.

    Larger networks need the prototypes at unit length, a longer freeze and a stronger clip to stay stable.
    """
    return replace(
        vits16_800ep(facts),
        model__backbone="vit_base",
        model__norm_last_layer=True,
        method__warmup_teacher_temp_for="50 epochs",
        optim__length="400 epochs",
        optim__base_lr=0.00075,
        optim__min_lr=2e-6,
        optim__clip=0.3,
        optim__freeze_last_layer="3 epochs",
    )


def vitb8_300ep(facts: Facts) -> Config:
    """ViT-B/8, 300 epochs, batch 1024: k-NN 77.4 %, linear 80.1 %, the paper's headline (table 2). Not re-run by us."""
    return replace(
        vitb16_400ep(facts),
        model__patch_size=8,
        method__warmup_teacher_temp=0.03,
        optim__length="300 epochs",
        optim__base_lr=0.0005,
        optim__clip=3.0,
    )


def resnet50(_: Facts) -> Config:
    """ResNet-50, 100 epochs with SGD, 8 GPUs (released README's convnet command). Not re-run by us.

    The paper's 800-epoch run reaches k-NN 67.5 %, linear 75.3 % (table 2).
    """
    return Config(
        data=DataConfig(val_fraction=0.0),
        crops=CropConfig(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14)),
        model=ModelConfig(backbone="timm:resnet50(zero_init_last=False)", drop_path=0.0),
        optim=OptimConfig(
            batch_size=512, optimizer="sgd", base_lr=0.03, min_lr=1e-6, weight_decay=1e-4, weight_decay_end=1e-4
        ),
    )


def xcit_s12_16(facts: Facts) -> Config:
    """XCiT-S12/16 with the settings of ViT-S/16: k-NN 76.0 %, linear 77.8 % after 300 epochs (released README). Not
    re-run by us."""
    return replace(vits16_800ep(facts), model__backbone="timm:xcit_small_12_p16_224", optim__length="300 epochs")


def gldv2_vits16(facts: Facts) -> Config:
    """ViT-S/16 on Google Landmarks v2 (clean): mAP 51.5 / 24.3 on ROxford medium / hard (table 3). Not re-run by us.

    The settings of the boosted run (facebookresearch/dino#156).
    """
    return vits16_boost_300ep(facts)


def demo(facts: Facts) -> Config:
    """What ``dino demo`` trains on the built-in shapes: a ViT of 0.8 M parameters, in under 4 minutes on 2 CPU cores.

    To an untrained network these images are all alike, and a short run has no time to find its way out of a
    collapse. So:
    Sinkhorn targets, which use all prototypes from the first step, a sharp teacher (0.02), fewer prototypes (512), a
    shorter memory (0.99), a larger learning rate. The kinds differ in hue, so crops keep more of theirs (0.05).
    Numbers: README and docs/learning.md.
    """
    return Config(
        data=DataConfig(canvas=48),
        crops=CropConfig(
            global_size=32,
            local_size=16,
            local_count=6,
            local_scale=(0.2, 0.5),
            hue=0.05,
            blur_sigma=(0.1, 0.5),
        ),
        model=ModelConfig(
            backbone="vit_nano",
            patch_size=8,
            drop_path=0.0,
            out_dim=512,
            hidden_dim=256,
            bottleneck_dim=64,
        ),
        method=MethodConfig(targets="sinkhorn", teacher_temp=0.02, warmup_teacher_temp=0.02, teacher_momentum=0.99),
        optim=OptimConfig(
            length="700 steps",
            batch_size=facts.batch_size or 64,
            base_lr=0.004,
            warmup="50 steps",
            freeze_last_layer="60 steps",
        ),
        run=RunConfig(knn_every="350 steps", save_every="350 steps", precision="float32"),
    )


RECIPES: dict[str, Callable[[Facts], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        auto,
        adapt,
        vits16_vanilla_100ep,
        vits16_boost_300ep,
        vits16_800ep,
        vits8_800ep,
        vitb16_400ep,
        vitb8_300ep,
        resnet50,
        xcit_s12_16,
        gldv2_vits16,
        demo,
    )
}
