"""A script for test_speed.py: two training steps of a network, compiled and not, must be the same.

Drop path included. ``fullgraph`` refuses whatever would fall back to Python inside a block.
"""

import copy
import sys
from contextlib import nullcontext

import torch

import tiny
from dino.config import replace
from dino.method import network
from dino.method.learner import make_learner
from dino.method.network import TeacherUpdate, compile_blocks
from dino.method.optim import make_optimizer
from dino.method.schedules import Now
from dino.method.step import train_step
from test_network import crops


def main(backbone: str, backend: str = "aot_eager") -> None:
    network.build_backbone = tiny.build
    # Inductor takes long over every shape, and over drop path: one shape is enough to run its code.
    few = backend == "inductor"
    rate = 0.1 if backbone == "vit_tiny" and not few else 0.0
    config = replace(tiny.CONFIG, model__backbone=backbone, model__drop_path=rate)
    plain = make_learner(config, torch.device("cpu"))
    compiled = copy.deepcopy(plain)
    compiled.student = compiled.network
    compiled.update_teacher = TeacherUpdate(compiled.teacher, compiled.network)
    compiled.optimizer = make_optimizer("adamw", compiled.network)
    for net in (compiled.network, compiled.teacher):
        compile_blocks(net, backend=backend, fullgraph=True)
    for seed in range(2):
        losses, batch = [], crops(4, 0 if few else 2, seed)
        for learner in (plain, compiled):
            masks = learner.network.draw_drop_path(batch, torch.Generator().manual_seed(seed))
            now, parts = Now(1e-3, 0.04, 0.99, 0.04), [(batch, masks)]
            losses.append(train_step(learner, parts, 1, now, config.optim, nullcontext(), False).loss)
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for (name, a), b in zip(plain.network.named_parameters(), compiled.network.parameters(), strict=True):
        if not name.endswith("qkv.bias"):  # The third of it that belongs to the keys moves by rounding noise alone.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert plain.network.state_dict().keys() == compiled.network.state_dict().keys()
    print("the same")


if __name__ == "__main__":
    main(*sys.argv[1:])
