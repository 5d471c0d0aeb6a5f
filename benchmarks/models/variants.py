"""What is compared at one size: which layers are linear, and what computes those that are not."""

import dataclasses
from collections.abc import Sequence

from ..kernels.baselines import Contender, find_public, make_contenders

BASELINES = {"fa2": "fa2", "cudnn": "cudnn", "default": "sdpa", "sage": "sage"}
"""Name of a softmax backend in the record -> of the kernels' contender."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to compute a model.

    num_linear: linear layers; kept: the softmax backend of all others.
    is_compiled: whether the blocks are compiled.
    """

    num_linear: int
    kept: str
    is_compiled: bool = False


def find_softmax(wanted: Sequence[str], device_type: str) -> tuple[dict[str, Contender], list[str]]:
    """Return the softmax backends that can be tried, and a sentence for what is absent.

    wanted: names of BASELINES; on a CPU PyTorch has the default alone.
    """
    public, absent = find_public() if "sage" in wanted else ([], [])
    known = {contender.name: contender for contender in [*make_contenders(), *public]}
    found = {}
    for name in wanted:
        if device_type != "cuda" and name != "default":
            absent.append(f"{name} is not compared: it needs a CUDA device")
        elif BASELINES[name] in known:
            found[name] = known[BASELINES[name]]
    return found, [sentence for sentence in absent if not sentence.startswith("fla ")]


def plan_variants(softmax: Sequence[str], num_linear: int, *, compiled: bool) -> list[Variant]:
    """List what is measured: with each backend all layers softmax, then some of them linear.

    Pairs that are compared stand side by side, so that a card that grows warm burdens both.
    compiled: whether all of it is measured with compiled blocks, too.
    """
    return [
        Variant(num_linear=n, kept=kept, is_compiled=is_compiled)
        for is_compiled in ((False, True) if compiled else (False,))
        for kept in softmax
        for n in (0, num_linear)
    ]
