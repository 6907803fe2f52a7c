"""The training text: what every Python installation says about itself.

Three kinds of document, all prose: the language reference's topics (``pydoc_data.topics``), the docstrings and
block comments of the standard library's Python files, and the docstrings of its compiled modules. Each document
falls into one split by the hash of its name, so a machine with the same Python builds the same corpus.

Docstrings repeat across files, so a paragraph is kept once, in the first split that has it, held-out before
validation before train: what is held out was never trained on.

    python -m training.corpus --out .corpus
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

# Order matters: an earlier split keeps a paragraph that a later one repeats.
SPLITS = ("heldout", "validation", "train")
HELDOUT_PERCENT = 4
VALIDATION_PERCENT = 4
SALT = "flute:"  # chosen, before any training, so that the held-out part has all three kinds of document

PARAGRAPH_BREAK = "\n\n"
DOCUMENT_BREAK = "\n\n\n"  # never occurs inside a document, whose paragraphs are one blank line apart

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
MIN_COMMENT_LINES = 2  # a one-line comment explains a line of code that is not here to be read
DISTINCTIVE_WORDS = 6  # shorter ones, such as "For example:", join paragraphs and may stand in every split
SIGNATURE = re.compile(r"^(?:def|class) [^\n]*\n")


class Document(NamedTuple):
    """A name, which alone decides the split, and text in paragraphs one blank line apart."""

    name: str
    text: str


def digest(name: str) -> bytes:
    """A hash of a document's name, the same on every machine: it orders the documents and splits them."""
    return hashlib.sha256((SALT + name).encode()).digest()


def split_of(name: str) -> str:
    """The split a document belongs to, by its name alone."""
    percentile = int.from_bytes(digest(name)[:8], "big") % 100
    if percentile < HELDOUT_PERCENT:
        return "heldout"
    return "validation" if percentile < HELDOUT_PERCENT + VALIDATION_PERCENT else "train"


def fingerprint(paragraph: str) -> str:
    """What makes two paragraphs the same: their words, without case or layout.

    The signature above a docstring is left out, since methods share docstrings, unless the rest is too short to tell.
    """
    body = words(SIGNATURE.sub("", paragraph))
    return " ".join(body if len(body) >= DISTINCTIVE_WORDS else words(paragraph))


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def is_distinctive(paragraph: str) -> bool:
    """Whether a paragraph is long enough that meeting it in two splits would be a leak."""
    return len(words(paragraph)) >= DISTINCTIVE_WORDS


def tidy(text: str) -> str:
    """Text without control characters, trailing blanks or runs of blank lines."""
    text = re.sub(r"[^\n\x20-\x7e\u00a0-\uffff]", "", text.expandtabs().replace("\r\n", "\n"))
    text = re.sub(r"[ \u00a0]+\n", "\n", text)
    return re.sub(r"\n{3,}", PARAGRAPH_BREAK, text).strip()


def topic_documents() -> Iterator[Document]:
    """The language reference as ``help()`` prints it."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topic:{name}", tidy(text))


def signature_line(node: ast.AST) -> str:
    """The line that introduces a docstring: ``def name(arguments):`` or ``class name(bases):``."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases}):\n" if bases else f"class {node.name}:\n"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"def {node.name}({ast.unparse(node.args)}):\n"
    return ""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Each docstring under its signature, with the line it begins on."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and text.strip():
                yield node.body[0].lineno, signature_line(node) + text.strip()


def block_comments(source: str) -> Iterator[tuple[int, str]]:
    """Runs of whole-line comments, without their ``#``, with the line they begin on."""
    block: list[str] = []
    last = start = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        row = token.start[0]
        if row != last + 1:
            if len(block) >= MIN_COMMENT_LINES:
                yield start, "\n".join(block)
            block, start = [], row
        text = token.string.lstrip("#")
        block.append(text.removeprefix(" ") if re.search(r"\w", text) else "")
        last = row
    if len(block) >= MIN_COMMENT_LINES:
        yield start, "\n".join(block)


def source_documents(stdlib: Path) -> Iterator[Document]:
    """One document for each Python file: its docstrings and block comments in the order they are written."""
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
            pieces = sorted([*docstrings(source), *block_comments(source)])
        except (SyntaxError, UnicodeDecodeError):  # a few files are templates or deliberately odd
            continue
        text = tidy(PARAGRAPH_BREAK.join(piece for _, piece in pieces))
        if text:
            yield Document(f"source:{relative.as_posix()}", text)


def described(name: str, member: object) -> str:
    """A compiled object's docstring under its signature, or nothing."""
    text = getattr(member, "__doc__", None)
    if not isinstance(text, str) or not text.strip():
        return ""
    if inspect.isclass(member):
        return f"class {name}:\n{inspect.cleandoc(text)}"
    signature = getattr(member, "__text_signature__", None) or ""
    heading = f"def {name}{signature.replace('$', '')}:\n" if signature else ""
    return heading + inspect.cleandoc(text)


def compiled_documents() -> Iterator[Document]:
    """One document for each compiled module: what its functions, classes and methods say of themselves."""
    for name in sorted(sys.stdlib_module_names):
        try:
            spec = importlib.util.find_spec(name)
            if spec is None or not (spec.origin or "").endswith(("built-in", *EXTENSION_SUFFIXES)):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                module = importlib.import_module(name)
        except (ImportError, ValueError):  # listed for every platform, present on some
            continue
        pieces = [inspect.getdoc(module) or ""]
        for key, member in sorted(vars(module).items()):
            if not inspect.isclass(member):
                pieces.append(described(key, member) if inspect.isroutine(member) else "")
            elif member.__module__ == name:
                pieces.append(described(key, member))
                pieces += [described(attribute, value) for attribute, value in sorted(vars(member).items())]
        text = tidy(PARAGRAPH_BREAK.join(filter(None, pieces)))
        if text:
            yield Document(f"compiled:{name}", text)


def documents() -> list[Document]:
    """Every document of the running Python."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return [*topic_documents(), *source_documents(stdlib), *compiled_documents()]


def build(found: Iterable[Document]) -> dict[str, list[str]]:
    """The texts of each split, with no distinctive paragraph in more than one place."""
    everything = sorted(found, key=lambda document: digest(document.name))
    seen: set[str] = set()
    corpus: dict[str, list[str]] = {}
    for split in SPLITS:
        corpus[split] = []
        for document in everything:
            if split_of(document.name) != split:
                continue
            kept = []
            for paragraph in document.text.split(PARAGRAPH_BREAK):
                key = fingerprint(paragraph)
                if not is_distinctive(paragraph) or key not in seen:
                    kept.append(paragraph)
                    seen.add(key)
            if any(map(is_distinctive, kept)):
                corpus[split].append(PARAGRAPH_BREAK.join(kept))
    return corpus


def write(corpus: dict[str, list[str]], folder: Path) -> None:
    """One text file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in corpus.items():
        (folder / f"{split}.txt").write_text(DOCUMENT_BREAK.join(texts) + "\n", encoding="utf-8")


def read(folder: Path, split: str) -> list[str]:
    """The documents of a split that ``write`` wrote."""
    path = folder / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: build the corpus first, python -m training.corpus --out {folder}")
    return path.read_text(encoding="utf-8").removesuffix("\n").split(DOCUMENT_BREAK)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the training text from the running Python's own documentation.")
    parser.add_argument("--out", type=Path, default=Path(".corpus"), help="folder for the text files (default .corpus)")
    folder = parser.parse_args().out
    corpus = build(documents())
    write(corpus, folder)
    for split, texts in corpus.items():
        print(f"{split}: {len(texts)} documents, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
