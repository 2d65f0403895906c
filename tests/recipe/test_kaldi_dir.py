"""Kaldi-style data directories: what is written is read back, sorted as the C locale does, and broken ones are refused."""

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_mega_plugin.recipe.kaldi_dir import (
    DataDir,
    c_sorted,
    read_data_dir,
    read_table,
    validate,
    write_data_dir,
    write_table,
)

keys = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8).filter(lambda key: key.split())
values = st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), max_size=20).map(
    lambda text: " ".join(text.split())
)


@pytest.fixture
def corpus(tmp_path):
    """A sound directory of three utterances by two speakers."""
    wav = {}
    for utterance in ("anna-1", "anna-2", "bob-1"):
        wav[utterance] = str(tmp_path / f"{utterance}.wav")
        (tmp_path / f"{utterance}.wav").write_bytes(b"RIFF")
    text = {"anna-1": "ONE", "anna-2": "TWO THREE", "bob-1": "FOUR"}
    write_data_dir(tmp_path / "set", DataDir(wav, text, {utterance: utterance[:-2] for utterance in wav}))
    return tmp_path / "set"


@settings(max_examples=100, deadline=None)
@given(table=st.dictionaries(keys, values, max_size=20))
def test_a_table_is_read_as_it_was_written(table, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "table"
    write_table(path, table)
    assert read_table(path, empty_values=True) == table


def test_lines_are_sorted_as_sort_does(tmp_path):
    names = ["b", "B", "a-1", "a_1", "a", "é", "Z9", "a.1", "10", "9", "aB", "😀", "ﬀ"]
    write_table(tmp_path / "table", dict.fromkeys(names, "x y"))
    content = (tmp_path / "table").read_bytes()
    oracle = subprocess.run(["sort"], input=content, capture_output=True, check=True, env={"LC_ALL": "C"})
    assert content == oracle.stdout
    assert c_sorted(names) != sorted(names, key=str.casefold)


def test_a_character_that_python_takes_for_a_line_break_stays_in_its_line(tmp_path):
    table = {"a": "one\u2028two", "b": "three\x85four"}
    write_table(tmp_path / "text", table)
    assert read_table(tmp_path / "text") == table


def test_a_directory_is_read_as_it_was_written(corpus):
    data = validate(corpus)
    assert data == read_data_dir(corpus)
    assert data.by_speaker() == {"anna": ["anna-1", "anna-2"], "bob": ["bob-1"]}
    assert (corpus / "spk2utt").read_text() == "anna anna-1 anna-2\nbob bob-1\n"
    assert len(data) == 3


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("text", "anna-1 ONE\nanna-1 TWO\n", "text, line 2: 'anna-1' appears a second time"),
        ("text", "anna-1 ONE\n\nbob-1 FOUR\n", "text, line 2: expected 'key value'"),
        ("text", "anna-1 ONE\nanna-2 TWO\n", "text and wav.scp differ in 1 utterances.*'bob-1' is only in wav.scp"),
        ("text", "anna-1 ONE\nanna-2 A\nbob-1 F\ncarl-1 X\n", "'carl-1' is only in text"),
        ("text", "anna-2 TWO\nanna-1 ONE\nbob-1 FOUR\n", "'anna-1' stands after 'anna-2'"),
        ("text", "anna-1\nanna-2 TWO\nbob-1 FOUR\n", "'anna-1' has no transcript"),
        ("utt2spk", "anna-1 anna\nanna-2\nbob-1 bob\n", "utt2spk, line 2: expected 'key value'"),
        ("utt2spk", "anna-1 bob\nanna-2 anna\nbob-1 bob\n", "not the inverse of utt2spk"),
        ("spk2utt", "anna anna-2 anna-1\nbob bob-1\n", "not the inverse of utt2spk"),
        ("wav.scp", "", "3 utterances"),
    ],
)
def test_a_broken_table_is_named(corpus, table, content, message):
    (corpus / table).write_text(content)
    with pytest.raises(ValueError, match=message):
        validate(corpus)


def test_missing_tables_and_recordings_are_named(corpus):
    (corpus.parent / "bob-1.wav").unlink()
    validate(corpus, recordings=False)
    with pytest.raises(FileNotFoundError, match="recording of 'bob-1' is missing.*bob-1.wav"):
        validate(corpus)
    (corpus / "utt2spk").unlink()
    with pytest.raises(FileNotFoundError, match="utt2spk: no such table; run stage 1"):
        validate(corpus, recordings=False)


def test_speakers_out_of_the_order_of_utterances_are_refused(tmp_path):
    wav = {"1": "a.wav", "2": "b.wav", "3": "c.wav"}
    write_data_dir(tmp_path, DataDir(wav, dict.fromkeys(wav, "YES"), {"1": "bob", "2": "anna", "3": "bob"}))
    with pytest.raises(ValueError, match="begin every utterance's name with its speaker's"):
        validate(tmp_path, recordings=False)


def test_an_empty_directory_is_refused(tmp_path):
    write_data_dir(tmp_path, DataDir({}, {}, {}))
    assert len(read_data_dir(tmp_path)) == 0
    with pytest.raises(ValueError, match="has no utterances"):
        validate(tmp_path)


@pytest.mark.parametrize("table", [{"two words": "x"}, {"": "x"}, {"a": "one\ntwo"}])
def test_what_could_not_be_read_back_is_not_written(tmp_path, table):
    with pytest.raises(ValueError, match="table"):
        write_table(tmp_path / "table", table)
    assert not list(tmp_path.iterdir())


def test_differing_mappings_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="utt2spk and wav.scp differ in 1"):
        write_data_dir(tmp_path / "set", DataDir({"a": "x"}, {"a": "YES"}, {"a": "s", "b": "s"}))
    assert not (tmp_path / "set").exists()
