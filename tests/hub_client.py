"""What the two processes of `test_hub.py` run: one where the package is installed, one where it is not.

`python hub_client.py publish FOLDER` saves and pushes small models; `python hub_client.py load FOLDER` loads them
again, generates, and saves once more. Each writes what it saw to `FOLDER/published.json`, `FOLDER/loaded.json`.
They are separate processes because `huggingface_hub` reads HF_ENDPOINT once, when it is imported.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

if TYPE_CHECKING:  # at run time the package may be missing
    from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration

OWNER = "tester"
TEXTS = ["a b c d", "d", "b b a"]


def word_tokenizer(words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def small_models() -> "dict[str, tuple[RnnSeq2SeqForConditionalGeneration, PreTrainedTokenizerBase]]":
    """A model of each kind: one vocabulary for both sides and any tokenizer, or two with the tokenizer of pairs."""
    from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqTokenizer

    shared = word_tokenizer("a b c d")
    pair = RnnSeq2SeqTokenizer(word_tokenizer("a b c d"), word_tokenizer("v w x y z"))
    set_seed(0)
    # a wide start, so that the untrained models' outputs differ from one source to the next
    config_shared = RnnSeq2SeqConfig(
        vocab_size=len(shared),
        embedding_size=8,
        hidden_size=16,
        initializer_range=2.0,
        cell_type="gru",
        tie_word_embeddings=True,
    )
    config_pair = RnnSeq2SeqConfig(
        vocab_size=len(pair),
        source_vocab_size=pair.source_vocab_size,
        embedding_size=8,
        hidden_size=16,
        initializer_range=2.0,
    )
    return {
        "shared": (RnnSeq2SeqForConditionalGeneration(config_shared).eval(), shared),
        "pair": (RnnSeq2SeqForConditionalGeneration(config_pair).eval(), pair),
    }


def generated_ids(model: "RnnSeq2SeqForConditionalGeneration", tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    ids = model.generate(**inputs, num_beams=3, max_new_tokens=8)  # type: ignore[misc]  # `self` is a protocol there
    assert isinstance(ids, torch.Tensor)
    return ids.tolist()


def load_everything(
    place: str, trust_remote_code: bool = True
) -> "tuple[dict[str, object], RnnSeq2SeqForConditionalGeneration, PreTrainedTokenizerBase]":
    """Load config, both models and tokenizer from a folder or a repository, and say what they are and generate."""
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        place, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    body, body_info = AutoModel.from_pretrained(place, trust_remote_code=trust_remote_code, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    ids = tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    start = torch.full((len(TEXTS), 1), config.decoder_start_token_id)
    with torch.no_grad():
        same = torch.equal(
            body(input_ids=ids, decoder_input_ids=start).last_hidden_state,
            model.model(input_ids=ids, decoder_input_ids=start).last_hidden_state,
        )
    seen: dict[str, object] = {
        "classes": [f"{type(part).__module__}.{type(part).__name__}" for part in (config, model, body, tokenizer)],
        "missing": sorted(info["missing_keys"]) + sorted(body_info["missing_keys"]),
        "body_equals_model": same,
        "generated": generated_ids(model, tokenizer),
        "labels": tokenizer(text_target=["v x", "z"]).input_ids,
    }
    return seen, model, tokenizer


def publish(folder: Path) -> dict[str, object]:
    """Save to `folder/NAME`, push to `tester/NAME`, and load from the hub with the package installed."""
    report: dict[str, object] = {}
    for name, (model, tokenizer) in small_models().items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        # so small a shard that the weights take several files
        model.push_to_hub(name, max_shard_size=2000, tags=["g2p"])  # type: ignore[arg-type]  # transformers wraps it as a function
        tokenizer.push_to_hub(name)
        place = f"{OWNER}/{name}"
        report[name] = {
            "generated": generated_ids(model, tokenizer),
            "labels": tokenizer(text_target=["v x", "z"]).input_ids,
            "trusting": load_everything(place)[0],
            "not trusting": load_everything(place, trust_remote_code=False)[0],
        }
    report["client"] = look_around()
    return report


def look_around() -> dict[str, object]:
    """What the client itself says of the hub: listings, downloads, and what is not there."""
    api, repository = HfApi(), f"{OWNER}/shared"
    before = api.list_repo_files(repository)
    api.upload_file(path_or_fileobj=b"", path_in_repo="notes/empty.txt", repo_id=repository)
    uploaded = sorted({*api.list_repo_files(repository)} - {*before})
    api.delete_file("notes/empty.txt", repository)
    missing = {}
    for place, file_name, revision in (
        (repository, "none.txt", "main"),
        (repository, "config.json", "none"),
        (f"{OWNER}/none", "config.json", "main"),
    ):
        try:
            hf_hub_download(place, file_name, revision=revision)
        except HfHubHTTPError as error:
            missing[f"{place}/{file_name}@{revision}"] = type(error).__name__
    snapshot = Path(snapshot_download(repository))
    return {
        "repositories": [model.id for model in api.list_models()],
        "files": before,
        "uploaded": uploaded,
        "after deletion": api.list_repo_files(repository),
        "snapshot": sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*")),
        "snapshot is of": snapshot.name == api.model_info(repository).sha,
        "missing": missing,
    }


def load(folder: Path) -> dict[str, object]:
    """Load `NAME` from the folder, from the hub, and from where each of the two was saved again, and so on."""
    report: dict[str, object] = {"installed": importlib.util.find_spec("hf_rnn_seq2seq") is not None}
    for name in ("shared", "pair"):
        for source, place in {"folder": str(folder / name), "hub": f"{OWNER}/{name}"}.items():
            seen, model, tokenizer = load_everything(place)
            again = folder / f"{name}_from_{source}"
            model.save_pretrained(again)
            tokenizer.save_pretrained(again)
            report[f"{name} {source}"] = seen
            report[f"{name} {source} again"] = load_everything(str(again))[0]
        # the config's class from the folder's copy of the code, the model's from the hub's
        config = AutoConfig.from_pretrained(folder / name, trust_remote_code=True)
        mixed = AutoModelForSeq2SeqLM.from_pretrained(f"{OWNER}/{name}", config=config, trust_remote_code=True)
        report[f"{name} mixed"] = {
            "modules": [type(config).__module__, type(mixed).__module__],
            "generated": generated_ids(mixed, tokenizer),
        }
    return report


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "publish":
        (folder / "published.json").write_text(json.dumps(publish(folder)))
    else:
        (folder / "loaded.json").write_text(json.dumps(load(folder)))
