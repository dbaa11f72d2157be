"""Any timm model as a backbone: the released ResNet-50 and XCiT, ConvNeXt, other vision transformers."""

import ast
import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.models.backbone import Backbone, Tokens
from dino.models.convolutions import mend_convolutions


class TimmBackbone(Backbone):
    """A timm model that gives DINO's tokens.

    Convnets: ``cls_token`` is what their classifier would see (the pooled features, ``embed_dim`` wide),
    ``patch_tokens`` the last feature map. Transformers: the [CLS] token, where there is one, and the patch tokens
    without registers. ``patch_size`` is the total stride in pixels. Images may have any size where the timm model
    allows it; borders that do not fill a patch of a transformer are ignored. ``kwargs`` go to ``timm.create_model``,
    and can stand behind the name instead: ``"vit_small_patch14_dinov2(img_size=224)"``. ``norm_eps``: of all layer
    norms, in place of timm's. Drop path is timm's own.

    Raises:
        ValueError: timm has no such model (names close matches), its options cannot be read, or the model has no drop
            path.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        drop_path_rate: float | int = 0.0,
        norm_eps: float | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        name, options = parse(name)
        options |= kwargs | ({} if norm_eps is None else {"norm_eps": norm_eps})
        self.name = spec(name, options)
        norm_eps = options.pop("norm_eps", None)
        self.model = _create(name, drop_path_rate, pretrained=pretrained, **options)
        if norm_eps is not None:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps
        mend_convolutions(self.model)
        self.patch_size: int = self.model.feature_info[-1]["reduction"]
        self.embed_dim: int = getattr(self.model, "head_hidden_size", self.model.num_features)
        # A norm behind the average pooling (BEiT) means that the [CLS] token was never meant to be read.
        has_pooled_norm = not isinstance(getattr(self.model, "fc_norm", nn.Identity()), nn.Identity)
        self.has_cls_token = getattr(self.model, "cls_token", None) is not None and not has_pooled_norm

    def forward(self, images: Float[Tensor, "b c height width"]) -> Tokens:
        """Gives the tokens of the last layer.

        Raises:
            ValueError: the image is smaller than one patch, or the model does not take this size.
        """
        images = self._whole_patches(images)
        features = self._run(self.model.forward_features, images)
        if features.ndim == 4:  # A feature map: convnets, Swin.
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            patch_tokens = features if channels_last else features.permute(0, 2, 3, 1)
            return Tokens(self._pooled(features), patch_tokens)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        patch_tokens = features[:, getattr(self.model, "num_prefix_tokens", 0) :].unflatten(1, grid)
        return Tokens(features[:, 0] if self.has_cls_token else self._pooled(features), patch_tokens)

    @property
    def has_blocks(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the timm model gives its inner layers with a [CLS] token to read."""
        layers = getattr(self.model, "forward_intermediates", lambda: None)
        return self.has_cls_token and "return_prefix_tokens" in inspect.signature(layers).parameters

    def get_intermediate_layers(
        self, images: Float[Tensor, "b c height width"], n: int = 1
    ) -> list[Float[Tensor, "b t d"]]:
        """As ``VisionTransformer.get_intermediate_layers``; n from 1 to the number of blocks.

        Raises:
            ValueError: the timm model has no such layers, or not as many.
        """
        if not self.has_blocks:
            return super().get_intermediate_layers(images, n)
        layers = self._run(
            self.model.forward_intermediates,
            self._whole_patches(images),
            indices=n,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )
        return [torch.cat([prefix[:, :1], patches], dim=1) for patches, prefix in layers]

    def _pooled(self, features: Tensor) -> Float[Tensor, "b d"]:
        return self.model.forward_head(features, pre_logits=True)

    def _whole_patches(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c h w"]:
        height, width = images.shape[-2:]
        if not hasattr(self.model, "patch_embed"):
            return images
        if min(height, width) < self.patch_size:
            raise ValueError(f"an image of {height} x {width} pixels is smaller than one patch of {self.patch_size}")
        return images[..., : height - height % self.patch_size, : width - width % self.patch_size]

    def _run(self, function: Any, images: Tensor, **kwargs: Any) -> Any:
        try:
            return function(images, **kwargs)
        except AssertionError as error:  # How timm refuses an input size.
            raise ValueError(f"timm:{self.name} does not take images of {tuple(images.shape[1:])}: {error}") from error


def spec(name: str, options: Mapping[str, Any]) -> str:
    """A model of timm with its options, in one line that ``parse`` reads.

    >>> spec("resnet50", {}), spec("vit_small_patch16_224", {"img_size": 96, "reg_tokens": 4})
    ('resnet50', 'vit_small_patch16_224(img_size=96, reg_tokens=4)')
    """
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else name


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of ``spec``: plain numbers, words, tuples.

    Raises:
        ValueError: the options cannot be read, or a number is no size of a network.
    """
    match = re.fullmatch(r"([^()]+)\((.*)\)", text)
    if match is None:
        return text, {}
    try:
        call = ast.parse(f"dict({match[2]})", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        options = {str(entry.arg): ast.literal_eval(entry.value) for entry in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(f"timm:{text} is not timm:NAME or timm:NAME(option=value, ...)") from error
    for option, value in options.items():
        if isinstance(value, (int, float)) and abs(value) > 10_000:
            raise ValueError(f"timm:{match[1]}: {option} {value} is not a size of a network")
    return match[1].strip(), options


def _create(name: str, drop_path_rate: float | int, **kwargs: Any) -> Any:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5) or timm.list_models(f"*{name}*")[:5]
        raise ValueError(f"timm has no model {name!r}; close names: {', '.join(close) or 'none'}")
    # Only a refusal tells what a constructor takes. A zero drop path is passed on: some have another default.
    attempts = [{"dynamic_img_size": True, "drop_path_rate": drop_path_rate}, {"drop_path_rate": drop_path_rate}]
    for options in attempts:
        try:
            return timm.create_model(name, num_classes=0, **options, **kwargs)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
    if drop_path_rate:
        raise ValueError(f"timm:{name} has no drop path: use a rate of 0 (--model.drop-path 0)")
    try:
        return timm.create_model(name, num_classes=0, **kwargs)
    except TypeError as error:
        raise ValueError(f"timm:{name} does not take these options: {error}") from error
