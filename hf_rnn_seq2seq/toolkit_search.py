"""The beam searches of OpenNMT-py, JoeyNMT and Yoyodyne on transformers' loop, for models that come from there."""

from typing import Any

import torch
from transformers import GenerationConfig

from .beam_options import BeamSearchOptions
from .search_base import NEVER, Search


class ToolkitSearch(Search):
    """
    What OpenNMT-py's and JoeyNMT's have in common. B sources, N beams, K candidates a source.

    Of a step's candidates the N best alone count: in the next step there may be fewer beams to go on from
    (transformers goes on from the N best that do not end). A source's search is over when `_is_over`.
    """

    _acts_on_ends_alone = True
    _ended: torch.Tensor  # places, best to worst, at which a candidate has ended in this or an earlier step, [B, N]

    def start_search(
        self, options: BeamSearchOptions, generation_config: GenerationConfig, device: torch.device
    ) -> None:
        super().start_search(options, generation_config, device)
        (self._alpha,) = [getattr(options, name) for name in options.toolkits]
        self._ended = torch.zeros(1, generation_config.num_beams, dtype=torch.bool, device=device)
        generation_config.early_stopping = False  # neither has such an option

    def _length_penalty(self, length: int) -> float:
        """What a finished hypothesis's log P is divided by; `length` counts the end of sequence."""
        raise NotImplementedError

    def _is_over(self) -> torch.Tensor:
        """[B, 1]"""
        raise NotImplementedError

    def _select_sources(self, rows: torch.Tensor) -> None:
        self._ended = self._ended[rows]

    def _get_running_beams_for_next_iteration(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        scores = arguments["topk_log_probs"]  # [B, K], best first
        rank = torch.arange(scores.size(1), device=scores.device)
        arguments["topk_log_probs"] = scores.masked_fill(rank >= arguments["num_beams"], NEVER)
        return super()._get_running_beams_for_next_iteration(**arguments)

    def _update_finished_beams(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        self._ended = self._ended | arguments["next_token_hits_stopping_criteria"][:, : arguments["num_beams"]]
        length = arguments["cur_len"] + 1 - arguments["decoder_prompt_len"]
        scores = arguments["topk_log_probs"] / self._length_penalty(length)
        return super()._update_finished_beams(**{**arguments, "topk_log_probs": scores, "length_penalty": 0.0})

    def _check_early_stop_heuristic(self, **arguments: Any) -> torch.Tensor:  # type: ignore[override]
        return arguments["is_early_stop_heuristic_unsatisfied"] & ~self._is_over()


class OpennmtSearch(ToolkitSearch):
    """
    Beam search as OpenNMT-py does it (`onmt.translate.beam_search`, the same from 1.0 to 3.5), beyond
    [`ToolkitSearch`] in two points unlike transformers':

    - a source's search is over when the best candidate of a step ends;
    - a finished hypothesis of n tokens, end of sequence included, scores log P / (n + 1) ** alpha.
    """

    def _length_penalty(self, length: int) -> float:
        return (length + 1) ** self._alpha

    def _is_over(self) -> torch.Tensor:
        return self._ended[:, :1]


class JoeynmtSearch(ToolkitSearch):
    """
    Beam search as JoeyNMT does it (`joeynmt.search.beam_search`, 2.0 to 2.3), beyond [`ToolkitSearch`] in three points
    unlike transformers':

    - a candidate that has ended goes on all the same, and keeps its place for as long as its score does. What comes
      after its end counts for nothing else;
    - a source's search is over when at each of the N places, best to worst, some candidate has ended;
    - a finished hypothesis of n tokens, end of sequence included, scores log P / ((5 + n) / 6) ** alpha (Wu et al.
      2016, eq. 14).
    """

    _acts_on_ends_alone = True

    def _length_penalty(self, length: int) -> float:
        return ((5 + length) / 6) ** self._alpha

    def _is_over(self) -> torch.Tensor:
        return self._ended.all(1, keepdim=True)

    def _get_running_beams_for_next_iteration(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        arguments["next_token_hits_stopping_criteria"] = torch.zeros_like(
            arguments["next_token_hits_stopping_criteria"]
        )
        return super()._get_running_beams_for_next_iteration(**arguments)

    def _update_finished_beams(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        ends = arguments["next_token_hits_stopping_criteria"]  # [B, K]
        before = arguments["topk_running_sequences"][:, :, arguments["decoder_prompt_len"] : arguments["cur_len"]]
        earlier = torch.isin(before, self._eos_ids).any(-1)
        self._ended = self._ended | ends[:, : arguments["num_beams"]]
        return super()._update_finished_beams(**{**arguments, "next_token_hits_stopping_criteria": ends & ~earlier})


class YoyodyneSearch(Search):
    """
    Beam search as Yoyodyne does it (`yoyodyne.models.beam_search`, 0.5). B sources, N beams, K candidates a source.

    A finished hypothesis stays among the N, until N better ones push it out, for good: it takes a beam's place
    (transformers goes on from N others, and keeps N finished ones besides). Scores are log P. A source's search is
    over when all N are finished.
    """

    _finished: torch.Tensor  # log P of the finished among the N, `NEVER` in the other places, [B, N]
    _stays: torch.Tensor  # which candidates of a step are among the N, [B, K]
    _worst: torch.Tensor  # log P of the worst of the N, [B, 1]
    _goes_on: torch.Tensor  # whether one of them is not finished, [B, 1]

    def start_search(
        self, options: BeamSearchOptions, generation_config: GenerationConfig, device: torch.device
    ) -> None:
        super().start_search(options, generation_config, device)
        self._finished = torch.full((1, generation_config.num_beams), NEVER, device=device)
        generation_config.early_stopping = False  # it has no such option

    def _select_sources(self, rows: torch.Tensor) -> None:
        self._finished = self._finished[rows]

    def _get_running_beams_for_next_iteration(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        scores = arguments["topk_log_probs"]  # [B, K], best first
        finished = self._finished.expand(len(scores), -1)
        self._worst = torch.cat((finished, scores), dim=1).topk(arguments["num_beams"]).values[:, -1:]
        self._stays = scores >= self._worst
        real = self._stays & (scores > NEVER / 2)
        self._goes_on = (real & ~arguments["next_token_hits_stopping_criteria"]).any(1, keepdim=True)
        arguments["topk_log_probs"] = scores.masked_fill(~self._stays, NEVER)
        return super()._get_running_beams_for_next_iteration(**arguments)

    def _update_finished_beams(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        scores = arguments["beam_scores"]
        arguments["beam_scores"] = scores.masked_fill(scores < self._worst, NEVER)
        arguments["next_token_hits_stopping_criteria"] = arguments["next_token_hits_stopping_criteria"] & self._stays
        updated = super()._update_finished_beams(**{**arguments, "length_penalty": 0.0})
        self._finished = updated[1]
        return updated

    def _check_early_stop_heuristic(self, **arguments: Any) -> torch.Tensor:  # type: ignore[override]
        return arguments["is_early_stop_heuristic_unsatisfied"] & self._goes_on
