"""
Which sequences end, and how they leave the batch.

Shape letters: B rows of the batch, b those that still run, T tokens so far.
"""

import torch
from torch import nn
from transformers import GenerationConfig, generation
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

# Those whose answer for a row depends on nothing but this row, so that other rows may be missing. (By their types:
# a subclass may do anything.)
ROW_WISE_PROCESSORS: frozenset[type] = frozenset(
    {
        generation.EpsilonLogitsWarper,
        generation.EtaLogitsWarper,
        generation.ExponentialDecayLengthPenalty,
        generation.ForcedBOSTokenLogitsProcessor,
        generation.ForcedEOSTokenLogitsProcessor,
        generation.InfNanRemoveLogitsProcessor,
        generation.LogitNormalization,
        generation.MinLengthLogitsProcessor,
        generation.MinNewTokensLengthLogitsProcessor,
        generation.MinPLogitsWarper,
        generation.NoBadWordsLogitsProcessor,
        generation.NoRepeatNGramLogitsProcessor,
        generation.RepetitionPenaltyLogitsProcessor,
        generation.SequenceBiasLogitsProcessor,
        generation.SuppressTokensAtBeginLogitsProcessor,
        generation.SuppressTokensLogitsProcessor,
        generation.TemperatureLogitsWarper,
        generation.TopKLogitsWarper,
        generation.TopPLogitsWarper,
        generation.TypicalLogitsWarper,
    }
)
ROW_WISE_CRITERIA: frozenset[type] = frozenset({EosTokenCriteria, MaxLengthCriteria, generation.MaxTimeCriteria})

# What it costs to copy a row's state and all that it attends to, in steps of that row.
COPY_STEPS = 0.5


class Ends:
    """
    What a `StoppingCriteriaList` says of sequences, without its calls if all it asks for is a length or a last token.

    Args:
        criteria: of one call of generate().
    """

    def __init__(self, criteria: StoppingCriteriaList):
        self.criteria = criteria
        self.simple = all(
            type(one) is EosTokenCriteria or (type(one) is MaxLengthCriteria and one.max_position_embeddings is None)
            for one in criteria
        )
        self.max_length = min((one.max_length for one in criteria if type(one) is MaxLengthCriteria), default=None)
        self.eos = [id for one in criteria if type(one) is EosTokenCriteria for id in one.eos_token_id.tolist()]

    def __call__(self, sequences: torch.Tensor) -> torch.Tensor:
        """[..., T] -> [...]"""
        if not self.simple:
            return self.criteria(sequences.flatten(0, -2), None).view(sequences.shape[:-1])
        last = sequences[..., -1]
        if self.max_length is not None and sequences.size(-1) >= self.max_length:
            return torch.ones_like(last, dtype=torch.bool)
        if not self.eos:
            return torch.zeros_like(last, dtype=torch.bool)
        ends = last == self.eos[0]
        for token in self.eos[1:]:
            ends = ends | (last == token)
        return ends


class Ended:
    """
    What has ended, by the row of the batch (under beam search, the source) that it belongs to.

    Args:
        rows: how many there are in the batch.
    """

    def __init__(self, rows: int, device: torch.device):
        self.running = torch.arange(rows, device=device)  # which rows of the batch are still with us
        self.wasted = 0  # how many steps rows that had ended were carried along, summed over these rows
        self.rows: list[torch.Tensor] = []
        self.sequences: list[torch.Tensor] = []

    def add(self, ended: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
        """Of rows that have `ended` [b], their sequences [.., T]. Returns which rows go on."""
        self.rows.append(self.running[ended])
        self.sequences.append(sequences)
        going_on = (~ended).nonzero().squeeze(1)
        self.running, self.wasted = self.running[going_on], 0
        return going_on

    def should_leave(self, number: int) -> bool:
        """
        To be asked before a step: shall so many rows that have ended leave the batch? They are carried along until
        that has cost as much as to copy the others. (Exported greedy search has the same rule: `greedy_step`.)
        """
        self.wasted += number
        return number > 0 and self.wasted >= COPY_STEPS * (len(self.running) - number)

    def all_sequences(self, fill: int) -> torch.Tensor:
        """Those of all rows in the batch's order, [B, ..., T], filled up behind."""
        width = max(one.size(-1) for one in self.sequences)
        padded = [nn.functional.pad(one, (0, width - one.size(-1)), value=fill) for one in self.sequences]
        return torch.cat(padded)[torch.cat(self.rows).argsort()]


def rows_are_independent(
    config: GenerationConfig, logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList
) -> bool:
    """May a row be missing without a difference to others? In sampling, all rows draw from one stream of numbers."""
    return (
        not config.do_sample
        and all(
            type(one) in ROW_WISE_PROCESSORS
            and not isinstance(getattr(one, "prompt_ignore_length", None), torch.Tensor)  # one for each row
            for one in logits_processor
        )
        and all(type(one) in ROW_WISE_CRITERIA for one in stopping_criteria)
    )
