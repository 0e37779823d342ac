"""A cache of encoded words: three times as fast as the tokenizers library alone, with the same ids.

Qwen's pattern splits text into words, and BPE merges never cross them, so each word needs to be encoded only once. The
pattern runs in the `regex` library, whose Unicode version may differ from that of `tokenizers`; the caller therefore
encodes text with recently changed characters with the library.
"""

import itertools
import re

import numpy as np
import regex
from tokenizers import Tokenizer

# Every character except letters, digits, signs and spaces that are unchanged since Unicode 5 and that NFC never changes
# (Latin, Greek, Cyrillic, Hebrew, Arabic, signs, kana, CJK, Hangul, fullwidth forms).
UNSETTLED = re.compile(
    r"[^\t\n\r -~\u00a0-\u017e\u0180-\u024f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03ce"
    r"\u0400-\u0481\u048a-\u0513\u05d0-\u05ea\u0621-\u063a\u0641-\u064a"
    r"\u2010-\u2027\u2030-\u205e\u20a0-\u20b5\u2190-\u22ff\u2500-\u25ff"
    r"\u3001-\u3011\u3041-\u3096\u30a1-\u30fe\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff5e]"
)
MAX_WORDS = 1 << 17
MAX_WORD_CHARS = 64


class WordEncoder:
    """Caches the ids of up to 131,072 words, about 40 MiB, and is cleared when full."""

    def __init__(self, tokenizer: Tokenizer, pattern: str) -> None:
        self._tokenizer = tokenizer
        self._pattern = regex.compile(pattern)
        self._ids: dict[str, list[int]] = {}

    def encode(self, text: str, dtype: np.dtype) -> np.ndarray | None:
        """The ids of a text, or None if it has a character that must be left to the library."""
        if UNSETTLED.search(text):
            return None
        words = self._pattern.findall(text)
        if len(self._ids) > MAX_WORDS:
            self._ids.clear()
        new_words = [word for word in set(words) if word not in self._ids]
        encoded = self._tokenizer.encode_batch_fast(new_words, add_special_tokens=False)
        self._ids.update((word, one.ids) for word, one in zip(new_words, encoded, strict=True))
        ids = np.fromiter(itertools.chain.from_iterable(map(self._ids.__getitem__, words)), dtype)
        for word in new_words:
            if len(word) > MAX_WORD_CHARS:
                del self._ids[word]  # long words rarely repeat, and their size is unlimited
        return ids
