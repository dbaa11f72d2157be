"""Every known weight file becomes a backbone, completely or not at all: ours, the released ones, and those of others.

``weight_files`` reads a file, ``layouts`` knows how others call their tensors; here the network is built and filled.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dino.config import Config, ModelConfig, Preprocessing
from dino.machine.files import whole_file
from dino.models.build import build_backbone, build_described
from dino.models.conversions import vit_sizes
from dino.models.layouts import recognise
from dino.models.timm_backbone import TimmBackbone, parse, spec
from dino.models.vision_transformer import VisionTransformer
from dino.models.weight_files import RELEASED, Stored, locate, open_safetensors, read, unpickle

__all__ = [
    "RELEASED",
    "Weights",
    "load",
    "load_classifier",
    "load_linear",
    "load_with_preprocessing",
    "open_weights",
    "save_backbone",
]


OURS = ("dino", "checkpoint of dino")  # Layouts of our own.
_CLASSIFIER = "classifier."  # Begins the names of its tensors in a file of ``dino finetune``.


class Weights(NamedTuple):
    """A backbone, how it is shown images, and what was read."""

    backbone: nn.Module
    preprocessing: Preprocessing
    layout: str  # Whose names the tensors had.
    tensors: int  # Read into the backbone: all that it has.
    left: list[str]  # In the file, not in the backbone: heads, other networks.
    path: Path  # Of the file.

    @property
    def summary(self) -> str:
        """One line for the screen."""
        parts = sorted({name.rsplit(".", 2)[0] if name.count(".") > 2 else name.split(".")[0] for name in self.left})
        listed = f" ({', '.join(parts[:4])}{', ...' if len(parts) > 4 else ''})" if parts else ""
        return f"{self.layout}: {self.tensors} tensors read, {len(self.left)} left{listed}"


def save_backbone(
    backbone: nn.Module,
    path: Path | str,
    config: ModelConfig,
    preprocessing: Preprocessing | int,
    extra: Mapping[str, str] | None = None,
    classifier: tuple[nn.Linear, Sequence[str]] | None = None,
) -> None:
    """Writes the weights as safetensors, with all that ``load`` needs to build the backbone in the header.

    The file appears whole or not at all. ``preprocessing``: how it is shown images, which travels along; a number
    stands for the paper's at this size in pixels. ``extra``: more strings for the header's metadata. ``classifier``:
    one on the [CLS] token, and the names of its classes; ``load`` passes it over, ``load_classifier`` reads it.
    """
    if isinstance(preprocessing, int):
        preprocessing = Preprocessing.at(preprocessing, channels=getattr(backbone, "in_chans", 3))
    description = {**describe(backbone, config.backbone), "preprocessing": dataclasses.asdict(preprocessing)}
    state = cpu_state(backbone)
    if classifier is not None:
        description["classes"] = list(classifier[1])
        state |= {f"{_CLASSIFIER}{name}": tensor for name, tensor in cpu_state(classifier[0]).items()}
    with whole_file(Path(path)) as partial:
        metadata = {**(extra or {}), "format": "pt", "dino": json.dumps(description)}
        save_file(state, partial, metadata=metadata)


def describe(backbone: nn.Module, name: str = "vit") -> dict[str, Any]:
    """What builds this backbone again, for a header. ``name``: what to call a vision transformer of ours."""
    if isinstance(backbone, TimmBackbone):
        return {"backbone": f"timm:{backbone.name}"}
    description: dict[str, Any] = {"backbone": name}
    if isinstance(backbone, VisionTransformer):
        description |= vit_sizes(backbone.state_dict())
        description |= {"num_heads": backbone.num_heads, "pos_offset": backbone.pos_offset}
        description |= {} if backbone.norm.eps == 1e-6 else {"norm_eps": backbone.norm.eps}
    return description


def name_of(backbone: nn.Module) -> str:
    """What ``ModelConfig.backbone`` calls a backbone, so that one like it can be built: with all its sizes."""
    description = describe(backbone)
    if "embed_dim" in description:
        return spec("vit", {key: value for key, value in description.items() if key != "backbone"})
    return description["backbone"] if isinstance(backbone, TimmBackbone) else f"own:{type(backbone).__name__}"


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors as a file wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def load(name_or_path: str | Path, device: str | torch.device = "cpu", checkpoint_key: str = "teacher") -> nn.Module:
    """Loads a pretrained backbone, in eval mode and without drop path.

    Takes the name of released weights (``dino_vits16``, ``dino_resnet50``, ...), ``example`` (a small convnet inside
    this package, to try things with, offline), ``timm:NAME``, a run folder, a file of ``save_backbone``, a checkpoint
    of ours or of the reference implementation, a folder or file of timm or Hugging Face (ViT, DINOv2, DINOv3), a
    Lightning checkpoint, DeiT's, torchvision's ViT and ResNet, or a URL of any of these files. Downloads
    are kept in torch.hub's folder. Every tensor of the backbone comes from the file.
    ``checkpoint_key``: ``"teacher"`` or ``"student"`` where a file holds both, or the name of the part wanted.

    Raises:
        ValueError: there is no such name or file, it holds no known weights, its keys or shapes do not fit (lists
            them), a tensor holds numbers that are not finite, or reading it would execute code.
        ConnectionError: the download failed; says where the file can be put by hand.
    """
    return open_weights(name_or_path, device, checkpoint_key).backbone


def load_with_preprocessing(
    name_or_path: str | Path, device: str | torch.device = "cpu", checkpoint_key: str = "teacher"
) -> tuple[nn.Module, Preprocessing]:
    """As ``load``, with how the backbone is shown images: what its file or the configuration beside it says, else the
    paper's evaluations at the size it was trained on."""
    return open_weights(name_or_path, device, checkpoint_key)[:2]


def open_weights(
    name_or_path: str | Path, device: str | torch.device = "cpu", checkpoint_key: str = "teacher"
) -> Weights:
    """As ``load``, with how the backbone is shown images and what was read and left."""
    if str(name_or_path).startswith("timm:"):
        stored = _of_timm(str(name_or_path).removeprefix("timm:"))
    else:
        stored = read(locate(name_or_path))
    if "config" in stored.says:
        config = Config.from_json(stored.says["config"])
        preprocessing, layout = Preprocessing.of(config), OURS[1]
        state = _part_of_ours(stored, checkpoint_key)
        model = dataclasses.replace(config.model, drop_path=0.0)
        left = [name for name in stored.tensors if not name.startswith(f"{checkpoint_key}.backbone.")]

        def build() -> nn.Module:
            return build_backbone(model, config.crops.global_size, preprocessing.channels)

    else:
        if "dino" in stored.says:
            layout, state, description, left = OURS[0], stored.tensors, dict(stored.says["dino"]), []
            if description.pop("classes", None) is not None:  # Of ``dino finetune``.
                left = [name for name in state if name.startswith(_CLASSIFIER)]
                state = {name: tensor for name, tensor in state.items() if name not in left}
            preprocessing = _preprocessing(description, stored)
            if "embed_dim" in description:
                description = _checked_sizes(description, state, stored.path)
        else:
            layout, state, description, left = recognise(stored, checkpoint_key)
            preprocessing = _preprocessing(description, stored)

        def build() -> nn.Module:
            return build_described(description)

    with torch.device("meta"):  # Nothing is allocated for what the file does not hold.
        backbone = build()
    _check(backbone, state, stored.path)
    # Networks of others compute more than their tensors when they are built.
    backbone = backbone.to_empty(device="cpu") if isinstance(backbone, VisionTransformer) else build()
    backbone.load_state_dict(state)
    return Weights(backbone.to(device).eval(), preprocessing, layout, len(state), left, stored.path)


def load_classifier(
    name_or_path: str | Path, device: str | torch.device = "cpu"
) -> tuple[nn.Module, nn.Linear, list[str], Preprocessing]:
    """What ``dino finetune`` made: backbone, classifier of its [CLS] token, the names of the classes, and how it is
    shown images.

    Raises:
        ValueError: as ``load``, or there is no classifier.
    """
    weights = open_weights(name_or_path, device)
    stored = read(weights.path)
    classes = stored.says.get("dino", {}).get("classes")
    if not classes:
        raise ValueError(f"{name_or_path} holds no classifier: dino finetune makes one, of any weights")
    state = {n.removeprefix(_CLASSIFIER): t for n, t in stored.tensors.items() if n.startswith(_CLASSIFIER)}
    classifier = nn.Linear(int(weights.backbone.embed_dim), len(classes))  # pyright: ignore[reportArgumentType]
    _check(classifier, state, weights.path)
    classifier.load_state_dict(state)
    return weights.backbone, classifier.to(device).eval(), list(classes), weights.preprocessing


def load_linear(name_or_path: str | Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A linear classifier's weight (c, f), bias (c) and description (empty for released ones), from a file or URL.

    Raises:
        ValueError: the file holds no linear classifier.
    """
    path = locate(name_or_path)
    description: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        state, metadata = open_safetensors(path)
        description = json.loads(metadata.get("dino_probe", "{}"))
    else:
        content = unpickle(path)
        state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {name.removeprefix("module.").removeprefix("linear."): tensor for name, tensor in state.items()}
    if state.keys() != {"weight", "bias"} or state["weight"].ndim != 2:
        raise ValueError(f"{path} holds no linear classifier (linear.weight, linear.bias): {', '.join([*state][:5])}")
    _refuse_not_finite(state, path)
    return state["weight"], state["bias"], description


def _of_timm(name: str) -> Stored:
    """A model of timm with its pretrained weights, downloaded (or found) by timm."""
    try:
        network: Any = TimmBackbone(name, pretrained=True).model
    except RuntimeError as error:
        raise ValueError(f"timm:{name}: {error}") from error
    except OSError as error:
        raise ConnectionError(f"could not download timm:{name} ({error})") from error
    name, options = parse(name)
    hub = {"architecture": name, "model_args": options, "pretrained_cfg": network.pretrained_cfg}
    return Stored(Path(f"timm:{name}"), dict(network.state_dict()), {"hub": hub})


def _part_of_ours(stored: Stored, key: str) -> dict[str, Tensor]:
    prefix = f"{key}.backbone."
    state = {name.removeprefix(prefix): t for name, t in stored.tensors.items() if name.startswith(prefix)}
    if not state:
        parts = dict.fromkeys(name.split(".")[0] for name in stored.tensors)
        raise ValueError(
            f"{stored.path} has no {key!r} (it holds {', '.join(parts)}): "
            "choose another with checkpoint_key (--checkpoint-key)"
        )
    return state


def _checked_sizes(description: dict[str, Any], state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """A header's sizes are believed as far as the tensors have them."""
    try:
        sizes = vit_sizes(state)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not fit its model: it lacks {error}") from error
    for name, size in sizes.items():
        # Version 0.1 wrote the images' size beside the sizes of the table; the table counts.
        if name != "img_size" and description.get(name, size) != size:
            raise ValueError(f"{path} does not fit its model: its header says {name} {description[name]}, not {size}")
    return {**description, **sizes}


def _preprocessing(description: dict[str, Any], stored: Stored) -> Preprocessing:
    if (said := description.pop("preprocessing", None)) is not None:
        return Preprocessing.from_dict(said)
    hub, processor = stored.says.get("hub", {}), stored.says.get("processor")
    try:
        if processor is not None:
            return _of_processor(processor)
        if cfg := hub.get("pretrained_cfg"):
            return _of_pretrained_cfg(cfg)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{stored.path.parent} does not say how images are shown: {error!r}") from error
    beside = stored.path.parent / "config.json"
    # Runs of version 0.1 said it in their configuration only.
    if "dino" in stored.says and beside.is_file() and '"crops"' in (text := beside.read_text("utf-8")):
        return Preprocessing.of(Config.from_json(text))
    if description["backbone"].startswith("timm:"):
        options = parse(description["backbone"])[1]
        # DINOv2's table of positions is that of a last stage at 518 pixels; it is shown images of 224.
        return Preprocessing.at(min(options.get("img_size", 224), 224), channels=options.get("in_chans", 3))
    return Preprocessing.at(description.get("img_size", 224), channels=description.get("in_chans", 3))


def _of_pretrained_cfg(cfg: Mapping[str, Any]) -> Preprocessing:
    """timm's: the crop is a share of the resized side."""
    channels, size = cfg["input_size"][0], cfg["input_size"][-1]
    resize = int(size / (cfg.get("crop_pct") or 0.875))
    return Preprocessing(size, max(size, resize), tuple(cfg["mean"]), tuple(cfg["std"]), channels)


def _of_processor(processor: Mapping[str, Any]) -> Preprocessing:
    """Hugging Face's: ``size`` is a number, {height, width} or {shortest_edge}."""

    def side(value: Any) -> int:
        return value if isinstance(value, int) else value.get("shortest_edge") or min(value["height"], value["width"])

    resize = side(processor["size"])
    size = side(processor["crop_size"]) if processor.get("do_center_crop") and processor.get("crop_size") else resize
    mean, std = (tuple(processor.get(name) or (0.5, 0.5, 0.5)) for name in ("image_mean", "image_std"))
    if processor.get("do_normalize") is False:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    return Preprocessing(min(size, resize), resize, mean, std, len(mean))


def _check(backbone: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """That every tensor of the backbone is there, and no other; of its shape, of its kind, and finite."""
    wanted = backbone.state_dict()
    for name in wanted.keys() - state.keys():
        if name.endswith("num_batches_tracked"):  # Older files lack this counter, which only matters without momentum.
            state[name] = torch.zeros(wanted[name].shape, dtype=wanted[name].dtype)
    both = sorted(wanted.keys() & state.keys())
    shapes = {k: f"{k} {tuple(state[k].shape)} for {tuple(wanted[k].shape)}" for k in both}
    problems = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": [shapes[k] for k in both if state[k].shape != wanted[k].shape],
        "of another kind": [
            f"{k} ({state[k].dtype})" for k in both if state[k].is_floating_point() != wanted[k].is_floating_point()
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names[:6])}" for kind, names in problems.items() if names)
        raise ValueError(f"{path} does not fit its model: {listed}")
    _refuse_not_finite(state, path)


def _refuse_not_finite(state: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in state.items():
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{path}: {name} claims {tensor.numel()} numbers that the file does not hold")
        if tensor.is_floating_point() and (bad := tensor.numel() - int(torch.isfinite(tensor).sum())):
            raise ValueError(
                f"{path} is refused: {bad} of {tensor.numel()} numbers in {name} are not finite; "
                "the training that wrote it diverged, take an earlier checkpoint"
            )
