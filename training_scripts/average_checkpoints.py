"""Average the weights of a training's last or best checkpoints, or of several trained models, into one model:

    python training_scripts/average_checkpoints.py outputs/mine --last 5 --output_dir outputs/averaged
    python training_scripts/average_checkpoints.py outputs/mine --best 5 --metric bleu --output_dir outputs/averaged
    python training_scripts/average_checkpoints.py outputs/one outputs/another --output_dir outputs/averaged

With --last and --best the first argument is the `output_dir` of run_seq2seq.py, which must have kept so many
checkpoints (`--save_total_limit`). The mean of models can be better than each of them where their trainings began with
the same weights (`model_name_or_path`), or one with the other's; a model that is named twice counts twice. The
averaged model is a folder like any other saved model's; to see how good it is:

    python training_scripts/run_seq2seq.py recipe.yaml --model_name_or_path outputs/averaged \\
        --do_train false --do_eval --output_dir outputs/averaged

after which make_model_card.py writes its card as that of a model that was trained.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import hf_rnn_seq2seq  # noqa: F401  # registers the model with the Auto classes
from hf_rnn_seq2seq.run_record import write_average_record
from hf_rnn_seq2seq.weight_averaging import (
    AveragingError,
    average_checkpoints,
    average_models,
    best_checkpoints,
    last_checkpoints,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="With --last or --best a training's, with its checkpoint-* folders; else two models' or more.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=int, metavar="N", help="Average the N checkpoints of the highest steps.")
    which.add_argument("--best", type=int, metavar="N", help="Average the N checkpoints with the best --metric.")
    parser.add_argument(
        "--metric", help="For --best: of the evaluation at the checkpoint's step; eval_loss if not given."
    )
    parser.add_argument(
        "--greater_is_better",
        action=argparse.BooleanOptionalAction,
        help="For --best; known of losses, perplexity and error rates, of which less is better, else assumed.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="A folder that isn't there yet, for the model.")
    args = parser.parse_args(argv)
    if args.best is None and (args.metric is not None or args.greater_is_better is not None):
        parser.error("--metric and --greater_is_better are for --best")
    if args.last is None and args.best is None:
        if len(args.folders) < 2:
            parser.error("one folder is averaged with --last or --best; without them name two models or more")
        average_models(args.folders, args.output_dir)
        names = [str(folder) for folder in args.folders]
    elif len(args.folders) > 1:
        parser.error(f"--last and --best are for the checkpoints of one training, not of {len(args.folders)} folders")
    else:
        (training_dir,) = args.folders
        if args.last is not None:
            checkpoints = last_checkpoints(training_dir, args.last)
        else:
            metric = args.metric or "eval_loss"
            checkpoints = best_checkpoints(training_dir, args.best, metric, args.greater_is_better)
        average_checkpoints(checkpoints, args.output_dir)
        names = [checkpoint.path.name for checkpoint in checkpoints]
    write_average_record(args.output_dir, args.folders, names, sys.argv[1:] if argv is None else argv)
    print(f"{args.output_dir}: the mean of {', '.join(names)}")


if __name__ == "__main__":
    try:
        main()
    except (AveragingError, OSError) as error:
        sys.exit(f"error: {error}")
