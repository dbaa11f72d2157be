"""A backbone and settings so small that a run takes a second; as a script, the command ``dino`` with them."""

import json
from pathlib import Path
from typing import Any

import torch

from dino.config import Config, CropConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from dino.method import network
from dino.models.build import build_backbone as build_by_name
from dino.models.vision_transformer import VisionTransformer

CONFIG = Config(
    crops=CropConfig(global_size=32, local_size=16, local_count=2),
    model=ModelConfig("vit_tiny", patch_size=8, drop_path=0.1, out_dim=64, hidden_dim=32, bottleneck_dim=16),
    method=MethodConfig(warmup_teacher_temp_for="1 epochs", warmup_teacher_temp=0.02, teacher_momentum=0.9),
    optim=OptimConfig(length="6 steps", batch_size=8, base_lr=0.02, warmup="2 steps", freeze_last_layer="1 steps"),
    run=RunConfig(
        device="cpu", precision="float32", log_every=1, save_every="1000 steps", knn_every="0 epochs", threads=1
    ),
)
# The same as flags.
FLAGS = [
    *("--crops.global-size", "32", "--crops.local-size", "16", "--crops.local-count", "2"),
    *("--model.backbone", "vit_tiny", "--model.patch-size", "8", "--model.drop-path", "0.1", "--model.out-dim", "64"),
    *("--model.hidden-dim", "32", "--model.bottleneck-dim", "16", "--optim.length", "6 steps"),
    *("--optim.batch-size", "8", "--optim.base-lr", "0.02", "--optim.warmup", "2 steps"),
    *("--optim.freeze-last-layer", "1 steps", "--run.device", "cpu", "--run.log-every", "1", "--run.threads", "1"),
    *("--run.precision", "float32", "--run.save-every", "1000 steps", "--run.knn-every", "0 epochs"),
]
TIMES = ("images_per_second", "data_wait")  # What two equal runs do not share.


def build(config: ModelConfig, img_size: int, in_chans: int = 3) -> torch.nn.Module:
    """``vit_tiny`` becomes tinier; any other backbone is what it is."""
    if config.backbone != "vit_tiny":
        return build_by_name(config, img_size, in_chans)
    return VisionTransformer(
        img_size,
        config.patch_size,
        in_chans,
        24,
        3,
        2,
        2.0,
        drop_path_rate=config.drop_path,
        pos_offset=config.pos_offset,
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without those that are times; what is not JSON by the standard is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same(a: Any, b: Any, path: str = "state") -> None:
    """Nested dicts and lists with tensors, equal bit for bit (NaN equals NaN)."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{path}: {text}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}.{i}")
    else:
        assert a == b, path


if __name__ == "__main__":
    import sys

    from dino.commands import cli

    network.build_backbone = build
    sys.exit(cli.main())
