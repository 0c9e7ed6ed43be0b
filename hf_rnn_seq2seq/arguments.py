"""The arguments of `training_scripts/run_seq2seq.py`: flags, a YAML recipe, and what of the model they may say."""

import argparse
import dataclasses
import difflib
import json
import os
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import yaml
from transformers import HfArgumentParser

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .data import DataArguments, DataError
from .presets import PRESETS
from .tokenizer_training import TokenizerArguments
from .trainer import RnnSeq2SeqTrainingArguments


class ArgumentError(ValueError):
    """A flag or a recipe's key that is unknown, malformed or at odds with another."""


@dataclass
class RunArguments:
    """What the script does beside what the Trainer does."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Fine-tune, evaluate or predict with this saved model and its tokenizer."},
    )
    ensemble: list[str] | None = field(
        default=None,
        metadata={
            "help": "Evaluate or predict with these saved models as one, which averages their probabilities. They must"
            " have been trained with the same tokenizer."
        },
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "A published system's configuration (hf_rnn_seq2seq.PRESETS); other flags change it."},
    )
    metrics: list[str] = field(
        default_factory=lambda: ["sequence_error_rate", "symbol_error_rate"],
        metadata={"help": "Some of sequence_error_rate, symbol_error_rate, bleu, chrf, meteor, rouge, wer, cer."},
    )
    error_rate_symbols: Literal["whitespace", "characters"] = field(
        default="whitespace",
        metadata={"help": "What symbol_error_rate counts: what white space separates (phones), or characters."},
    )
    bleu_tokenize: str = field(
        default="13a",
        metadata={"help": "sacrebleu's tokenizer for bleu: 13a, intl, char, zh, …, or none for tokenized text."},
    )
    bleu_lowercase: bool = field(default=False, metadata={"help": "Compute bleu on lower-cased text."})
    meteor_stemmer: str = field(
        default="porter",
        metadata={"help": "nltk's stemmer for meteor: porter (English), german, french, …, or none."},
    )
    meteor_tokenize: Literal["treebank", "whitespace"] = field(
        default="treebank",
        metadata={"help": "What meteor takes for words: nltk's, or, in tokenized text, what white space separates."},
    )
    num_beams: int | None = field(
        default=None,
        metadata={
            "help": "Beams of the final evaluation, of prediction and, saved with the model, of later generation; "
            "evaluation during training has --generation_num_beams."
        },
    )
    generation_options: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fields of GenerationConfig and options of beam search as name=value, values in JSON, for what "
            "--num_beams is for: length_penalty=0, coverage_penalty=0.2"
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better --metric_for_best_model."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better the metric has to be to count as better."}
    )
    num_attention_plots: int = field(
        default=0, metadata={"help": "Draw the attention over the first so many test rows, in attention_plots/."}
    )
    source_embeddings_file: str | None = field(
        default=None,
        metadata={
            "help": "First weights of the source embeddings, for a new model: word2vec, GloVe or fastText vectors as "
            "text, plain or .gz, as wide as --embedding_size. With one shared vocabulary, of both sides."
        },
    )
    target_embeddings_file: str | None = field(
        default=None, metadata={"help": "The same for the target embeddings of a model with two vocabularies."}
    )
    freeze_source_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Do not train the source embeddings, whether a token's vector was found or not; with one shared "
            "vocabulary, those of both sides."
        },
    )
    freeze_target_embeddings: bool = field(
        default=False,
        metadata={
            "help": "The same for the target embeddings of a model with two vocabularies and, with "
            "--tie_word_embeddings, the output layer."
        },
    )
    hp_search: str | None = field(
        default=None,
        metadata={
            "help": "Search hyperparameters with Optuna instead of training one model: a YAML file of training "
            "arguments and configuration fields, as `learning_rate: {type: float, low: 1.0e-4, high: 1.0e-2, log: "
            "true}`, `hidden_size: {type: int, low: 128, high: 512, step: 128}`, `cell_type: {type: categorical, "
            "choices: [lstm, gru]}`. Judged by --metric_for_best_model, or the loss, on the validation data."
        },
    )
    hp_trials: int = field(
        default=20, metadata={"help": "With --hp_search: go on until the study has so many finished trials."}
    )
    hp_storage: str | None = field(
        default=None,
        metadata={
            "help": "With --hp_search: the study's SQLite file, or an SQLAlchemy URL; by default study.db in "
            "--output_dir. A study that is there is gone on with."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into an output_dir that isn't empty; checkpoints of the run before are removed."},
    )


@dataclass(frozen=True)
class ScriptArguments:
    """All arguments of a run.

    Args:
        config: the fields of the model's configuration that were given, by name, over those of `--preset`.
        given: names of all arguments that were given by flag or recipe.
        recipe: the recipe's path, or None.
    """

    run: RunArguments
    data: DataArguments
    tokenizer: TokenizerArguments
    training: RnnSeq2SeqTrainingArguments
    config: dict[str, object]
    given: frozenset[str]
    recipe: Path | None

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir or "trainer_output")


def config_arguments() -> type:
    """A dataclass with a field for each field of [`RnnSeq2SeqConfig`], for HfArgumentParser.

    A field that the training arguments have as well (`use_cache`) is left to them: the Trainer copies it over.
    """
    defaults = {each.name: each.default for each in dataclasses.fields(RnnSeq2SeqConfig)}
    elsewhere = {each.name for each in dataclasses.fields(RnnSeq2SeqTrainingArguments)}
    helps = config_helps()
    return dataclasses.make_dataclass(
        "ConfigArguments",
        [
            (name, flag_type(hint), field(default=defaults[name], metadata={"help": helps.get(name, name)}))
            for name, hint in RnnSeq2SeqConfig.__annotations__.items()  # its own fields, not the inherited ones
            if name in defaults and name not in elsewhere
        ],
        namespace={"_argument_group_name": "the model's configuration"},
    )


def flag_type(hint: object) -> object:
    """The one type that a flag's text is converted to, where a field allows several (float, of int or float)."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    members = [member for member in get_args(hint) if member is not type(None) and get_origin(member) is not list]
    kept = float if set(members) == {float, int} else members[0]
    return kept | None if type(None) in get_args(hint) else kept


def config_helps() -> dict[str, str]:
    """Each field's text from the `Args` of the configuration's docstring."""
    text = (RnnSeq2SeqConfig.__doc__ or "").split("Args:")[-1].split("Example:")[0]
    helps: dict[str, str] = {}
    for head, body in re.findall(r"^ {8}(\w.*):\n((?: {12}.*\n)+)", text, flags=re.MULTILINE):
        for name in re.findall(r"(\w+) \(", head):
            # argparse formats help texts with %.
            helps[name] = " ".join(body.split()).replace("`", "").replace("%", "%%")
    return helps


def parse_arguments(argv: Sequence[str]) -> ScriptArguments:
    """Parse `[recipe.yaml] --flag value …`; flags override the recipe's keys, which are the flags' names.

    Raises:
        ArgumentError: an unknown flag or key (with what is near to it), or a recipe that can't be used.
        DataError: arguments about data that contradict each other.
    """
    argv = list(argv)
    recipe = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    flags = {arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    if recipe is not None:
        argv = recipe_flags(recipe, skip=flags) + argv

    classes: list[type] = [
        RunArguments,
        DataArguments,
        TokenizerArguments,
        RnnSeq2SeqTrainingArguments,
        config_arguments(),
    ]
    usage = "%(prog)s [recipe.yaml] [--flag value ...]"
    try:
        parser = HfArgumentParser(classes, usage=usage, allow_abbrev=False, exit_on_error=False)  # type: ignore[arg-type]
        _, unknown = parser.parse_known_args(argv)
        if unknown:
            known = [option for action in parser._actions for option in action.option_strings]
            raise ArgumentError(unknown_arguments(unknown, known, recipe))
        run, data, tokenizer, training, config = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        # Without defaults, what a second pass finds is what was given.
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        given = frozenset(vars(parser.parse_args(argv)))
    except (argparse.ArgumentError, ValueError) as error:
        if isinstance(error, (ArgumentError, DataError)):
            raise
        raise ArgumentError(f"{error} (recipe: {recipe})" if recipe else str(error)) from error
    if run.preset is not None and run.preset not in PRESETS:
        raise ArgumentError(f"--preset {run.preset}: there is no such preset; there are: {', '.join(PRESETS)}")
    published = PRESETS[run.preset].settings if run.preset else {}
    return ScriptArguments(
        run=run,
        data=data,
        tokenizer=tokenizer,
        training=training,
        config=published | {name: value for name, value in vars(config).items() if name in given},
        given=given,
        recipe=recipe,
    )


def recipe_flags(path: Path, skip: set[str]) -> list[str]:
    """A recipe as flags, so that there is one way to check and convert values. Keys in `skip` are left out.

    `${NAME}` in a text is replaced by the environment variable.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{path}: the recipe can't be read: {error}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(recipe, dict):
        raise ArgumentError(f"{path}: a recipe is a mapping from flags' names to values, not {recipe!r}.")

    def text(key: str, value: object) -> str:
        if isinstance(value, dict):
            return json.dumps(value)
        return re.sub(r"\$\{(\w+)\}", lambda match: variable(key, match[1]), str(value))

    def variable(key: str, name: str) -> str:
        if name not in os.environ:
            raise ArgumentError(
                f"{path}, key {key!r}: the environment variable {name} isn't set: set it, or give --{key}."
            )
        return os.environ[name]

    flags = []
    for key, value in recipe.items():
        if not isinstance(key, str):
            raise ArgumentError(f"{path}: the key {key!r} is not a flag's name.")
        if value is None or key in skip:
            continue
        if isinstance(value, list):
            flags += [f"--{key}", *(text(key, item) for item in value)]
        else:
            flags.append(f"--{key}={text(key, value)}")
    return flags


def unknown_arguments(unknown: Sequence[str], known: Sequence[str], recipe: Path | None) -> str:
    messages = []
    # What follows an unknown flag is its value: only where no flag is unknown is a stray value an error of its own.
    for argument in [text for text in unknown if text.startswith("--")] or unknown:
        flag = argument.split("=")[0]
        near = difflib.get_close_matches("--" + flag.lstrip("-").replace("-", "_"), known, n=3)
        messages.append(f"unknown argument {argument}" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    return "; ".join(messages) + (f"; flags and the keys of {recipe} are read alike" if recipe else "")
