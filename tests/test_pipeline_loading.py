"""The pipeline loaded from saved and pushed folders, and what travels with a model for it."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import small_models
from hub_server import HubServer
from test_hub import run, site_packages_without_the_package
from test_pipeline import TEXTS, texts_of
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqModel, RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.pipeline_rnn_seq2seq import TASK, CustomPipelines, RnnText2TextPipeline


def load(folder: Path, device: str = "cpu", **options: Any) -> Any:
    return pipeline(TASK, model=str(folder), device=device, **options)  # type: ignore[call-overload]  # a task of ours


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pair` as the model's own save_pretrained leaves it, `pipe` as the pipeline's."""
    folder = tmp_path_factory.mktemp("pipeline")
    model, tokenizer = small_models()["pair"]
    model.save_pretrained(folder / "pair")
    tokenizer.save_pretrained(folder / "pair")
    pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu").save_pretrained(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pair", {"task": TASK}),
        ("pair", {}),
        ("pipe", {"task": TASK, "trust_remote_code": True}),
    ],
    ids=str,
)
def test_where_the_package_is_installed_its_own_pipeline_is_used_and_needs_no_trust(
    folder: Path, name: str, arguments: dict[str, Any]
) -> None:
    pipe = pipeline(model=str(folder / name), device="cpu", **arguments)
    assert type(pipe) is RnnText2TextPipeline
    model, tokenizer = small_models()["pair"]
    expected = RnnText2TextPipeline(model, tokenizer, device="cpu", max_new_tokens=8)(TEXTS)
    assert pipe(TEXTS, max_new_tokens=8) == expected


def test_device_and_dtype(folder: Path) -> None:
    pipe = load(folder / "pair", dtype="bfloat16")
    assert (pipe.dtype, pipe.model.dtype, pipe.device.type) == (torch.bfloat16, torch.bfloat16, "cpu")
    (hypothesis,) = pipe("a b", return_scores=True, return_alignments=True, max_new_tokens=8)
    assert hypothesis["score"] < 0


@pytest.mark.gpu
def test_on_a_gpu(folder: Path) -> None:
    on_cpu, on_gpu = (load(folder / "pair", device=device) for device in ("cpu", "cuda"))
    options = {"num_beams": 3, "return_scores": True, "return_alignments": True, "max_new_tokens": 8}
    for (one,), (other,) in zip(on_cpu(TEXTS, **options), on_gpu(TEXTS, batch_size=3, **options), strict=True):
        assert other["attention"].device.type == "cpu"
        torch.testing.assert_close(one.pop("attention"), other.pop("attention"), atol=1e-3, rtol=0)
        assert one["generated_text"] == other["generated_text"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)


def test_every_way_of_saving_writes_the_pipeline_and_its_code(folder: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "pair")
    AutoModelForSeq2SeqLM.from_pretrained(folder / "pipe").save_pretrained(tmp_path / "again")
    config.save_pretrained(tmp_path / "config")
    RnnSeq2SeqModel(config).save_pretrained(tmp_path / "body")
    for place in (folder / "pair", folder / "pipe", *tmp_path.iterdir()):
        saved = json.loads((place / "config.json").read_text())["custom_pipelines"]
        own = {"impl": "pipeline_rnn_seq2seq.RnnText2TextPipeline", "pt": ["AutoModelForSeq2SeqLM"], "type": "text"}
        assert saved == {TASK: own}
        assert (place / "pipeline_rnn_seq2seq.py").is_file()


def test_custom_pipelines_of_a_configuration_hide_the_registered_ones() -> None:
    config = RnnSeq2SeqConfig()
    assert TASK not in config.custom_pipelines
    assert list(config.custom_pipelines) == [TASK]
    mine = CustomPipelines({"mine": {"impl": "mine.Mine"}, TASK: {}})
    assert "mine" in mine
    saved = RnnSeq2SeqConfig(custom_pipelines={"mine": {"impl": "mine.Mine"}})
    assert saved.to_dict()["custom_pipelines"] == {"mine": {"impl": "mine.Mine"}}
    assert copy.deepcopy(config).custom_pipelines == config.custom_pipelines
    config.custom_pipelines[TASK]["pt"] = ()
    assert RnnSeq2SeqConfig().custom_pipelines[TASK]["pt"] == ["AutoModelForSeq2SeqLM"]


CHILD = f"""
import importlib.util, json, sys
from pathlib import Path
from transformers import pipeline

assert importlib.util.find_spec("hf_rnn_seq2seq") is None
folder, texts = Path(sys.argv[1]), json.loads(sys.argv[2])
seen = {{}}
places = {{name: str(folder / name) for name in ("pair", "pipe", "again")}} | {{"hub": "tester/pair"}}
for name in ("pair", "pipe", "hub", "again"):
    place = places[name]
    pipe = pipeline("{TASK}", model=place, trust_remote_code=True, device="cpu")
    unnamed = pipeline(model=place, trust_remote_code=True, device="cpu")
    options = dict(num_beams=3, num_return_sequences=2, return_scores=True, batch_size=2, max_new_tokens=8)
    seen[name] = [type(pipe).__module__, pipe(texts, **options), unnamed(texts, **options)]
    pipe.save_pretrained(folder / "again")
(folder / "seen.json").write_text(json.dumps(seen))
"""


def test_a_pushed_pipeline_works_where_the_package_is_not_installed(folder: Path, tmp_path: Path) -> None:
    site = site_packages_without_the_package(tmp_path / "site-packages")
    start = f"import sys; sys.path.append({str(site)!r})\n"
    push = (
        "import sys, hf_rnn_seq2seq\nfrom transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n"
        "AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]).push_to_hub('pair')\n"
        "AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub('pair')\n"
    )
    with HubServer(tmp_path / "server") as hub:
        run([sys.executable, "-c", push, str(folder / "pair")], hub, tmp_path / "author")
        arguments = [str(folder), json.dumps(TEXTS)]
        run([sys.executable, "-I", "-S", "-c", start + CHILD, *arguments], hub, tmp_path / "reader")
    pipe = load(folder / "pair")
    expected = pipe(TEXTS, num_beams=3, num_return_sequences=2, return_scores=True, max_new_tokens=8)
    for module, *results in json.loads((folder / "seen.json").read_text()).values():
        assert module.startswith("transformers_modules.")
        for result in results:
            assert texts_of(result) == texts_of(expected)
            for hypotheses, others in zip(result, expected, strict=True):
                scores = [hypothesis["score"] for hypothesis in others]
                assert [hypothesis["score"] for hypothesis in hypotheses] == pytest.approx(scores, rel=1e-4)


def test_the_tokenizer_of_a_folder_is_loaded_with_it(folder: Path) -> None:
    pipe = load(folder / "pair")
    expected = AutoTokenizer.from_pretrained(folder / "pair")
    assert pipe.tokenizer.get_vocab() == expected.get_vocab()
    assert type(pipe.tokenizer) is RnnSeq2SeqTokenizer
