"""The prompt QCM-A (question, context, options; the answer alone), and its tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from science_questions.data import Problem

__all__ = [
    "LETTERS",
    "Tokens",
    "answer_of",
    "choice_in",
    "pad_token",
    "prompt_of",
    "question_tokens",
    "training_tokens",
]

LETTERS = "ABCDE"
LEAD = "The answer is"
"""What the answer's letter follows; evaluation puts it behind the prompt, and no shortening may cost it."""


class Tokens(NamedTuple):
    """Token ids, of which the first ``prompt`` are not to be learned."""

    ids: list[int]
    prompt: int


def prompt_of(problem: Problem) -> str:
    """``Question: … Context: … Options: (A) … (B) … Response:`` on four lines.

    Raises:
        ValueError: more choices than letters.
    """
    if len(problem.choices) > len(LETTERS):
        raise ValueError(
            f"problem {problem.id} has {len(problem.choices)} choices; the prompt has letters for {len(LETTERS)}"
        )
    context = " ".join((problem.hint, problem.caption)).strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
    text = f"Question: {problem.question}\nContext: {context}\nOptions: {options}\nResponse:"
    return text.replace("  ", " ").strip()


def answer_of(problem: Problem) -> str:
    """``The answer is A.``; the official code puts no space between ``Response:`` and it, nor do we."""
    return f"{LEAD} {LETTERS[problem.answer]}."


def choice_in(text: str, problem: Problem) -> int:
    """The choice that a generated text names by its first capital letter; -1 when there is no such choice."""
    found = re.search(r"[A-Z]", text)
    letter = found[0] if found else ""
    return LETTERS.index(letter) if letter and letter in LETTERS[: len(problem.choices)] else -1


def training_tokens(tokenizer: PreTrainedTokenizerBase, problem: Problem, limit: int) -> Tokens:
    """Prompt, answer and end of sequence, at most ``limit`` tokens; too long a context loses its own end."""
    prompt, answer = prompt_of(problem), answer_of(problem)
    head, whole = _encode(tokenizer, prompt), _encode(tokenizer, prompt + answer)
    learned = len(whole) - _shared(head, whole) + 1
    ids = _shorten(tokenizer, prompt, [*whole, tokenizer.eos_token_id], limit, keep=learned)
    return Tokens(ids, len(ids) - learned)


def question_tokens(tokenizer: PreTrainedTokenizerBase, problem: Problem, limit: int) -> list[int]:
    """Prompt and ``The answer is``, at most ``limit`` tokens; too long a context loses its own end."""
    prompt = prompt_of(problem)
    head, whole = _encode(tokenizer, prompt), _encode(tokenizer, prompt + LEAD)
    return _shorten(tokenizer, prompt, whole, limit, keep=len(whole) - _shared(head, whole))


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: its own pad, or unknown, or end of sequence; never one that an answer may consist of.

    Raises:
        ValueError: the tokenizer has none of them, or it is part of an answer.
    """
    texts = [f"{LEAD} {letter}." for letter in LETTERS]
    answers = {token for ids in tokenizer(texts, add_special_tokens=False).input_ids for token in ids}
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate not in answers:
            return int(candidate)
    raise ValueError("the tokenizer has no pad, unknown or end token that is not part of an answer: add a pad token")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + list(tokenizer(text, add_special_tokens=False).input_ids)


def _shared(a: list[int], b: list[int]) -> int:
    """How many tokens two lists start with in common; where texts meet a tokenizer may join what it would else split."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shorten(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], limit: int, *, keep: int) -> list[int]:
    """Drop what is too much from the end of the context, then from the start; never the last ``keep``."""
    excess = len(ids) - limit
    if excess <= 0:
        return ids
    if keep >= limit:
        raise ValueError(f"a limit of {limit} tokens leaves nothing of the question beside an answer of {keep}")
    context, _, _ = prompt.rpartition("\nOptions: ")
    question, _, _ = context.partition("\nContext: ")
    first = _shared(_encode(tokenizer, question), ids)
    last = _shared(_encode(tokenizer, context), ids)
    cut = min(excess, last - first)
    ids = ids[: last - cut] + ids[last:]
    excess -= cut
    return ids[:1] + ids[1 + excess :]
