"""OpenNMT-py's beam search on transformers' loop, for models that come from there."""

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateBeamOutput

from .beam_options import BeamSearchOptions

NEVER = -1e9  # what transformers' loop adds to the score of what must not be chosen


class OpennmtSearch(GenerationMixin):
    """
    Beam search as OpenNMT-py does it (`onmt.translate.beam_search`, the same from 1.0 to 3.5), in three points unlike
    transformers':

    - of a step's candidates the N best stay, with those that end: in the next step there are fewer beams to go on from
      (transformers goes on from the N best that do not end);
    - a source's search is over when the best candidate of a step ends;
    - a finished hypothesis of n tokens, end of sequence included, scores log P / (n + 1) ** alpha.

    Used as a view of the model, as the searches of `beam_search`; K candidates a source, N beams.
    """

    _ended: torch.Tensor  # sources whose best candidate has ended in this or an earlier step, [B, 1]

    def start_search(
        self, options: BeamSearchOptions, generation_config: GenerationConfig, device: torch.device
    ) -> None:
        """Called on the view, once, before the loop."""
        assert options.opennmt_length_penalty is not None
        self._alpha = options.opennmt_length_penalty
        self._ended = torch.zeros(1, 1, dtype=torch.bool, device=device)

    def finish_search(self, output: GenerateBeamOutput | torch.LongTensor) -> GenerateBeamOutput | torch.LongTensor:
        """Called with what the loop has returned."""
        return output

    def _get_top_k_continuations(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        scores, *others = super()._get_top_k_continuations(**arguments)  # best first
        rank = torch.arange(scores.size(1), device=scores.device)
        return scores.masked_fill(rank >= arguments["num_beams"], NEVER), *others

    def _update_finished_beams(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        self._ended = self._ended | arguments["next_token_hits_stopping_criteria"][:, :1]
        length = arguments["cur_len"] + 1 - arguments["decoder_prompt_len"]
        scores = arguments["topk_log_probs"] / (length + 1) ** self._alpha
        return super()._update_finished_beams(**{**arguments, "topk_log_probs": scores, "length_penalty": 0.0})

    def _check_early_stop_heuristic(self, **arguments: Any) -> torch.Tensor:  # type: ignore[override]
        return arguments["is_early_stop_heuristic_unsatisfied"] & ~self._ended
