"""`torch.set_float32_matmul_precision`, chosen by what it does on the machine at hand.

On a CPU without units for bfloat16 matrices "medium" moves float32 products from MKL to oneDNN, which still computes
them in float32 and is up to twice as fast on some processors, no faster on others. On a CPU with such units (AMX), and
on a GPU, the same word lowers the precision. No name of a processor says which, so error and time are both measured.
"""

from collections.abc import Callable

import torch
from accelerate.utils import broadcast_object_list
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .checkpoints import saved_attributes
from .timing import fastest_seconds

logger = logging.get_logger(__name__)

CHOICES = ("auto", "highest", "high", "medium")
# Rounding of float32 leaves a relative error of some 1e-7, bfloat16 of 1e-3, TF32 of 1e-4.
LARGEST_ERROR = 2e-6
LEAST_GAIN = 1.1
# Multiplications. Of smaller products noise decides which is faster, and runs would differ by it.
LEAST_PRODUCT = 2**20


class MatmulPrecision(TrainerCallback, ExportableState):
    """
    Sets the precision of float32 matrix products when training begins, and says in the log what "auto" has chosen; and
    warns where `bf16` makes training slower, as on CPUs that make bfloat16 products without units for them.

    A run that is resumed goes on with what its checkpoint names: another measurement might come out differently, and
    its weights would not be those of an uninterrupted run any more.

    Args:
        precision: one of torch's, or "auto": on a CPU [`recommended_precision`], else what is set already.
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
            self.chosen = saved_attributes(self, state).get("chosen", "auto")
            if self.chosen == "auto":
                self.chosen = self.measured(args, model)
        torch.set_float32_matmul_precision(self.chosen)
        if args.bf16 and args.device.type == "cpu" and state.is_world_process_zero:
            gain = gain_of_bfloat16(*rows_and_width(args, model))
            if gain < 1:
                logger.warning(
                    f"bf16: on this CPU products in bfloat16 take {1 / gain:.1f} times as long as in float32; "
                    "training is faster without."
                )

    @staticmethod
    def measured(args: TrainingArguments, model: PreTrainedModel) -> str:
        """What a measurement recommends: the same for all processes, the first one's."""
        before = torch.get_float32_matmul_precision()
        if args.device.type != "cpu" or before != "highest":
            return before
        (chosen,) = broadcast_object_list([recommended_precision(*rows_and_width(args, model))])
        return chosen


def rows_and_width(args: TrainingArguments, model: PreTrainedModel) -> tuple[int, int]:
    """Of the products that training makes most."""
    return args.per_device_train_batch_size, getattr(model.config, "hidden_size", 512)


def recommended_precision(rows: int, width: int) -> str:
    """
    "medium" where [`gain_of_medium`] finds it faster at full precision, else "highest"; the log has why. Products too
    small to be told apart by their times stay at "highest".
    """
    if rows * width**2 < LEAST_PRODUCT:
        return "highest"
    error, gain = gain_of_medium(rows, width)
    chosen = "medium" if error <= LARGEST_ERROR and gain >= LEAST_GAIN else "highest"
    logger.info(
        f'float32 products at "medium": relative error {error:.1e}, {gain:.2f} times as fast. Recommended: "{chosen}".'
    )
    return chosen


def gain_of_medium(rows: int, width: int) -> tuple[float, float]:
    """
    What "medium" is on this machine's CPU for the products that training makes, forward and backward, of `rows` rows
    and a weight [width, width]: their largest relative error (Frobenius norm, against float64), and how many times as
    fast as "highest" they are.
    """
    products = training_products(rows, width, torch.float32)
    exact = training_products(rows, width, torch.float64)()
    before = torch.get_float32_matmul_precision()

    def made_at(precision: str) -> list[torch.Tensor]:
        torch.set_float32_matmul_precision(precision)
        return products()

    try:
        errors = [float((y - e).norm() / e.norm()) for y, e in zip(made_at("medium"), exact, strict=True)]
        highest, medium = fastest_seconds(lambda: made_at("highest"), lambda: made_at("medium"))
    finally:
        torch.set_float32_matmul_precision(before)
    return max(errors), highest / medium


def gain_of_bfloat16(rows: int, width: int) -> float:
    """How many times as fast as in float32 the same products are in bfloat16, of values that are so already."""
    narrow, wide = (training_products(rows, width, dtype) for dtype in (torch.bfloat16, torch.float32))
    seconds_narrow, seconds_wide = fastest_seconds(narrow, wide)
    return seconds_wide / seconds_narrow


def training_products(rows: int, width: int, dtype: torch.dtype) -> Callable[[], list[torch.Tensor]]:
    """What makes y = W x and the gradients of x and W, the same numbers at every call but for rounding."""
    generator = torch.Generator().manual_seed(0)
    x, grad, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, rows, width))
    return lambda: [F.linear(x, weight), grad @ weight, grad.t() @ x]
