"""A model of another toolkit as a folder that `from_pretrained` loads, with tokenizer and model card:

    python training_scripts/convert_checkpoint.py --format g2p_en checkpoint20.npz outputs/g2p_en
    python training_scripts/convert_checkpoint.py --format opennmt model_step_10000.pt outputs/opennmt \\
        --file source_codes=codes.en --file target_codes=codes.de

What each format reads, takes and refuses, and which further files it knows, says `--format NAME --describe`. Nothing
is written unless everything can be. `--trust-pickle` runs the code that a checkpoint's pickle names: only for files
whose maker you trust.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_rnn_seq2seq.convert import FORMATS, ConversionError, ConversionOptions, convert
from hf_rnn_seq2seq.convert.saving import save


def named_file(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, Path(path)


class Describe(argparse.Action):
    """Prints the documentation of the format that was given before, and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        if namespace.format is None:
            parser.error("--describe comes after --format NAME")
        print(importlib.import_module(f"hf_rnn_seq2seq.convert.{FORMATS[namespace.format]}").__doc__)
        parser.exit()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--format", choices=FORMATS, required=True, help="The toolkit that wrote the checkpoint.")
    parser.add_argument("--describe", nargs=0, action=Describe, help="Say what the format takes, and end.")
    parser.add_argument("checkpoint", type=Path, help="As the toolkit saves it, a file or folder.")
    parser.add_argument("output_dir", type=Path, help="For the model: a folder that is empty or not there yet.")
    parser.add_argument("--trust-pickle", action="store_true", help="Run the code that the checkpoint's pickle names.")
    parser.add_argument(
        "--file",
        type=named_file,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="A further file, such as a vocabulary; may be given several times.",
    )
    args = parser.parse_args(argv)
    options = ConversionOptions(trust_pickle=args.trust_pickle, files=dict(args.file))
    if len(options.files) < len(args.file):
        parser.error("the same --file name was given twice")
    converted = convert(args.format, args.checkpoint, options)
    save(converted, args.output_dir, args.checkpoint.name)
    print(f"{args.output_dir}: {args.checkpoint.name} of {converted.origin}")
    for note in converted.notes:
        print(f"- {note}")


if __name__ == "__main__":
    try:
        main()
    except ConversionError as error:
        sys.exit(f"convert_checkpoint.py: {error}")
