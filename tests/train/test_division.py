from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from spikelm.corpus import BLOCK_CHARACTERS, Piece, in_pieces
from spikelm.errors import DataError
from spikelm_train.texts.division import Held, check_disjoint, divide

DOCUMENTS = [f"Document {i}.\n" * (i % 7 + 1) for i in range(60)]


def reader(documents: Sequence[str]) -> Callable[[int], Iterator[Piece]]:
    return lambda limit: (piece for text in documents for piece in in_pieces([text], limit))


def split(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str], int]:
    """Documents of both sides, and how many copies were left out."""
    division, held = divide(reader(documents), fraction), Held()
    assert division.num_bytes == sum(len(text.encode()) for text in documents)
    sides: dict[str, list[str]] = {"train": [], "validation": []}
    for side, (text, begins, _) in division.split(reader(documents)(division.limit), held):
        if begins:
            sides[side].append("")
        sides[side][-1] += text
    return sides["train"], sides["validation"], held.duplicates


def test_it_is_deterministic_and_keeps_everything() -> None:
    train, validation, copies = split(DOCUMENTS, 0.1)
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert train == [text for text in DOCUMENTS if text in set(train)]
    assert 0.1 <= sum(map(len, validation)) / sum(map(len, DOCUMENTS)) < 0.15
    assert copies == 0
    again = split(DOCUMENTS[::-1], 0.1)
    assert sorted(again[1]) == sorted(validation)


def test_copies_of_held_out_documents_are_left_out() -> None:
    copies = [f"  {text}\n".replace(" ", "  ") for text in DOCUMENTS]
    train, validation, left_out = split(DOCUMENTS + copies, 0.2)
    held = {" ".join(text.split()) for text in validation}
    assert len(held) == len(validation) == left_out
    assert not held & {" ".join(text.split()) for text in train}
    assert len(train) == 120 - 2 * left_out


def test_a_book_is_cut_at_paragraphs_and_stays_whole_elsewhere() -> None:
    book = "".join(f"Paragraph {i}. " + "word " * (i % 90) + "\n\n" for i in range(4000))
    train, validation, _ = split([book], 0.05)
    assert len(book) > 10 * BLOCK_CHARACTERS
    assert len("".join(train + validation)) == len(book)
    for text in train + validation:
        assert text.startswith("Paragraph")
        assert text in book
    # What is trained on is interrupted by what is not, and by nothing else.
    assert len(train) <= len(validation) + 1
    assert max(map(len, train)) > 2 * BLOCK_CHARACTERS


def test_a_short_text_that_stands_alone_is_cut() -> None:
    text = "".join(f"Sentence {i} of a short text.\n\n" for i in range(200))
    train, validation, _ = split([text], 0.02)
    assert sum(map(len, train + validation)) == len(text)
    assert 0.02 * len(text) <= sum(map(len, validation)) < 0.12 * len(text)


def test_a_text_of_few_blocks_holds_out_no_more_than_asked() -> None:
    text = "".join(f"Sentence {i} of a text.\n\n" for i in range(6000))
    assert 2 * BLOCK_CHARACTERS < len(text) < 3 * BLOCK_CHARACTERS
    for fraction in (0.02, 0.1, 0.9):
        _, validation, _ = split([text], fraction)
        assert fraction <= sum(map(len, validation)) / len(text) < 1.3 * fraction


@pytest.mark.parametrize("documents", [["one"], ["same", "same"], ["same", " same\n"]])
def test_it_needs_two_texts(documents: list[str]) -> None:
    with pytest.raises(DataError, match="cannot be split into training and validation"):
        split(documents, 0.1)


def test_check_disjoint() -> None:
    check_disjoint(DOCUMENTS[:9], DOCUMENTS[9:], "test")
    with pytest.raises(DataError, match=r"2 test document\(s\) .* the first one 'Document 8\."):
        check_disjoint(DOCUMENTS[:10], ["new", f" {DOCUMENTS[8]}", DOCUMENTS[9]], "test")
