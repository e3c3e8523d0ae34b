"""Tokenise: a document to token ids, and to the tokens that may be labels.

    text         what the tokenizer adds by itself around it (BOS, EOS or nothing), each once, whoever wrote it
    chat         what the tokenizer's chat template makes of it; only answers are supervised (`answer_spans`)
    completion   prompt and completion, as a text; only the completion is supervised
    tokenised    as it is

Whether an end-of-sequence token closes a text or a completion: `auto` where the tokenizer adds one, `always`, `never`.
The text that a person gives is otherwise never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus.answer_spans import find_answers, find_prompt
from kdcache.corpus.chat_template import ChatTemplate
from kdcache.corpus.documents import BadDocument, Completion, Conversation, Document, TokenIds
from kdcache.corpus.exact_tokens import ExactTokens
from kdcache.corpus.packing import Tokens
from kdcache.errors import ConfigError


class Tokeniser:
    """Documents to tokens.

    Args:
        tokenizer: of transformers.
        vocab_size: ids lie below it.
        eos: whether an end-of-sequence token closes texts: `auto`, `always` or `never`.
        date: the day that a chat template may ask for.

    Raises:
        ConfigError: `always`, and the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, *, eos: str = "auto", date: str = "2000-01-01") -> None:
        self._tokenizer, self._vocab_size, self._date = tokenizer, vocab_size, date
        self._before, self._after = special_tokens(tokenizer)
        end = tokenizer.eos_token_id
        if eos == "never":
            self._after = [token for token in self._after if token != end]
        if eos == "always" and end not in self._after:
            if end is None:
                raise ConfigError("eos is always, but the tokenizer has no end-of-sequence token")
            self._after = [*self._after, end]
        self._template: ChatTemplate | None = None
        self._exact: ExactTokens | None = None

    def tokenise(self, documents: Sequence[tuple[int, Document]]) -> list[list[Tokens] | BadDocument]:
        """Tokenise some documents, texts among them in one call.

        Args:
            documents: each with its index in the corpus.

        Returns:
            For each, its sequences, or why it cannot be used. A conversation may have several.

        Raises:
            CorpusError: there are conversations, and no chat template.
        """
        texts = [(number, document) for number, document in documents if isinstance(document, str)]
        encoded = iter(self.texts(texts))
        found: list[list[Tokens] | BadDocument] = []
        for number, document in documents:
            if isinstance(document, str):
                found.append([next(encoded)])
                continue
            try:
                found.append(self._one(number, document))
            except BadDocument as bad:
                found.append(bad)
        return found

    def prompt(self, text: str) -> list[int]:
        """The tokens with which a plain document begins that begins with a text: no special token follows it."""
        return [int(token) for token in self._around(self._plain([text])[0], [])]

    def prompt_of(self, document: Document) -> NDArray[np.int32]:
        """The tokens of a document behind which a model is to write.

        Of a text these are all of it; of a completion its prompt; of a conversation everything before the last answer,
        with the invitation to answer; of token ids those before the first that is supervised, or all.

        Raises:
            BadDocument: there is no text, or see `tokenise`.
            CorpusError: it is a conversation, and there is no chat template.
        """
        if isinstance(document, Conversation):
            self._template = self._template or ChatTemplate(self._tokenizer, self._date)
            return self._encoded(find_prompt(self._template, document), ())[0]
        if isinstance(document, TokenIds):
            ids = self._in_vocabulary(document.ids)
            if document.supervised is not None and document.supervised.any():
                ids = ids[: int(np.argmax(document.supervised))]
            if not len(ids):
                raise BadDocument("no text: no token stands before the first that is supervised")
            return ids
        text = document.prompt if isinstance(document, Completion) else document
        if not text.strip():
            raise BadDocument("no text: the prompt is empty")
        return self._around(self._encoded(text, ())[0], [])

    def texts(self, texts: Sequence[tuple[int, str]]) -> list[Tokens]:
        """Tokenise texts, each with its index in the corpus, in one call."""
        encoded = self._plain([text for _, text in texts]) if texts else []
        return [
            Tokens(document=number, ids=self._around(ids, self._after))
            for (number, _), ids in zip(texts, encoded, strict=True)
        ]

    def _plain(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def _around(self, ids: Sequence[int] | NDArray[np.int32], after: list[int]) -> NDArray[np.int32]:
        """Ids between the special tokens, those left out that stand there already."""
        ids = np.asarray(ids, np.int32)
        before = self._before if ids[: len(self._before)].tolist() != self._before else []
        if after and ids[-len(after) :].tolist() == after:
            after = []
        return np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)])

    def _one(self, number: int, document: Document) -> list[Tokens]:
        if isinstance(document, Conversation):
            return self._conversation(number, document)
        if isinstance(document, Completion):
            return [self._completion(number, document)]
        assert isinstance(document, TokenIds)
        return [self._tokenised(number, document)]

    def _conversation(self, number: int, conversation: Conversation) -> list[Tokens]:
        self._template = self._template or ChatTemplate(self._tokenizer, self._date)
        found = []
        for answer in find_answers(self._template, conversation):
            ids, supervised = self._encoded(answer.text, answer.spans)
            found.append(Tokens(document=number, ids=ids, supervised=supervised, whole=True))
        return found

    def _completion(self, number: int, document: Completion) -> Tokens:
        edge = len(document.prompt)
        ids, supervised = self._encoded(document.text, [(edge, len(document.text))])
        whole = self._around(ids, self._after)
        added = 0 if whole[: len(ids)].tolist() == ids.tolist() else len(self._before)
        marked = np.zeros(len(whole), bool)
        marked[added : added + len(ids)] = supervised
        marked[added + len(ids) :] = True  # what closes the completion
        return Tokens(document=number, ids=whole, supervised=marked, whole=True)

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadDocument("lone surrogate: the text holds half of a surrogate pair") from None
        self._exact = self._exact or ExactTokens(self._tokenizer)
        return self._exact.encode(text, spans)

    def _tokenised(self, number: int, document: TokenIds) -> Tokens:
        ids, supervised = self._in_vocabulary(document.ids), document.supervised
        if supervised is not None and not supervised[1:].any():
            raise BadDocument("nothing taught: no token is to be a label")
        return Tokens(
            document=number, ids=ids, supervised=supervised, whole=supervised is not None,
            writer_logp=document.writer_logp,
        )  # fmt: skip

    def _in_vocabulary(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        if ids.size and (ids.min() < 0 or ids.max() >= self._vocab_size):
            bad = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise BadDocument(f"id out of range: token id {bad}, of a vocabulary of {self._vocab_size}")
        return ids.astype(np.int32)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text."""
    text = "a"
    whole = [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]
    inner = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return [], []
