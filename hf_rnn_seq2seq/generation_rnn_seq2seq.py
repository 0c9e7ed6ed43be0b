"""What generate() must know about a recurrent decoder and about two vocabularies."""

import copy
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from transformers import Cache, GenerationMixin, PreTrainedTokenizerBase
from transformers.generation import (
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
    GenerationConfig,
    GenerationMode,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateBeamOutput, GenerateNonBeamOutput

from .beam_options import take_options
from .beam_search import beam_search
from .fast_generation import is_covered, sample, search_beams
from .step_products import LoopWeights, packed_weights


class TargetStopStringCriteria(StopStringCriteria):
    """
    Stop strings for any tokenizer.

    transformers learns what a token adds to a text by encoding "abcdef" and decoding it with the token behind. That
    fails where a vocabulary of words, phones or Hangul does not know "abcdef", and where text is encoded with one
    vocabulary and decoded with another. Any ordinary token of the target serves as well.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: str | list[str]):
        super().__init__(getattr(tokenizer, "target_tokenizer", tokenizer), stop_strings)

    @staticmethod
    def clean_tokenizer_vocab(
        tokenizer: PreTrainedTokenizerBase, static_prefix: str = "abcdef", stop_string_matching_mode: str | None = None
    ) -> tuple[tuple[str | bytes, ...], tuple[int, ...]]:
        """What each token adds to a text, and the tokens' ids."""
        if stop_string_matching_mode is not None:  # bytes, which have no unknown prefix
            return StopStringCriteria.clean_tokenizer_vocab(tokenizer, static_prefix, stop_string_matching_mode)
        vocabulary = tokenizer.get_vocab()
        ordinary = (token for token in sorted(vocabulary) if token not in tokenizer.all_special_tokens)
        prefix = next((token for token in ordinary if tokenizer.convert_tokens_to_string([token])), None)
        if prefix is None:
            raise ValueError("`stop_strings` needs a vocabulary with at least one token that is not special.")
        length = len(tokenizer.convert_tokens_to_string([prefix]))
        added = tuple(tokenizer.convert_tokens_to_string([prefix, token])[length:] for token in vocabulary)
        return added, tuple(vocabulary.values())


class RnnSeq2SeqGenerationMixin(GenerationMixin):
    """transformers' generate() with its hooks set for a recurrent state, and with the options `BeamSearchOptions`."""

    _fast_generation = True  # False leaves every loop to transformers, to compare with
    _kept_weights: LoopWeights | None = None  # by `packed`

    def packed(self, keep: bool = False) -> AbstractContextManager[None]:
        """
        Around many calls of generate() on a CPU, for speed where batches are small:

            with model.packed():
                for batch in batches:
                    model.generate(**batch)

        Large matrices are brought into the layout of oneDNN's products once, at their first use inside, and not by
        every call; they take their memory a second time. A weight that changes inside is packed again, but not one
        that is written to through `weight.data`, which torch does not see.

        Args:
            keep: for the next `packed(keep=True)`, too.
        """
        if not keep:
            return packed_weights()
        if self._kept_weights is None:
            self._kept_weights = LoopWeights(packed=True, lasting=True)
        return packed_weights(self._kept_weights)

    def _select_sources(self, rows: torch.Tensor) -> None:
        """Called on a view of the model when its search goes on with these sources alone: see `beam_search`."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache

    def _prepare_cache_for_generation(  # type: ignore[override]  # `self` is declared as a protocol there
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation`={generation_config.cache_implementation!r} is for keys and values; a "
                "recurrent decoder has a state of constant size: leave it out."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True  # as transformers marks it

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        # The configuration is this call's own copy; transformers, too, keeps on it what it derives from the options.
        setattr(config, "_beam_search_options", take_options(config, model_kwargs, kwargs))  # noqa: B010
        return config, model_kwargs

    def _beam_search(  # type: ignore[override]  # the same
        self, input_ids: torch.LongTensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> GenerateBeamOutput | torch.LongTensor:
        """transformers' beam search; with options of `BeamSearchOptions`, on a view of this model."""
        options = getattr(generation_config, "_beam_search_options", None)
        if options is not None:
            return beam_search(self, options, input_ids, generation_config, **kwargs)
        if is_covered(self, input_ids, generation_config, kwargs):
            return search_beams(self, input_ids, config=generation_config, **kwargs)
        return super()._beam_search(input_ids, generation_config=generation_config, **kwargs)  # type: ignore[misc]

    def _sample(  # type: ignore[override]  # the same
        self, input_ids: torch.LongTensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> GenerateNonBeamOutput | torch.LongTensor:
        """Greedy search and sampling."""
        if is_covered(self, input_ids, generation_config, kwargs):
            return sample(self, input_ids, config=generation_config, **kwargs)
        return super()._sample(input_ids, generation_config=generation_config, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]  # the same
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        kwargs.pop("tokenizer", None)  # generate() hands the stop strings' tokenizer on to the model
        if next_sequence_length is None and past_key_values is not None:
            # Continuing from a cache, generate() leaves out the tokens that it holds only where a mask is given.
            next_sequence_length = max(input_ids.size(1) - past_key_values.get_seq_length(), 1)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            cast(torch.LongTensor, input_ids),
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> StoppingCriteriaList:
        if generation_config.stop_strings is None or tokenizer is None:
            return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)  # type: ignore[misc]
        others = copy.copy(generation_config)
        others.stop_strings = None
        criteria = super()._get_stopping_criteria(others, stopping_criteria, tokenizer)  # type: ignore[misc]
        criteria.append(TargetStopStringCriteria(tokenizer, generation_config.stop_strings))
        return criteria

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: torch.Tensor | None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """As in transformers, which takes scores to be `config.vocab_size` wide; with `copy_ids` they are wider."""
        view = cast(Any, copy.copy(self))
        view.config = copy.copy(view.config)
        view.config.vocab_size = scores[0].size(-1)
        return GenerationMixin.compute_transition_scores(
            view,
            sequences,
            scores,  # type: ignore[arg-type]  # declared as a tuple of one
            beam_indices,
            normalize_logits,
        )

    def generated_attentions(
        self,
        outputs: GenerateEncoderDecoderOutput | GenerateBeamEncoderDecoderOutput,
        layer: int = -1,
        head: int | None = None,
    ) -> list[torch.Tensor]:
        """
        The attention matrix of every sequence that generate() returned.

        Under beam search the weights come one step after another for whatever hypotheses were alive then; this picks
        each returned sequence's own, by `beam_indices`.

        Args:
            outputs: of `generate(..., return_dict_in_generate=True, output_attentions=True)`, with any search.
            layer: which attending layer.
            head: which head; the mean over heads by default.

        Returns:
            One [T, S] tensor a sequence: rows are the T generated tokens, end of sequence included and start token or
            prompt left out; columns are source positions, padding included (with zeros).
        """
        if not outputs.cross_attentions or not outputs.cross_attentions[0]:
            raise ValueError(
                "`outputs` has no cross-attentions: call generate() with `return_dict_in_generate=True` and "
                "`output_attentions=True`, on a model whose `attention_type` is not 'none'."
            )
        # Of a prompt only the last token's row made a token of its own. -> [steps, rows, heads, S]
        steps = torch.stack([step[layer][:, :, -1] for step in outputs.cross_attentions])
        weights = steps.mean(2) if head is None else steps[:, :, head]  # [steps, rows, S]
        prompt = outputs.sequences.size(1) - weights.size(0)
        beam_indices = getattr(outputs, "beam_indices", None)
        if beam_indices is not None:
            chosen = [row[row >= 0] for row in beam_indices]
            return [weights[torch.arange(len(row), device=row.device), row] for row in chosen]
        eos = self.generation_config.eos_token_id
        ends = torch.tensor([] if eos is None else eos, device=outputs.sequences.device).view(-1)
        found = []
        for index, sequence in enumerate(outputs.sequences[:, prompt:]):
            at_end = torch.isin(sequence, ends).nonzero()
            length = int(at_end[0]) + 1 if len(at_end) else len(sequence)
            found.append(weights[:length, index])
        return found
