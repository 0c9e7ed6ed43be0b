"""
transformers' loops of greedy search, sampling and beam search over again, for when ids are all that is wanted.

Every choice is made by transformers' own code: its logits processors, its stopping criteria, its helpers of beam
search. What differs is what a step costs: the decoder is called without the shell around it, sources are read once and
not once a beam, matrices are brought into the layout that their products want, rows that have ended are dropped from
the batch, and what would change nothing is not called.

Shape letters: B sources, b those that still run, N beams a source, K candidates a source, T tokens so far, V
vocabulary; rows are b, under beam search b * N.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from .best_words import best_continuations, best_words, most_probable_continuations
from .decoding_steps import DecodingSteps, first_steps
from .ended_rows import Ended, Ends, rows_are_independent
from .heads import LinearHead
from .host_memory import keep_for_steps
from .screening import Screen, screen_of
from .search_base import NEVER
from .step_products import shared_by_steps


def _defining_class(cls: type, name: str) -> type | None:
    return next((base for base in cls.__mro__ if name in vars(base)), None)


def is_covered(
    model: GenerationMixin, input_ids: torch.Tensor, config: GenerationConfig, options: dict[str, Any]
) -> bool:
    """
    May these loops take a call's place? Not where anything but ids is returned or handed in, where something looks on
    (a streamer, hooks on modules), or where the model's forward pass is another one (a subclass's, a compiled one, one
    over several devices).

    Args:
        options: the keyword arguments of `GenerationMixin._sample` or `_beam_search`, the model's among them.
    """
    if not getattr(model, "_fast_generation", False) or not isinstance(options.get("encoder_outputs"), ModelOutput):
        return False
    wanted = config.return_dict_in_generate or config.is_assistant or config.prefill_chunk_size is not None
    handed_in = any(options.get(name) is not None for name in ("past_key_values", "streamer"))
    if wanted or handed_in or options.get("synced_gpus") or not options.get("use_cache"):
        return False
    module = cast(nn.Module, model)
    own = _defining_class(type(module), "forward") is _defining_class(type(module), "decoding_steps")
    compiled = "forward" in vars(module) or module._compiled_call_impl is not None
    if module.training or not own or compiled or input_ids.device != module.device:
        return False
    return not any(
        one._forward_hooks or one._forward_pre_hooks or hasattr(one, "_hf_hook") for one in module.modules()
    )


def output_screen(model: Any) -> Screen | None:
    """Of an output layer whose best word is the model's; its steps are then [`DecodingSteps`]."""
    if type(model).decoding_steps is not DecodingSteps or model.config.output_normalizer != "softmax":
        return None
    is_product = isinstance(model.head, LinearHead) and type(model.head).forward is LinearHead.forward
    return screen_of(model.head.output) if is_product else None


def sample(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> torch.LongTensor:
    """`GenerationMixin._sample`, greedy or not, where `is_covered`. All arguments are its own."""
    pad = cast(Any, config)._pad_token_tensor
    fills_up = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    may_drop = fills_up and rows_are_independent(config, logits_processor, stopping_criteria)
    ended, ends = Ended(input_ids.size(0), input_ids.device), Ends(stopping_criteria)
    unfinished = torch.ones_like(ended.running, dtype=torch.bool)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        scores = logits_processor(input_ids, logits.float())  # type: ignore[arg-type]
        if config.do_sample:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return best_words(scores)

    keep_for_steps(input_ids.device)
    with shared_by_steps(packed=True):
        # Before the output layer is packed for scores that later steps won't make.
        screen = None if config.do_sample or logits_processor else output_screen(model)
        outputs = model._prefill(input_ids, config, model_kwargs)
        steps = first_steps(model, outputs, model_kwargs)
        tokens = choose(outputs.logits[:, -1].clone())
        del outputs
        number_ended = 0
        while True:
            if fills_up and number_ended:
                tokens = torch.where(unfinished, tokens, pad)
            input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
            unfinished = unfinished & ~ends(input_ids)
            rows = len(unfinished)
            number_ended = rows - int(unfinished.sum())
            if number_ended == rows:
                break
            if may_drop and ended.should_leave(number_ended):
                going_on = ended.add(~unfinished, input_ids[~unfinished])
                input_ids, tokens, unfinished = (one[going_on] for one in (input_ids, tokens, unfinished))
                steps.select(going_on)
                number_ended = 0
            if screen is None:
                tokens = choose(steps(tokens))
            else:
                tokens = screen.best(cast(DecodingSteps, steps).before_output(tokens))
    ended.add(~unfinished, input_ids)
    return cast(torch.LongTensor, ended.all_sequences(fill=0 if pad is None else int(pad)))


# transformers' helpers that a beam search goes through, but for those that choose from scores.
BEAM_HELPERS = (
    "_get_running_beams_for_next_iteration",
    "_update_finished_beams",
    "_check_early_stop_heuristic",
    "_beam_search_has_unfinished_sequences",
)


def classes_with_own_helpers(model: GenerationMixin) -> list[type]:
    """The classes with other beam helpers than transformers'."""
    return [
        cls
        for cls in type(model).__mro__
        if cls is not GenerationMixin and any(name in vars(cls) for name in BEAM_HELPERS)
    ]


def acts_on_ends_alone(model: GenerationMixin) -> bool:
    """
    Where none of a step's K candidates has ended, and no source has all its finished hypotheses: are its N best the
    next beams, and is all else as before? So it is with transformers' helpers; a class with others says so by
    `_acts_on_ends_alone`.
    """
    return all(vars(cls).get("_acts_on_ends_alone", False) for cls in classes_with_own_helpers(model))


def nothing_ends(hits: torch.Tensor, scores: torch.Tensor, beams: int) -> bool:
    """
    No candidate has ended, and it is clear which N are the best, in which order.

    Args:
        hits: [b, K].
        scores: [b, K].
    """
    in_order = scores[:, 1 : beams + 1] < scores[:, :beams]
    return not bool(hits.any()) and bool(in_order.all())


def every(tensors: dict[str, Any], beams: int) -> dict[str, Any]:
    """One row a source of what generate() has repeated for the beams."""
    return {name: one[::beams] if isinstance(one, torch.Tensor) else one for name, one in tensors.items()}


def search_beams(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> torch.LongTensor:
    """
    `GenerationMixin._beam_search` where `is_covered`. All arguments are its own; its helpers are called through
    `model`, so a view of the model may have others.

    A source is done when its finished hypotheses can't change any more: when no running one can improve on them, or
    all are there and `early_stopping` is True.
    """
    beams = config.num_beams
    prompt = input_ids[::beams]
    encoder_outputs = model_kwargs["encoder_outputs"]
    model_kwargs = every(model_kwargs, beams)
    model_kwargs["encoder_outputs"] = type(encoder_outputs)(**every(encoder_outputs, beams))

    (sources, prompt_length), device = prompt.shape, prompt.device
    eos, pad = cast(Any, config)._eos_token_tensor, cast(Any, config)._pad_token_tensor
    kept = max(2, 1 + (0 if eos is None else len(eos))) * beams
    fill = -1 if eos is None else int(pad or eos[0])
    among_best = torch.arange(kept, device=device) < beams
    may_drop = rows_are_independent(config, logits_processor, stopping_criteria)
    ended, ends = Ended(sources, device), Ends(stopping_criteria)
    may_skip = config.num_return_sequences == 1 and acts_on_ends_alone(model)
    early_stopping, length_penalty = config.early_stopping, config.length_penalty

    def best(finished: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What is returned of these sources, [.., R, T]."""
        returned = config.num_return_sequences
        return finished[:, :returned, : prompt_length + int(lengths[:, :returned].max())]

    running = prompt[:, None].expand(-1, beams, -1)  # sequences, [b, N, T]
    running_scores = torch.zeros(sources, beams, device=device)
    running_scores[:, 1:] = NEVER  # all beams are the same at first
    finished = running
    finished_scores = torch.full_like(running_scores, NEVER)
    lengths = torch.zeros_like(running_scores, dtype=torch.long)  # tokens behind the prompt in `finished`
    is_finished = torch.zeros_like(running_scores, dtype=torch.bool)
    may_improve = torch.ones(sources, 1, dtype=torch.bool, device=device)
    crowded = False  # has a source that goes on all its finished hypotheses?
    first_rows = beams * torch.arange(sources, device=device)[:, None]

    keep_for_steps(input_ids.device)
    with shared_by_steps(packed=True):
        outputs = model._prefill(prompt, config, model_kwargs)
        steps = first_steps(model, outputs, model_kwargs)
        logits = outputs.logits[:, -1].repeat_interleave(beams, dim=0)
        del outputs
        steps.repeat(beams)
        while True:
            length = running.size(2)
            if not (logits_processor or config.do_sample):
                top_scores, chosen = most_probable_continuations(logits, running_scores, kept)  # [b, K]
            else:
                log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
                log_probs = logits_processor(running.flatten(0, 1), log_probs)  # type: ignore[arg-type]
                if config.do_sample:
                    scores = (log_probs.view(-1, beams, logits.size(1)) + running_scores[:, :, None]).flatten(1)
                    chosen = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=kept)  # of [b, N * V]
                    top_scores = scores.gather(1, chosen)
                else:
                    top_scores, chosen = best_continuations(log_probs, running_scores, kept)
            parents, tokens = chosen // logits.size(1), chosen % logits.size(1)
            top = torch.cat((model._gather_beams(running, parents), tokens[:, :, None]), dim=2)
            hits = ends(top)  # [b, K]
            if may_skip and not crowded and nothing_ends(hits, top_scores, beams):
                running, running_scores, parents = top[:, :beams], top_scores[:, :beams], parents[:, :beams]
                steps.reorder((parents + first_rows[: len(parents)]).flatten())
                logits = steps(running[:, :, -1].flatten())
                continue
            # In the places where transformers' helpers have all of a hypothesis's beam indices they get its last
            # parent, or the number of its tokens: all that is made of them here.
            running, running_scores, parents = model._get_running_beams_for_next_iteration(
                topk_log_probs=top_scores,
                topk_running_sequences=top,
                topk_running_beam_indices=parents,
                next_token_hits_stopping_criteria=hits,
                num_beams=beams,
            )
            finished, finished_scores, lengths, is_finished = model._update_finished_beams(
                sequences=nn.functional.pad(finished, (0, length + 1 - finished.size(2)), value=fill),
                topk_running_sequences=top,
                beam_scores=finished_scores,
                topk_log_probs=top_scores,
                beam_indices=lengths,
                topk_running_beam_indices=torch.full_like(chosen, length + 1 - prompt_length),
                is_early_stop_heuristic_unsatisfied=may_improve,
                is_sent_finished=is_finished,
                next_token_hits_stopping_criteria=hits,
                top_num_beam_mask=among_best,
                num_beams=beams,
                cur_len=length,
                decoder_prompt_len=prompt_length,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
            )
            may_improve = model._check_early_stop_heuristic(
                is_early_stop_heuristic_unsatisfied=may_improve,
                running_beam_scores=running_scores,
                beam_scores=finished_scores,
                is_sent_finished=is_finished,
                cur_len=length + 1,
                max_length=config.max_length,
                decoder_prompt_len=prompt_length,
                early_stopping=early_stopping,
                length_penalty=length_penalty,
            )
            done = ~may_improve[:, 0]
            if early_stopping is True:
                done = done | is_finished.all(1)
            # Of hypotheses whose scores are exactly equal transformers returns what the last step happens to leave.
            best_scores = finished_scores[:, : config.num_return_sequences + 1]
            done = done & (best_scores[:, 1:] != best_scores[:, :-1]).all(1)
            if done.all() or not model._beam_search_has_unfinished_sequences(
                may_improve, is_finished, hits, early_stopping
            ):
                break
            rows = parents + first_rows[: len(parents)]  # [b, N]
            if may_drop and ended.should_leave(int(done.sum())):
                going_on = ended.add(done, best(finished[done], lengths[done]))
                running, running_scores, rows = (one[going_on] for one in (running, running_scores, rows))
                model._select_sources(going_on)
                finished, finished_scores, lengths = (one[going_on] for one in (finished, finished_scores, lengths))
                is_finished, may_improve = is_finished[going_on], may_improve[going_on]
                steps.select(rows.flatten())
            else:
                steps.reorder(rows.flatten())
            # (A hypothesis without any probability, too, may have to give way to one that has not ended.)
            crowded = bool(((is_finished.all(1) & may_improve[:, 0]) | (finished_scores < NEVER).any(1)).any())
            logits = steps(running[:, :, -1].flatten())
    ended.add(torch.ones_like(done), best(finished, lengths))
    return cast(torch.LongTensor, ended.all_sequences(fill).flatten(0, 1))
