"""A backbone in the files of another tool, and that tool's reading of them beside ours."""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from dino.config import ModelConfig
from dino.machine.files import whole_file, write_text
from dino.machine.private_calls import use_public_calls
from dino.models.card import CardFacts, read_card, write_card
from dino.models.conversions import vit_sizes
from dino.models.timm_backbone import TimmBackbone, parse
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import OURS, RELEASED, Weights, cpu_state, describe, load, save_backbone

Target = Literal["timm", "hf", "onnx", "reference", "safetensors"]
Outputs = tuple[Tensor, Tensor]  # The [CLS] token (b, d), and the patch tokens (b, patches, d).


class Exported(NamedTuple):
    """What was written, and how it is opened again."""

    files: list[Path]
    tool: str  # That opens them.
    usage: str  # Lines of Python that do.
    open: Callable[[], Callable[[Float[Tensor, "b c h w"]], Outputs]] | None  # None: the tool is not installed.
    notes: list[str]  # What this layout does not say.
    library: str  # As the front matter of a model card calls it.
    one_size: bool = False  # Of images.


def export(
    weights: Weights, target: Target, out: Path, size: tuple[int, int] | None = None, batch: int = 0
) -> Exported:
    """Writes a backbone as another tool's files: a folder for ``timm`` and ``hf``, a file for the others.

    ``size`` (height, width in pixels) and ``batch`` (images a call, 0: any number) are fixed in an ONNX file; the table
    of positions is resized for that size before it is written. By default the size it is shown images at.

    Raises:
        ValueError: the layout cannot hold this network, a size is not allowed, or a package is missing; says which.
    """
    shown = weights.preprocessing
    notes = []
    if shown.pixel_range is not None:
        low, high = shown.pixel_range
        notes.append(f"no layout of others says that raw values from {low:g} to {high:g} are mapped to 0 to 255 first")
    if target == "onnx":
        exported = _onnx(weights, out, size or (shown.size, shown.size), batch)
    else:
        exported = {"timm": _timm, "hf": _hugging_face, "reference": _reference, "safetensors": _ours}[target](
            weights, out
        )
    return exported._replace(notes=notes + exported.notes)


@torch.no_grad()
def outputs(backbone: nn.Module, images: Float[Tensor, "b c h w"]) -> Outputs:
    """What a backbone here gives, as ``Exported.open``'s result gives it."""
    tokens = backbone(images)
    return tokens.cls_token, tokens.patch_tokens.flatten(1, 2)


def difference(ours: Outputs, theirs: Outputs) -> float:
    """The largest between two readings of the same weights."""
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"outputs of another shape: {tuple(b.shape)} for {tuple(a.shape)}")
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


# timm


def _timm(weights: Weights, out: Path) -> Exported:
    backbone, shown = weights.backbone, weights.preprocessing
    notes, header = [], {"format": "pt"}
    if isinstance(backbone, TimmBackbone):
        architecture, options = parse(backbone.name)
        state, eps = cpu_state(backbone.model), options.pop("norm_eps", None)
        pool = getattr(backbone.model, "global_pool", "avg")
        pool = pool if isinstance(pool, str) else "avg"
        if getattr(backbone.model, "dynamic_img_size", False):
            options["dynamic_img_size"] = True
    else:
        vit = _plain_vit(backbone, "timm")
        options: dict[str, Any] = {**vit_sizes(vit.state_dict()), "num_heads": vit.num_heads}
        architecture = f"vit_{_NAMES.get((vit.embed_dim, len(vit.blocks)), 'small')}_patch{vit.patch_size}_224"
        architecture = architecture if timm.is_model(architecture) else "vit_small_patch16_224"
        options |= {"dynamic_img_size": True, "global_pool": "token"}
        state, eps, pool = cpu_state(vit), None if vit.norm.eps == 1e-6 else vit.norm.eps, "token"
        # timm looks at the tensors alone; dino.load finds its own network again.
        header["dino"] = json.dumps({**describe(vit), "preprocessing": dataclasses.asdict(shown)})
    if eps is not None:
        notes.append(f"timm's layer norms add 1e-6 to the variance, this network's {eps:g}: config.json cannot say it")
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": pool,
        "model_args": {**options, "num_classes": 0},
        "pretrained_cfg": {
            "tag": "dino",
            "custom_load": False,
            "input_size": [shown.channels, shown.size, shown.size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": shown.size / shown.resize,
            "crop_mode": "center",
            "mean": list(shown.mean),
            "std": list(shown.std),
            "num_classes": 0,
        },
    }
    with whole_file(out / "model.safetensors") as partial:
        save_file(state, partial, metadata=header)
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")

    def reopen() -> Callable[[Tensor], Outputs]:
        network = timm.create_model(f"local-dir:{out.resolve()}", pretrained=True).eval()
        return lambda images: _of_timm(network, images)

    usage = (
        f'import timm\n\nmodel = timm.create_model("local-dir:{out.name}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    )
    files = [out / "config.json", out / "model.safetensors"]
    return Exported(files, f"timm {timm.__version__}", usage, reopen, notes, "timm")


_NAMES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}


@torch.no_grad()
def _of_timm(network: Any, images: Tensor) -> Outputs:
    x = network.forward_features(images)
    if x.ndim == 4:
        maps = x if getattr(network, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
        return network.forward_head(x, pre_logits=True), maps.flatten(1, 2)
    has_cls_token = getattr(network, "cls_token", None) is not None
    pooled = x[:, 0] if has_cls_token else network.forward_head(x, pre_logits=True)
    return pooled, x[:, getattr(network, "num_prefix_tokens", 0) :]


# Hugging Face


def _hugging_face(weights: Weights, out: Path) -> Exported:
    vit, shown = _plain_vit(weights.backbone, "hf"), weights.preprocessing
    sizes = vit_sizes(vit.state_dict())
    hidden = vit.state_dict()["blocks.0.mlp.fc1.weight"].shape[0]
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": vit.num_heads,
        "intermediate_size": hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": vit.norm.eps,
        "image_size": sizes["img_size"],
        "patch_size": vit.patch_size,
        "num_channels": vit.in_chans,
        "qkv_bias": True,
        "pooler_output_size": vit.embed_dim,
        "pooler_act": "tanh",
        "dtype": "float32",
    }
    processor = {
        "image_processor_type": "BitImageProcessor",  # The one that resizes the shorter side and cuts out the middle.
        "do_convert_rgb": shown.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": shown.resize},
        "resample": 3,  # Bicubic.
        "do_center_crop": True,
        "crop_size": {"height": shown.size, "width": shown.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(shown.mean),
        "image_std": list(shown.std),
    }
    with whole_file(out / "model.safetensors") as partial:
        save_file(_hugging_face_names(cpu_state(vit)), partial, metadata={"format": "pt"})
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(out / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")

    def reopen() -> Callable[[Tensor], Outputs]:
        import transformers

        network = transformers.AutoModel.from_pretrained(out.resolve()).eval()

        @torch.no_grad()
        def run(images: Tensor) -> Outputs:
            x = network(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
            return x[:, 0], x[:, 1:]

        return run

    usage = (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{out.name}")\n'
        f'model = AutoModel.from_pretrained("{out.name}")\n'
        'cls_token = model(**processor(image, return_tensors="pt")).last_hidden_state[:, 0]'
    )
    notes = ["ViTModel has a pooler, which DINO has not: it is the identity with a tanh; read last_hidden_state"]
    files = [out / name for name in ("config.json", "model.safetensors", "preprocessor_config.json")]
    return Exported(
        files, _installed("transformers"), usage, reopen if _has("transformers") else None, notes, "transformers"
    )


def _hugging_face_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``ViTModel``'s names, queries, keys and values apart; its pooler is the identity."""
    renames = (
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for word, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{word}.")] = part.contiguous()
        else:
            renamed[name] = tensor
    d = state["cls_token"].shape[-1]
    return renamed | {"pooler.dense.weight": torch.eye(d), "pooler.dense.bias": torch.zeros(d)}


# ONNX


class _Flat(nn.Module):
    """Tokens as a plain tuple, with the table of positions as it is at one size."""

    def __init__(self, backbone: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.backbone: Any = copy.deepcopy(backbone)
        if isinstance(backbone, VisionTransformer):
            self.register_buffer("positions", backbone._positions(height, width).detach())
            self.backbone._positions = lambda *_: self.positions

    def forward(self, images: Tensor) -> Outputs:
        tokens = self.backbone(images)
        return tokens.cls_token, tokens.patch_tokens


def _onnx(weights: Weights, out: Path, size: tuple[int, int], batch: int) -> Exported:
    if not (_has("onnx") and _has("onnxscript")):
        raise ValueError("writing ONNX needs the packages onnx and onnxscript: pip install 'dino-ssl[onnx]'")
    backbone, (height, width), channels = weights.backbone.cpu(), size, weights.preprocessing.channels
    patch = _patch(backbone)
    if height % patch or width % patch or min(size) < patch or max(size) > 10_000:
        raise ValueError(
            f"--size {height} {width} is not allowed: multiples of the patch of {patch} pixels, up to 10000"
        )
    network = _Flat(backbone, height, width).eval()
    images = torch.randn(batch or 2, channels, height, width)
    large = sum(p.numel() * p.element_size() for p in network.parameters()) > 1.8e9  # Protocol buffers end at 2 GB.
    with whole_file(out) as partial, torch.no_grad():
        use_public_calls()
        try:
            torch.onnx.export(
                network,
                (images,),
                str(partial),
                dynamo=True,
                external_data=large,
                input_names=["images"],
                output_names=["cls_token", "patch_tokens"],
                dynamic_shapes=None if batch else {"images": {0: torch.export.Dim("batch", min=1)}},
                verbose=False,
            )
        finally:
            use_public_calls(False)
        if not batch and not _first_dimension_is_free(partial):
            raise ValueError("this network cannot be written for any number of images: give one, --batch N")

    def reopen() -> Callable[[Tensor], Outputs]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Outputs:
            cls_token, patch_tokens = session.run(None, {"images": images.numpy()})
            return torch.from_numpy(cls_token), torch.from_numpy(patch_tokens).flatten(1, 2)

        return run

    usage = (
        f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{out.name}")\n'
        f"# images: float32 ({batch or 'any number'}, {channels}, {height}, {width}), normalised\n"
        'cls_token, patch_tokens = session.run(None, {"images": images})'
    )
    return Exported(
        [out], _installed("onnxruntime"), usage, reopen if _has("onnxruntime") else None, [], "onnx", one_size=True
    )


def _first_dimension_is_free(path: Path) -> bool:
    import onnx

    images = onnx.load(str(path), load_external_data=False).graph.input[0]
    return bool(images.type.tensor_type.shape.dim[0].dim_param)


# The released layout, and ours


def _reference(weights: Weights, out: Path) -> Exported:
    backbone, notes = weights.backbone, []
    state = cpu_state(backbone)
    if isinstance(backbone, TimmBackbone):
        name, options = parse(backbone.name)
        if not re.fullmatch(r"resnet(18|34|50|101|152)(\..*)?", name) or options:
            raise ValueError(f"timm:{backbone.name} has no released layout: the ViTs and plain ResNets have one")
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        usage = "model = torchvision.models.resnet50(weights=None)\nmodel.fc = torch.nn.Identity()\n"
        usage = f'import torch, torchvision\n\n{usage}model.load_state_dict(torch.load("{out.name}"))'
    else:
        vit = _plain_vit(backbone, "reference")
        usual = 16 if vit.embed_dim == 1280 else vit.embed_dim // 64
        if vit.num_heads != usual:
            raise ValueError(
                f"the released layout does not say the number of heads: readers would take {usual}, this network has "
                f"{vit.num_heads}; use --to safetensors or --to timm"
            )
        if vit.pos_offset != 0.1 or vit.norm.eps != 1e-6:
            notes.append(
                "the released layout says neither how positions are resized (readers add 0.1, this network "
                f"{vit.pos_offset:g}) nor what layer norms add to the variance (1e-6; {vit.norm.eps:g})"
            )
        usage = f'import torch\n\nvit_small(patch_size={vit.patch_size}).load_state_dict(torch.load("{out.name}"))'
    with whole_file(out) as partial:
        torch.save(state, partial)

    def reopen() -> Callable[[Tensor], Outputs]:
        again = load(out)
        return lambda images: outputs(again, images)

    return Exported([out], "dino.load, as a released file", usage, reopen, notes, "pytorch")


def _ours(weights: Weights, out: Path) -> Exported:
    save_backbone(weights.backbone, out, ModelConfig(backbone="vit"), weights.preprocessing)

    def reopen() -> Callable[[Tensor], Outputs]:
        again = load(out)
        return lambda images: outputs(again, images)

    return Exported([out], "dino.load", f'import dino\n\nbackbone = dino.load("{out.name}")', reopen, [], "dino-ssl")


def _plain_vit(backbone: nn.Module, target: str) -> VisionTransformer:
    if isinstance(backbone, VisionTransformer):
        return backbone
    name = f"timm:{backbone.name}" if isinstance(backbone, TimmBackbone) else type(backbone).__name__
    raise ValueError(f"{name} is no plain vision transformer, which --to {target} writes: use --to timm or --to onnx")


# Read back, and described


def compare(
    weights: Weights, exported: Exported, size: tuple[int, int] | None = None, batch: int = 0
) -> dict[str, Any]:
    """The largest difference between the other tool's outputs and ours, on normalised noise.

    At the size that the weights are shown, and near 96 x 160 pixels, where tools resize positions each its own way;
    at ``size`` alone where the file is made for one (ONNX).
    """
    notes = list(exported.notes)
    if exported.open is None:
        return {"opened_with": None, "notes": [*notes, f"{exported.tool} is not installed: not read back"]}
    run, backbone, shown = exported.open(), weights.backbone.cpu(), weights.preprocessing
    patch = _patch(backbone)
    wanted = [size or (shown.size, shown.size), *([] if exported.one_size else [(96, 160)])]
    sizes = [(max(height // patch, 1) * patch, max(width // patch, 1) * patch) for height, width in wanted]
    found: dict[str, Any] = {"opened_with": exported.tool}
    for place, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch or 3, shown.channels, height, width, generator=generator)
        ours = outputs(backbone, images)
        name = f"difference_{height}x{width}"
        found[name] = difference(ours, run(images))
        if not place:
            found["largest_output"] = max(part.abs().max().item() for part in ours)
        elif found[name] > 1e-3 * found["largest_output"]:
            notes.append(
                f"at other sizes than {sizes[0][0]} x {sizes[0][1]} this tool resizes the table of positions in its "
                f"own way: outputs differ by up to {found[name]:.2g} at {height} x {width}"
            )
    return {**found, "notes": notes}


def write_card_of(weights: Weights, exported: Exported, out: Path) -> Path | None:
    """The model card travels along: the facts of the one beside the weights, with how this tool opens them. None where
    nobody knows whether DINO trained them."""
    facts = None
    for name in ("model_card.md", "README.md"):
        with contextlib.suppress(ValueError, OSError):
            facts = facts or read_card(weights.path.parent / name)
    if facts is None and (weights.layout in OURS or weights.path.stem in RELEASED.values()):
        backbone = describe(weights.backbone)["backbone"].removeprefix("timm:")
        facts = dataclasses.replace(CardFacts.of(weights.backbone, weights.preprocessing), backbone=backbone)
    if facts is None:
        return None
    card = out / "README.md" if out.is_dir() else out.with_name(f"{out.stem}_card.md")
    return write_card(card, facts, usage=exported.usage, library=exported.library)


def _patch(backbone: nn.Module) -> int:
    return int(backbone.patch_size)  # pyright: ignore[reportArgumentType]


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _installed(package: str) -> str:
    from importlib.metadata import version

    return f"{package} {version(package)}" if _has(package) else package
