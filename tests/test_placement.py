"""Where tensors are, without a GPU: fake CUDA tensors (torch's FakeTensorMode) know their device and compute nothing.

Whatever is made on the host and meets them without ``upload`` is an error that names both devices.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import tiny
from dino.augment.multicrop import MultiCrop
from dino.config import replace
from dino.data.decode import Canvas
from dino.encoder.neighbors import nearest_neighbors
from dino.evaluation.knn import knn_votes
from dino.evaluation.propagation import propagate
from dino.machine import device as hardware
from dino.method.learner import make_learner

MODE = FakeTensorMode()


def on_gpu(*shape, dtype=torch.float32):
    with MODE:
        return torch.empty(shape, dtype=dtype, device="cuda")


def state(module):
    """Its parameters and buffers, on the GPU."""
    return {name: on_gpu(*t.shape, dtype=t.dtype) for name, t in [*module.named_parameters(), *module.named_buffers()]}


class FakeGpu(TorchFunctionMode):
    """Calls on fake tensors, and those that make tensors on CUDA, are faked; all else is real."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        made = device is not None and torch.device(device).type == "cuda"
        if made or any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            with MODE:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(hardware, "upload", lambda host, _: on_gpu(*host.shape, dtype=host.dtype))
    with FakeGpu():
        yield


def crops_of(config):
    canvas = Canvas(on_gpu(8, 3, 40, 40, dtype=torch.uint8), torch.full((8, 2), 40))
    return MultiCrop(config)(canvas, torch.Generator().manual_seed(0))


def test_the_crops():
    assert [crops.device.type for crops in crops_of(tiny.CONFIG.crops)] == ["cuda", "cuda"]


def test_what_is_not_uploaded_is_noticed(monkeypatch):
    monkeypatch.setattr(hardware, "upload", lambda host, _: host)
    with pytest.raises(Exception, match=r"(?i)device"):
        crops_of(tiny.CONFIG.crops)


@pytest.mark.parametrize("backbone", ["vit_nano", "timm:test_resnet"])
def test_student_and_loss(backbone):
    config = replace(tiny.CONFIG, model__backbone=backbone, model__drop_path=0.1 if backbone == "vit_nano" else 0.0)
    learner, crops = make_learner(config, torch.device("cpu")), crops_of(config.crops)
    masks = learner.network.draw_drop_path(crops, torch.Generator().manual_seed(0))
    logits = functional_call(learner.network, state(learner.network), tuple(crops), {"drop_path": masks})
    teacher_logits = on_gpu(8, 2, config.model.out_dim)
    loss = functional_call(learner.dino_loss, state(learner.dino_loss), (logits, teacher_logits, 0.04))
    assert loss.device.type == "cuda"
    assert loss.shape == ()


def test_evaluations():
    similarities, places = nearest_neighbors(on_gpu(20, 16), on_gpu(50, 16), 5)
    assert (similarities.device.type, places.device.type) == ("cuda", "cuda")
    votes = dict(knn_votes(similarities, on_gpu(20, 5, dtype=torch.int64), [1, 5], 10))
    assert [vote.device.type for vote in votes.values()] == ["cuda", "cuda"]
    labels = propagate(on_gpu(6, 5, 8), on_gpu(2, 6, 5, 8), on_gpu(2, 6, 5, 3))
    assert labels.device.type == "cuda"
