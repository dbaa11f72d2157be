"""An ONNX file, for one size of images."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.machine.files import whole_file
from dino.machine.private_calls import use_public_calls
from dino.models.exported import Exported, Outputs, has, installed, patch_of
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import Weights


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


def to_onnx(weights: Weights, out: Path, size: tuple[int, int], batch: int) -> Exported:
    if not (has("onnx") and has("onnxscript")):
        raise ValueError("writing ONNX needs the packages onnx and onnxscript: pip install 'dino-ssl[onnx]'")
    backbone, (height, width), channels = weights.backbone.cpu(), size, weights.preprocessing.channels
    patch = patch_of(backbone)
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
        [out], installed("onnxruntime"), usage, reopen if has("onnxruntime") else None, [], "onnx", one_size=True
    )


def _first_dimension_is_free(path: Path) -> bool:
    import onnx

    images = onnx.load(str(path), load_external_data=False).graph.input[0]
    return bool(images.type.tensor_type.shape.dim[0].dim_param)
