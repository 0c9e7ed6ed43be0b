"""Options of beam search that transformers 5 does not have, or has no longer: their meaning and their refusals."""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, cast

from transformers import GenerationConfig

# Phrases that must all occur. Each is a list of ids, or a list of such lists of which one is enough.
ForceWordsIds: TypeAlias = list[list[int] | list[list[int]]]


@dataclass(frozen=True)
class BeamSearchOptions:
    """
    Options of beam search: keyword arguments of generate(), or attributes of a `GenerationConfig` and so of
    generation_config.json. They need `num_beams` > 1; saved ones are left aside without.

    Args:
        gnmt_length_penalty: alpha of Wu et al. 2016, eq. 14, by which a finished hypothesis Y has the score
            log P(Y|X) / lp(Y) + cp(X; Y), lp(Y) = ((5 + |Y|) / 6) ** alpha. |Y| counts the generated tokens, end of
            sequence included. 0 means no normalisation. It takes the place of transformers' `length_penalty`, which
            divides by |Y| ** length_penalty.
        coverage_penalty: beta of the same equation, cp(X; Y) = beta * sum_i log(min(sum_j p_ij, 1)): i runs over the
            source positions without padding, p_ij is the mean over heads of the last attending layer's weights, and j
            runs over all target tokens, also over a prompt's (but not over those behind a `past_key_values` that was
            handed in). A position without any attention counts 1e-38. It goes with either length penalty.
        num_beam_groups: diverse beam search (Vijayakumar et al. 2018): as many groups of beams, which take turns
            within a step and share nothing but the next penalty. The results are the best over all groups.
        diversity_penalty: what a token loses for every beam of earlier groups that has taken it at this step (Hamming
            diversity; ends of sequence are not counted). As in transformers 4 it stays in `scores` and
            `sequences_scores`.
        force_words_ids: phrases that every hypothesis must contain, see `ForcedWords`: a list of lists of ids or,
            where one of several forms is enough, of lists of such lists. The ids come from the target's tokenizer,
            `tokenizer(text_target=phrase, add_special_tokens=False).input_ids`; check how it splits a word that
            stands within a sentence.
        force_words_ids_by_row: such a list for each source; an empty one where nothing is forced.

        opennmt_length_penalty: alpha of OpenNMT-py's `length_penalty: avg` (0: `none`), with its beam search in place
            of transformers', see `OpennmtSearch`; `early_stopping` is then not read. It excludes the other options.
        joeynmt_length_penalty: JoeyNMT's `beam_alpha` (0: none), with its beam search in place of transformers', see
            `JoeynmtSearch`; the same goes for it.
        yoyodyne_beam_search: True for Yoyodyne's, in which finished hypotheses take beams' places, see
            `YoyodyneSearch`; the same goes for it.

    `early_stopping="never"` ends the search when no running hypothesis can come before the worst finished one any
    more: each is taken to lose no more probability, to reach the length that favours it most, and to cover everything.
    With `False`, the running hypotheses are taken to keep their present length, as transformers does for its own
    penalty; better ones can be missed. With `True` the search ends as soon as there are as many finished hypotheses
    as beams.
    """

    gnmt_length_penalty: float | None = None
    coverage_penalty: float | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    force_words_ids: ForceWordsIds | None = None
    force_words_ids_by_row: list[ForceWordsIds] | None = None
    opennmt_length_penalty: float | None = None
    joeynmt_length_penalty: float | None = None
    yoyodyne_beam_search: bool | None = None

    @property
    def has_penalties(self) -> bool:
        return self.gnmt_length_penalty is not None or bool(self.coverage_penalty)

    @property
    def has_groups(self) -> bool:
        return (self.num_beam_groups or 1) > 1

    @property
    def has_words(self) -> bool:
        return self.force_words_ids is not None or self.force_words_ids_by_row is not None

    @property
    def toolkits(self) -> list[str]:
        """Which options that stand for another toolkit's whole search are given."""
        return [name for name in TOOLKITS if getattr(self, name) is not None and getattr(self, name) is not False]


OPTIONS = tuple(field.name for field in fields(BeamSearchOptions))
TOOLKIT_PENALTIES = ("opennmt_length_penalty", "joeynmt_length_penalty")
TOOLKITS = (*TOOLKIT_PENALTIES, "yoyodyne_beam_search")


@functools.cache
def _known_to_transformers() -> frozenset[str]:
    return frozenset(vars(GenerationConfig()))


def take_options(
    config: GenerationConfig, model_kwargs: dict[str, Any], arguments: Mapping[str, Any]
) -> BeamSearchOptions | None:
    """
    Takes the options of one call out of sight of transformers, for which the call becomes plain beam search.

    Args:
        config: the call's own copy of the configuration; loses groups and forced words.
        model_kwargs: arguments of generate() that the configuration did not take; loses the options.
        arguments: all keyword arguments of generate().

    Returns:
        The options, or `None` for plain search.

    Raises:
        ValueError: a value that is not allowed, options that exclude each other, or a misspelt attribute.
    """
    for name in vars(config).keys() - _known_to_transformers() - set(OPTIONS):
        if close := difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.85):
            raise ValueError(f"`generation_config` has an unknown attribute `{name}`: did you mean `{close[0]}`?")
    # A name that the configuration does not have yet is still among the arguments for the model.
    values = {name: model_kwargs.pop(name, getattr(config, name, None)) for name in OPTIONS}
    options = BeamSearchOptions(**values)
    _check_options(options, config, arguments)
    config.num_beam_groups = config.force_words_ids = None
    active = options.has_penalties or options.has_groups or options.has_words
    return options if config.num_beams > 1 and (active or options.toolkits) else None


def _check_options(options: BeamSearchOptions, config: GenerationConfig, arguments: Mapping[str, Any]) -> None:
    if config.constraints is not None:
        raise ValueError("`constraints` needs classes that transformers 5 no longer has: use `force_words_ids`.")
    for name in ("gnmt_length_penalty", "coverage_penalty", "diversity_penalty", *TOOLKIT_PENALTIES):
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"`{name}` must be a number, got {value!r}.")
    if not isinstance(options.yoyodyne_beam_search, bool | None):
        raise ValueError(f"`yoyodyne_beam_search` must be True or False, got {options.yoyodyne_beam_search!r}.")
    if config.num_beams == 1:
        off = {"num_beam_groups": 1, "diversity_penalty": 0, "coverage_penalty": 0, "yoyodyne_beam_search": False}
        wanted = [name for name in OPTIONS if arguments.get(name) not in (None, off.get(name))]
        if options.has_words and not wanted:
            wanted = ["force_words_ids"]
        if wanted:
            raise ValueError(f"`{wanted[0]}` needs beams: `num_beams` has to be greater than 1.")
        return
    if options.gnmt_length_penalty is not None and config.length_penalty != 1.0:
        raise ValueError(
            f"`gnmt_length_penalty`={options.gnmt_length_penalty} and `length_penalty`={config.length_penalty} "
            "exclude each other: leave `length_penalty` at 1.0."
        )
    others = config.length_penalty != 1.0 or options.has_penalties or options.has_groups or options.has_words
    if options.toolkits and (others or len(options.toolkits) > 1):
        name = options.toolkits[0]
        raise ValueError(
            f"`{name}`={getattr(options, name)} excludes `length_penalty`, `gnmt_length_penalty`, `coverage_penalty`, "
            "`num_beam_groups`, `force_words_ids` and other toolkits' searches: leave them out."
        )
    if (options.coverage_penalty or 0) < 0:
        raise ValueError(f"`coverage_penalty` must be 0 or more, got {options.coverage_penalty}.")
    if options.has_words:
        _check_words(options, config)
    elif options.diversity_penalty or options.num_beam_groups not in (None, 1):
        _check_groups(options, config)


def _check_groups(options: BeamSearchOptions, config: GenerationConfig) -> None:
    start = (
        "`diversity_penalty` is not 0.0 or `num_beam_groups` is not 1, triggering group beam search. In this "
        "generation mode, "
    )
    groups, penalty = options.num_beam_groups, options.diversity_penalty or 0.0
    if not isinstance(groups, int) or groups < 2:
        raise ValueError(f"{start}`num_beam_groups` must be an integer greater than 1, got {groups!r}.")
    if config.do_sample:
        raise ValueError(f"{start}`do_sample` must be set to `False`")
    if config.num_beams % groups != 0:
        raise ValueError(
            f"{start}`num_beams` ({config.num_beams}) should be divisible by `num_beam_groups` ({groups})"
        )
    if penalty <= 0:
        raise ValueError(
            f"{start}`diversity_penalty` should be greater than `0.0`, otherwise your groups will be identical; got "
            f"{penalty}."
        )


def _check_words(options: BeamSearchOptions, config: GenerationConfig) -> None:
    if options.force_words_ids is not None and options.force_words_ids_by_row is not None:
        raise ValueError("`force_words_ids` and `force_words_ids_by_row` exclude each other.")
    for name, value in (("do_sample", config.do_sample or None), ("num_beam_groups", options.num_beam_groups)):
        if value not in (None, 1) or value is True:
            raise ValueError(
                "`force_words_ids` is not `None`, triggering constrained beam search. However, "
                f"`{name}` is set to `{value}`, which is incompatible with this generation mode. Set "
                f"`force_words_ids` to `None` or unset `{name}` to continue."
            )
    for row in (
        [options.force_words_ids] if options.force_words_ids is not None else options.force_words_ids_by_row or []
    ):
        if not isinstance(row, list) or (not row and options.force_words_ids is not None):
            raise ValueError(f"`force_words_ids` has to be a non-empty list, but is {row!r}.")
        for phrase in row:
            for form in forms_of(phrase):
                if not (form and isinstance(form, list) and all(type(token) is int and token >= 0 for token in form)):
                    raise ValueError(
                        "`force_words_ids` has to either be a `list[list[list[int]]]` or `list[list[int]]` of "
                        f"positive integers, but has {phrase!r}."
                    )
                if ends := set(form) & set(as_list(config.eos_token_id)):
                    raise ValueError(
                        f"`force_words_ids` has {form}, with the end of sequence ({ends.pop()}) in it: encode the "
                        "phrases with `add_special_tokens=False`."
                    )


def as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def forms_of(phrase: list[int] | list[list[int]]) -> list[list[int]]:
    """The forms of which one must occur; of an ordinary phrase there is one."""
    several = isinstance(phrase, list) and phrase and isinstance(phrase[0], list)
    return cast(list[list[int]], phrase if several else [phrase])
