"""DINO as one writes it down from the paper: the baseline of the benchmarks, without any of our speed.

One forward pass a resolution, attention as two products with a softmax between them, the loss as a loop over pairs of
crops, loops over parameters for the clip and the teacher, crops made by Pillow and torchvision one image at a time.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision import transforms


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    if rate == 0 or not training:
        return x
    keep = 1 - rate
    mask = (keep + torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device)).floor_()
    return x / keep * mask


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, rate: float):
        super().__init__()
        self.heads, self.rate = heads, rate
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def attention(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(self.attention(self.norm1(x)), self.rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.rate, self.training)


class ViT(nn.Module):
    def __init__(self, side: int, patch: int, dim: int, depth: int, heads: int, rate: float):
        super().__init__()
        self.patch, self.side = patch, side // patch
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.side**2, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, rate * i / (depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        positions, n = self.pos_embed, images.shape[-1] // self.patch
        if n != self.side:
            table = positions[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, scale_factor=(n + 0.1) / self.side, mode="bicubic")
            positions = torch.cat([positions[:, :1], table.permute(0, 2, 3, 1).flatten(1, 2)], 1)
        x = x + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class Head(nn.Module):
    def __init__(self, dim: int, out_dim: int, hidden: int = 2048, bottleneck: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = weight_norm(nn.Linear(bottleneck, out_dim, bias=False))
        magnitude = self.last_layer.parametrizations.weight.original0  # pyright: ignore
        magnitude.data.fill_(1)
        magnitude.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class MultiCropNetwork(nn.Module):
    """One forward pass of the backbone for each run of crops of the same size, one of the head for all."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        sizes, features = sorted({crop.shape[-1] for crop in crops}, reverse=True), []
        for size in sizes:
            features.append(self.backbone(torch.cat([crop for crop in crops if crop.shape[-1] == size])))
        return self.head(torch.cat(features))


class Trainer:
    """The training step on lists of crops, crop by crop."""

    def __init__(self, student: nn.Module, out_dim: int, device: str):
        self.student, self.device = student.to(device), device
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():
            if hasattr(module, "rate"):
                module.rate = 0.0
        self.center = torch.zeros(1, out_dim, device=device)
        decayed = [p for n, p in student.named_parameters() if p.requires_grad and p.ndim > 1]
        free = [p for n, p in student.named_parameters() if p.requires_grad and p.ndim == 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.04)

    def loss(self, student: Tensor, teacher: Tensor, crops: int) -> Tensor:
        students = (student / 0.1).chunk(crops)
        teachers = F.softmax((teacher - self.center) / 0.04, dim=-1).detach().chunk(2)
        total, terms = torch.zeros((), device=student.device), 0
        for t, target in enumerate(teachers):
            for s, logits in enumerate(students):
                if s != t:
                    total = total + torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
                    terms += 1
        return total / terms

    def step(self, crops: Sequence[Tensor]) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.device == "cuda"):
            with torch.no_grad():
                teacher = self.teacher(crops[:2])
            student = self.student(crops)
            loss = self.loss(student, teacher, len(crops))
        if not torch.isfinite(loss).item():
            raise FloatingPointError("the loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.student.parameters():
            if p.grad is not None:
                norm = p.grad.norm()
                scale = 3.0 / (norm + 1e-6)
                if scale < 1:
                    p.grad.mul_(scale)
        self.optimizer.step()
        with torch.no_grad():
            for own, other in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                other.data.mul_(0.996).add_(own.detach().data, alpha=0.004)
            self.center = self.center * 0.9 + teacher.float().mean(0, keepdim=True) * 0.1


class Crops:
    """The multi-crop augmentation of the paper on a Pillow image, view by view."""

    def __init__(self, global_size: int, local_size: int, local_count: int, sigma: tuple[float, float]):
        self.sizes = [global_size, global_size] + [local_size] * local_count
        self.sigma = sigma
        color = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.views = []
        for i, size in enumerate(self.sizes):
            scale = (0.4, 1.0) if i < 2 else (0.05, 0.4)
            cut = transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC)
            steps = [cut, transforms.RandomHorizontalFlip(0.5), color, transforms.RandomGrayscale(0.2)]
            steps.append(self.blur(1.0 if i == 0 else 0.1 if i == 1 else 0.5))
            if i == 1:
                steps.append(transforms.RandomApply([transforms.Lambda(ImageOps.solarize)], p=0.2))
            self.views.append(transforms.Compose([*steps, transforms.ToTensor(), normalize]))

    def blur(self, p: float) -> Any:
        def blurred(image: Image.Image) -> Image.Image:
            if random.random() >= p:
                return image
            return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))

        return blurred

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]
