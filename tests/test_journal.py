"""What was written down is found again; what is of something else or damaged is said."""

import json

import pytest

from slimkit.journal import Journal


def opened(path, key="a", said=None):
    return Journal(path, key, int, (said if said is not None else []).append)


def written(path, *entries):
    journal = opened(path)
    journal.start({"more": 1})
    for entry in entries:
        journal.add(entry)
    return path


def test_results_and_header_come_back(tmp_path):
    again = opened(written(tmp_path / "new" / "file.jsonl", 1, 2, 3))
    assert again.results == [1, 2, 3]
    assert again.header["more"] == 1


def test_half_a_last_line_is_left_out_and_writing_goes_on_behind_what_is_whole(tmp_path):
    path = written(tmp_path / "file.jsonl", 10, 20)
    path.write_text(path.read_text()[:-2])  # the line now reads 2
    path.write_text(path.read_text() + '"')
    said = []
    journal = opened(path, said=said)
    assert journal.results == [10]
    assert said == []
    journal.start()
    journal.add(30)
    assert opened(path).results == [10, 30]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", None),
        ("\x00\x01nonsense\n", "damaged: starting over"),
        ("[1, 2]\n3\n", "damaged: starting over"),
        ('{"key": "b"}\n3\n', "of another model, data or options: starting over"),
    ],
)
def test_a_file_of_something_else_is_begun_anew_and_that_is_said(tmp_path, text, message):
    path, said = tmp_path / "file.jsonl", []
    path.write_text(text)
    journal = opened(path, said=said)
    assert journal.results == []
    assert [message] == [line.partition(" is ")[2] for line in said] or (not said and not message)
    journal.start()
    assert json.loads(path.read_text()) == {"key": "a"}


def test_damage_in_the_middle_is_said_and_what_is_behind_is_gone(tmp_path):
    path, said = written(tmp_path / "file.jsonl", 1, 2, 3), []
    lines = path.read_text().splitlines()
    lines[2] = '"two"'
    path.write_text("\n".join(lines) + "\n")
    assert opened(path, said=said).results == [1]
    assert "is damaged in line 3: what comes behind is computed again" in said[0]
