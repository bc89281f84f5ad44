"""Embeddings and rankings of texts: what callers give is checked and becomes token ids, vectors get their final form.

Knows the tokenizer and the model's widths; what runs when is decided by the queue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engine.api.embedding.embedding_queue import EmbeddingQueue
from engine.api.prompts import Prompt, as_prompts, is_prompt_like, not_a_prompt
from engine.api.requests import Requests
from engine.errors import ContextFullError, InvalidRequestError
from engine.model.config import Pooling
from engine.runner.pooling import Pooler

Vector = npt.NDArray[np.float32]

RANK_TEMPLATE = "tokenizer.chat_template.rerank"
"""Metadata of rerankers that were made of language models: the text around {query} and {document}."""

PLACE = "{text}"
"""Where an instruction says that the text goes; without it the text follows the instruction."""


@dataclass(frozen=True, eq=False)
class EmbeddingRequest:
    """Checked texts.

    Attributes:
        texts: token ids of each.
        pooling: how their vectors become one.
        normalize: whether results are divided by their length.
        dimensions: numbers of a result; None = all.
    """

    texts: tuple[list[int], ...]
    pooling: Pooling
    normalize: bool = False
    dimensions: int | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of all texts together."""
        return sum(map(len, self.texts))


@dataclass(frozen=True, eq=False, kw_only=True)
class RankingRequest(EmbeddingRequest):
    """Checked pairs of a query and each document.

    Attributes:
        documents: their texts.
        top_n: how many of them are wanted; None = all.
    """

    documents: tuple[str, ...]
    top_n: int | None

    def ranked(self, scores: Sequence[Vector]) -> list[RankedDocument]:
        """The best documents by the first number of each result, the earlier one first among equals."""
        found = [RankedDocument(i, float(score[0]), self.documents[i]) for i, score in enumerate(scores)]
        return sorted(found, key=lambda one: -one.score)[: self.top_n]


Asked = TypeVar("Asked", bound=EmbeddingRequest)


@dataclass(frozen=True)
class RankedDocument:
    """A document and how well it answers a query.

    Attributes:
        index: its place among the documents given.
        score: the larger the better; only scores of one model can be compared.
        document: its text.
    """

    index: int
    score: float
    document: str


class Embeddings:
    """Makes and runs the requests of one open model.

    Args:
        requests: makes token ids.
        queue: runs texts.
        pooler: of the model.
        context_length: tokens that a text may have.
        metadata: of the file.
    """

    def __init__(
        self,
        requests: Requests,
        queue: EmbeddingQueue,
        pooler: Pooler,
        context_length: int,
        metadata: Mapping[str, Any],
    ) -> None:
        self._requests = requests
        self._queue = queue
        self._pooler = pooler
        self._context_length = context_length
        self._template = metadata.get(RANK_TEMPLATE)

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self._pooler.width

    def request(
        self,
        texts: Any,
        *,
        pooling: str | Pooling | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        instruction: str | None = None,
        truncate: bool = False,
    ) -> EmbeddingRequest:
        """Check what LLM.embed() was given.

        Raises:
            InvalidRequestError: a setting out of range, or something that is no text.
            ContextFullError: a text is longer than the context, and `truncate` does not cut it.
        """
        wanted = self._pooling(pooling)
        if dimensions is not None and not (isinstance(dimensions, int) and 1 <= dimensions <= self.width):
            raise InvalidRequestError(f"dimensions is {dimensions!r}; allowed are 1 to {self.width} for this model")
        if dimensions is not None and wanted is Pooling.RANK:
            raise InvalidRequestError("dimensions is given for scores; only embeddings can be cut")
        prompts, _ = as_prompts(texts)
        ids = [self._fitting(self._ids(prompt, instruction), truncate=truncate) for prompt in prompts]
        return EmbeddingRequest(tuple(ids), wanted, normalize and wanted is not Pooling.RANK, dimensions)

    def ranking(self, query: str, documents: Sequence[str], top_n: int | None = None) -> RankingRequest:
        """Check what LLM.rerank() was given, and make the pairs of the query and each document that the model reads.

        Raises:
            InvalidRequestError: a setting out of range, something that is no text, or the model cannot rank.
            ContextFullError: a pair is longer than the context.
        """
        if top_n is not None and not (isinstance(top_n, int) and top_n >= 1):
            raise InvalidRequestError(f"top_n is {top_n!r}; allowed is a positive integer")
        if not self._pooler.ranks:
            raise InvalidRequestError(
                "this model has no classification head, so it cannot rank: take the file of a reranker, or compare "
                "embeddings"
            )
        if not isinstance(query, str) or isinstance(documents, str) or not is_prompt_like(documents):
            raise InvalidRequestError("rerank takes a query, which is a text, and a list of documents, which are texts")
        documents = tuple(documents)
        wrong = next((document for document in documents if not isinstance(document, str)), None)
        if wrong is not None:
            raise InvalidRequestError(f"a document is a text; found {type(wrong).__name__}")
        pairs = [self._requests.checked(self._pair(query, document)) for document in documents]
        texts = tuple(self._fitting(ids, truncate=False) for ids in pairs)
        return RankingRequest(texts, Pooling.RANK, documents=documents, top_n=top_n)

    def run(self, request: EmbeddingRequest, stopped: Callable[[], bool] = lambda: False) -> list[Vector]:
        """The result of each text, in order: (width,), with Pooling.NONE (T, width), with RANK scores (labels,).

        Args:
            request: what runs.
            stopped: whether the caller has given up; asked between batches.
        """
        found = self._queue.run(request.texts, request.pooling, stopped)
        if request.pooling is Pooling.NONE or not found:
            return [_finished(vector, request) for vector in found]
        return list(_finished(np.stack(found), request))  # all at once: thousands of texts may come back together

    def together(self, request: EmbeddingRequest, found: list[Vector]) -> Vector | list[Vector]:
        """Results as LLM.embed() returns them: one array (n, width), with Pooling.NONE the list."""
        if request.pooling is Pooling.NONE:
            return found
        width = len(found[0]) if found else request.dimensions or self.width
        return np.stack(found) if found else np.empty((0, width), dtype=np.float32)

    def _pooling(self, pooling: str | Pooling | None) -> Pooling:
        if pooling is None:
            if self._pooler.default is Pooling.RANK:
                raise InvalidRequestError(
                    'this model ranks: use rerank, or name a pooling ("mean", "cls" or "last") to embed with it'
                )
            return self._pooler.default
        try:
            wanted = Pooling(pooling)
        except ValueError:
            allowed = ", ".join(one.value for one in Pooling)
            raise InvalidRequestError(f"pooling is {pooling!r}; allowed are {allowed}") from None
        if wanted is Pooling.RANK and not self._pooler.ranks:
            raise InvalidRequestError('pooling is "rank", but this model has no classification head')
        return wanted

    def _ids(self, prompt: Prompt, instruction: str | None) -> list[int]:
        if not is_prompt_like(prompt):
            raise not_a_prompt(prompt)
        if instruction is None:
            return self._requests.prompt_ids(prompt)
        if not isinstance(prompt, str):
            raise InvalidRequestError("an instruction goes before texts; token ids have theirs already")
        if not isinstance(instruction, str):
            raise InvalidRequestError(f"instruction is a text; found {type(instruction).__name__}")
        whole = instruction.replace(PLACE, prompt) if PLACE in instruction else instruction + prompt
        return self._requests.prompt_ids(whole)

    def _fitting(self, ids: list[int], *, truncate: bool) -> list[int]:
        limit = self._context_length
        if len(ids) <= limit:
            return ids
        if not truncate:
            hint = "shorten the text, cut it (truncate), or open the model with a larger context_length if it has one"
            raise ContextFullError(len(ids), limit, hint, parts="of one text")
        kept = ids[:limit]
        if self._requests.has_tokenizer and self._requests.tokenizer.is_control(ids[-1]):
            kept[-1] = ids[-1]  # what ends every text
        return kept

    def _pair(self, query: str, document: str) -> list[int]:
        """Token ids of a query and a document, in the layout that llama.cpp gives to rerankers."""
        tokenizer = self._requests.tokenizer
        if isinstance(self._template, str):
            values = {"{query}": query, "{document}": document}
            whole = re.sub(r"\{query\}|\{document\}", lambda match: values[match[0]], self._template)
            return tokenizer.encode(whole, add_special=False)
        special = tokenizer.special_ids
        end = special.get("eos", special.get("sep"))
        ends = [end] if tokenizer.add_eos and end is not None else []
        separators = [special["sep"]] if tokenizer.add_sep else []
        first, second = (tokenizer.encode(text, add_special=False, parse_special=False) for text in (query, document))
        return [*([special["bos"]] if tokenizer.add_bos else []), *first, *ends, *separators, *second, *ends]


def _finished(vector: Vector, request: EmbeddingRequest) -> Vector:
    """Cut and normalized, in memory of its own."""
    cut = np.array(vector[..., : request.dimensions], dtype=np.float32)
    if request.normalize:
        length = np.linalg.norm(cut.astype(np.float64), axis=-1, keepdims=True)
        cut /= np.maximum(length, np.finfo(np.float32).tiny).astype(np.float32)
    return cut
