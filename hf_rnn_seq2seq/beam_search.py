"""
What generate() can do with beams beyond transformers' own: GNMT's penalties, diverse groups, words that must occur.

None of it is a second search: transformers' beam loop calls its helpers through `self`, so a search runs on a view of
the model, an object of its own that shares the model's modules and has other helpers in front of its class. What a
search remembers is on its view and ends with it: the model stays as it was, and threads do not meet.

Shape letters: B sources, N beams a source, K candidates a source (a multiple of N), S source positions, V vocabulary.
"""

import functools
import logging
from typing import Any, cast

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerateBeamEncoderDecoderOutput
from transformers.generation.utils import GenerateBeamOutput
from transformers.utils import ModelOutput

from .beam_options import BeamSearchOptions, ForceWordsIds, forms_of
from .fast_generation import is_covered, search_beams
from .search_base import NEVER, Search
from .toolkit_search import JoeynmtSearch, OpennmtSearch, YoyodyneSearch

logger = logging.getLogger(__name__)

MISSING_TOKEN = 1e6  # a forced token that is missing at the end costs less than that, and more than any score


@functools.cache
def _view_class(model_class: Any, searches: tuple[Any, ...]) -> Any:
    return type(f"{model_class.__name__}View", (*searches, model_class), {})


def beam_search(
    model: GenerationMixin,
    options: BeamSearchOptions,
    input_ids: torch.LongTensor,
    generation_config: GenerationConfig,
    **arguments: Any,
) -> GenerateBeamOutput | torch.LongTensor:
    """
    transformers' `_beam_search` with the options.

    Args:
        arguments: the others of `GenerationMixin._beam_search`.
    """
    chosen = {
        GnmtPenalties: options.has_penalties,
        DiverseGroups: options.has_groups,
        DynamicBeamAllocation: options.has_words,
        OpennmtSearch: options.opennmt_length_penalty is not None,
        JoeynmtSearch: options.joeynmt_length_penalty is not None,
        YoyodyneSearch: bool(options.yoyodyne_beam_search),
    }
    view_class = _view_class(cast(Any, type(model)), tuple(search for search, wanted in chosen.items() if wanted))
    view = object.__new__(view_class)  # not through __new__ of a sharded model's class, which makes another class
    view.__dict__.update(model.__dict__)
    view.start_search(options, generation_config, input_ids.device)
    if options.coverage_penalty:
        arguments["output_attentions"] = True  # of every step; the configuration says whether they are returned
    # What these remember is of all rows: `search_beams` drops some.
    keeps_rows = options.coverage_penalty or options.has_groups or options.has_words
    if not keeps_rows and is_covered(view, input_ids, generation_config, arguments):
        return search_beams(view, input_ids, config=generation_config, **arguments)
    output = GenerationMixin._beam_search(view, input_ids, generation_config=generation_config, **arguments)
    return view.finish_search(output)


class GnmtPenalties(Search):
    """Length and coverage penalty of Wu et al. 2016, eq. 14, for finished hypotheses."""

    _acts_on_ends_alone = True
    _coverage: torch.Tensor | None  # attention summed over each running hypothesis's tokens, [B * N, S]
    _step_attention: torch.Tensor  # what the present step adds, [B * N, S]
    _source_mask: torch.Tensor  # [B * N, S]

    def start_search(
        self, options: BeamSearchOptions, generation_config: GenerationConfig, device: torch.device
    ) -> None:
        super().start_search(options, generation_config, device)
        self._coverage = None

    def _length_penalty(self, length: int) -> float:
        return ((5 + length) / 6) ** (self._options.gnmt_length_penalty or 0.0)

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if self._options.coverage_penalty:
            if not outputs.get("cross_attentions"):
                raise ValueError(
                    f"`coverage_penalty`={self._options.coverage_penalty} needs attention weights, and this model has "
                    "none (`attention_type`='none')."
                )
            weights = outputs["cross_attentions"][-1].float().mean(1)  # [B * N, heads, T, S] -> [B * N, T, S]
            if self._coverage is None:
                self._source_mask = _source_mask(model_kwargs, weights)
                prompt_mask = model_kwargs.get("decoder_attention_mask")
                if prompt_mask is not None:
                    weights = weights * prompt_mask[:, -weights.size(1) :, None]
                self._step_attention = weights.sum(1)
            else:
                self._step_attention = weights[:, -1]  # without a cache the earlier tokens come again
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _get_top_k_continuations(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        if self._options.coverage_penalty:
            if self._coverage is None:
                self._coverage = self._step_attention
            else:
                last = arguments["cur_len"] - arguments["decoder_prompt_len"] - 1
                parents = arguments["running_beam_indices"][:, :, last].flatten()
                self._coverage = self._coverage[parents] + self._step_attention
        return super()._get_top_k_continuations(**arguments)

    def _update_finished_beams(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        length = arguments["cur_len"] + 1 - arguments["decoder_prompt_len"]
        if self._options.gnmt_length_penalty is None:
            scores = arguments["topk_log_probs"] / length ** arguments["length_penalty"]
        else:
            scores = arguments["topk_log_probs"] / self._length_penalty(length)
        if self._coverage is not None:
            parents = arguments["topk_running_beam_indices"][:, :, length - 1]  # [B, K]
            covered = self._coverage[parents].clamp(torch.finfo(torch.float32).tiny, 1.0).log()
            beta = self._options.coverage_penalty or 0.0
            scores = scores + beta * (covered * self._source_mask[parents]).sum(-1)
        return super()._update_finished_beams(**{**arguments, "topk_log_probs": scores, "length_penalty": 0.0})

    def _check_early_stop_heuristic(self, **arguments: Any) -> torch.Tensor:  # type: ignore[override]
        alpha = self._options.gnmt_length_penalty
        if alpha is not None:  # the coverage penalty is 0 at best
            longest = arguments["early_stopping"] == "never" and alpha > 0
            length = arguments["max_length" if longest else "cur_len"] - arguments["decoder_prompt_len"]
            best = arguments["running_beam_scores"] / self._length_penalty(length)
            arguments |= {"running_beam_scores": best, "length_penalty": 0.0}
        return super()._check_early_stop_heuristic(**arguments)


def _source_mask(model_kwargs: dict[str, Any], weights: torch.Tensor) -> torch.Tensor:
    """Which source positions are none of padding, [B * N, S]; `weights` [B * N, T, S]."""
    mask = getattr(model_kwargs["encoder_outputs"], "memory_mask", None)
    if mask is None:
        mask = model_kwargs.get("attention_mask")
    if mask is None:
        return weights.new_ones(weights[:, 0].shape)
    if mask.shape != weights[:, 0].shape:
        raise ValueError(
            f"`coverage_penalty` needs a mask of the positions that attention sees, {tuple(weights[:, 0].shape)}: "
            f"`encoder_outputs.memory_mask` or `attention_mask` has {tuple(mask.shape)}."
        )
    return mask


class DiverseGroups(Search):
    """
    Diverse beam search (Vijayakumar et al. 2018, algorithm 1) with Hamming diversity.

    For transformers' helpers a group is a source with fewer beams; only the order in which groups take tokens, and
    the ranking of their results together, are added.
    """

    # Of each group: sequences, scores, beam indices and whether finished, [B * groups, N / groups, ...]. The loop
    # gets the same, ranked over the groups of a source.
    _finished: tuple[torch.Tensor, ...] | None
    _over: torch.Tensor | None  # groups whose search has ended, [B, groups]
    _penalties: list[torch.Tensor]  # of each step, [B * N, V], if the scores are returned

    def start_search(
        self, options: BeamSearchOptions, generation_config: GenerationConfig, device: torch.device
    ) -> None:
        super().start_search(options, generation_config, device)
        self._groups = cast(int, options.num_beam_groups)
        self._finished = self._over = None
        self._penalties = []
        self._keeps_penalties = bool(generation_config.output_scores and generation_config.return_dict_in_generate)

    def finish_search(self, output: GenerateBeamOutput | torch.LongTensor) -> GenerateBeamOutput | torch.LongTensor:
        output = super().finish_search(output)
        if self._keeps_penalties and isinstance(output, GenerateBeamEncoderDecoderOutput):
            assert output.scores is not None
            output.scores = tuple(one - penalty for one, penalty in zip(output.scores, self._penalties, strict=True))  # type: ignore[assignment]
        return output

    def _split(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, groups * n, ...] -> [B * groups, n, ...]"""
        return tensor.unflatten(1, (self._groups, -1)).flatten(0, 1)

    def _join(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B * groups, n, ...] -> [B, groups * n, ...]"""
        return tensor.unflatten(0, (-1, self._groups)).flatten(1, 2)

    def _get_top_k_continuations(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        batch, beams = arguments["batch_size"], arguments["num_beams"]
        size, keep = beams // self._groups, arguments["beams_to_keep"] // self._groups
        column = arguments["cur_len"]
        step = column - arguments["decoder_prompt_len"]
        scores = arguments["accumulated_log_probs"].unflatten(1, (beams, -1))  # [B, N, V]
        if step == 0:  # the loop lets one beam start, of several that are the same; here one in each group does
            start = torch.full_like(scores[:, :size], NEVER)
            start[:, 0] = scores[:, 0]
            scores = start.repeat(1, self._groups, 1)
        over = scores.new_zeros(batch, self._groups, dtype=torch.bool) if self._over is None else self._over
        taken = torch.zeros_like(scores[:, 0])  # by how many beams of the groups so far, [B, V]
        penalties, results = [], []
        for group in range(self._groups):
            at = slice(group * size, (group + 1) * size)
            penalty = taken * (self._options.diversity_penalty or 0.0)
            log_probs, sequences, indices = super()._get_top_k_continuations(
                **arguments
                | {
                    "accumulated_log_probs": (scores[:, at] - penalty[:, None]).flatten(1),
                    "running_sequences": arguments["running_sequences"][:, at],
                    "running_beam_indices": arguments["running_beam_indices"][:, at],
                    "beams_to_keep": keep,
                    "num_beams": size,
                }
            )
            # Rows were numbered as if there were no other groups: b * size + k, which should be b * N + at.start + k.
            rows = torch.arange(batch, device=indices.device)[:, None]
            indices[:, :, step] += rows * (beams - size) + at.start
            tokens = sequences[:, :, column]
            runs = ~torch.isin(tokens, self._eos_ids)
            runs &= (runs.cumsum(1) <= size) & ~over[:, group, None]
            taken = taken.scatter_add(1, tokens, runs.to(taken.dtype))
            penalties.append(penalty)
            results.append((log_probs, sequences, indices))
        if self._keeps_penalties:
            self._penalties.append(torch.stack(penalties, 1).repeat_interleave(size, 1).flatten(0, 1))
        log_probs, sequences, indices = (torch.cat(parts, 1) for parts in zip(*results, strict=True))
        return log_probs, sequences, indices

    def _get_running_beams_for_next_iteration(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        beams = arguments.pop("num_beams")
        split = {name: self._split(tensor) for name, tensor in arguments.items()}
        running = super()._get_running_beams_for_next_iteration(**split, num_beams=beams // self._groups)
        return tuple(self._join(tensor) for tensor in running)

    def _update_finished_beams(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        own = ("sequences", "beam_scores", "beam_indices", "is_sent_finished")
        names = (
            "topk_running_sequences",
            "topk_log_probs",
            "topk_running_beam_indices",
            "next_token_hits_stopping_criteria",
        )
        batch, beams = arguments["beam_scores"].shape
        finished = self._finished or tuple(self._split(arguments[name]) for name in own)
        may_improve = arguments["is_early_stop_heuristic_unsatisfied"].expand(batch, self._groups)
        size = beams // self._groups
        keep = arguments["topk_log_probs"].size(1) // self._groups
        self._finished = super()._update_finished_beams(
            **arguments
            | {name: self._split(arguments[name]) for name in names}
            | dict(zip(own, finished, strict=True))
            | {
                "is_early_stop_heuristic_unsatisfied": may_improve.reshape(-1, 1),
                "top_num_beam_mask": torch.arange(keep, device=may_improve.device) < size,
                "num_beams": size,
            }
        )
        sequences, scores, indices, is_finished = (self._join(tensor) for tensor in self._finished)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return tuple(self._gather_beams(tensor, order) for tensor in (sequences, scores, indices, is_finished))

    def _check_early_stop_heuristic(self, **arguments: Any) -> torch.Tensor:  # type: ignore[override]
        assert self._finished is not None
        _, scores, _, is_finished = self._finished
        may_improve = arguments["is_early_stop_heuristic_unsatisfied"].expand(-1, self._groups)
        unsatisfied = (
            super()
            ._check_early_stop_heuristic(
                **arguments
                | {
                    "is_early_stop_heuristic_unsatisfied": may_improve.reshape(-1, 1),
                    "running_beam_scores": self._split(arguments["running_beam_scores"]),
                    "beam_scores": scores,
                    "is_sent_finished": is_finished,
                }
            )
            .view_as(may_improve)
        )
        full = is_finished.all(1).view_as(may_improve)
        self._over = ~unsatisfied | (full & (arguments["early_stopping"] is True))
        return unsatisfied


class ForcedWords:
    """
    Phrases as tensors, and how many of their tokens a hypothesis still lacks.

    A hypothesis contains a phrase if its tokens stand in it side by side; phrases may overlap, and what is given
    twice need be there once. The tokens that it lacks are those of one way to go on: finish the phrase that is begun
    best, then append the others one by one, each in its shortest form.

    Args:
        rows: for each source, or one list for all.

    F forms of phrases, P phrases, U different tokens, M length of the longest form; rows are filled up.
    """

    ANY, NONE, BEFORE = -1, -2, -3  # ids that match every token, none, and what stands before a sequence

    def __init__(self, rows: list[ForceWordsIds], device: torch.device):
        forms = [[(index, form) for index, phrase in enumerate(row) for form in forms_of(phrase)] for row in rows]
        self.longest = max((len(form) for row in forms for _, form in row), default=1)
        count, phrases = max(1, *map(len, forms)), max(1, *map(len, rows))
        patterns = torch.full((len(rows), count, self.longest, self.longest), self.NONE)
        lengths, owners = torch.zeros(len(rows), count, dtype=torch.long), torch.zeros(len(rows), count, phrases)
        shortest = torch.zeros(len(rows), phrases, dtype=torch.long)
        for b, row in enumerate(forms):
            for f, (index, form) in enumerate(row):
                lengths[b, f], owners[b, f, index] = len(form), 1
                for end in range(1, len(form) + 1):
                    patterns[b, f, end - 1] = torch.tensor([self.ANY] * (self.longest - end) + form[:end])
            for index, phrase in enumerate(rows[b]):
                shortest[b, index] = min(map(len, forms_of(phrase)))
        different = [sorted({token for _, form in row for token in form}) for row in forms]
        tokens = torch.full((len(rows), max(1, *map(len, different))), self.NONE)
        for b, ids in enumerate(different):
            tokens[b, : len(ids)] = torch.tensor(ids, dtype=torch.long)

        self.patterns = patterns.to(device)  # beginnings of each length at the end of M places, [B, F, M, M]
        self.lengths = lengths.to(device)  # [B, F]
        self.owners = owners.to(device, torch.bool)  # which phrase a form is one of, [B, F, P]
        self.shortest = shortest.to(device)  # [B, P]
        self.tokens = tokens.to(device)  # [B, U], filled up with NONE
        self.rows_and_tokens = (tokens != self.NONE).nonzero()[:, 0].to(device), tokens[tokens != self.NONE].to(device)
        self.total = int(shortest.sum(1).max())

    def contained(self, sequences: torch.Tensor) -> torch.Tensor:
        """Which forms occur. [B, n, T] -> [B, n, F]"""
        last = (self.lengths - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, self.longest)
        whole = self.patterns.gather(2, last).squeeze(2)[:, None, None]  # [B, 1, 1, F, M]
        windows = pad(sequences, (self.longest - 1, 0), value=self.BEFORE).unfold(2, self.longest, 1)[:, :, :, None]
        return ((windows == whole) | (whole == self.ANY)).all(-1).any(2)

    def begun(self, ends: torch.Tensor) -> torch.Tensor:
        """How many of a form's first tokens are the last of `ends`. [B, n, M] -> [B, n, F]"""
        patterns = self.patterns[:, None]
        matches = ((ends[:, :, None, None] == patterns) | (patterns == self.ANY)).all(-1)  # [B, n, F, M]
        return (matches * torch.arange(1, self.longest + 1, device=ends.device)).amax(-1)

    def missing(self, contained: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
        """How many tokens are missing, [B, n]."""
        owners = self.owners[:, None]  # [B, 1, F, P]
        there = (contained[..., None] & owners).any(2)  # [B, n, P]
        missing = (self.shortest[:, None] * ~there).sum(-1)
        is_open = (owners & ~there[:, :, None]).any(-1)  # [B, n, F]
        shortest = (self.owners * self.shortest[:, None]).sum(-1)  # of the form's phrase, [B, F]
        saved = (begun - self.lengths[:, None] + shortest[:, None]) * is_open
        return missing - saved.amax(-1).clamp(min=0)


class DynamicBeamAllocation(Search):
    """
    Lexically constrained beam search by dynamic beam allocation (Post & Vilar 2018).

    The candidates of a step are in banks by how many forced tokens they lack, and the banks take the beams in turn,
    those that lack less first; what a bank has no candidates for goes to the others. Within a bank the score decides.
    A source's best candidates by score are not enough for that: of every beam all forced tokens are candidates, too.

    Beside the paper, a candidate that lacks more tokens than there is room for up to `max_length` comes after all
    others. A hypothesis ends only with all phrases in it, so all that is returned has them wherever that is possible
    without overlap. Where it isn't (or where a criterion other than the end of sequence ended a hypothesis), the score
    is less by 1e6 for each missing token, so that a score below -1e5 tells.
    """

    _words: ForcedWords | None

    def start_search(
        self, options: BeamSearchOptions, generation_config: GenerationConfig, device: torch.device
    ) -> None:
        super().start_search(options, generation_config, device)
        self._words = None
        self._last = 0 if generation_config.forced_eos_token_id is None else 1  # tokens that are not free at the end

    def _make_words(self, batch: int, vocabulary: int, room: int, device: torch.device) -> ForcedWords:
        rows = self._options.force_words_ids_by_row
        if rows is not None and len(rows) != batch:
            raise ValueError(f"`force_words_ids_by_row` has {len(rows)} rows, the batch {batch}.")
        words = ForcedWords(rows or [cast(ForceWordsIds, self._options.force_words_ids)] * batch, device)
        largest = int(words.tokens.max())
        if largest >= vocabulary:
            raise ValueError(f"`force_words_ids` has {largest}, but the model's last token is {vocabulary - 1}.")
        if words.total > room:
            logger.warning("The forced words have %d tokens; there is room for %d.", words.total, room)
        return words

    def _get_top_k_continuations(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        sequences, column, keep = arguments["running_sequences"], arguments["cur_len"], arguments["beams_to_keep"]
        batch, beams, max_length = sequences.shape
        scores = arguments["accumulated_log_probs"].unflatten(1, (beams, -1))  # [B, N, V]
        vocabulary = scores.size(2)
        if self._words is None:
            self._words = self._make_words(batch, vocabulary, max_length - column - self._last, scores.device)
        words = self._words

        # Candidates: each beam's best, and all forced tokens. Of the other tokens all leave no phrase begun.
        forced = words.tokens.clamp(min=0)[:, None].expand(-1, beams, -1)  # [B, N, U]
        forced_scores = scores.gather(2, forced).masked_fill((words.tokens == words.NONE)[:, None], -torch.inf)
        others = scores.transpose(1, 2).clone()  # [B, V, N]
        others[words.rows_and_tokens] = -torch.inf
        others = others.transpose(1, 2)
        other_scores, other = others.topk(min(keep, vocabulary), dim=2)  # [B, N, k]

        contained = words.contained(sequences[:, :, :column])  # [B, N, F]
        other_missing = words.missing(contained, torch.zeros_like(contained, dtype=torch.long))  # [B, N]
        ends = pad(sequences[:, :, :column], (words.longest, 0), value=words.BEFORE)[
            :, :, column + 1 :
        ]  # M - 1 tokens
        count = forced.size(2)
        ends = torch.cat((ends[:, :, None].expand(-1, -1, count, -1), forced[..., None]), 3).flatten(1, 2)
        begun = words.begun(ends)  # [B, N * U, F]
        contained = contained.repeat_interleave(count, 1) | (begun == words.lengths[:, None])
        forced_missing = words.missing(contained, begun).view_as(forced)

        tokens = torch.cat((other, forced), 2)
        missing = torch.cat((other_missing[..., None].expand_as(other), forced_missing), 2).flatten(1)
        beam = torch.arange(beams, device=tokens.device)[:, None].expand_as(tokens)
        ends_now = torch.isin(tokens, self._eos_ids).flatten(1)
        candidate_scores = torch.cat((other_scores, forced_scores), 2).flatten(1)
        rank = torch.zeros_like(missing)  # the less, the better
        rank[missing > max_length - column - 1 - self._last] = 1
        rank[ends_now & (missing > 0)] = 2
        rank[candidate_scores < NEVER / 10] = 3
        chosen = take_turns(candidate_scores, missing, rank)[:, :keep]

        # The inherited helper takes the best; so that these be the chosen ones, in their order, it sees other scores.
        flat = (beam * vocabulary + tokens).flatten(1).gather(1, chosen)
        places = torch.arange(keep, 0, -1, device=flat.device, dtype=scores.dtype).expand_as(flat)
        order = torch.full_like(arguments["accumulated_log_probs"], -torch.inf).scatter(1, flat, places)
        _, sequences, indices = super()._get_top_k_continuations(**arguments | {"accumulated_log_probs": order})
        return candidate_scores.gather(1, chosen), sequences, indices

    def _get_running_beams_for_next_iteration(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        hits, beams = arguments["next_token_hits_stopping_criteria"], arguments["num_beams"]
        first = hits.long().argsort(dim=1, stable=True)[:, :beams]  # in the order of the allocation
        scores = arguments["topk_log_probs"] + hits * NEVER
        return tuple(
            self._gather_beams(tensor, first)
            for tensor in (arguments["topk_running_sequences"], scores, arguments["topk_running_beam_indices"])
        )

    def _update_finished_beams(self, **arguments: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        assert self._words is not None
        column = arguments["cur_len"]
        length = column + 1 - arguments["decoder_prompt_len"]
        contained = self._words.contained(arguments["topk_running_sequences"][:, :, : column + 1])
        missing = self._words.missing(contained, torch.zeros_like(contained, dtype=torch.long))
        scores = arguments["topk_log_probs"] / length ** arguments["length_penalty"] - MISSING_TOKEN * missing
        sequences, scores, indices, is_finished = super()._update_finished_beams(
            **arguments | {"topk_log_probs": scores, "length_penalty": 0.0}
        )
        # What lacks a phrase is returned if nothing better is found, but must not keep the search from finding it.
        return sequences, scores, indices, is_finished & (scores > -MISSING_TOKEN / 10)

    def _check_early_stop_heuristic(self, **arguments: Any) -> torch.Tensor:  # type: ignore[override]
        best = arguments["running_beam_scores"].amax(1, keepdim=True)  # they come in the order of the allocation
        return super()._check_early_stop_heuristic(**arguments | {"running_beam_scores": best})


def take_turns(scores: torch.Tensor, banks: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """
    The order in which banks, the lowest first, give one candidate each, their best ones first, and again, and again;
    candidates of a higher rank follow after those of a lower one. All [B, n].
    """
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    banks, ranks = banks.gather(1, by_score), ranks.gather(1, by_score)
    bank = ranks * (banks.max() + 1) + banks
    by_bank = bank.argsort(dim=1, stable=True)
    sorted_banks = bank.gather(1, by_bank)
    places = torch.arange(bank.size(1), device=bank.device)
    rounds = places - torch.searchsorted(sorted_banks, sorted_banks)  # how many of the bank come before
    rounds = torch.empty_like(rounds).scatter(1, by_bank, rounds)
    key = (ranks * bank.size(1) + rounds) * (banks.max() + 1) + banks
    return by_score.gather(1, key.argsort(dim=1, stable=True))
