"""What generate() must know about a recurrent decoder and about two vocabularies."""

import copy
from typing import Any

from transformers import GenerationMixin, PreTrainedTokenizerBase
from transformers.generation import GenerationConfig, GenerationMode, StoppingCriteriaList, StopStringCriteria


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
    """transformers' generate(), with its hooks set for a recurrent state."""

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
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "Assisted and prompt-lookup decoding take back tokens they guessed wrong; a recurrent state can't be "
                "rolled back. Use greedy or beam search."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True  # as transformers marks it: tokens it has seen are not fed again

    def _get_stopping_criteria(  # type: ignore[override]  # the same
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
