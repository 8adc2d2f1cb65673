"""text8's 27 symbols and bytes as Hugging Face tokenizers with the ids of `alphabets`, for exported directories."""

import tokenizers as hf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from catmaps.text.alphabets import COMBINING, DIGITS, EOS_TOKEN, LETTERS, ByteTokenizer, Text8Tokenizer, Tokenizer
from catmaps.text.tokenizers import HuggingFaceTokenizer


def fast(tokenizer: Tokenizer) -> hf.Tokenizer:
    """A Hugging Face tokenizer with the ids of `tokenizer`."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.inner
    made = {Text8Tokenizer: _text8, ByteTokenizer: _bytes}[type(tokenizer)]()
    made.encode_special_tokens = True  # a text that quotes the end of a document does not end there
    return made


def _text8() -> hf.Tokenizer:
    symbols = {symbol: i for i, symbol in enumerate(Text8Tokenizer().token_strings())}
    tokenizer = hf.Tokenizer(models.WordLevel(symbols, unk_token=" "))
    steps = [
        normalizers.Lowercase(),
        normalizers.NFKD(),
        normalizers.Replace(Regex(COMBINING.pattern.removesuffix("+")), ""),
        normalizers.Lowercase(),
        *(normalizers.Replace(chr(letter), str(plain)) for letter, plain in LETTERS.items()),
        *(normalizers.Replace(str(digit), f" {word} ") for digit, word in enumerate(DIGITS)),
        normalizers.Replace(Regex("[^a-z]+"), " "),
    ]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z ]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bytes() -> hf.Tokenizer:
    # Bytes under the characters that byte-level tokenizers give them: printable ones stand for themselves, the rest, in
    # order, for those from U+0100 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256))
    shown = {byte: chr(byte) if byte in plain else chr(256 + next(others)) for byte in range(256)}
    tokenizer = hf.Tokenizer(models.BPE({character: byte for byte, character in shown.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS_TOKEN, special=True)])
    return tokenizer
