"""Weights in the layouts of others, made from random networks of timm, transformers and torchvision: read completely,
so that the output is theirs, or refused by name."""

import argparse
import json
import sys
import types

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from dino.config import Preprocessing
from dino.models.timm_backbone import TimmBackbone
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import load, load_with_preprocessing, open_weights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
HF_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # Not what the width suggests.
    "intermediate_size": 256,
    "image_size": 32,
    "patch_size": 8,
}
READERS = {}


def reader(function):
    """A layout: writes a file or folder into ``folder`` and gives its path, the images and the outputs of its own
    network ([CLS], patches row by row), and the key to load it with."""
    READERS[function.__name__] = function
    return function


def randomised(network):
    """Every tensor away from its initial value: nothing that is not read goes unnoticed."""
    torch.manual_seed(len(list(network.parameters())))
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.05 * (torch.rand_like(tensor) - 0.3)
    return network.eval()


def random_images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def of_ours(network, images):
    tokens = network(images)
    return tokens.cls_token, tokens.patch_tokens.flatten(1, 2)


@torch.no_grad()
def of_timm(network, images):
    x = network.forward_features(images)
    if x.ndim == 4:
        return network.forward_head(x, pre_logits=True), x.flatten(2).mT
    return x[:, 0], x[:, network.num_prefix_tokens :]


@torch.no_grad()
def of_hugging_face(network, images, registers=0):
    x = network(pixel_values=images).last_hidden_state
    return x[:, 0], x[:, 1 + registers :]


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def noise(prefix):
    """Another network's tensors."""
    return prefixed(prefix, {"0.weight": torch.randn(3, 3), "last.weight_g": torch.randn(3, 1)})


def two_vits():
    return [randomised(VisionTransformer(**SMALL)) for _ in range(2)]


def saved(content, folder, images, outputs, key="teacher", name="weights.pth"):
    torch.save(content, folder / name)
    return folder / name, images, outputs, key


# Of trainers


@reader
def flat_teacher_backbone(folder):
    vit, images = randomised(VisionTransformer(**SMALL)), random_images()
    content = prefixed("teacher.backbone.", vit.state_dict()) | noise("teacher.head.") | noise("student.head.")
    return saved(content, folder, images, of_ours(vit, images))


@reader
def flat_student(folder):
    teacher, vit = two_vits()
    images = random_images()
    with torch.no_grad():
        vit.cls_token += 1
    content = prefixed("teacher.", teacher.state_dict()) | prefixed("student.", vit.state_dict())
    return saved(content, folder, images, of_ours(vit, images), "student")


@reader
def compiled_and_parallel(folder):
    vit, images = randomised(VisionTransformer(**SMALL)), random_images()
    return saved(prefixed("module._orig_mod.", vit.state_dict()), folder, images, of_ours(vit, images))


@reader
def compiled_blocks_in_safetensors(folder):
    vit, images = randomised(VisionTransformer(**SMALL)), random_images()
    state = {name.replace("blocks.1.", "blocks.1._orig_mod."): t for name, t in vit.state_dict().items()}
    save_file(prefixed("teacher.", state), folder / "w.safetensors")
    return folder / "w.safetensors", images, of_ours(vit, images), "teacher"


@reader
def lightning_of_lightly(folder):
    student, teacher = two_vits()
    images = random_images()
    with torch.no_grad():
        teacher.cls_token += 1
    state = prefixed("teacher_backbone.", teacher.state_dict()) | prefixed("student_backbone.", student.state_dict())
    parsing = types.ModuleType("pytorch_lightning.utilities.parsing")
    parsing.AttributeDict = type("AttributeDict", (dict,), {"__module__": parsing.__name__})
    packages = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.utilities")}
    with pytest.MonkeyPatch.context() as patch:  # As a file that was written where Lightning was installed.
        for name, module in {**packages, parsing.__name__: parsing}.items():
            patch.setitem(sys.modules, name, module)
        content = {
            "epoch": 3,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": state | noise("student_head.layers.") | noise("teacher_head.layers."),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
            "hyper_parameters": parsing.AttributeDict(lr=0.1, backbone="vit"),
            "callbacks": {},
        }
        return saved(content, folder, images, of_ours(teacher, images), name="epoch=3.ckpt")


@reader
def lightly_resnet_as_a_sequence(folder):
    resnet, images = randomised(torchvision.models.resnet18()), random_images(64)
    sequence = torch.nn.Sequential(*list(resnet.children())[:-1])
    content = {"state_dict": prefixed("backbone.", sequence.state_dict()) | noise("projection_head.layers.")}
    with torch.no_grad():
        maps = sequence[:-1](images)
        outputs = sequence(images).flatten(1), maps.flatten(2).mT
    return saved(content, folder, images, outputs)


@reader
def solo_learn_resnet(folder):
    resnet, images = randomised(torchvision.models.resnet18()), random_images(64)
    resnet.fc = torch.nn.Identity()
    momentum = {name: tensor + 1 for name, tensor in resnet.state_dict().items()}
    state = prefixed("backbone.", resnet.state_dict()) | prefixed("momentum_backbone.", momentum)
    with torch.no_grad():
        maps = torch.nn.Sequential(*list(resnet.children())[:-2])(images)
        outputs = resnet(images), maps.flatten(2).mT
    content = {"state_dict": state | noise("classifier.") | noise("momentum_projector.")}
    return saved(content, folder, images, outputs, "student")


@reader
def moco_v3(folder):
    base, momentum = two_vits()
    images = random_images()
    with torch.no_grad():
        momentum.cls_token += 1
    state = prefixed("module.base_encoder.", base.state_dict())
    state |= prefixed("module.momentum_encoder.", momentum.state_dict() | noise("head."))
    content = {"arch": "vit_small", "state_dict": state, "optimizer": {"state": {}}}
    return saved(content, folder, images, of_ours(momentum, images))


@reader
def mae(folder):
    network, images = randomised(timm.create_model("vit_small_patch16_224", num_classes=0, **SMALL)), random_images()
    state = network.state_dict() | noise("decoder_blocks.0.") | {"mask_token": torch.zeros(1, 1, 64)}
    return saved({"model": state, "epoch": 4}, folder, images, of_timm(network, images))


@reader
def deit(folder):
    network, images = randomised(timm.create_model("deit_tiny_patch16_224", img_size=32)), random_images()
    args = argparse.Namespace(model="deit_tiny_patch16_224", lr=np.float64(0.1))
    return saved({"model": network.state_dict(), "args": args}, folder, images, of_timm(network, images))


@reader
def deit_distilled(folder):
    network = randomised(timm.create_model("deit_small_distilled_patch16_224", **SMALL))
    return saved({"model": network.state_dict()}, folder, random_images(), of_timm(network, random_images()))


@reader
def timm_ema(folder):
    network, images = randomised(timm.create_model("vit_small_patch16_224", **SMALL)), random_images()
    other = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    content = {"epoch": 1, "state_dict": other, "state_dict_ema": network.state_dict(), "version": 2}
    return saved(content, folder, images, of_timm(network, images), name="last.pth.tar")


@reader
def timm_named_by_arch(folder):
    network, images = randomised(timm.create_model("convnext_atto", num_classes=7)), random_images(64)
    content = {"arch": "convnext_atto", "state_dict": network.state_dict()}
    return saved(content, folder, images, of_timm(network, images))


# Of timm


def timm_folder(network, folder, images):
    timm.models.save_for_hf(network, folder, safe_serialization=True)
    return folder, images, of_timm(network, images), "teacher"


@reader
def timm_folder_of_a_vit(folder):
    network = randomised(timm.create_model("vit_small_patch16_224", num_classes=5, **SMALL))
    return timm_folder(network, folder, random_images())


@reader
def timm_folder_of_a_resnet(folder):
    return timm_folder(randomised(timm.create_model("resnet10t", num_classes=5)), folder, random_images(64))


@reader
def timm_folder_of_dinov3(folder):
    options = {**SMALL, "init_values": 1.0}
    network = timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, global_pool="token", **options)
    return timm_folder(randomised(network), folder, random_images())


@reader
def timm_state_of_clip_layout_is_named(folder):
    network = randomised(timm.create_model("vit_base_patch16_clip_224", num_classes=0, **SMALL))
    return timm_folder(network, folder, random_images())


# Of Meta: DINOv2 and DINOv3, judged by timm's own reading of these files.


def meta_dinov2(folder, name, **options):
    network, images = randomised(timm.create_model(name, num_classes=0, **SMALL, **options)), random_images()
    state = dict(network.state_dict())
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        positions = torch.randn(1, 1, 64)
        state["cls_token"] = state["cls_token"] - positions
        state["pos_embed"] = torch.cat([positions, state["pos_embed"]], dim=1)
    if options:  # The gated MLP.
        state = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for n, t in state.items()}
    state["mask_token"] = torch.zeros(1, 64)
    theirs = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), network)
    network.load_state_dict(theirs)
    return saved(state, folder, images, of_timm(network, images))


@reader
def dinov2(folder):
    return meta_dinov2(folder, "vit_small_patch14_dinov2")


@reader
def dinov2_registers(folder):
    return meta_dinov2(folder, "vit_small_patch14_reg4_dinov2")


@reader
def dinov2_giant_with_registers(folder):
    return meta_dinov2(folder, "vit_giant_patch14_reg4_dinov2", mlp_ratio=352 / 64)


@reader
def dinov2_teacher_checkpoint_in_chunks(folder):
    path, images, outputs, key = meta_dinov2(folder, "vit_small_patch14_dinov2")
    state = {name.replace("blocks.", "blocks.0."): t for name, t in torch.load(path).items()}
    return saved({"teacher": prefixed("backbone.", state) | noise("dino_head.")}, folder, images, outputs, key)


def meta_dinov3(folder, name):
    options = {**SMALL, "init_values": 1.0}
    network, images = randomised(timm.create_model(name, num_classes=0, **options)), random_images()
    state = {}
    for key, tensor in network.state_dict().items():
        for old, new in {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}.items():
            key = key.replace(old, new)
        for old, new in {"fc1_g": "w1", "fc1_x": "w2"}.items():
            key = key.replace(old, new)
        state[key.replace("fc2", "w3") if "plus" in name else key] = tensor
    for key in [key for key in state if key.endswith("q_bias")]:
        queries, values = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([queries, torch.randn(64), values])
        mask = torch.cat([torch.ones(64), torch.zeros(64), torch.ones(64)])
        state[key.replace("q_bias", "qkv.bias_mask")] = mask
    state["rope_embed.periods"] = 100 ** torch.linspace(0, 1, 17)[:-1]
    state["mask_token"] = torch.zeros(1, 64)
    network.load_state_dict(timm.models.eva.checkpoint_filter_fn(dict(state), network))
    return saved(state, folder, images, of_timm(network, images))


@reader
def dinov3(folder):
    return meta_dinov3(folder, "vit_small_patch16_dinov3_qkvb")


@reader
def dinov3_plus(folder):
    return meta_dinov3(folder, "vit_small_plus_patch16_dinov3")


# Of torchvision


@reader
def torchvision_vit(folder):
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(32, 8, 2, 1, 64, 256)
    network, images = randomised(network), random_images()
    with torch.no_grad():
        x = torch.cat([network.class_token.expand(2, -1, -1), network._process_input(images)], dim=1)
        x = network.encoder(x)
    return saved({"model": network.state_dict()}, folder, images, (x[:, 0], x[:, 1:]))


# Of Hugging Face


def hugging_face(folder, kind, registers=0, whole=False, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**HF_SMALL, **options)
    network = randomised(getattr(transformers, f"{kind}ForImageClassification" if whole else f"{kind}Model")(config))
    network.save_pretrained(folder)
    body = network.vit if whole else network
    return folder, random_images(), of_hugging_face(body, random_images(), registers), "teacher"


@reader
def hf_vit(folder):
    return hugging_face(folder, "ViT")


@reader
def hf_vit_classifier(folder):
    return hugging_face(folder, "ViT", whole=True)


@reader
def hf_vit_file_alone(folder):
    path, images, outputs, key = hugging_face(folder, "ViT")
    state = dict(load_of_hugging_face(path).state_dict())
    return saved({"num_heads": 2, "args": {"num_heads": 2}, "state_dict": state}, folder, images, outputs, key)


@reader
def hf_vit_in_pieces(folder):
    path, images, outputs, key = hugging_face(folder, "ViT")
    load_of_hugging_face(path).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert (folder / "model.safetensors.index.json").is_file()
    return path, images, outputs, key


def load_of_hugging_face(folder):
    import transformers

    return transformers.AutoModel.from_pretrained(folder)


@reader
def hf_dinov2(folder):
    return hugging_face(folder, "Dinov2")


@reader
def hf_dinov2_gated(folder):
    return hugging_face(folder, "Dinov2", use_swiglu_ffn=True)


@reader
def hf_dinov2_gated_state_dict(folder):
    path, images, outputs, key = hugging_face(folder, "Dinov2", use_swiglu_ffn=True)
    state = load_of_hugging_face(path).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return path, images, outputs, key


@reader
def hf_dinov2_registers(folder):
    return hugging_face(folder, "Dinov2WithRegisters", registers=4)


@reader
def hf_dinov3(folder):
    return hugging_face(folder, "DINOv3ViT", registers=4, num_register_tokens=4)


@reader
def hf_dinov3_gated(folder):
    return hugging_face(folder, "DINOv3ViT", registers=4, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_outputs_are_theirs(name, tmp_path):
    path, images, (cls_token, patch_tokens), key = READERS[name](tmp_path)
    weights = open_weights(path, checkpoint_key=key)
    tokens = weights.backbone(images)
    torch.testing.assert_close(tokens.cls_token, cls_token, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.patch_tokens.flatten(1, 2), patch_tokens, atol=1e-5, rtol=1e-5)
    assert weights.tensors == len(weights.backbone.state_dict())
    assert f"{weights.tensors} tensors read, {len(weights.left)} left" in weights.summary


def test_enough_layouts():
    assert len(READERS) >= 20


# Refused by name


def refused(path, message, **options):
    with pytest.raises(ValueError, match=message) as error:
        load(path, **options)
    assert "\n" not in str(error.value)
    assert "Error(" not in str(error.value)


def test_other_networks_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    swin = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    transformers.SwinModel(swin).save_pretrained(tmp_path / "swin")
    refused(tmp_path / "swin", r"holds no known backbone .* it calls itself 'swin', its keys: embeddings\.norm\.bias")
    beit = transformers.BeitConfig(**HF_SMALL)
    transformers.BeitModel(beit).save_pretrained(tmp_path / "beit")
    refused(tmp_path / "beit", "vision transformer of Hugging Face that cannot be read|does not fit its model")
    vit = transformers.ViTConfig(**HF_SMALL, hidden_act="relu")
    transformers.ViTModel(vit).save_pretrained(tmp_path / "relu")
    refused(tmp_path / "relu", "its activation is 'relu' instead of 'gelu'")


def test_networks_of_timm_without_a_name(tmp_path):
    for name in ("vit_base_patch16_siglip_224", "swin_tiny_patch4_window7_224", "vit_base_patch16_clip_224"):
        options = SMALL if "vit" in name else {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
        network = timm.create_model(name, num_classes=0, **options)
        torch.save(network.state_dict(), tmp_path / "w.pth")
        refused(tmp_path / "w.pth", r"holds no known backbone|does not fit its model|cannot be read")


def test_a_resnet_for_small_images(tmp_path):
    resnet = torchvision.models.resnet18()
    resnet.conv1 = torch.nn.Conv2d(3, 64, 3, bias=False)  # As solo-learn does for CIFAR.
    torch.save({"state_dict": prefixed("backbone.", resnet.state_dict())}, tmp_path / "w.ckpt")
    refused(tmp_path / "w.ckpt", r"of another shape: model\.conv1\.weight \(64, 3, 3, 3\) for \(64, 3, 7, 7\)")


def test_parts_that_are_not_there_or_not_alone(tmp_path):
    vit = VisionTransformer(**SMALL).state_dict()
    torch.save(prefixed("student.", vit), tmp_path / "s.pth")
    way_out = r"choose another with checkpoint_key \(--checkpoint-key\)"
    refused(tmp_path / "s.pth", rf"has no 'teacher' \(it holds student\): {way_out}")
    torch.save(prefixed("left.", vit) | prefixed("right.net.", vit), tmp_path / "two.pth")
    refused(tmp_path / "two.pth", rf"has more than one 'teacher' \(it holds left, right\.net\): {way_out}")
    for key in ("right", "right.net"):
        assert open_weights(tmp_path / "two.pth", checkpoint_key=key).left == [f"left.{name}" for name in vit]


def test_half_a_network_is_refused(tmp_path):
    vit = VisionTransformer(**SMALL).state_dict()
    for missing in ("norm.weight", "blocks.1.mlp.fc2.bias", "blocks.0.attn.qkv.bias", "pos_embed", "cls_token"):
        torch.save({name: tensor for name, tensor in vit.items() if name != missing}, tmp_path / "w.pth")
        refused(tmp_path / "w.pth", r"missing: |holds no known backbone|cannot be read: it lacks|unexpected")
    torch.save(vit | {"blocks.0.adapter.weight": torch.zeros(3)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"1 unexpected: blocks\.0\.adapter\.weight")


def test_dinov3_whose_positions_turn_otherwise(tmp_path):
    path, *_ = dinov3(tmp_path)
    state = torch.load(path)
    torch.save(state | {"rope_embed.periods": 10_000 ** torch.linspace(0, 1, 17)[:-1]}, path)
    refused(path, "its rotary positions have a base other than 100")
    state["blocks.1.attn.qkv.bias_mask"] = torch.ones(192)
    torch.save(state, path)
    refused(path, r"keys with a bias: blocks\.1\.attn\.qkv\.bias")


def test_unknown_number_of_heads(tmp_path):
    torch.save(VisionTransformer(32, 8, embed_dim=1664, depth=1, num_heads=16).state_dict(), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "does not say how many heads its 1664 channels have")


# What they are shown


def test_preprocessing_of_timm_folders(tmp_path):
    network = timm.create_model("resnet10t", num_classes=0)
    cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "input_size": [3, 176, 176], "crop_pct": 0.95}
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= cfg
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone, preprocessing = load_with_preprocessing(tmp_path)
    assert isinstance(backbone, TimmBackbone)
    assert preprocessing == Preprocessing(176, 185, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    "processor, expected",
    [
        ({"size": 48}, (48, 48)),
        ({"size": {"height": 40, "width": 40}}, (40, 40)),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True}, (56, 64)),
        ({"size": {"shortest_edge": 64}, "crop_size": 56, "do_center_crop": False}, (64, 64)),
    ],
)
def test_preprocessing_of_hugging_face_folders(processor, expected, tmp_path):
    hf_vit(tmp_path)
    processor |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    expected = Preprocessing(*expected, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert load_with_preprocessing(tmp_path)[1] == expected


def test_dinov2_is_shown_images_as_its_authors_do(tmp_path):
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, embed_dim=64, depth=1, num_heads=1)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    backbone, preprocessing = load_with_preprocessing(tmp_path / "w.pth")
    assert backbone.model.pos_embed.shape == (1, 37**2 + 1, 64)
    assert preprocessing == Preprocessing(224, 256)
