"""Axolotl's DPO training on packed forests and our head.

    plugins:
      - stepdpo_kernels.integrations.axolotl.StepDPOPlugin

in the YAML file of a run with `rl: dpo` or `rl: ipo`. The plugin names the class of the trainer, by `trainer_cls`:
Axolotl 0.19 asks `get_trainer_cls` for preference training, too, but then builds the trainer without its model. Where
the file names a class of its own, that trainer is accelerated once it is built.

Nothing of TRL is imported here: Axolotl changes it before it imports its own trainers, and plugins come before that.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from stepdpo_kernels.integrations.versions import require
from stepdpo_kernels.types import StepDPOError

require("axolotl", "0.19", "0.20")
require("trl", "1.9", "1.17")

from axolotl.integrations.base import BasePlugin  # noqa: E402 (of a version that was looked at)
from axolotl.utils.logging import get_logger  # noqa: E402

NAME = f"{__name__}.StepDPOPlugin"
TRAINER = "stepdpo_kernels.integrations.axolotl_trainer.AxolotlStepDPOTrainer"
LOG = get_logger(f"axolotl.{__name__}")  # it shows what its own loggers say, and warnings of others


class StepDPOArgs(BaseModel):
    """Keys of the YAML file, for datasets with step pairs; as in `load_step_pairs`."""

    stepdpo_template: Literal["chat", "alpaca", "deepseek-math", "qwen2-boxed", "none"] = "chat"
    stepdpo_boundary: Literal["joint", "separate"] = "joint"


class StepDPOPlugin(BasePlugin):
    """Packs the shared prefixes of every micro-batch; see docs/integrations/axolotl.md.

    Raises StepDPOError for training that is not DPO, and as `accelerate_dpo` once there is a trainer.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.StepDPOArgs"

    def register(self, cfg: dict[str, Any]) -> None:
        if not _is_asked_for(cfg):
            return
        if cfg.get("rl") not in ("dpo", "ipo"):
            raise StepDPOError(
                f"rl: {cfg.get('rl')} is not DPO, and {NAME} packs the pairs of DPO: set rl to dpo or ipo, or take the "
                "plugin out of plugins"
            )
        if not cfg.get("trainer_cls"):
            cfg["trainer_cls"] = TRAINER

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if not _is_asked_for(cfg):
            return
        from stepdpo_kernels.integrations.trl import accelerate_dpo

        self._accelerated = accelerate_dpo(trainer)
        LOG.info("%s trains on packed prefix forests", type(trainer).__name__)

    def post_train(self, cfg: Any, model: Any) -> None:
        if _is_asked_for(cfg):
            self._accelerated.remove()


def _is_asked_for(cfg: Any) -> bool:
    """Axolotl calls a plugin for every later run of the same process, too."""
    return NAME in (cfg.get("plugins") or ())
