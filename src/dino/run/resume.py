"""A learner into a checkpoint and back."""

from pathlib import Path

from dino.config import Config
from dino.machine import distributed
from dino.method.learner import Learner
from dino.run import checkpoint


def save_learner(learner: Learner, out: Path, config: Config, done: int, images: int) -> None:
    """Writes a checkpoint, whole or not at all, by the first process; the last ``run.keep`` stay."""
    if distributed.is_main():
        state = {
            "config": config.to_json(),
            "step": done,
            "images": images,
            "student": learner.network.state_dict(),
            "teacher": learner.teacher.state_dict(),
            "dino_loss": learner.dino_loss.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "skipped": learner.skipped,
        }
        checkpoint.save(out / "checkpoints", done, state, config.run.keep)
    distributed.barrier()


def resume(learner: Learner, out: Path, config: Config, images: int) -> int:
    """Puts the newest checkpoint of the run folder into the learner and returns the number of steps done.

    Raises:
        ValueError: the run was started with other settings (of those that change the result) or on other images.
    """
    state = checkpoint.load_latest(out / "checkpoints")
    if state is None:
        if (out / "backbone.safetensors").exists():
            raise ValueError(f"--out {out} holds a finished model but no checkpoints: use another folder")
        return 0
    before, now = Config.from_json(state["config"]).flat(), config.flat()
    only_speed = {"data.cache", "data.workers", *(f"run.{name}" for name in vars(config.run) if name != "seed")}
    changed = [
        f"--{name.replace('_', '-')} {before[name]} -> {now[name]}"
        for name in now
        if name not in only_speed and now[name] != before[name]
    ]
    if changed:
        raise ValueError(
            f"--out {out} holds a run with other settings ({', '.join(changed)}): "
            "give the settings it was started with, or another --out"
        )
    if state["images"] != images:  # An epoch would have another length, and with it every schedule.
        raise ValueError(f"--out {out} holds a run on {state['images']} images, DATA has {images}: use another --out")
    learner.network.load_state_dict(state["student"])
    learner.teacher.load_state_dict(state["teacher"])
    learner.dino_loss.load_state_dict(state["dino_loss"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.skipped.copy_(state["skipped"])
    return state["step"]
