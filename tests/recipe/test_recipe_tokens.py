"""Stage 5: the sentencepiece token list is one that ESPnet reads, and texts come back from it whole."""

import random

import pytest
from espnet2.text.sentencepiece_tokenizer import SentencepiecesTokenizer
from espnet2.text.token_id_converter import TokenIDConverter

from espnet_mega_plugin.recipe.tokens import token_list, train_bpe

WORDS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ON OFF THE LIGHT".split()


@pytest.fixture(scope="module")
def sentences():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(200)]


@pytest.mark.parametrize(("mode", "size"), [("unigram", 30), ("unigram", 34), ("bpe", 40), ("char", 20)])
def test_round_trip_through_espnets_classes(tmp_path, sentences, mode, size):
    model = train_bpe(sentences, size, mode)
    tokens = token_list(model)
    assert len(tokens) == len(set(tokens)) == size
    assert tokens[:2] == ["<blank>", "<unk>"] and tokens[-1] == "<sos/eos>"
    (tmp_path / "bpe.model").write_bytes(model)
    (tmp_path / "tokens.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    tokenizer = SentencepiecesTokenizer(str(tmp_path / "bpe.model"))
    converter = TokenIDConverter(str(tmp_path / "tokens.txt"))
    for sentence in sentences:
        ids = converter.tokens2ids(tokenizer.text2tokens(sentence))
        assert not {0, 1, size - 1} & set(ids)  # no blank, no unknown, no end of sentence
        assert tokenizer.tokens2text(converter.ids2tokens(ids)) == sentence


def test_symbols_stay_whole(sentences):
    noisy = [f"<noise> {sentence}" for sentence in sentences]
    assert "<noise>" in token_list(train_bpe(noisy, 40, symbols=["<noise>"]))


def test_the_same_text_gives_the_same_model(sentences):
    assert train_bpe(sentences, 30) == train_bpe(sentences, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["ONE TWO"], 500), "nbpe 500 with bpemode unigram does not fit this text; sentencepiece: .*500"),
        ((["ONE TWO THREE"], 5), "nbpe 5 with"),
        (([], 30), "the training text is empty"),
        ((["", ""], 30), "the training text is empty"),
        ((["ONE"], 30, "wordpiece"), "bpemode must be one of unigram, bpe, char, word; got 'wordpiece'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(*arguments)
