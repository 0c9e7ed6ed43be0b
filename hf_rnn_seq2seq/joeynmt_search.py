"""JoeyNMT's beam search on transformers' loop, for models that come from there."""

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateBeamOutput

from .beam_options import BeamSearchOptions, as_list

NEVER = -1e9  # what transformers' loop adds to the score of what must not be chosen


class JoeynmtSearch(GenerationMixin):
    """
    Beam search as JoeyNMT does it (`joeynmt.search.beam_search`, 2.0 to 2.3), in three points unlike transformers':

    - a step's N best candidates are the next step's beams, whether or not they have ended: one that has goes on, and
      keeps its place for as long as its score does. What comes after its end counts for nothing else;
    - a source's search is over when at each of the N places, best to worst, some candidate has ended, in this step or
      an earlier one;
    - a finished hypothesis of n tokens, end of sequence included, scores log P / ((5 + n) / 6) ** alpha (Wu et al.
      2016, eq. 14).

    Used as a view of the model, as the searches of `beam_search`; K candidates a source, N beams.
    """

    _ended: torch.Tensor  # places at which a candidate has ended, [B, N]

    def start_search(
        self, options: BeamSearchOptions, generation_config: GenerationConfig, device: torch.device
    ) -> None:
        """Called on the view, once, before the loop."""
        assert options.joeynmt_length_penalty is not None
        self._alpha = options.joeynmt_length_penalty
        self._eos_ids = torch.tensor(as_list(generation_config.eos_token_id), device=device, dtype=torch.long)
        self._ended = torch.zeros(1, generation_config.num_beams, dtype=torch.bool, device=device)

    def finish_search(self, output: GenerateBeamOutput | torch.LongTensor) -> GenerateBeamOutput | torch.LongTensor:
        """Called with what the loop has returned."""
        return output

    def _get_top_k_continuations(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        scores, *others = super()._get_top_k_continuations(**arguments)  # best first
        rank = torch.arange(scores.size(1), device=scores.device)
        return scores.masked_fill(rank >= arguments["num_beams"], NEVER), *others

    def _get_running_beams_for_next_iteration(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        ended = torch.zeros_like(arguments["next_token_hits_stopping_criteria"])
        return super()._get_running_beams_for_next_iteration(
            **{**arguments, "next_token_hits_stopping_criteria": ended}
        )

    def _update_finished_beams(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        ends = arguments["next_token_hits_stopping_criteria"]  # [B, K]
        self._ended = self._ended | ends[:, : arguments["num_beams"]]
        start, end = arguments["decoder_prompt_len"], arguments["cur_len"]
        earlier = torch.isin(arguments["topk_running_sequences"][:, :, start:end], self._eos_ids).any(-1)
        lp = ((5 + end + 1 - start) / 6) ** self._alpha
        changed = {
            "next_token_hits_stopping_criteria": ends & ~earlier,
            "topk_log_probs": arguments["topk_log_probs"] / lp,
            "length_penalty": 0.0,
            "early_stopping": False,
        }
        return super()._update_finished_beams(**{**arguments, **changed})

    def _check_early_stop_heuristic(self, **arguments: Any) -> torch.Tensor:  # type: ignore[override]
        return arguments["is_early_stop_heuristic_unsatisfied"] & ~self._ended.all(1, keepdim=True)

    def _beam_search_has_unfinished_sequences(  # type: ignore[override]
        self, improvable: torch.Tensor, finished: torch.Tensor, ended: torch.Tensor, early_stopping: bool | str
    ) -> torch.Tensor:
        return super()._beam_search_has_unfinished_sequences(improvable, finished, ended, early_stopping=False)
