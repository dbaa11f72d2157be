"""The variants of the settings that ``learning.py`` compares, and how long each may train."""

from collections.abc import Callable
from typing import Any

from dino.config import Config, CropConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig, replace
from dino.run.plan import plan

PIXELS = "pixels"  # No network: what the images themselves give.
LIGHTLY = "lightly"  # ``learning_lightly.py``, beside the variant --like.


def cpu(**changes: Any) -> Config:
    """What the variants of a CPU have in common."""
    base = Config(
        data=DataConfig(canvas=512),
        crops=CropConfig(
            global_size=64,
            local_size=32,
            local_count=4,
            global_scale=(0.25, 1.0),
            local_scale=(0.05, 0.25),
            blur_sigma=(0.1, 0.6),
        ),
        model=ModelConfig("timm:test_resnet", 8, drop_path=0.0, out_dim=1024, hidden_dim=512, bottleneck_dim=128),
        method=MethodConfig(teacher_temp=0.02, warmup_teacher_temp=0.02, teacher_momentum=0.98, targets="sinkhorn"),
        optim=OptimConfig(batch_size=64, base_lr=0.006),
        run=RunConfig(precision="bfloat16"),
    )
    return replace(base, **changes)


_NANO = {"model__backbone": "vit_nano", "crops__global_size": 32, "crops__local_size": 16}
_CENTER = {"method__targets": "center", "method__teacher_temp": 0.015, "method__warmup_teacher_temp": 0.015}
_WARMER = {"method__teacher_temp": 0.04, "method__warmup_teacher_temp": 0.04}
_SMALL = {"crops__global_size": 32, "crops__local_size": 16}
_OLD = {  # ``auto`` of version 0.1 on a CPU.
    **_CENTER,
    "model__backbone": "vit_tiny",
    "model__use_bn": True,
    "run__precision": "float32",
    "optim__batch_size": 32,
    "method__teacher_momentum": 0.993,
}
VARIANTS: dict[str, Callable[[], Config]] = {
    "resnet": cpu,
    "resnet, center": lambda: cpu(**_CENTER),
    "resnet, center 0.04": lambda: cpu(**_CENTER | _WARMER),
    "resnet, clip over all": lambda: cpu(optim__clip_mode="global"),
    "resnet, center 0.04, float32": lambda: cpu(**_CENTER | _WARMER, run__precision="float32"),
    "resnet, center 0.04, clip over all": lambda: cpu(**_CENTER | _WARMER, optim__clip_mode="global"),
    "resnet, BatchNorm in the head": lambda: cpu(model__use_bn=True),
    "resnet, momentum 0.99": lambda: cpu(method__teacher_momentum=0.99),
    "resnet, momentum 0.95": lambda: cpu(method__teacher_momentum=0.95),
    "resnet, teacher 0.04": lambda: cpu(method__teacher_temp=0.04, method__warmup_teacher_temp=0.04),
    "resnet, K 4096": lambda: cpu(model__out_dim=4096),
    "resnet, float32": lambda: cpu(run__precision="float32"),
    "resnet 32": lambda: cpu(**_SMALL, crops__blur_sigma=(0.1, 0.5)),
    "resnet 32, center": lambda: cpu(**_SMALL, **_CENTER, crops__blur_sigma=(0.1, 0.5)),
    "nano": lambda: cpu(**_NANO),
    "nano, Muon": lambda: cpu(**_NANO, optim__optimizer="muon"),
    "nano, center": lambda: cpu(**_NANO, **_CENTER),
    "resnet, batch 16": lambda: cpu(optim__batch_size=16),
    "resnet, batch 16, queue": lambda: cpu(optim__batch_size=16, method__queue=512),
    "resnet, coding rate 0.002": lambda: cpu(method__coding_rate=0.002),
    "resnet, coding rate 0.0005": lambda: cpu(method__coding_rate=0.0005),
    "resnet, queue": lambda: cpu(method__queue=512),
    "resnet, batch 128": lambda: cpu(optim__batch_size=128),
    "resnet, 2 local crops": lambda: cpu(crops__local_count=2),
    "resnet, lr 0.012": lambda: cpu(optim__base_lr=0.012),
    "resnet 48": lambda: cpu(crops__global_size=48, crops__local_size=24, crops__blur_sigma=(0.1, 0.5)),
    "old auto": lambda: cpu(**_OLD),
    "resnet, the old recipe": lambda: cpu(**{**_OLD, "model__backbone": cpu().model.backbone}),
    "old auto 32": lambda: cpu(**_OLD, **_SMALL, model__patch_size=4),
}


def anchor() -> Config:
    """The published anchor: ViT-S/16 on imagenette, 200 epochs (stable-pretraining: k-NN 83.8, linear 86.1 %)."""
    return Config(
        data=DataConfig(canvas=256),
        crops=CropConfig(global_scale=(0.25, 1.0), local_scale=(0.05, 0.25), local_count=6),
        model=ModelConfig("vit_small", 16, out_dim=4096),
        method=MethodConfig(teacher_momentum=0.99, targets="sinkhorn"),
        optim=OptimConfig(length="200 epochs", batch_size=256, base_lr=0.0005, warmup="10 epochs"),
        run=RunConfig(device="cuda", save_every="2 minutes"),
    )


def tflop_per_step(config: Config) -> float:
    """Operations of one training step (two a multiply-add), forward and backward, teacher and student; counted."""
    batch = config.optim.batch_size
    return plan(config, batch)["gflop_an_image"] * batch / 1e3


def planned(config: Config, tflop: float, images: int, seed: int) -> Config:
    """The same settings, as long as the budget allows."""
    steps = max(10, round(tflop / tflop_per_step(config)))
    batch = min(config.optim.batch_size, images)
    return replace(
        config,
        optim__length=f"{steps} steps",
        optim__batch_size=batch,
        optim__warmup=f"{max(steps // 10, 1)} steps",
        optim__freeze_last_layer=f"{max(steps // 20, 1)} steps",
        run__seed=seed,
        run__knn_every="0 epochs",
        run__save_every="1 minutes",
    )
