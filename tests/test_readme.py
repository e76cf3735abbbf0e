"""README and docs: snippets run, each alone and one after another on its page; commands parse; links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from pyvidx.__main__ import COMMANDS
from pyvidx.data import motion
from pyvidx.models import MALMM
from tests.test_published import chat_files, pretraining_file, vectors
from tests.torchvision_shim import mend_torchvision

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of the code blocks of a language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start()) + 2, m[1]) for m in found]


SNIPPETS = {page: blocks(page, "python") for page in PAGES}
ALONE = [pytest.param(page, *s, id=f"{page.name} line {s[0]}") for page in PAGES for s in SNIPPETS[page]]


def commands(page: Path) -> list[str]:
    """Lines of the sh blocks, and commands in the text."""
    lines = [line.split("#")[0].strip() for _, block in blocks(page, "sh") for line in block.splitlines()]
    inline = re.findall(r"`((?:pyvidx|python -m|make|pytest) [^`]+)`", page.read_text())
    return [line for line in lines if line] + inline


COMMANDS_TOLD = list(dict.fromkeys(line for page in PAGES for line in commands(page)))


def given_here(words: list[str], folder: Path) -> list[str]:
    """Arguments whose files are there: those of the project, and in the folder those that a reader would have."""
    found = []
    for word in words:
        if (ROOT / word).is_file():
            word = str(ROOT / word)
        elif word.endswith("/"):
            (folder / word).mkdir(exist_ok=True)
        elif Path(word).suffix and "://" not in word and not word.startswith("-"):
            (folder / word).touch()
        found.append(word)
    return found


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What is the reader's own: a video, published weights, a language model and its tokenizers."""
    pytest.importorskip("av", reason="README reads a video: pip install 'pyvidx[video]'")
    mend_torchvision()
    pytest.importorskip("transformers", reason="README has a language model: pip install 'pyvidx[hosts]'")
    import transformers

    from tests.test_language import tokenizer

    folder = tmp_path_factory.mktemp("readme")
    motion.write_clip(folder / "video.mp4", motion.random_scenes(1, seed=0)[0])
    chat_files(folder, vectors("bt_adapter/llava_sft"))
    pretraining_file(folder / "pretrain_btadapter_weight.pth", vectors("bt_adapter/mma_eval").part("weights."))
    width = MALMM.default().projection.out_features
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=width, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, bos_token_id=1, eos_token_id=2)  # fmt: skip
    names = {"causal_lm": transformers.LlamaForCausalLM(config), "tokenizer": tokenizer()}
    names |= {"bert_tokenizer": tokenizer(bos=False)}
    pytest.importorskip("transformers", minversion="5.20.2", reason="docs hand videos to language models")
    from tests.hosts.chats import PROCESSORS
    from tests.hosts.tiny import entries

    vlm, processor = entries()["llava_onevision"].model(), PROCESSORS["llava_onevision"]()
    frames = motion.render(motion.random_scenes(1, seed=0)[0], 20, 32)
    return folder, names | {"vlm": vlm, "processor": processor, "prompt": "<video>what happens?", "frames": frames}


@pytest.fixture(autouse=True)
def gradients_as_they_were():
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("page, line, text", ALONE)
def test_a_snippet_alone(page, line, text, given, monkeypatch):
    folder, names = given
    monkeypatch.chdir(folder)
    exec(compile("\n" * (line - 1) + text, page.name, "exec"), dict(names))


@pytest.mark.parametrize("page", [page for page in PAGES if len(SNIPPETS[page]) > 1], ids=lambda page: page.name)
def test_the_snippets_one_after_another(page, given, monkeypatch):
    folder, names = given
    monkeypatch.chdir(folder)
    together = dict(names)
    for line, text in SNIPPETS[page]:
        exec(compile("\n" * (line - 1) + text, page.name, "exec"), together)


def test_there_are_snippets_and_commands():
    assert len(ALONE) >= 8 and len(COMMANDS_TOLD) >= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Those into the project, and the pages of docs that README does not lead to."""
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert all((page.parent / link).exists() for link in links), [x for x in links if not (page.parent / x).exists()]
    if page.name == "README.md":
        assert {str(p.relative_to(ROOT)) for p in PAGES[1:]} <= set(links)
        assert len(page.read_text().splitlines()) < 150


@pytest.mark.parametrize("line", COMMANDS_TOLD)
def test_a_command_parses(line, tmp_path, monkeypatch):
    """With the parser of its command; what other programs take is only known to be there."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    while re.fullmatch(r"\w+=\S+", words[0]):
        words = words[1:]
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(.*?)\]", line)
        known = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{name} = ", known, re.MULTILINE) for e in extras for name in e.split(",")), line
    elif words[0] == "pytest":
        assert (ROOT / words[1]).exists(), line
    elif words[0] == "pyvidx":
        assert words[1] in COMMANDS, line
        module = importlib.import_module(f"pyvidx.cli.{words[1]}")
        module.parser().parse_args(given_here([word for word in words[2:] if word != "..."], tmp_path))
    elif words[:2] == ["python", "-m"]:
        path = ROOT / words[2].replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir() or words[2] == "pytest", line
    else:  # of other programs, and of the shell
        assert words[0] in ("cmake", "apt-get", "pip-audit", "python3", "python", "export", "$CUDA_HOME/bin/nvcc"), line
