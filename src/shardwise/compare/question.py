"""The fixed input of a comparison: a prompt for the logits and the answer, and a batch for the training step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

QUESTION: Final = "What is the capital of France?"

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_PROMPT_TOKENS: Final = 16
_BATCH_TOKENS: Final = 16
_ANSWER_TOKENS: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt in tokens, and what turns tokens back into words.

    Args:
        token_ids: The prompt; shape (1, tokens).
        tokenizer: None where the model has none with a chat template.
    """

    token_ids: torch.Tensor
    tokenizer: Any

    @property
    def batch(self) -> torch.Tensor:
        """The prompt's tokens, repeated to a batch of fixed length; shape (1, tokens)."""
        times = -(-_BATCH_TOKENS // self.token_ids.shape[1])
        return self.token_ids.repeat(1, times)[:, :_BATCH_TOKENS]

    def answer(self, model: Any) -> str | None:
        """Return the model's greedy answer; every rank has to call it.

        Returns:
            The answer, or None where there is no chat template to ask with.
        """
        if self.tokenizer is None:
            return None
        generated = model.generate(
            input_ids=self.token_ids,
            attention_mask=torch.ones_like(self.token_ids),
            do_sample=False,
            max_new_tokens=_ANSWER_TOKENS,
        )
        said = self.tokenizer.decode(generated[0, self.token_ids.shape[1] :], skip_special_tokens=True)
        return str(said).strip()


def question_for(directory: Path, *, vocabulary: int, device: torch.device) -> Question:
    """Return the question in the tokens of the model in `directory`, or fixed tokens where it cannot be asked.

    Args:
        directory: The checkpoint.
        vocabulary: Number of tokens that the model knows.
        device: Where the tokens are to be.
    """
    tokenizer = _chat_tokenizer(directory)
    if tokenizer is None:
        token_ids = (torch.arange(_PROMPT_TOKENS) % vocabulary).unsqueeze(0)
    else:
        messages = [{"role": "user", "content": QUESTION}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        token_ids = encoded["input_ids"]
    return Question(token_ids=token_ids.to(device), tokenizer=tokenizer)


def _chat_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, ImportError):
        # The comparison is of weights; it goes on with fixed tokens.
        return None
    return tokenizer if tokenizer.chat_template else None
