"""``dino plan``: what a run will cost."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from dino.commands.pretrain import WithRecipe
from dino.recipes import Facts


@dataclass(frozen=True)
class Plan(WithRecipe):
    """Says what a run will cost before it begins: parameters, steps, operations, disk, memory, hours.

    Give it what `dino pretrain` will be given. With DATA, the first 20 steps are made on this machine and measured.
    """

    needs_data: ClassVar[bool] = False

    _: KW_ONLY
    images: int = 1281167
    """Without DATA: number of images; by default those of ImageNet."""
    side: int = 375
    """Without DATA: median of their shorter sides in pixels."""
    accelerator: bool = True
    """Without DATA: whether the recipe is for a machine with a GPU."""
    measure: bool = True
    """With DATA: measure; without, only what can be counted is told."""

    def run(self) -> dict[str, Any]:
        from dino.run.plan import plan

        if not self.data:
            return plan(self.plain_config, self.images)
        train, _ = self.parts()
        return plan(self.plain_config, len(train), train if self.measure else None)

    def facts(self, batch_size: int | None) -> Facts:
        return super().facts(batch_size) if self.data else Facts(self.images, self.side, self.accelerator, batch_size)
