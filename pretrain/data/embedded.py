"""Corpora that every Python carries, so that a first run needs no download.

`stdlib-code` is the standard library's source, one document a file. `stdlib-english` is the
language reference of `pydoc_data.topics`, one document a topic, and the docstrings of the
library's modules, one document a module. Both are read from whatever Python is running.
"""

from __future__ import annotations

import ast
import functools
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests are repetitive and large; encodings are tables; pydoc_data is the English corpus.
EXCLUDED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def code_files() -> list[Path]:
    """The standard library's own source files, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in EXCLUDED and not s.startswith("config-")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def code_documents() -> Iterator[str]:
    """One source file a document."""
    for path in code_files():
        yield path.read_text(encoding="utf-8-sig", errors="replace")


def english_documents() -> Iterator[str]:
    """One reference topic, then one module's docstrings, a document."""
    yield from _english()


# Parsing the library takes seconds, and a tokenizer and its corpus both read the text.
@functools.cache
def _english() -> tuple[str, ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    documents = [topics[name] for name in sorted(topics)]
    for source in code_documents():
        text = "\n\n".join(_docstrings(source))
        if text:
            documents.append(text + "\n")
    return tuple(documents)


def _docstrings(source: str) -> list[str]:
    """Docstrings of a module, its classes and functions, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and Python 2 sources
        return []
    return [text for text in map(ast.get_docstring, _documented(tree)) if text]


def _documented(node: ast.AST) -> Iterator[Documented]:
    """Nodes under `node` that may have a docstring; expressions, most of a tree, are passed by."""
    if isinstance(node, Documented):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _documented(child)


EMBEDDED = {"stdlib-code": code_documents, "stdlib-english": english_documents}


def identity() -> list[object]:
    """What both corpora depend on: the Python version and the files with their sizes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sizes = [[path.relative_to(root).as_posix(), path.stat().st_size] for path in code_files()]
    return [platform.python_version(), sizes]
