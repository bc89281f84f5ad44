"""Prompts of conversations: messages go through the model's chat template. Knows no requests and no devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.api.requests import Requests
from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.text import ChatPrompt, ChatTemplate, chat_prompt

Message = Mapping[str, Any]


class Chats:
    """Makes the prompts of one open model.

    Args:
        config: of the model, perhaps with a template in place of the file's.
        metadata: of the file.
        requests: checks the token ids; has the tokenizer.
    """

    def __init__(self, config: EngineConfig, metadata: Mapping[str, Any], requests: Requests) -> None:
        self._config = config
        self._metadata = metadata
        self._requests = requests
        self._template: ChatTemplate | None = None  # made on first use: most runs never chat

    def template(self) -> ChatTemplate:
        """The chat template in force.

        Raises:
            InvalidRequestError: the model has none and none was given.
            TokenizerError: it does not parse.
        """
        self._requests.require_generation()
        if self._template is None:
            metadata = self._metadata
            if self._config.chat_template is not None:
                metadata = {**metadata, "tokenizer.chat_template": self._config.chat_template}
            self._template = ChatTemplate.from_metadata(metadata, self._requests.tokenizer)
        if self._template is None:
            raise InvalidRequestError(
                f"{Path(str(self._config.model)).name} holds no chat template: use generate instead, or give a "
                "template of your own (chat_template, --chat-template-file)"
            )
        self._template.compile()
        return self._template

    def prompt(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> ChatPrompt:
        """What the template makes of messages: text, token ids, and what is needed to read the answer.

        Raises:
            InvalidRequestError: there is no template, or it refuses the messages.
            ContextFullError: the text is longer than any that fits.
        """
        config = self._config
        prompt = chat_prompt(
            self.template(),
            self._requests.tokenizer,
            messages,
            variables,
            config.tool_format,
            config.reasoning_format,
            self._requests.check_length,
        )
        return replace(prompt, token_ids=tuple(self._requests.checked(prompt.token_ids)))
