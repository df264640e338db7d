"""The trainer that `StepDPOPlugin` names. Axolotl imports it late, when it has changed TRL as it needs it."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations.base import PluginManager

from stepdpo_kernels.integrations.trl import StepDPOTRLTrainer


class AxolotlStepDPOTrainer(StepDPOTRLTrainer, AxolotlDPOTrainer):
    """Axolotl's DPO trainer, accelerated from the start, that also takes step pairs; see `StepDPOTRLTrainer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cfg = PluginManager.get_instance().cfg
        super().__init__(*args, template=cfg.stepdpo_template, boundary=cfg.stepdpo_boundary, **kwargs)
