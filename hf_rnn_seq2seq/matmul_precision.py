"""`torch.set_float32_matmul_precision`, chosen by what it does on the machine at hand.

On a CPU without units for bfloat16 matrices "medium" moves float32 products from MKL to oneDNN, which still computes
them in float32 and is up to twice as fast on some processors, no faster on others. On a CPU with such units (AMX), and
on a GPU, the same word lowers the precision. No name of a processor says which, so error and time are both measured.
"""

import time
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

logger = logging.get_logger(__name__)

CHOICES = ("auto", "highest", "high", "medium")
# Rounding of float32 leaves a relative error of some 1e-7, bfloat16 of 1e-3, TF32 of 1e-4.
LARGEST_ERROR = 2e-6
LEAST_GAIN = 1.1
REPEATS = 15


class MatmulPrecision(TrainerCallback, ExportableState):
    """
    Sets the precision of float32 matrix products when training begins, and says in the log what "auto" has chosen.

    A run that is resumed goes on with what its checkpoint names: another measurement might come out differently, and
    its weights would not be those of an uninterrupted run any more.

    Args:
        precision: one of torch's, or "auto": "medium" if [`gain_of_medium`] says that it is faster at full precision,
            else what is set already.
    """

    def __init__(self, precision: str):
        self.precision = precision
        self.chosen = "auto"

    def state(self) -> dict[str, dict[str, str]]:
        return {"args": {"precision": self.precision}, "attributes": {"chosen": self.chosen}}

    def on_train_begin(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        self.chosen = self.precision
        if self.precision == "auto":
            earlier = cast(dict[str, Any], state.stateful_callbacks or {}).get(type(self).__name__)
            self.chosen = earlier["attributes"]["chosen"] if earlier else "auto"
            if self.chosen == "auto":
                self.chosen = self.measured(args, model)
        torch.set_float32_matmul_precision(self.chosen)

    @staticmethod
    def measured(args: TrainingArguments, model: PreTrainedModel) -> str:
        """What a measurement recommends: the same for all processes, the first one's."""
        before = torch.get_float32_matmul_precision()
        if args.device.type != "cpu" or before != "highest":
            return before
        width = getattr(model.config, "hidden_size", 512)
        error, gain = gain_of_medium(args.per_device_train_batch_size, width)
        chosen = "medium" if error <= LARGEST_ERROR and gain >= LEAST_GAIN else "highest"
        (chosen,) = broadcast_object_list([chosen])
        logger.info(
            f'float32 products at "medium": relative error {error:.1e}, {gain:.2f} times as fast. Chosen: "{chosen}".'
        )
        return chosen


def gain_of_medium(rows: int, width: int) -> tuple[float, float]:
    """
    What "medium" is on this machine's CPU for the products that training makes, forward and backward, of `rows` rows
    and a weight [width, width]: their largest relative error (Frobenius norm, against float64), and how many times as
    fast as "highest" they are at their fastest, which other work on the machine disturbs least.
    """
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    x, grad, weight = (torch.randn(n, width, generator=generator) for n in (rows, rows, width))
    products = (lambda: F.linear(x, weight), lambda: grad @ weight, lambda: grad.t() @ x)
    exact = [F.linear(x.double(), weight.double()), grad.double() @ weight.double(), grad.double().t() @ x.double()]
    seconds: dict[str, list[float]] = {"highest": [], "medium": []}
    error = 0.0
    try:
        for repeat in range(REPEATS + 1):
            for precision, taken in seconds.items():
                torch.set_float32_matmul_precision(precision)
                start = time.perf_counter()
                made = [product() for product in products]
                if repeat:  # the first time warms up
                    taken.append(time.perf_counter() - start)
                if precision == "medium":
                    errors = [float((y - e).norm() / e.norm()) for y, e in zip(made, exact, strict=True)]
                    error = max(error, *errors)
    finally:
        torch.set_float32_matmul_precision(before)
    return error, min(seconds["highest"]) / min(seconds["medium"])
