r"""The symbols of a text: its bytes, as numbers."""

import codecs
from typing import Any, NamedTuple

import numpy as np

from jaxbptt.tasks.files import InputError

# The second and further bytes of a UTF-8 character.
LATER_BYTES = bytes(range(0x80, 0xC0))


class Vocabulary(NamedTuple):
    """The bytes that a model of text knows.

    Attributes:
        symbols: the bytes, in order; a symbol's number is its place here.
    """

    symbols: tuple[int, ...]

    def encode(self, text: str) -> np.ndarray:
        """Symbol numbers, int32, of the text's UTF-8 bytes.

        Raises:
            InputError: characters that the model has never seen, which are named.
        """
        known = set(self.symbols)
        unknown = [character for character in dict.fromkeys(text) if not known.issuperset(character.encode())]
        if unknown:
            raise InputError(
                f"The model has never seen {', '.join(map(repr, unknown[:5]))}: use only characters of its training text."
            )
        numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        return np.array([numbers[byte] for byte in text.encode()], np.int32)

    def decode(self, numbers: Any) -> str:
        r"""The text of symbol numbers; bytes that are not valid UTF-8 become `"\ufffd"`.

        A character that is cut off at either end is left out.
        """
        raw = bytes(np.array(self.symbols, np.uint8)[np.asarray(numbers)])
        # Without final=True the decoder holds an incomplete last character back.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return decoder.decode(raw[:3].lstrip(LATER_BYTES) + raw[3:])
