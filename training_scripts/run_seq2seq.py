"""Train, evaluate and predict with a recurrent encoder-decoder, from flags or from one recipe:

    python training_scripts/run_seq2seq.py training_scripts/recipes/cmudict_g2p.yaml --learning_rate 5e-4
    python training_scripts/run_seq2seq.py --train_file train.tsv --output_dir outputs/mine --do_train --do_eval

`--help` lists all flags: those of transformers' Seq2SeqTrainingArguments, of the data, of the tokenizers, and every
field of the model's configuration. A recipe's keys are the flags' names; flags override them.

Written into `output_dir`: the model with its tokenizer and README.md, `all_results.json`, `run.json` (what was run, on
what; make_model_card.py makes a full card of these), and with `--do_predict`
`generated_predictions.txt` (a line for each test row), `generated_predictions.jsonl` (with source and reference) and
`attention_plots/`.

An interrupted run goes on where it was: give it `--resume_from_checkpoint auto`, which begins anew only where there is
no checkpoint yet, and run the same command again. Exit codes: 0 done; 1 an error, which is named; 143 after
SIGTERM and 130 after SIGINT (Ctrl-C), which in training write a checkpoint of the last step first. (torchrun itself
exits with 1 after either.)
"""

import itertools
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

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

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqEnsemble, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.arguments import ArgumentError, ScriptArguments, parse_arguments
from hf_rnn_seq2seq.checkpoints import (
    CheckpointError,
    NonFiniteError,
    checkpoint_fault,
    checkpoint_folders,
    last_complete_checkpoint,
    set_aside_broken,
    writing_to,
)
from hf_rnn_seq2seq.configuration_rnn_seq2seq import TRAINING_ONLY
from hf_rnn_seq2seq.data import (
    DataError,
    load_data,
    load_streamed_data,
    prepare_data,
    stream_train_data,
    tokenize_stream,
)
from hf_rnn_seq2seq.generation_options import check_generation_options, read_generation_options
from hf_rnn_seq2seq.hyperparameter_search import search_hyperparameters
from hf_rnn_seq2seq.metrics import METRICS, compute_metrics_for
from hf_rnn_seq2seq.metrics.bleu.bleu import TOKENIZERS
from hf_rnn_seq2seq.metrics.meteor.meteor import STEMMERS
from hf_rnn_seq2seq.model_card import RESULTS_NAME, RUN_RECORD_NAME, read_json
from hf_rnn_seq2seq.pretrained_embeddings import apply_pretrained_embeddings, load_pretrained_embeddings
from hf_rnn_seq2seq.reports import model_card_arguments, plot_attentions, summary, write_predictions
from hf_rnn_seq2seq.run_record import write_run_record
from hf_rnn_seq2seq.scoring import Scorer
from hf_rnn_seq2seq.stopping import StopOnSignal
from hf_rnn_seq2seq.tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.tokenizer_training import build_tokenizer
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer

COVERAGE_ROWS = 100_000  # training rows whose tokens are counted to see how many of them have a pretrained vector


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    """Run the script and return what `all_results.json` gets."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    check_arguments(args)
    run, training = args.run, args.training
    checkpoint = find_checkpoint(args)
    prepare_output_dir(args, checkpoint)
    set_seed(training.seed)

    # The first process of a machine fills the caches, which the others then find.
    with training.main_process_first(desc="reading of the data"):
        load = load_streamed_data if args.data.streaming else load_data
        data = load(args.data, wanted_splits(args))
        check_splits(args, data)
    saved = checkpoint or run.model_name_or_path or (run.ensemble[0] if run.ensemble else None)
    tokenizer = load_tokenizer(args, saved) if saved else new_tokenizer(args, data["train"])
    model = load_model(args, saved) if saved else new_model(args, tokenizer)
    vocab_sizes = (
        getattr(model.config, "source_vocab_size", None) or model.config.vocab_size,
        model.config.vocab_size,
    )
    with training.main_process_first(desc="tokenizing"):
        prepared = prepare_data(data, tokenizer, args.data, *vocab_sizes)
    data = prepared.datasets
    set_generation_length(args, model, data)
    say(args, "Data: " + ", ".join(f"{split} {len(dataset):,} rows" for split, dataset in data.items()) + ".")
    say(args, prepared.drop_line())
    train: datasets.Dataset | datasets.IterableDataset | None = data.get("train")
    if args.data.streaming and train is not None:
        say(args, "Streaming: those training rows are the first ones, which the tokenizers are trained on.")
        shards = training.world_size * max(1, training.dataloader_num_workers)
        train = tokenize_stream(stream_train_data(args.data, shards), tokenizer, args.data, *vocab_sizes)
    embedding_figures = set_embeddings(args, model, tokenizer, data["train"]) if training.do_train else {}
    say(args, f"Model: {model.num_parameters():,} parameters.")

    metric_options: dict[str, dict[str, object]] = {
        "symbol_error_rate": {"symbols": run.error_rate_symbols},
        "bleu": {"tokenize": run.bleu_tokenize, "lowercase": run.bleu_lowercase},
        "meteor": {"stemmer": run.meteor_stemmer, "tokenize": run.meteor_tokenize},
    }
    scorer = Scorer(tokenizer, run.metrics, metric_options)
    stop = StopOnSignal()

    def make_trainer(args: ScriptArguments, model: PreTrainedModel) -> RnnSeq2SeqTrainer:
        return RnnSeq2SeqTrainer(
            model=model,
            args=args.training,
            train_dataset=train if args.training.do_train else None,
            eval_dataset=scorer.watch(data["validation"]) if "validation" in data else None,
            processing_class=tokenizer,
            # The model shifts the labels, which it no longer sees when the Trainer smoothes them.
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            compute_metrics=scorer if args.training.predict_with_generate else None,
            callbacks=[*early_stopping(args), stop],
        )

    def make_trial(args: ScriptArguments) -> RnnSeq2SeqTrainer:
        set_seed(args.training.seed)
        model = load_model(args, saved) if saved else new_model(args, tokenizer)
        set_generation_length(args, model, data)
        set_embeddings(args, model, tokenizer, data["train"])
        return make_trainer(args, model)

    if run.hp_search is not None:
        return search_hyperparameters(args, argv, make_trial)
    try:
        trainer = make_trainer(args, model)
    except ValueError as error:  # arguments that don't go with this model or data
        raise ArgumentError(str(error)) from error
    results: dict[str, float | str] = {}
    if training.process_index == 0:
        rows = {split: len(dataset) for split, dataset in data.items() if split != "train" or not args.data.streaming}
        with writing_to(args.output_dir):
            write_run_record(args, argv, rows, model, resumed=checkpoint is not None)

    def record(split: str, metrics: dict[str, float | str]) -> None:
        with writing_to(args.output_dir):
            trainer.save_metrics(split, metrics)  # also into all_results.json
        results.update(metrics)

    if training.do_train:
        with stop:
            outcome = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.received is not None:
            say(args, f"Stopped by {stop.received.name} after step {trainer.state.global_step}; {how_to_go_on(args)}")
            sys.exit(stop.exit_code)
        samples = {} if args.data.streaming else {"train_samples": len(data["train"])}
        record("train", {**outcome.metrics, **samples, **embedding_figures})
        trainer.save_state()
    if run.num_beams is not None:
        model.generation_config.num_beams = run.num_beams
    for name, value in read_generation_options(run.generation_options).items():
        setattr(model.generation_config, name, value)
    if training.do_train:
        with writing_to(args.output_dir):
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
            with writing_to(args.output_dir):
                write_predictions(args.output_dir, data["test"], predictions)
            if run.num_attention_plots > 0 and getattr(model.config, "attention_type", None) == "none":
                say(args, "No attention plots: the model has no attention.")
            elif run.num_attention_plots > 0 and trainer.is_fsdp_enabled:
                say(args, "No attention plots: no process has the whole model.")
            elif run.num_attention_plots > 0:
                rows = data["test"].select(range(min(run.num_attention_plots, len(data["test"]))))
                plot_attentions(args.output_dir / "attention_plots", model, tokenizer, rows, output.predictions)

    if training.do_train:
        card = model_card_arguments(args)
        trainer.results = results
        trainer.run_record = read_json(args.output_dir / RUN_RECORD_NAME)
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
    if run.ensemble is not None and (training.do_train or run.model_name_or_path is not None):
        raise ArgumentError(
            "--ensemble is for --do_eval and --do_predict, without --do_train and --model_name_or_path"
        )
    if not training.do_train and run.model_name_or_path is None and run.ensemble is None:
        raise ArgumentError("--do_eval and --do_predict without --do_train need --model_name_or_path or --ensemble")
    if training.resume_from_checkpoint is not None and not training.do_train:
        raise ArgumentError("--resume_from_checkpoint needs --do_train")
    if run.hp_search is not None and (not training.do_train or training.resume_from_checkpoint is not None):
        raise ArgumentError("--hp_search needs --do_train, and goes on with a study without --resume_from_checkpoint")
    if args.data.streaming and training.do_train:
        if training.max_steps <= 0:
            raise ArgumentError("--streaming needs --max_steps: nobody knows how many rows there are")
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(training, name) == "epoch":
                raise ArgumentError(f"--{name} epoch: --streaming has no epochs to go by; must be steps or no")
    if training.enable_jit_checkpoint:
        raise ArgumentError("--enable_jit_checkpoint: SIGTERM saves a checkpoint without it")
    if not training.predict_with_generate and training.do_predict:
        raise ArgumentError("--do_predict needs --predict_with_generate")
    for name in run.metrics:
        if name not in METRICS:
            raise ArgumentError(f"--metrics {name}: unknown; there are {', '.join(METRICS)}")
    if run.bleu_tokenize not in TOKENIZERS:
        raise ArgumentError(f"--bleu_tokenize {run.bleu_tokenize}: unknown; there are {', '.join(TOKENIZERS)}")
    if run.meteor_stemmer not in STEMMERS:
        raise ArgumentError(f"--meteor_stemmer {run.meteor_stemmer}: unknown; there are {', '.join(STEMMERS)}")
    try:
        check_generation_options(run.generation_options, run.num_beams or 1)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if training.metric_for_best_model is not None:
        figures = ["loss", "perplexity"]
        if training.predict_with_generate:
            figures += [k for k, v in compute_metrics_for(run.metrics, ["a"], ["a"]).items() if not isinstance(v, str)]
        if training.metric_for_best_model.removeprefix("eval_") not in figures:
            raise ArgumentError(
                f"--metric_for_best_model {training.metric_for_best_model}: with --metrics {' '.join(run.metrics)} "
                f"there are {', '.join(figures)}"
            )
    for side in ("source", "target") if training.do_train else ():
        path, freeze = getattr(run, f"{side}_embeddings_file"), getattr(run, f"freeze_{side}_embeddings")
        if path is not None and run.model_name_or_path is not None:
            raise ArgumentError(f"--{side}_embeddings_file is for a new model, not for --model_name_or_path")
        if freeze and path is None and run.model_name_or_path is None:
            raise ArgumentError(f"--freeze_{side}_embeddings needs --{side}_embeddings_file or --model_name_or_path")
        if path is not None and not Path(path).is_file():
            raise ArgumentError(f"--{side}_embeddings_file {path}: no such file")
    if run.early_stopping_patience is not None:
        for name in ("metric_for_best_model", "load_best_model_at_end"):
            if not getattr(training, name):
                raise ArgumentError(f"--early_stopping_patience needs --{name}")


def find_checkpoint(args: ScriptArguments) -> str | None:
    """The checkpoint to resume from, checked to be complete."""
    wanted = args.training.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() not in ("true", "auto"):
        if fault := checkpoint_fault(wanted):
            raise ArgumentError(f"--resume_from_checkpoint {wanted}: can't be resumed from: {fault}")
        return wanted
    found = last_complete_checkpoint(args.output_dir)
    if found is None and wanted.lower() == "true":
        raise ArgumentError(f"--resume_from_checkpoint True: there is no complete checkpoint in {args.output_dir}")
    return None if found is None else str(found)


def prepare_output_dir(args: ScriptArguments, checkpoint: str | None) -> None:
    """Make sure that the folder can be written to, and don't train over an earlier run unless that is asked for."""
    output_dir, resume = args.output_dir, args.training.resume_from_checkpoint
    if args.training.process_index != 0:
        return
    check_writable(output_dir)
    if args.run.hp_search is not None:
        return  # each trial has a folder of its own in it
    if not args.training.do_train or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if checkpoint is not None:
        if Path(checkpoint).parent == output_dir:
            set_aside_broken(output_dir)
        return
    # What `auto` finds without a checkpoint is a run that did not get far, or one whose model is all that was kept.
    broken_off = resume is not None and resume.lower() == "auto" and not (output_dir / "model.safetensors").exists()
    if not args.run.overwrite_output_dir and not broken_off:
        raise ArgumentError(
            f"--output_dir {output_dir} isn't empty: choose another, or give --overwrite_output_dir or "
            "--resume_from_checkpoint True"
        )
    # Their step numbers and figures would be mixed up with the new ones.
    for old in [*checkpoint_folders(output_dir), output_dir / "attention_plots"]:
        shutil.rmtree(old, ignore_errors=True)
    for name in (RUN_RECORD_NAME, RESULTS_NAME):
        (output_dir / name).unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Before hours of work: that files can be made in the folder, or where it will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ArgumentError(f"--output_dir {folder}: can't be written to: {there}: {error.strerror}") from error


def how_to_go_on(args: ScriptArguments) -> str:
    last = last_complete_checkpoint(args.output_dir)
    if last is None:
        return "there is no checkpoint to go on from."
    same = (args.training.resume_from_checkpoint or "").lower() == "auto"
    how = "run the same command again" if same else "add --resume_from_checkpoint auto to the same command"
    return f"to go on from {last}, {how}."


def wanted_splits(args: ScriptArguments) -> list[str]:
    training = args.training
    wanted = {
        "train": training.do_train,
        "validation": training.do_eval
        or (training.do_train and (training.eval_strategy != "no" or args.run.hp_search is not None)),
        "test": training.do_predict and args.run.hp_search is None,
    }
    return [split for split, is_wanted in wanted.items() if is_wanted]


def check_splits(args: ScriptArguments, data: datasets.DatasetDict) -> None:
    for split in wanted_splits(args):
        if split not in data:
            share = "" if split == "train" or args.data.streaming else f" or a --{split}_split_percentage"
            raise DataError(f"There is no {split} data: give --{split}_file{share}.")


def texts(dataset: datasets.Dataset, column: str) -> Iterator[str]:
    for batch in dataset.iter(1000):
        yield from batch[column]


def new_tokenizer(args: ScriptArguments, train: datasets.Dataset) -> PreTrainedTokenizerBase:
    """Trained once: two processes might settle ties in different ways, and would each tokenize all data anew."""
    training = args.training
    if training.world_size == 1:
        return train_tokenizer(args, train)
    with training.main_process_first(local=False, desc="training of the tokenizer"):
        if training.process_index == 0:
            train_tokenizer(args, train).save_pretrained(args.output_dir)
        return AutoTokenizer.from_pretrained(args.output_dir)


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
    if args.run.ensemble is not None:
        if args.config:
            say(args, "Models of an ensemble are as they were saved; flags of a configuration have no effect.")
        try:
            return RnnSeq2SeqEnsemble.from_pretrained(args.run.ensemble)
        except ValueError as error:
            raise ArgumentError(f"--ensemble {' '.join(args.run.ensemble)}: {error}") from error
    config = AutoConfig.from_pretrained(saved)
    for name, value in args.config.items():
        if name in TRAINING_ONLY:
            continue
        saved_value = getattr(config, name, None)
        if value != saved_value:
            raise ArgumentError(f"--{name} {value}: the model of {saved} has {saved_value}, which can't be changed")
    changed = {name: args.config[name] for name in TRAINING_ONLY if name in args.config}
    return AutoModelForSeq2SeqLM.from_pretrained(saved, **changed)


def set_embeddings(
    args: ScriptArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: datasets.Dataset
) -> dict[str, float]:
    """Put pretrained vectors into the embeddings, freeze them, as far as asked for; how many vectors were found."""
    run = args.run
    two_tables = getattr(model.config, "source_vocab_size", None) is not None
    if not two_tables and (run.target_embeddings_file is not None or run.freeze_target_embeddings):
        raise ArgumentError(
            "--target_embeddings_file and --freeze_target_embeddings are for two vocabularies; this model has one, "
            "with one table for both sides: give --source_embeddings_file and --freeze_source_embeddings"
        )
    figures: dict[str, float] = {}
    for side in ("source", "target") if two_tables else ("source",):
        part = model.get_encoder() if side == "source" else model.get_decoder()
        table = part.get_input_embeddings()
        if (path := getattr(run, f"{side}_embeddings_file")) is not None:
            vocabulary = getattr(tokenizer, f"{side}_tokenizer", tokenizer).get_vocab()
            found = load_pretrained_embeddings(path, vocabulary, table.embedding_dim)
            if len(found.ids) == 0:
                raise ArgumentError(
                    f"--{side}_embeddings_file {path}: there is no vector for any of the vocabulary's tokens, which "
                    f"are spelled like {', '.join(list(vocabulary)[-5:])}"
                )
            apply_pretrained_embeddings(found, table)
            column = "input_ids" if side == "source" else "labels"
            rows = (row[column] for row in itertools.islice(train.select_columns([column]), COVERAGE_ROWS))
            covered = found.token_coverage(rows, skip=tokenizer.all_special_ids)
            say(args, f"{side.capitalize()} embeddings: {found}; {covered:.1%} of the training data's tokens.")
            figures |= {f"{side}_embeddings_{name}": value for name, value in found.figures().items()}
            figures[f"{side}_embeddings_token_coverage"] = covered
        if getattr(run, f"freeze_{side}_embeddings"):
            table.requires_grad_(False)
    return figures


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
    except (ArgumentError, DataError, CheckpointError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
