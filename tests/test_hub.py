"""A model on the Hub carries its code: saved or pushed, it loads where this package is not installed.

Both sides of the trip are real: the `huggingface_hub` client as it is, against the server of `hub_server.py`, and an
interpreter whose site-packages lack this package.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import ModelCard

import hf_rnn_seq2seq

PACKAGE = "hf_rnn_seq2seq"
CLIENT = Path(__file__).with_name("hub_client.py")
WEIGHTS_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass
class RoundTrip:
    """What two processes wrote and saw, and the hub between them."""

    folder: Path
    hub: HubServer
    published: dict
    loaded: dict


def site_packages_without_the_package(folder: Path) -> Path:
    """A folder that links to all that is installed but this package, be it installed as usual or editable."""
    folder.mkdir()
    for entry in sys.path:
        if Path(entry).name in ("site-packages", "dist-packages"):
            for item in Path(entry).iterdir():
                if PACKAGE not in item.name and not (folder / item.name).exists():
                    (folder / item.name).symlink_to(item)
    return folder


def run(command: list[str], hub: HubServer, home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= hub.environment(home)
    done = subprocess.run(command, env=environment, cwd=home.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoundTrip]:
    folder = tmp_path_factory.mktemp("hub")
    site = site_packages_without_the_package(folder / "site-packages")
    # -I: no current directory and no PYTHONPATH. -S: no site-packages, and no .pth file, which editable installs are.
    start = f"import runpy, sys; sys.path.append({str(site)!r}); del sys.argv[0]; "
    bare = [sys.executable, "-I", "-S", "-c", start + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    with HubServer(folder / "server") as hub:
        run([sys.executable, str(CLIENT), "publish", str(folder)], hub, folder / "home of the author")
        run([*bare, str(CLIENT), "load", str(folder)], hub, folder / "home of the reader")
        published = json.loads((folder / "published.json").read_text())
        yield RoundTrip(folder, hub, published, json.loads((folder / "loaded.json").read_text()))


def test_the_client_lists_and_downloads_what_was_uploaded(trip: RoundTrip) -> None:
    seen = trip.published["client"]
    files = sorted(trip.hub.store.files("tester/shared"))
    assert seen["repositories"] == ["tester/pair", "tester/shared"]
    assert sorted(seen["files"]) == seen["snapshot"] == sorted(seen["after deletion"]) == files
    assert seen["uploaded"] == ["notes/empty.txt"]
    assert seen["snapshot is of"]
    assert seen["missing"] == {
        "tester/shared/none.txt@main": "RemoteEntryNotFoundError",
        "tester/shared/config.json@none": "RevisionNotFoundError",
        "tester/none/config.json@main": "RepositoryNotFoundError",
    }


def test_the_reader_has_no_package(trip: RoundTrip) -> None:
    assert trip.loaded["installed"] is False


@pytest.mark.parametrize("again", ["", " again"], ids=["as published", "saved again"])
@pytest.mark.parametrize("source", ["folder", "hub"])
@pytest.mark.parametrize("name", ["shared", "pair"])
def test_generates_the_same_without_the_package(trip: RoundTrip, name: str, source: str, again: str) -> None:
    seen = trip.loaded[f"{name} {source}{again}"]
    assert seen["missing"] == []
    assert seen["generated"] == trip.published[name]["generated"]
    assert seen["labels"] == trip.published[name]["labels"]
    # a generation checkpoint also loads as the model without a head
    assert seen["body_equals_model"]
    own = seen["classes"] if name == "pair" else seen["classes"][:3]  # the shared tokenizer is transformers' own
    assert all(name.startswith("transformers_modules.") for name in own)


def test_published_models_tell_sources_apart(trip: RoundTrip) -> None:
    """The comparison of generated ids would show little if every source gave the same."""
    for name in ("shared", "pair"):
        first, *others = trip.published[name]["generated"]
        assert any(ids != first for ids in others)


@pytest.mark.parametrize("name", ["shared", "pair"])
def test_config_and_model_may_come_from_different_copies_of_the_code(trip: RoundTrip, name: str) -> None:
    seen = trip.loaded[f"{name} mixed"]
    config_package, model_package = (module.rpartition(".")[0] for module in seen["modules"])
    assert config_package != model_package
    assert seen["generated"] == trip.published[name]["generated"]


@pytest.mark.parametrize("trust", ["trusting", "not trusting"])
@pytest.mark.parametrize("name", ["shared", "pair"])
def test_an_installed_package_wins(trip: RoundTrip, name: str, trust: str) -> None:
    seen = trip.published[name][trust]
    # AutoTokenizer, unlike the other Auto classes, prefers the repository's code where it may run it
    own = seen["classes"] if name == "pair" and trust == "not trusting" else seen["classes"][:3]
    assert all(name.startswith(PACKAGE + ".") for name in own)
    assert seen["generated"] == trip.published[name]["generated"]
    assert seen["missing"] == []


@pytest.mark.parametrize("name", ["shared", "pair"])
def test_repository_has_code_and_card_and_no_pickle(trip: RoundTrip, name: str) -> None:
    saved = {path.name for path in (trip.folder / name).iterdir()}
    files = trip.hub.store.files(f"tester/{name}")
    assert {path for path in saved if path.endswith(".py")} == {path for path in files if path.endswith(".py")}
    modules = {"configuration_rnn_seq2seq.py", "modeling_rnn_seq2seq.py"}
    assert modules <= saved
    assert ("tokenization_rnn_seq2seq.py" in saved) == (name == "pair")
    weights = [path for path in files if path.endswith(".safetensors")]
    assert len(weights) > 1  # sharded
    assert all(files[path].lfs for path in weights)
    assert not [path for path in [*files, *saved] if path.endswith(WEIGHTS_SUFFIXES)]
    card = ModelCard(trip.hub.store.content(files["README.md"]).decode()).data.to_dict()
    assert card["library_name"] == "transformers"
    assert "g2p" in card["tags"]


@pytest.mark.parametrize("name", ["shared", "pair"])
def test_pushed_code_is_the_installed_code(trip: RoundTrip, name: str) -> None:
    package = Path(hf_rnn_seq2seq.__file__).parent
    for path, file in trip.hub.store.files(f"tester/{name}").items():
        if path.endswith(".py"):
            assert trip.hub.store.content(file) == (package / path).read_bytes()
