"""Who is compared: ours, the plain form (``plain.py``), and lightly with timm's network, each behind the same calls."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("dino", "plain", "lightly")
BFLOAT16 = "dino-bfloat16"  # Ours again: on a CPU the others, and ``dino``, are measured in float32.
# Facts of the tasks of the benchmarks; ``batch`` is for a CPU.
TASKS: dict[str, dict[str, Any]] = {
    "vits16": {"net": (16, 384, 12, 6), "sizes": (224, 96), "local_count": 8, "out_dim": 65536, "batch": 8},
    "tiny8": {"net": (8, 192, 12, 3), "sizes": (64, 32), "local_count": 4, "out_dim": 1024, "batch": 32},
    "tiny4": {"net": (4, 192, 12, 3), "sizes": (32, 16), "local_count": 8, "out_dim": 65536, "batch": 128},
}
TIMM = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224"}


def configuration(options: dict[str, Any]) -> Any:
    """Our settings for a task."""
    from dino.config import Config, CropConfig, DataConfig, ModelConfig, OptimConfig, RunConfig

    task = TASKS[options["task"]]
    patch, dim, _, _ = task["net"]
    global_size, local_size = task["sizes"]
    return Config(
        data=DataConfig(canvas=512, cache=options.get("cache", "auto")),
        crops=CropConfig(
            global_size=global_size,
            local_size=local_size,
            local_count=task["local_count"],
            blur_sigma=(0.1, max(2 * global_size / 224, 0.5)),
        ),
        model=ModelConfig({192: "vit_tiny", 384: "vit_small"}[dim], patch, out_dim=task["out_dim"]),
        optim=OptimConfig(batch_size=options["batch"]),
        run=RunConfig(device=options["device"]),
    )


def random_crops(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Global crops (b, 2, 3, g, g) and local crops (b, v, 3, l, l)."""
    task, b = TASKS[options["task"]], options["batch"]
    (g, l), v = task["sizes"], task["local_count"]
    device = options["device"]
    return torch.randn(b, 2, 3, g, g, device=device), torch.randn(b, v, 3, l, l, device=device)


Step = Callable[[Any], None]


def make_step(name: str, options: dict[str, Any]) -> Step:
    """A whole training step on crops: ``Crops`` for ours, a list of views for the others."""
    if name.startswith("dino"):
        on_cpu = "bfloat16" if name == BFLOAT16 else "float32"
        return _dino_step(options, on_cpu if options["device"] == "cpu" else "auto")
    return {"plain": _plain_step, "lightly": _lightly_step}[name](options)


def _dino_step(options: dict[str, Any], precision: str) -> Step:
    from dino.machine import device as hardware
    from dino.method.learner import make_learner
    from dino.method.network import compile_blocks
    from dino.method.schedules import Now
    from dino.method.step import train_step

    config, device = configuration(options), torch.device(options["device"])
    hardware.prepare(device)
    learner, now, count = make_learner(config, device), Now(1e-4, 0.04, 0.996, 0.04), itertools.count()
    if options.get("compile") or hardware.compiles(device, "auto"):
        compile_blocks(learner.network)
        compile_blocks(learner.teacher)
    autocast = hardware.autocast(device, precision)

    def step(crops: Any) -> None:
        masks = learner.network.draw_drop_path(crops, torch.Generator().manual_seed(next(count)))
        train_step(learner, [(crops, masks)], 1, now, config.optim, autocast, freeze_last_layer=False)

    return step


def _plain_step(options: dict[str, Any]) -> Step:
    import plain

    task = TASKS[options["task"]]
    backbone = plain.ViT(task["sizes"][0], *task["net"], rate=0.1)
    network = plain.MultiCropNetwork(backbone, plain.Head(backbone.norm.weight.shape[0], task["out_dim"]))
    return plain.Trainer(network.train(), task["out_dim"], options["device"]).step


def _lightly_step(options: dict[str, Any]) -> Step:
    """The recipe of lightly's documentation with a vision transformer of timm, in its favour one pass a resolution
    (there: one a view)."""
    import timm
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import get_weight_decay_parameters, update_momentum

    task, device = TASKS[options["task"]], options["device"]
    patch, dim, _, _ = task["net"]

    def build(rate: float) -> tuple[nn.Module, Any]:
        backbone = timm.create_model(
            TIMM[dim],
            img_size=task["sizes"][0],
            patch_size=patch,
            num_classes=0,
            dynamic_img_size=True,
            drop_path_rate=rate,
        )
        head = DINOProjectionHead(dim, 2048, 256, task["out_dim"], freeze_last_layer=1)
        return backbone.to(device).train(), head.to(device).train()

    (student, student_head), (teacher, teacher_head) = build(0.1), build(0.0)
    for own, other in ((student, teacher), (student_head, teacher_head)):
        other.load_state_dict(own.state_dict())
        other.requires_grad_(False)
    criterion = DINOLoss(task["out_dim"], teacher_temp=0.04, warmup_teacher_temp_epochs=0).to(device)
    decayed, free = get_weight_decay_parameters([student, student_head])
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.04)

    def forward(backbone: nn.Module, head: nn.Module, views: list[Tensor]) -> list[Tensor]:
        sizes = sorted({view.shape[-1] for view in views}, reverse=True)
        groups = [[view for view in views if view.shape[-1] == size] for size in sizes]
        return list(head(torch.cat([backbone(torch.cat(group)) for group in groups])).chunk(len(views)))

    def step(views: list[Tensor]) -> None:
        update_momentum(student, teacher, m=0.996)
        update_momentum(student_head, teacher_head, m=0.996)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device == "cuda"):
            with torch.no_grad():
                targets = forward(teacher, teacher_head, views[:2])
            loss = criterion(targets, forward(student, student_head, views), epoch=1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*student.parameters(), *student_head.parameters()], 3.0)
        student_head.cancel_last_layer_gradients(current_epoch=1)
        optimizer.step()

    return step


def make_batches(name: str, options: dict[str, Any]) -> Iterator[Any]:
    """Crops on the device without end, read from the JPEGs of the folder ``options["folder"]``."""
    if name == "dino":
        return _dino_batches(options)
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    task = TASKS[options["task"]]
    sizes, local_count = task["sizes"], task["local_count"]
    sigma = (0.1, max(2 * sizes[0] / 224, 0.5))
    if name == "lightly":
        from lightly.transforms import DINOTransform

        make = functools.partial(DINOTransform, sizes[0], local_crop_size=sizes[1], n_local_views=local_count)
        # lightly draws stronger colours by default; these are the paper's, as in the other two.
        transform: Any = make(cj_strength=0.5, cj_bright=0.8, cj_contrast=0.8, cj_sat=0.4, cj_hue=0.2, sigmas=sigma)
    else:
        import plain

        transform = plain.Crops(*sizes, local_count, sigma)
    dataset = ImageFolder(options["folder"], transform)
    workers = options.get("workers") or len(os.sched_getaffinity(0))
    loader = DataLoader(
        dataset,
        options["batch"],
        shuffle=True,
        num_workers=workers,
        pin_memory=options["device"] == "cuda",
        drop_last=True,
        persistent_workers=True,
    )

    def batches() -> Iterator[list[Tensor]]:
        while True:
            for views, _ in loader:
                yield [view.to(options["device"], non_blocking=True) for view in views]

    return batches()


def _dino_batches(options: dict[str, Any]) -> Iterator[Any]:
    from dino.augment.multicrop import MultiCrop
    from dino.data.loader import Loader
    from dino.data.sources import open_source
    from dino.machine.device import overlapped
    from dino.machine.randomness import generator

    config, device = configuration(options), torch.device(options["device"])
    loader = Loader(
        open_source(options["folder"]), options["batch"], data=config.data, seed=0, device=options["device"]
    )
    multicrop = MultiCrop(config.crops)
    crops = (
        multicrop(batch.canvas, generator(0, "crops", step)) for step, batch in enumerate(loader.batches(0, 10**9))
    )
    return overlapped(crops, device)


def split_views(crops: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Crops as the others take them: one tensor a view."""
    return [view.contiguous() for group in crops for view in group.unbind(1)]
