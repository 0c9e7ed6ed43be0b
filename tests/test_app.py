"""app.py: the functions behind its events, its API over loopback, and the page itself in a headless browser."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ports import free_port
from scripts import FOLDER, load_script
from transformers import pipeline

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer

pytest.importorskip("gradio")

# Learnt by heart in a few seconds: from and to a script that runs from right to left, IPA, what HTML would swallow.
PAIRS = {"كتاب": "kitaːb", "kitaːb": "كتاب", "fiancé": "fiˈɑ̃seɪ", "<b> & c": "ʃ<i>"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="needs Chromium and playwright"
)
# No proxy between two processes of this machine.
LOCAL = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "kitāb"
    tokenizer = train_tokenizer([*PAIRS, *PAIRS.values()], "char")
    torch.manual_seed(0)
    config = RnnSeq2SeqConfig(vocab_size=len(tokenizer), hidden_size=48, embedding_size=24, output_dropout=0.0)
    model = RnnSeq2SeqForConditionalGeneration(config)
    batch = tokenizer(list(PAIRS), padding=True, return_tensors="pt")
    labels = tokenizer(list(PAIRS.values()), padding=True, return_tensors="pt")["input_ids"]
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        model(batch["input_ids"], batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def app() -> ModuleType:
    return load_script("app")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipeline("rnn-text2text", model=str(folder), device="cpu")  # type: ignore[call-overload]  # a task of ours


def hypotheses_of(pipe: Any, text: str, beams: int = 4) -> list[Any]:
    options = {"return_scores": True, "return_alignments": True, "num_alternatives": 5}
    return pipe(text, num_beams=beams, num_return_sequences=beams, **options)


class Elements(HTMLParser):
    """Elements of a page by class: (tag, attributes, text within). Complains where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.all: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def handle_endtag(self, tag: str) -> None:
        name, attributes, text = self.open.pop()
        assert name == tag
        self.all.append((tag, attributes, "".join(text)))

    def of(self, tag: str, kind: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        def fits(attributes: dict[str, str | None]) -> bool:
            return kind is None or kind in (attributes.get("class") or "").split()

        return [(attributes, text) for name, attributes, text in self.all if name == tag and fits(attributes)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("كتاب", "rtl"), ("שלום abc", "rtl"), ("abc שלום", "ltr"), ("12 ˈ كتاب", "rtl"), ("1. כן", "rtl"), ("…", "ltr")],
)
def test_direction(app: ModuleType, text: str, expected: str) -> None:
    assert app.direction(text) == expected


def test_tokens_are_shown_as_a_reader_knows_them(app: ModuleType, pipe: Any) -> None:
    shown = {token: app.shown(token, pipe.tokenizer) for token in ("ك", " ", "\N{COMBINING TILDE}", "</s>", "ˈ", "\n")}
    assert shown == {
        "ك": "ك",
        " ": "␣",
        "\N{COMBINING TILDE}": "◌\N{COMBINING TILDE}",
        "</s>": "</s>",
        "ˈ": "ˈ",
        "\n": "↵",
    }
    by_bytes = train_tokenizer(["größer كتاب"] * 30, "byte_bpe", vocab_size=300)
    text = "größer كتاب"
    tokens = [app.shown(token, by_bytes) for token in by_bytes.tokenize(text)]
    assert "".join(tokens) == text.replace(" ", "")
    *_, part = by_bytes.tokenize("é")
    assert app.shown(part, by_bytes) == part  # half a character stays as the vocabulary has it


@pytest.mark.parametrize("source", PAIRS)
def test_steps_have_the_alternatives_of_the_pipeline(app: ModuleType, pipe: Any, source: str) -> None:
    for hypothesis in hypotheses_of(pipe, source):
        elements = Elements(app.steps_html(hypothesis, pipe.tokenizer))
        ((steps, _),) = elements.of("div", "steps")
        assert steps["dir"] == ("rtl" if hypothesis["generated_text"].startswith("ك") else "ltr")
        chips = elements.of("span", "step")
        assert len(chips) == len(hypothesis["target_tokens"])
        names, numbers = elements.of("span", "name"), elements.of("span", "number")
        taken = [text for _, text in elements.of("span", "taken")]
        assert len(taken) == len(chips)
        for place, token in enumerate(hypothesis["target_tokens"]):
            probability = torch.tensor(hypothesis["token_log_probabilities"][place]).exp().item()
            assert chips[place][1].startswith(app.shown(token, pipe.tokenizer))
            assert f"--doubt: {1 - probability:.3f}" == chips[place][0]["style"]
            assert taken[place] == app.shown(token, pipe.tokenizer) + app.percent(probability)
            five = hypothesis["alternatives"][place]
            if token not in dict(five):
                five = [*five[:4], (token, probability)]
            rows = slice(5 * place, 5 * place + 5)
            assert [text for _, text in names[rows]] == [app.shown(name, pipe.tokenizer) for name, _ in five]
            assert [text for _, text in numbers[rows]] == [app.percent(value) for _, value in five]


def test_a_taken_token_is_shown_though_five_others_were_likelier(app: ModuleType, pipe: Any) -> None:
    hypothesis = hypotheses_of(pipe, "كتاب")[0]
    hypothesis["target_tokens"][0] = "ˈ"
    hypothesis["token_log_probabilities"][0] = -20.0
    elements = Elements(app.steps_html(hypothesis, pipe.tokenizer))
    assert elements.of("span", "taken")[0][1] == "ˈ< 0.01\u00a0%"
    assert len(elements.of("span", "name")) == 5 * len(hypothesis["target_tokens"])


@pytest.mark.parametrize("source", PAIRS)
def test_the_heat_map_has_a_cell_for_each_weight(app: ModuleType, pipe: Any, source: str) -> None:
    hypothesis = hypotheses_of(pipe, source)[0]
    assert hypothesis["generated_text"] == PAIRS[source]
    elements = Elements(app.attention_html(hypothesis, pipe.tokenizer))
    weights = [float(re.fullmatch(r"--w: (.*)", cell["style"] or "")[1]) for cell, _ in elements.of("td")]  # type: ignore[index]
    darkest = hypothesis["attention"].max()
    assert f"From 0 to {darkest:.2f}" in elements.of("p")[0][1]
    expected = (hypothesis["attention"] / darkest).flatten().tolist()
    assert weights == pytest.approx(expected, abs=6e-4)
    headings = [text for _, text in elements.of("th")]
    columns = [app.shown(token, pipe.tokenizer) for token in hypothesis["source_tokens"]]
    assert headings == ["", *columns, *(app.shown(token, pipe.tokenizer) for token in hypothesis["target_tokens"])]
    ((table, _),) = elements.of("table")
    assert table["dir"] == ("rtl" if source == "كتاب" else "ltr")
    assert [text for cell, text in elements.of("th", "long")] == ["</s>"] * columns.count("</s>")


def test_labels_of_outputs_are_isolated_from_their_figures(app: ModuleType, pipe: Any) -> None:
    hypotheses = hypotheses_of(pipe, "kitaːb")
    labels = app.choices(hypotheses)
    assert [index for _, index in labels] == [0, 1, 2, 3]
    assert labels[0][0].startswith("\u2068كتاب\u2069  ·  ")
    assert labels[0][0].endswith(f"{hypotheses[0]['score']:.3f}")
    assert [app.percent(value) for value in (1.0, 0.5231, 0.0123456, 0.00001)] == [
        "100\u00a0%", "52.3\u00a0%", "1.23\u00a0%", "< 0.01\u00a0%"
    ]  # fmt: skip


def test_a_model_without_attention_has_no_heat_map(app: ModuleType, pipe: Any) -> None:
    hypothesis = hypotheses_of(pipe, "kitaːb")[0]
    del hypothesis["attention"]
    html = app.reading_html([hypothesis], 0, pipe.tokenizer)
    assert "This model has no attention." in html
    assert not Elements(html).of("table")
    assert app.reading_html([], None, pipe.tokenizer) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a model, here or in the environment variable MODEL"),
        (["x", "--examples", "/no/such/file"], "--examples /no/such/file: "),
    ],
)
def test_wrong_arguments_are_refused(
    app: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("MODEL", raising=False)
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        app.main()
    assert message in capsys.readouterr().err


# The script as a Space runs it: its arguments in the environment.


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    (folder / "examples.txt").write_text("\n".join([*PAIRS, ""]), encoding="utf-8")
    port = free_port()
    variables = {"MODEL": str(folder), "EXAMPLES": str(folder / "examples.txt"), "GRADIO_SERVER_PORT": str(port)}
    variables |= LOCAL | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, FOLDER / "app.py"], env={**os.environ, **variables}, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 240
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        else:
            pytest.fail((folder / "log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def test_programs_get_what_the_pipeline_gives(address: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LOCAL.items():
        monkeypatch.setenv(name, value)
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/generate"]  # type: ignore[index]
    texts = [*PAIRS, ""]
    found = client.predict(texts, num_beams=4, num_return_sequences=2, api_name="/generate")
    expected = pipe(texts, num_beams=4, num_return_sequences=2, return_scores=True)
    for hypotheses, others in zip(found, expected, strict=True):
        for one, other in zip(hypotheses, others, strict=True):
            assert one.keys() == {"generated_text", "score", "log_probability"}
            assert one["generated_text"] == other["generated_text"]
            for name in ("score", "log_probability") if one["generated_text"] else ():
                assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert [hypotheses[0]["generated_text"] for hypotheses in found] == [*PAIRS.values(), ""]
    for arguments, message in (
        (([5],), "not int"),
        ((["a"], 1, 2), "num_return_sequences"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(*arguments, api_name="/generate")


def test_plain_http_will_do(address: str) -> None:
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=f"{address}/gradio_api/call/generate", trust_env=False, timeout=60) as client:
        event = client.post("", json={"data": [["kitaːb"], 1, 1]}).json()["event_id"]
        answer = client.get(f"/{event}").text
    assert "event: complete" in answer
    assert '"generated_text": "كتاب"' in answer.encode().decode("unicode_escape") or "كتاب" in answer


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        yield browser
        browser.close()


@needs_browser
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page(address: str, browser: Any, pipe: Any, app: ModuleType, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, has_touch=width < 500)
    problems: list[str] = []
    page.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or problems.append(request.url)
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.goto(address)
    page.wait_for_selector("#source textarea")
    for source, target in PAIRS.items():
        expected = hypotheses_of(pipe, source, beams=5)[:3]
        page.fill("#source textarea", source)
        if source == "fiancé":
            page.press("#source textarea", "Enter")
        else:
            page.click("#generate")
        page.wait_for_function(
            "text => document.querySelector('#outputs label')?.innerText.includes(text)", arg=f"\u2068{target}\u2069"
        )
        labels = [text for text, _ in app.choices(expected)]
        assert [label.strip() for label in page.locator("#outputs label").all_inner_texts()] == labels
        # Nothing sticks out of the window, and the map scrolls within it.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # The steps run in the output's direction, the source's columns in the source's.
        left = [step.bounding_box()["x"] for step in page.locator(".step").all()[:3]]
        assert (left == sorted(left)) == (target != "كتاب")
        left = [cell.bounding_box()["x"] for cell in page.locator("table.map thead th").all()[:4]]
        assert (left == sorted(left)) == (source != "كتاب")
        alignment = page.evaluate("getComputedStyle(document.querySelector('#source textarea')).unicodeBidi")
        assert alignment == "plaintext"
        # Pointing at a step shows its alternatives, in the place of the hint; tapping or the keyboard as well.
        steps = page.locator(".step")
        assert steps.count() == len(expected[0]["target_tokens"])
        for index in (0, 1):
            steps.nth(index).hover()
            assert steps.nth(index).locator(".alternatives").is_visible()
            assert not steps.nth(1 - index).locator(".alternatives").is_visible()
            box = steps.nth(index).locator(".alternatives").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        page.mouse.move(1, 1)
        assert page.locator(".alternatives:visible").count() == 0
        steps.nth(2).tap() if width < 500 else steps.nth(2).click()
        page.mouse.move(1, 1)
        assert steps.nth(2).locator(".alternatives").is_visible()
        # Another output has another heat map.
        page.locator("#outputs label").nth(1).click()
        tokens = [app.shown(token, pipe.tokenizer) for token in expected[1]["target_tokens"]]
        page.wait_for_function("n => document.querySelectorAll('.step').length == n", arg=len(tokens))
        page.wait_for_function(
            "tokens => [...document.querySelectorAll('tbody th')].map(e => e.innerText).join() == tokens.join()",
            arg=tokens,
        )
        assert page.locator("table.map td").count() == expected[1]["attention"].numel()
    # An example fills the box; without a text there is a message, and the page goes on.
    page.locator("#examples button, .example").first.click()
    page.wait_for_function("text => document.querySelector('#source textarea').value == text", arg="كتاب")
    page.fill("#source textarea", "  ")
    page.click("#generate")
    page.wait_for_selector("text=There is no text to start from.")
    assert problems == []
    page.close()
