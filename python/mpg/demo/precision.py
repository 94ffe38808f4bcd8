"""What the demo's real model computes in: four bits where these lose nothing and answer sooner on this machine.

Knows what is tried and how it is timed; nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mpg.model import Model
from mpg.models import gguf

TURNS, TOKENS = 3, 8  # of each type: by turns, and of a turn the tokens


def quicker(model: Model, load_int4: Callable[[], Model], question: str) -> tuple[Model, str]:
    """The model that was loaded, or the same in four bits, whichever wrote a few tokens sooner, and what to say of it.

    A GPU has no four bits, and weights that did not come from a file of such weights would lose by them: there it is
    the model that was loaded.
    """
    source = model.models.describe()["base"]["source"]
    if model.models.device.type != "cpu" or not Path(source, gguf.COMPLETE).is_file():
        return model, f"Computed in {model.precision}."
    models = [model, load_int4()]
    how = {"weights": dict.fromkeys(model.models.attribute_names[:1], 1.0), "sampler": "direct", "seed": 0}
    speeds = [0.0, 0.0]
    for _ in range(TURNS):  # the first one warms up, and what else the machine does slows others
        for place, each in enumerate(models):
            result = each.generate(question, max_new_tokens=TOKENS, **how)
            speeds[place] = max(speeds[place], result.stats["tokens_per_second"])
    chosen, other = sorted(range(2), key=speeds.__getitem__, reverse=True)
    return models[chosen], (
        f"Computed in {models[chosen].precision}, which wrote {speeds[chosen]:.0f} tokens/s in a trial here, "
        f"{models[other].precision} {speeds[other]:.0f}; --quantize int4 or none fixes it."
    )
