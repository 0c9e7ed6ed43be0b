"""Write a model's card from what run_seq2seq.py left in its output folder:

    python training_scripts/make_model_card.py outputs/mine --output model_cards/mine.md
    python training_scripts/make_model_card.py outputs/mine --variants outputs/mine_dot outputs/mine_gru

The card has the figures of `all_results.json` with their signatures, the data, the commands that give these figures,
time, hardware, versions, an attention plot (copied beside the card) and limits. Where something of it is missing, no
card is written, and what is missing is named; so training has to be run with
`--do_train --do_eval --do_predict --num_attention_plots 1`. Without `--output` the card is the folder's README.md.

`--variants` adds a table of what is different in other runs and their figures; `--axes_table` takes its rows from a
file: `[{"change": "without attention", "figures": {"eval_bleu": 30.1}}, ...]`. `--ensemble` adds the figures that
run_seq2seq.py gave with its own `--ensemble`.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import hf_rnn_seq2seq  # noqa: F401  # registers the configuration with AutoConfig
from hf_rnn_seq2seq.model_card import (
    CardError,
    attention_plot,
    read_variants,
    variant_of,
    what_is_missing,
    write_card_of_run,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("output_dir", type=Path, help="Output folder of run_seq2seq.py.")
    parser.add_argument("--output", type=Path, help="The card; by default README.md in the output folder.")
    parser.add_argument("--variants", type=Path, nargs="+", default=[], help="Output folders of runs to compare with.")
    parser.add_argument("--axes_table", type=Path, help="JSON file with further rows of the table.")
    parser.add_argument("--ensemble", type=Path, help="Output folder of run_seq2seq.py with --ensemble.")
    args = parser.parse_args(argv)

    if missing := what_is_missing(args.output_dir):
        raise CardError(f"{args.output_dir}: no card without {', '.join(missing)}")
    variants = [variant_of(args.output_dir, other) for other in args.variants]
    if args.axes_table is not None:
        variants += read_variants(args.axes_table)
    path = args.output or args.output_dir / "README.md"
    plot = attention_plot(args.output_dir)
    if plot is not None and args.output is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot = Path(shutil.copyfile(plot, path.with_name(f"{path.stem}_attention.png")))
    link = None if plot is None else plot.relative_to(path.parent).as_posix()
    write_card_of_run(args.output_dir, path, plot=link, variants=variants, ensemble=args.ensemble)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (CardError, OSError) as error:
        sys.exit(f"error: {error}")
