"""Parts that messages of errors have in common."""

from __future__ import annotations

import pytest

from shardwise.errors import listed, shortened


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "w0"),
        (5, "w0, w1, w2, w3, w4"),
        (6, "w0, w1, w2, w3, w4 and 1 more"),
        (2415, "w0, w1, w2, w3, w4 and 2,410 more"),
    ],
)
def test_of_many_names_the_first_five_are_said_and_how_many_more_there_are(count: int, text: str) -> None:
    assert listed([f"w{number}" for number in range(count)]) == text


def test_words_are_cut_where_it_is_said() -> None:
    assert shortened((3, 1, 4), most=2, between="; ") == "3; 1 and 1 more"
