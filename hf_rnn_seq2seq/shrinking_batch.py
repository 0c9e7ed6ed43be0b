"""
A batch whose rows leave the time loop when their targets have ended.

In the order of their lengths, the longest first, the rows that go on are the first ones, so that what a step reads is
a view. Of captions in batches of like length 15 % of all target positions are padding, of rows as they come more.

Shapes: B batch, R rows in the loop, T target.
"""

import torch

from .attention import PreparedMemory
from .cache_rnn_seq2seq import DecoderState

# Rows leave by parts of the batch, of which there are so many: whenever some do, attention's products with the source
# start anew, and oneDNN makes a kernel of every new number of rows, which takes as long as a product.
PARTS = 8


class ShrinkingBatch:
    """
    Args:
        lengths: how many target tokens of each row are looked at, [B].
        steps: T. The longest row stays as long.
    """

    def __init__(self, lengths: torch.Tensor, steps: int):
        self.order = lengths.argsort(descending=True, stable=True)  # the row in each place
        self.places = self.order.argsort()  # each row's place
        self.rows = rows_of_steps(lengths, steps)

    def sort(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, ...] in the order of lengths."""
        return tensor.index_select(0, self.order)

    def step(self, t: int, state: DecoderState, prepared: PreparedMemory) -> tuple[DecoderState, PreparedMemory]:
        """What step t reads, of the rows that are still in the loop; the same tensors where none has left."""
        rows = self.rows[t]
        if rows == prepared.mask.size(0):
            return state, prepared
        return state.map(lambda one: one[:rows]), prepared.map(lambda one: one[:rows])

    def join(self, steps: list[torch.Tensor], dim: int) -> torch.Tensor:
        """
        Results of all steps [R, ..., 1, ...], `dim` being that of time, with zeros for rows that had left:
        [B, ..., T, ...], in the order in which the rows came.
        """
        batch = len(self.order)
        whole = [torch.cat((one, one.new_zeros(batch - len(one), *one.shape[1:]))) for one in steps]
        return torch.cat(whole, dim=dim).index_select(0, self.places)


def shrinking_batch(lengths: torch.Tensor, steps: int) -> ShrinkingBatch | None:
    """`None` where all rows stay to the end."""
    batch = ShrinkingBatch(lengths, steps)
    return batch if batch.rows[-1] < batch.rows[0] else None


def rows_of_steps(lengths: torch.Tensor, steps: int) -> list[int]:
    """How many rows are in the loop at each step, given their lengths [B]: whole parts of the batch."""
    part = -(-len(lengths) // PARTS)
    going_on = (lengths.unsqueeze(1) > torch.arange(steps)).sum(0).clamp(min=1)
    return (-(-going_on // part) * part).clamp(max=len(lengths)).tolist()
