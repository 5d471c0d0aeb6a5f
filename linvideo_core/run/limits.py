"""What a number may be, declared once: for flags, nodes' inputs and the headers of files alike.

A setting that is taken can so be written into a file at the end, and what a file says can be used.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Numbers from `low` to `high`; as a text, what is expected: "a number from 0 to 1".

    is_whole: integers alone, and of those the multiples of `step`. without_low: `low` is no such
    number. or_zero: 0 is one, although it is below `low`.
    """

    low: float
    high: float
    is_whole: bool = False
    step: int = 1
    without_low: bool = False
    or_zero: bool = False

    def takes(self, value: object) -> bool:
        """Say whether a value is such a number; NaN, infinity and booleans are none."""
        kinds = int if self.is_whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool):
            return False
        if value == 0 and self.or_zero:
            return True
        is_inside = self.low <= value <= self.high and not (self.without_low and value == self.low)
        return is_inside and (self.step == 1 or value % self.step == 0)

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        kind = f"a multiple of {self.step}" if self.step > 1 else "a number"
        kind = "a whole number" if self.is_whole and self.step == 1 else kind
        span = f"{'above' if self.without_low else 'from'} {self.low} to {self.high}"
        return f"{'0 or ' if self.or_zero else ''}{kind} {span}"


def _whole(low: int, high: int, **more: bool | int) -> Limits:
    return Limits(low=low, high=high, is_whole=True, **more)


COUNT = _whole(1, 10**9)
"""Of whatever there is at least one, such as the steps of a training."""
COUNT_OR_NONE = _whole(0, 10**9)
VIDEOS = _whole(1, 10**6)
"""That are numbered in six digits, or all begun at once."""
COMPARED_VIDEOS = _whole(2, 10**6)
"""Of which a spread can be told."""
SAMPLER_STEPS = _whole(1, 10**6)
LAYERS = _whole(1, 1000)
PIXELS = _whole(1, 2**16)
FRAMES = _whole(1, 2**20)
LORA_RANK = _whole(1, 2**16)
FEATURE_DIM = _whole(2, 8192, step=2)
FEATURE_RATIO = _whole(1, 2)
WINDOW = _whole(2, 2**20, or_zero=True)
SEED = _whole(0, 2**63 - 1)
"""What PyTorch's generators and a safetensors header both hold."""
FRACTION = Limits(low=0, high=1)
GUIDANCE_SCALE = Limits(low=0, high=1000)
SHIFT = Limits(low=0, high=1000, without_low=True)
POSITIVE = Limits(low=0, high=1e38, without_low=True)
"""Such as a learning rate: a weight, which is fp32, moves by about as much in a step."""
LOSS_WEIGHT = Limits(low=0, high=10**6)
STRENGTH = Limits(low=-1000, high=1000)
