"""A Hugging Face checkpoint: decode it, find out what it can leave out, and decode with that.

    python examples/hugging_face.py [FOLDER or hub id]

Without an argument it takes the model that comes with skipkernels. The same in the shell: docs/your-model.md.
"""

import pydoc
import sys

from skipkernels import Engine
from skipkernels.calibration.calibration import calibrate
from skipkernels.demo import demo_model_path

PROMPT = "The module "
TEXT = "".join(pydoc.render_doc(kind) for kind in (str, dict, list))  # take a text of your own


def main(model: str) -> None:
    # neuron_rows lets single neurons be left out, too; without it only whole feed-forward blocks can be
    engine = Engine.from_pretrained(model, max_batch_size=4, neuron_rows=True)
    (dense,) = engine.generate(PROMPT, max_new_tokens=48)
    print(f"dense: {dense.tokens_per_s:.0f} tokens/s\n{dense.text}\n")

    found = calibrate(engine, [TEXT], 0.2, kinds=("neurons", "fixed"), new_tokens=32, passages=8, warmup_tokens=1)
    print(f"found: {found.policy.label}")
    print(f"left out {found.held_out.skip_ratio:.1%} of the FFN bytes, KL {found.held_out.kl:.3f} from dense\n")

    (skipping,) = engine.generate(PROMPT, max_new_tokens=48, policy=found.policy)
    print(f"skipping: {skipping.tokens_per_s:.0f} tokens/s, {skipping.unread_ratio:.1%} not read\n{skipping.text}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(demo_model_path()))
