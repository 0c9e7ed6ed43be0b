"""Several models with one target vocabulary that generate as one, by the average of their predictions.

Shapes: B batch, S source, T target, V vocabulary.
"""

import copy
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, Cache, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput, can_return_tuple

from .cache_rnn_seq2seq import RnnSeq2SeqCache
from .decoding_steps import DecodingSteps
from .encoders import RnnSeq2SeqEncoderOutput
from .generation_rnn_seq2seq import RnnSeq2SeqGenerationMixin
from .modeling_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from .signatures import with_known_signature

Average = Literal["probabilities", "log_probabilities"]

ENSEMBLE_FILE = "ensemble.json"
SHARED_FIELDS = ("vocab_size", "source_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


class RnnSeq2SeqEnsembleEncoder(nn.Module):
    """
    All members' encoders: what `ensemble.get_encoder()` returns.

    Args:
        encoders: of the members.
        first: the member whose output stands for the ensemble's.
    """

    main_input_name = "input_ids"

    def __init__(self, encoders: Sequence[nn.Module], first: int):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.first = first

    @with_known_signature
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput:
        """
        Every member's tensors as fields `member_0_last_hidden_state` and so on, since generate() repeats just those
        for its beams; and `last_hidden_state` and `memory_mask` of the one that stands for all. The last three
        arguments come from generate(), and change nothing.
        """
        outputs = [
            encoder(input_ids, attention_mask, output_hidden_states=False, return_dict=True)
            for encoder in self.encoders
        ]
        found = {name: outputs[self.first][name] for name in ("last_hidden_state", "memory_mask")}
        for index, output in enumerate(outputs):
            tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
            found.update({f"member_{index}_{name}": value for name, value in tensors.items()})
        return ModelOutput(**found)


def member_output(encoder_outputs: ModelOutput, index: int) -> RnnSeq2SeqEncoderOutput:
    """What [`RnnSeq2SeqEnsembleEncoder`] has of one member."""
    prefix = f"member_{index}_"
    fields = {name.removeprefix(prefix): value for name, value in encoder_outputs.items() if name.startswith(prefix)}
    if not fields:
        raise ValueError(
            "`encoder_outputs` must be what `ensemble.get_encoder()(...)` returns; it holds nothing of member "
            f"{index}, but {', '.join(encoder_outputs)}."
        )
    return RnnSeq2SeqEncoderOutput(**fields)


class RnnSeq2SeqEnsembleCache(Cache):
    """The members' caches. Their layers are its own, so that whatever is done to it is done to them."""

    def __init__(self, members: Sequence[RnnSeq2SeqCache]):
        self.members = list(members)
        super().__init__(layers=[layer for member in members for layer in member.layers])

    def reset(self) -> None:
        for member in self.members:
            member.reset()

    @property
    def is_initialized(self) -> bool:
        return all(member.is_initialized for member in self.members)


class EnsembleSteps:
    """The members' `DecodingSteps` as one: arguments and methods are theirs."""

    def __init__(
        self,
        model: "RnnSeq2SeqEnsemble",
        cache: RnnSeq2SeqEnsembleCache,
        encoder_outputs: ModelOutput,
        copy_ids: torch.Tensor | None,
    ):
        self.model = model
        self.members = [
            DecodingSteps(member, own, member_output(encoder_outputs, index), copy_ids)
            for index, (member, own) in enumerate(zip(model.members, cache.members, strict=True))
        ]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model._average([member(tokens).unsqueeze(1) for member in self.members])[:, 0]

    def select(self, rows: torch.Tensor) -> None:
        for member in self.members:
            member.select(rows)

    def reorder(self, rows: torch.Tensor) -> None:
        for member in self.members:
            member.reorder(rows)

    def repeat(self, times: int) -> None:
        for member in self.members:
            member.repeat(times)


class RnnSeq2SeqEnsemble(PreTrainedModel, RnnSeq2SeqGenerationMixin):
    """
    An ensemble of models of any architectures that read the same source ids and write the same target ids. It
    generates with every search that a single model has, and `logits` are its log-probabilities.

    With weights w_k that sum to one, after every prefix

        probabilities:      p(y) = sum_k w_k p_k(y)
        log_probabilities:  p(y) = exp(sum_k w_k log p_k(y)) / Z,  Z so that p sums to one

    The first lets a token pass that one member is sure of, the second asks all of them to find it likely.

    Args:
        models: the members. They are used as they are, not copied.
        average: what is averaged.
        weights: of the members, positive; equal by default. Only their ratios count.

    `config` is a copy of the first member's that has attention (or of the first), for what all members share;
    `generation_config` one of the first's. All members are put into the first's mode, training or evaluation.

    Raises:
        ValueError: no members; vocabularies, special ids, kinds of heads or devices differ; wrong weights.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # tells the Trainer to hand in `num_items_in_batch`
    decoding_steps = EnsembleSteps
    _is_stateful = True  # a state can't take tokens back
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  transformers' class attribute

    def __init__(
        self,
        models: Sequence[RnnSeq2SeqForConditionalGeneration],
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ):
        check_members(models)
        if average not in get_args(Average):
            raise ValueError(f"`average` must be one of {', '.join(get_args(Average))}, got {average!r}.")
        weights = [1.0] * len(models) if weights is None else list(weights)
        if len(weights) != len(models) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"`weights` must be {len(models)} positive numbers, one a model, got {weights}.")
        attends = [index for index, model in enumerate(models) if model.config.attention_type != "none"]
        first = [*attends, 0][0]
        super().__init__(copy.deepcopy(models[first].config))
        # No `post_init()`: it is for the first weights, and the members have theirs.
        self.members = nn.ModuleList(models)
        self.generation_config = copy.deepcopy(models[0].generation_config)
        self.first = first
        self.average = average
        self.weights = [weight / sum(weights) for weight in weights]
        self.loss_type = "ForMaskedLM"  # as a single model's
        self.train(models[0].training)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # of several models
        cls,
        models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        average: Average | None = None,
        weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> "RnnSeq2SeqEnsemble":
        """
        Args:
            models: the members' folders or names on the Hub; or one folder that `save_pretrained` wrote.
            average, weights: as for the class; by default what is saved.
            kwargs: for `AutoModelForSeq2SeqLM.from_pretrained` (`dtype`, `device_map`, `trust_remote_code`, ...).
        """
        settings: dict[str, Any] = {"average": "probabilities", "weights": None}
        if isinstance(models, str | os.PathLike):
            file = Path(models) / ENSEMBLE_FILE
            if not file.is_file():
                raise ValueError(
                    f"{models} has no {ENSEMBLE_FILE}, so it is no saved ensemble; an ensemble of several models "
                    "takes a list of their names."
                )
            settings = json.loads(file.read_text(encoding="utf-8"))
            models = [Path(models) / name for name in settings["members"]]
        members = [AutoModelForSeq2SeqLM.from_pretrained(name, **kwargs) for name in models]
        return cls(members, average or settings["average"], settings["weights"] if weights is None else weights)

    def save_pretrained(  # type: ignore[override]  # its many arguments pass through
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Saves every member in a folder of its own under `save_directory`, and the average and weights beside."""
        names = [f"member_{index}" for index in range(len(self.members))]
        for name, member in zip(names, self._members(), strict=True):
            member.save_pretrained(Path(save_directory) / name, **kwargs)
        settings = {"members": names, "average": self.average, "weights": self.weights}
        text = json.dumps(settings, indent=2) + "\n"
        (Path(save_directory) / ENSEMBLE_FILE).write_text(text, encoding="utf-8")

    def _members(self) -> list[RnnSeq2SeqForConditionalGeneration]:
        return [cast(RnnSeq2SeqForConditionalGeneration, member) for member in self.members]

    def get_encoder(self, modality: str | None = None) -> RnnSeq2SeqEnsembleEncoder:
        return RnnSeq2SeqEnsembleEncoder([member.get_encoder() for member in self._members()], self.first)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T]"""
        return self._members()[0].prepare_decoder_input_ids_from_labels(labels)

    @with_known_signature
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        copy_ids: torch.Tensor | None = None,
    ) -> Seq2SeqLMOutput:
        """
        Takes a single model's arguments, but for embeddings, which differ between members.

        Returns:
            `Seq2SeqLMOutput`; `logits` are log-probabilities, [B, T, V] or with `copy_ids` [B, T, V + S], and `loss`
            is their mean cross entropy.
            `cross_attentions`, if asked for, holds the weighted mean over heads and members, [B, 1, T, S]: over those
            members that attend to as many positions as the first one that attends.
        """
        if output_hidden_states:
            raise ValueError(
                "An ensemble has no hidden states of its own, for `output_hidden_states`: ask its members."
            )
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        cache = self._check_cache(past_key_values)
        if cache is None and use_cache:
            cache = RnnSeq2SeqEnsembleCache([RnnSeq2SeqCache() for _ in self.members])

        outputs = [
            member(
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=member_output(encoder_outputs, index),
                past_key_values=None if cache is None else cache.members[index],
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=False,
                return_dict=True,
                copy_ids=copy_ids,
            )
            for index, member in enumerate(self.members)
        ]
        logits = self._average([output.logits for output in outputs])
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"`labels` must have the decoder input's shape {tuple(logits.shape[:2])}, "
                    f"got {tuple(labels.shape)}."
                )
            loss = self.loss_function(
                logits, labels, vocab_size=logits.size(-1), num_items_in_batch=num_items_in_batch
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,  # type: ignore[arg-type]  # transformers declares one kind
            cross_attentions=self._mean_attention(outputs) if output_attentions else None,
            encoder_last_hidden_state=encoder_outputs["last_hidden_state"],
        )

    def _average(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """Members' logits [B, T, V] -> the ensemble's log-probabilities, in float32 at least."""
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        each = torch.stack([torch.log_softmax(one.to(dtype), dim=-1) for one in logits])  # [members, B, T, V]
        weights = each.new_tensor(self.weights).view(-1, 1, 1, 1)
        if self.average == "probabilities":
            return torch.logsumexp(each + weights.log(), dim=0)
        return torch.log_softmax((each * weights).sum(0), dim=-1)

    def _mean_attention(self, outputs: list[Seq2SeqLMOutput]) -> tuple[torch.Tensor, ...]:
        """Of members without attention there is none: an empty tuple."""
        attending = [
            (weight, output.cross_attentions[-1].mean(1, keepdim=True))  # [B, 1, T, S]
            for weight, output in zip(self.weights, outputs, strict=True)
            if output.cross_attentions
        ]
        if not attending:
            return ()
        length = attending[0][1].size(-1)
        alike = [(weight, attention) for weight, attention in attending if attention.size(-1) == length]
        total = sum(weight for weight, _ in alike)
        return (torch.stack([attention * (weight / total) for weight, attention in alike]).sum(0),)

    def _check_cache(self, cache: Cache | None) -> RnnSeq2SeqEnsembleCache | None:
        """Our cache, or `None` for an empty foreign one, as generate() or a user may hand in."""
        if isinstance(cache, RnnSeq2SeqEnsembleCache) and len(cache.members) == len(self.members):
            return cache
        if cache is None or (not isinstance(cache, RnnSeq2SeqEnsembleCache) and cache.get_seq_length() == 0):
            return None
        raise ValueError(
            f"`past_key_values` must be a RnnSeq2SeqEnsembleCache of {len(self.members)} members, got "
            f"{type(cache).__name__} of {len(cache)}."
        )


def check_members(models: Sequence[RnnSeq2SeqForConditionalGeneration]) -> None:
    """
    Raises:
        ValueError: no models, or models that can't be averaged; names what differs and the values.
    """
    if not models:
        raise ValueError("`models` must hold at least one model, got none.")
    values: dict[str, list[Any]] = {
        "model_type": [model.config.model_type for model in models],
        **{name: [getattr(model.config, name, None) for model in models] for name in SHARED_FIELDS},
        "device": [str(model.device) for model in models],
    }
    head_types = [model.config.head_type for model in models]
    if "pointer_generator" in head_types:  # its probabilities are over copied words, too
        values |= {"head_type": head_types, "unk_token_id": [model.config.unk_token_id for model in models]}
    for name, found in values.items():
        if any(value != found[0] for value in found):
            raise ValueError(
                f"All models of an ensemble must have the same `{name}`, got {', '.join(map(repr, found))}."
            )


__all__ = ["RnnSeq2SeqEnsemble", "RnnSeq2SeqEnsembleCache"]
