"""What a model does to its logits after the language-model head."""

from __future__ import annotations

from typing import Any

from stepdpo_kernels.model.support import causal_lm


def head_options(model: Any) -> dict[str, Any]:
    """The options `softcap` and `logit_scale` of `linear_logprob` and `StepDPOLoss` that give this model's logits.

        loss_fn = StepDPOLoss(**head_options(model))

    softcap is `final_logit_softcapping` (Gemma 2), logit_scale the factor of Cohere or one over Granite's divisor.
    Empty for a model whose head gives the logits as they are.
    """
    config = causal_lm(model).config
    options = {}
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        options["softcap"] = float(softcap)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is not None:
        options["logit_scale"] = float(scale)
    elif divisor is not None:
        options["logit_scale"] = 1.0 / float(divisor)
    return {name: value for name, value in options.items() if (name, value) != ("logit_scale", 1.0)}
