"""Train, evaluate and predict with a recurrent encoder-decoder, from flags or from one recipe:

    python training_scripts/run_seq2seq.py training_scripts/recipes/cmudict_g2p.yaml --learning_rate 5e-4
    python training_scripts/run_seq2seq.py --train_file train.tsv --output_dir outputs/mine --do_train --do_eval

`--help` lists all flags: those of transformers' Seq2SeqTrainingArguments, of the data, of the tokenizers, and every
field of the model's configuration. A recipe's keys are the flags' names; flags override them.

Written into `output_dir`: the model with its tokenizer and README.md, `all_results.json`, and with `--do_predict`
`generated_predictions.txt` (a line for each test row), `generated_predictions.jsonl` (with source and reference) and
`attention_plots/`.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence

import datasets
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import sort_checkpoints

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.arguments import ArgumentError, ScriptArguments, parse_arguments
from hf_rnn_seq2seq.configuration_rnn_seq2seq import TRAINING_ONLY
from hf_rnn_seq2seq.data import DataError, load_data, prepare_data
from hf_rnn_seq2seq.metrics import METRICS, compute_metrics_for
from hf_rnn_seq2seq.metrics.bleu.bleu import TOKENIZERS
from hf_rnn_seq2seq.reports import model_card_arguments, plot_attentions, summary, write_predictions
from hf_rnn_seq2seq.scoring import Scorer
from hf_rnn_seq2seq.tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.tokenizer_training import build_tokenizer
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer, checkpoint_fault, last_complete_checkpoint


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Run the script and return what `all_results.json` gets."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    check_arguments(args)
    run, training = args.run, args.training
    checkpoint = find_checkpoint(args)
    prepare_output_dir(args)
    set_seed(training.seed)

    with training.main_process_first(desc="data preparation"):
        data = load_data(args.data, wanted_splits(args))
        check_splits(args, data)
        saved = checkpoint or run.model_name_or_path
        tokenizer = load_tokenizer(args, saved) if saved else train_tokenizer(args, data["train"])
        model = load_model(args, saved) if saved else new_model(args, tokenizer)
        vocab_sizes = (
            getattr(model.config, "source_vocab_size", None) or model.config.vocab_size,
            model.config.vocab_size,
        )
        prepared = prepare_data(data, tokenizer, args.data, *vocab_sizes)
    data = prepared.datasets
    set_generation_length(args, model, data)
    say(args, "Data: " + ", ".join(f"{split} {len(dataset):,} rows" for split, dataset in data.items()) + ".")
    say(args, prepared.drop_line())
    say(args, f"Model: {model.num_parameters():,} parameters.")

    metric_options: dict[str, dict[str, object]] = {
        "symbol_error_rate": {"symbols": run.error_rate_symbols},
        "bleu": {"tokenize": run.bleu_tokenize, "lowercase": run.bleu_lowercase},
    }
    scorer = Scorer(tokenizer, run.metrics, metric_options)
    trainer = RnnSeq2SeqTrainer(
        model=model,
        args=training,
        train_dataset=data.get("train") if training.do_train else None,
        eval_dataset=scorer.watch(data["validation"]) if "validation" in data else None,
        processing_class=tokenizer,
        # The model shifts the labels, which it no longer sees when the Trainer smoothes them.
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=scorer if training.predict_with_generate else None,
        callbacks=early_stopping(args),
    )
    results: dict[str, float | str] = {}

    def record(split: str, metrics: dict[str, float | str]) -> None:
        trainer.save_metrics(split, metrics)  # also into all_results.json
        results.update(metrics)

    if training.do_train:
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        record("train", {**outcome.metrics, "train_samples": len(data["train"])})
        trainer.save_state()
    if run.num_beams is not None:
        model.generation_config.num_beams = run.num_beams
    if training.do_train:
        trainer.save_model()

    if training.do_eval:
        scorer.watch(data["validation"])
        metrics = trainer.evaluate(metric_key_prefix="eval", num_beams=run.num_beams)
        record("eval", {**metrics, **scorer.signatures("eval"), "eval_samples": len(data["validation"])})

    predictions: list[str] = []
    if training.do_predict:
        scorer.watch(data["test"])
        output = trainer.predict(data["test"], metric_key_prefix="predict", num_beams=run.num_beams)
        metrics = output.metrics or {}
        record("predict", {**metrics, **scorer.signatures("predict"), "predict_samples": len(data["test"])})
        predictions = scorer.decode(output.predictions)
        if trainer.is_world_process_zero():
            write_predictions(args.output_dir, data["test"], predictions)
            if run.num_attention_plots > 0 and getattr(model.config, "attention_type", None) == "none":
                say(args, "No attention plots: the model has no attention.")
            elif run.num_attention_plots > 0:
                rows = data["test"].select(range(min(run.num_attention_plots, len(data["test"]))))
                plot_attentions(args.output_dir / "attention_plots", model, tokenizer, rows, output.predictions)

    if training.do_train:
        card = model_card_arguments(args)
        if training.push_to_hub:
            trainer.push_to_hub(**card)  # writes the card as well
        else:
            trainer.create_model_card(**card)
    say(args, summary(args, results, data.get("test"), predictions))
    return results


def say(args: ScriptArguments, text: str) -> None:
    if args.training.process_index == 0:
        print(text, flush=True)


def check_arguments(args: ScriptArguments) -> None:
    """Refuse what can't work before any data is read."""
    run, training = args.run, args.training
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ArgumentError("nothing to do: give some of --do_train --do_eval --do_predict")
    if not training.do_train and run.model_name_or_path is None:
        raise ArgumentError("--do_eval and --do_predict without --do_train need --model_name_or_path")
    if training.resume_from_checkpoint is not None and not training.do_train:
        raise ArgumentError("--resume_from_checkpoint needs --do_train")
    if not training.predict_with_generate and training.do_predict:
        raise ArgumentError("--do_predict needs --predict_with_generate")
    for name in run.metrics:
        if name not in METRICS:
            raise ArgumentError(f"--metrics {name}: unknown; there are {', '.join(METRICS)}")
    if run.bleu_tokenize not in TOKENIZERS:
        raise ArgumentError(f"--bleu_tokenize {run.bleu_tokenize}: unknown; there are {', '.join(TOKENIZERS)}")
    if training.metric_for_best_model is not None:
        figures = ["loss", "perplexity"]
        if training.predict_with_generate:
            figures += [k for k, v in compute_metrics_for(run.metrics, ["a"], ["a"]).items() if not isinstance(v, str)]
        if training.metric_for_best_model.removeprefix("eval_") not in figures:
            raise ArgumentError(
                f"--metric_for_best_model {training.metric_for_best_model}: with --metrics {' '.join(run.metrics)} "
                f"there are {', '.join(figures)}"
            )
    if run.early_stopping_patience is not None:
        for name in ("metric_for_best_model", "load_best_model_at_end"):
            if not getattr(training, name):
                raise ArgumentError(f"--early_stopping_patience needs --{name}")


def find_checkpoint(args: ScriptArguments) -> str | None:
    """The checkpoint to resume from, checked to be complete."""
    wanted = args.training.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() != "true":
        if fault := checkpoint_fault(wanted):
            raise ArgumentError(f"--resume_from_checkpoint {wanted}: can't be resumed from: {fault}")
        return wanted
    found = last_complete_checkpoint(args.output_dir)
    if found is None:
        raise ArgumentError(f"--resume_from_checkpoint True: there is no complete checkpoint in {args.output_dir}")
    return str(found)


def prepare_output_dir(args: ScriptArguments) -> None:
    """Don't train over an earlier run unless that is asked for."""
    output_dir = args.output_dir
    fresh = args.training.do_train and args.training.resume_from_checkpoint is None
    if not fresh or args.training.process_index != 0 or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if not args.run.overwrite_output_dir:
        raise ArgumentError(
            f"--output_dir {output_dir} isn't empty: choose another, or give --overwrite_output_dir or "
            "--resume_from_checkpoint True"
        )
    for old in sort_checkpoints(str(output_dir)):
        shutil.rmtree(old)  # their step numbers would be mixed up with the new ones


def wanted_splits(args: ScriptArguments) -> list[str]:
    training = args.training
    wanted = {
        "train": training.do_train,
        "validation": training.do_eval or (training.do_train and training.eval_strategy != "no"),
        "test": training.do_predict,
    }
    return [split for split, is_wanted in wanted.items() if is_wanted]


def check_splits(args: ScriptArguments, data: datasets.DatasetDict) -> None:
    for split in wanted_splits(args):
        if split not in data:
            share = "" if split == "train" else f" or a --{split}_split_percentage"
            raise DataError(f"There is no {split} data: give --{split}_file{share}.")


def texts(dataset: datasets.Dataset, column: str) -> Iterator[str]:
    for batch in dataset.iter(1000):
        yield from batch[column]


def train_tokenizer(args: ScriptArguments, train: datasets.Dataset) -> PreTrainedTokenizerBase:
    try:
        tokenizer = build_tokenizer(texts(train, "source"), texts(train, "target"), args.tokenizer)
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    if args.config.get("head_type") == "pointer_generator":  # which copies words outside the vocabulary, too
        if not isinstance(tokenizer, RnnSeq2SeqTokenizer):
            tokenizer = RnnSeq2SeqTokenizer(tokenizer, tokenizer)
        tokenizer.copies_source = True
    return tokenizer


def load_tokenizer(args: ScriptArguments, saved: str) -> PreTrainedTokenizerBase:
    unused = sorted(args.given & set(vars(args.tokenizer)))
    if unused:
        say(args, f"The tokenizer of {saved} is used; without effect: {' '.join('--' + name for name in unused)}.")
    return AutoTokenizer.from_pretrained(saved)


def new_model(args: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model of random weights for the tokenizer's vocabularies and the configuration's flags."""
    two_sides = isinstance(tokenizer, RnnSeq2SeqTokenizer) and not args.tokenizer.shared_vocabulary
    fields = {
        "vocab_size": len(tokenizer),  # of a pair, the target's
        "source_vocab_size": tokenizer.source_vocab_size if two_sides else None,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.bos_token_id,
        "unk_token_id": tokenizer.unk_token_id,
    }
    try:
        return RnnSeq2SeqForConditionalGeneration(RnnSeq2SeqConfig(**{**fields, **args.config}))
    except StrictDataclassError as error:
        raise ArgumentError(f"the model's configuration: {error.__cause__ or error}") from error


def load_model(args: ScriptArguments, saved: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(saved)
    for name, value in args.config.items():
        if name in TRAINING_ONLY:
            continue
        saved_value = getattr(config, name, None)
        if value != saved_value:
            raise ArgumentError(f"--{name} {value}: the model of {saved} has {saved_value}, which can't be changed")
    changed = {name: args.config[name] for name in TRAINING_ONLY if name in args.config}
    return AutoModelForSeq2SeqLM.from_pretrained(saved, **changed)


def set_generation_length(args: ScriptArguments, model: PreTrainedModel, data: datasets.DatasetDict) -> None:
    """Let generation go on beyond the longest training target by half, not to transformers' default of 20 tokens."""
    if args.training.generation_max_length is not None:
        model.generation_config.max_length = args.training.generation_max_length
    elif args.run.model_name_or_path is None and "train" in data:
        model.generation_config.max_length = max(map(len, texts(data["train"], "labels"))) * 3 // 2 + 1


def early_stopping(args: ScriptArguments) -> list[TrainerCallback]:
    if args.run.early_stopping_patience is None:
        return []
    return [EarlyStoppingCallback(args.run.early_stopping_patience, args.run.early_stopping_threshold)]


if __name__ == "__main__":
    try:
        main()
    except (ArgumentError, DataError) as error:
        sys.exit(f"error: {error}")
