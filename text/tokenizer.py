"""CLIP's tokenizer: byte-pair encoding (Sennrich et al. 2016, section 3.2) of lower-case words.

A word begins as its bytes, the last one marked as the word's end. Then two neighbours are merged,
always those that come first in CLIP's list, until no two are in it: what remains are its tokens.
"""

import html
import json
from functools import lru_cache
from itertools import pairwise
from math import inf
from pathlib import Path

import ftfy
import regex

from common.files import atomic_write

MERGES = Path(__file__).with_name("merges.txt")
START, END = 49406, 49407  # the last two tokens of CLIP's vocabulary
WORD_END = "</w>"
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")  # CLIP's own
Pair = tuple[str, str]


class Tokenizer:
    """Text <-> token ids, without start, end and padding."""

    def __init__(self):
        # A byte is written as a printable character: itself, or one from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable}
        self.letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
        _, merges = MERGES.read_text(encoding="utf-8").split("\n\n")  # a licence comes first
        pairs = [tuple(line.split(" ")) for line in merges.rstrip("\n").split("\n")]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        letters = list(self.letters.values())
        self.tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, pairs)]
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        self.known: dict[str, list[int]] = {}  # words that were split before

    def encode(self, text: str) -> list[int]:
        """The ids of a text's tokens. Damaged Unicode, HTML entities, capitals and spaces are
        cleaned first as in open_clip, with which OpenCLIP's models were trained."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        words = WORD.findall(" ".join(text.split()).lower())
        return [number for word in words for number in self.word(word)]

    def word(self, word: str) -> list[int]:
        """The ids of one word's tokens."""
        if word not in self.known:
            parts = [self.letters[byte] for byte in word.encode()]
            parts[-1] += WORD_END
            while first := self.first_pair(parts):
                parts = merged(parts, first)
            self.known[word] = [self.ids[part] for part in parts]
        return self.known[word]

    def first_pair(self, parts: list[str]) -> Pair | None:
        """The neighbours that come first in the list; None if no two are in it."""
        first = min(pairwise(parts), key=lambda pair: self.ranks.get(pair, inf), default=None)
        return first if first in self.ranks else None

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, as far as it can be restored."""
        byte_of = {letter: byte for byte, letter in self.letters.items()}
        text = "".join(self.tokens[number] for number in ids)
        text = bytes(byte_of[letter] for letter in text).decode(errors="replace")
        return text.replace(WORD_END, " ").strip()


def merged(parts: list[str], pair: Pair) -> list[str]:
    """The parts with every such pair joined, from the left."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def write_tokenizer(folder: Path, padding: str) -> None:
    """Write the tokenizer as transformers' CLIPTokenizer reads it. `padding`: its token."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": padding}
    _, merges = MERGES.read_text(encoding="utf-8").split("\n\n")
    contents = {
        "merges.txt": f"#version: 0.2\n{merges}",
        "vocab.json": json.dumps(tokenizer().ids | {start: START, end: END}, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(special | {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}, indent=2)}
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The one tokenizer, read when the first prompt is encoded: that takes a tenth of a second."""
    return Tokenizer()
