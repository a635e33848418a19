"""A tokenizer of words, for tests of text and windows."""

import json
import re
from dataclasses import dataclass

BOS, EOS = 1, 2
WORDS, CHARACTERS = r"\S+", r"(?s)."


@dataclass
class Encoding:
    input_ids: list[int]


class FakeTokenizer:
    """A token is a match of `pattern`; ids are given in the order of first sight. `calls` holds
    every text that was tokenized.
    """

    def __init__(self, pattern: str = WORDS, bos: int | None = BOS, append_eos: bool = False):
        self.bos_token_id, self.eos_token_id = bos, EOS
        self.pattern, self.append_eos = re.compile(pattern), append_eos
        self.ids: dict[str, int] = {}
        self.calls: list[str] = []

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> Encoding:
        self.calls.append(text)
        tokens = [
            self.ids.setdefault(token, 10 + len(self.ids)) for token in self.pattern.findall(text)
        ]
        if add_special_tokens:
            tokens = (
                [self.bos_token_id] * (self.bos_token_id is not None)
                + tokens
                + [EOS] * self.append_eos
            )
        return Encoding(tokens)

    def decode(self, tokens) -> str:
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[token] for token in tokens)

    def apply_chat_template(self, messages: list[dict], tokenize: bool = True) -> str:
        assert not tokenize
        return "".join(f"<{message['role']}> {message['content']}\n" for message in messages)


def numbers(start: int, stop: int) -> str:
    """Words that are all different."""
    return " ".join(f"n{number}" for number in range(start, stop))


def plain(tokenizer: FakeTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def jsonl(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
