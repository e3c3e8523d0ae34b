"""Tokenise: a document to token ids, and to the tokens that may be labels.

    text         what the tokenizer adds by itself around it (BOS, EOS or nothing), each once, whoever wrote it
    chat         what the tokenizer's chat template makes of it; only answers are supervised (`answer_spans`)
    completion   prompt and completion, as a text; only the completion is supervised
    tokenised    as it is

A teacher that is told more reads the same in a context of its own (`teacher_context`); of a text, that is a prompt with
tokens of its own behind the special tokens that begin it, and then the tokens of the text.

Whether an end-of-sequence token closes a text or a completion: `auto` where the tokenizer adds one, `always`, `never`.
The text that a person gives is otherwise never changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus.answer_spans import find_answers, find_prompt
from kdcache.corpus.chat_template import ChatTemplate
from kdcache.corpus.documents import BadDocument, Completion, Conversation, Document, PromptedText, TokenIds
from kdcache.corpus.exact_tokens import ExactTokens
from kdcache.corpus.packing import Tokens
from kdcache.corpus.teacher_context import prefix_of, with_system
from kdcache.errors import ConfigError
from kdcache.prefixes import NO_PREFIX

_Marked = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""`[n]` the ids of a text, and which of them are taught."""


class Tokeniser:
    """Documents to tokens.

    Args:
        tokenizer: of transformers.
        vocab_size: ids lie below it.
        eos: whether an end-of-sequence token closes texts: `auto`, `always` or `never`.
        date: the day that a chat template may ask for.
        teacher_system: what the teacher alone is told, as the system prompt of conversations and before other
            documents; None for nothing.

    Raises:
        ConfigError: `always`, and the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        *,
        eos: str = "auto",
        date: str = "2000-01-01",
        teacher_system: str | None = None,
    ) -> None:
        self._tokenizer, self._vocab_size, self._date = tokenizer, vocab_size, date
        self._system = teacher_system
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
        self._told_last = "", np.zeros(0, np.int32)

    def tokenise(self, documents: Sequence[tuple[int, Document]]) -> list[list[Tokens] | BadDocument]:
        """Tokenise some documents, texts among them in one call.

        Args:
            documents: each with its index in the corpus.

        Returns:
            For each, its sequences, or why it cannot be used. A conversation may have several.

        Raises:
            CorpusError: there are conversations, and no chat template.
        """
        texts = [
            (number, document if isinstance(document, str) else document.text)
            for number, document in documents
            if isinstance(document, str | PromptedText)
        ]
        encoded = iter(self.texts(texts))
        found: list[list[Tokens] | BadDocument] = []
        for number, document in documents:
            try:
                if isinstance(document, str):
                    found.append([self._told(next(encoded), "")])
                elif isinstance(document, PromptedText):
                    found.append([self._told(next(encoded), document.teacher_prompt)])
                else:
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
        if isinstance(document, Completion):
            text = document.prompt
        else:
            text = document.text if isinstance(document, PromptedText) else document
        if not text.strip():
            raise BadDocument("no text: the prompt is empty")
        return self._around(self._encoded(text, ())[0], [])

    def teacher_prompt(self, text: str) -> list[int]:
        """What the teacher reads of a plain document that begins with a text, behind what it alone is told."""
        ids = np.asarray(self.prompt(text), np.int32)
        prefix = self._told(Tokens(document=0, ids=ids, supervised=np.zeros(len(ids), bool)), "").prefix or NO_PREFIX
        return [*prefix.tokens.tolist(), *ids[prefix.replaced :].tolist()]

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
        return [self._told(self._tokenised(number, document), "")]

    def _told(self, tokens: Tokens, prompt: str) -> Tokens:
        """A text, or tokens, that the teacher reads behind what it alone is told."""
        told = (self._system or "") + prompt
        if not told:
            return tokens
        begins = len(self._before) if tokens.ids[: len(self._before)].tolist() == self._before else 0
        read = np.concatenate([tokens.ids[:begins], self._told_ids(told), tokens.ids[begins:]])
        return dataclasses.replace(tokens, prefix=prefix_of(tokens.ids, tokens.supervised, read))

    def _told_ids(self, told: str) -> NDArray[np.int32]:
        """The tokens of what a teacher is told; those of the last are kept, which many documents may share."""
        if self._told_last[0] != told:
            self._told_last = told, np.asarray(self._plain([told])[0], np.int32)
        return self._told_last[1]

    def _conversation(self, number: int, conversation: Conversation) -> list[Tokens]:
        student, told = self._answers(conversation), conversation.teacher
        if self._system is not None:
            told = with_system(told or conversation, self._system)
        found = [Tokens(document=number, ids=ids, supervised=taught, whole=True) for ids, taught in student]
        if told is None:
            return found
        teacher = self._answers(told)
        if len(teacher) != len(student):
            raise BadDocument(
                f"teacher reads other answers: the chat template makes {len(teacher)} texts of what it reads, and "
                f"{len(student)} of what is taught"
            )
        return [
            dataclasses.replace(one, prefix=prefix_of(one.ids, one.supervised, ids))
            for one, (ids, _) in zip(found, teacher, strict=True)
        ]

    def _answers(self, conversation: Conversation) -> list[_Marked]:
        """The texts of a conversation."""
        self._template = self._template or ChatTemplate(self._tokenizer, self._date)
        return [self._encoded(answer.text, answer.spans) for answer in find_answers(self._template, conversation)]

    def _completion(self, number: int, document: Completion) -> Tokens:
        ids, supervised = self._completed(document.prompt, document.completion)
        found = Tokens(document=number, ids=ids, supervised=supervised, whole=True)
        if document.teacher_prompt is None and self._system is None:
            return found
        told = document.prompt if document.teacher_prompt is None else document.teacher_prompt
        read, _ = self._completed((self._system or "") + told, document.completion)
        return dataclasses.replace(found, prefix=prefix_of(ids, supervised, read))

    def _completed(self, prompt: str, completion: str) -> _Marked:
        """A prompt and its completion between the special tokens of a text."""
        text, edge = prompt + completion, len(prompt)
        ids, supervised = self._encoded(text, [(edge, len(text))])
        whole = self._around(ids, self._after)
        added = 0 if whole[: len(ids)].tolist() == ids.tolist() else len(self._before)
        marked = np.zeros(len(whole), bool)
        marked[added : added + len(ids)] = supervised
        marked[added + len(ids) :] = True  # what closes the completion
        return whole, marked

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]]) -> _Marked:
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
