"""An own skipping rule: a policy of a few lines, measured beside the ones that come with skipkernels.

    python examples/own_rule.py [FOLDER or hub id]

A policy says, for a model of so many layers, which feed-forward blocks (FFNs) may be skipped and when. The kernels do
the rest. Which parameters there are: `GatePlan` in skipkernels/skipping/policy.py.
"""

import pydoc
import sys
from dataclasses import dataclass
from typing import ClassVar

from skipkernels import DensePolicy, Engine, RandomPolicy, SkipPolicy
from skipkernels.calibration.passages import cut_passages
from skipkernels.calibration.scoring import compare, score
from skipkernels.demo import demo_model_path
from skipkernels.skipping.policy import GatePlan, Policy


@dataclass(frozen=True)
class EveryThird(Policy):
    """Skips every third FFN of the middle layers, once a sequence has a few tokens."""

    kind: ClassVar[str] = "every third"
    warmup_tokens: int = 4

    def plan(self, num_layers: int) -> GatePlan:
        middle = range(num_layers // 6, num_layers - num_layers // 6)
        return GatePlan("fixed", gated_layers=tuple(middle)[::3], warmup_tokens=self.warmup_tokens)


def main(model: str) -> None:
    engine = Engine.from_pretrained(model, max_batch_size=8)
    text = pydoc.render_doc(str) + pydoc.render_doc(dict) + pydoc.render_doc(list)
    _, passages = cut_passages(engine, [text], 16, prompt_tokens=16, new_tokens=64)
    dense = score(engine, passages, DensePolicy(), keep_log_probs=True)

    print(f"{'policy':<24}{'FFN bytes not read':>20}{'KL from dense':>16}{'same next token':>18}")
    for policy in (EveryThird(), RandomPolicy(0.2, warmup_tokens=4), SkipPolicy(target_ratio=0.2, span=2)):
        figures = compare(dense, score(engine, passages, policy, reference=dense), warmup_tokens=4)
        print(f"{policy.kind:<24}{figures.skip_ratio:>20.1%}{figures.kl:>16.3f}{figures.top1_agreement:>18.1%}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(demo_model_path()))
