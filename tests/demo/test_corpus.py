"""The text that the demo model learns from."""

from pathlib import Path

import pytest

from skipkernels.demo.corpus import HELD_OUT_SHARE, MIN_CHARACTERS, Corpus, build_corpus

DOCSTRING = "Says what it does, at a length that is worth the reading and the learning."


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus()


def _body(document: str) -> str:
    return document.partition("\n")[2]


def test_no_held_out_text_is_trained_on(corpus: Corpus) -> None:
    train, held_out = set(map(_body, corpus.train)), set(map(_body, corpus.held_out))
    assert train.isdisjoint(held_out)
    assert len(train) == len(corpus.train)
    assert len(held_out) == len(corpus.held_out)


def test_corpus_is_large_enough_to_learn_from(corpus: Corpus) -> None:
    assert sum(map(len, corpus.train)) > 1_000_000
    assert all(len(_body(document)) >= MIN_CHARACTERS for document in corpus.train)
    share = len(corpus.held_out) / len(corpus.train + corpus.held_out)
    assert share == pytest.approx(HELD_OUT_SHARE, abs=0.01)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of one readable module."""
    (tmp_path / "LICENSE.txt").write_text("Anyone may do anything, " * 10)
    (tmp_path / "shapes.py").write_text(
        f'class Circle(Shape):\n    def area(self, unit=1):\n        """{DOCSTRING}"""\n'
    )
    (tmp_path / "broken.py").write_text("def broken(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_shapes.py").write_text(f'"""Not collected: {DOCSTRING}"""\n')
    return tmp_path


def test_documents_are_found_in_source_files(library: Path) -> None:
    corpus = build_corpus(library)
    documents = corpus.train + corpus.held_out
    assert f"def area(self, unit=1)\n{DOCSTRING}" in documents
    assert not any("Not collected" in document for document in documents)


def test_others_may_go_on_between_two_documents(library: Path) -> None:
    paused: list[None] = []
    corpus = build_corpus(library, lambda: paused.append(None))
    assert len(paused) >= len(corpus.train + corpus.held_out)


def test_corpus_is_the_same_every_time(library: Path) -> None:
    assert build_corpus(library) == build_corpus(library)
