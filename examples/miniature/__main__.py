"""`python -m examples.miniature`: every stage in order, a few minutes on two cores, offline.

Writes to runs/demo, or where --output says: report.md, curves.png, the pairs and the models. The fine-tuned model is
kept for the next time; --fresh trains it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path

THREADS = 2  # floating-point sums depend on it, so it is fixed

# Before torch and tokenizers are imported. Threads that wait without spinning lose little on an idle machine and much
# less on a busy one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.miniature", description="Step-DPO in miniature.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where the results go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="train the fine-tuned model again")
    parser.add_argument("--quick", action="store_true", help="tiny counts: every stage in seconds, nothing learned")
    options = parser.parse_args()

    for name in ("stepdpo_kernels", "bitsandbytes"):  # the second one where it is installed, about its own kernels
        logging.getLogger(name).setLevel(logging.ERROR)

    import torch
    import transformers

    from examples.miniature.run import run
    from examples.miniature.settings import QUICK, Settings
    from stepdpo_kernels import StepDPOError

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|torch")
    settings = replace(QUICK if options.quick else Settings(), seed=options.seed)
    try:
        run(options.output, settings, fresh=options.fresh)
    except StepDPOError as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; a fine-tuned model that was finished is kept for the next time\n")


if __name__ == "__main__":
    main()
