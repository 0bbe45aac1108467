"""A conversation with a model: its messages, and the next reply piece by piece."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from common.generation.engine import Engine
from common.generation.prepacked import prepacked
from common.generation.sampling import SamplingParams
from common.model.output import LanguageModel
from common.model.transformer import Transformer
from common.tokenization.protocol import TURN_ENDS, Tokenizer


def chat_engine(model: LanguageModel, tokenizer: Tokenizer, template: str | None = None) -> Engine:
    """An engine for conversations: it ends a turn where chat models end theirs, and does not read a conversation twice.

    Args:
        template: source of the chat template; None for a model that only continues text.
    """
    ends = [tokenizer.specials[name] for name in TURN_ENDS if name in tokenizer.specials]
    fast = prepacked(model) if isinstance(model, Transformer) else model
    return Engine(fast, tokenizer, template=template, ends=ends, remember=True)


@dataclass
class Conversation:
    """Messages so far, and who answers.

    An engine without a chat template only continues text: it is shown the plain texts of the messages, one after the other.
    """

    engine: Engine
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self) -> list[int]:
        """Ids of everything so far and of the opening of the reply.

        Raises:
            ValueError: longer than the context of the model.
        """
        if self.engine.template is None:
            ids = self.engine.encode("".join(message["content"] for message in self.messages))
        else:
            ids = self.engine.encode(self.messages)
        if len(ids) >= self.engine.model.context_length:
            raise ValueError(
                f"the conversation has {len(ids):,} tokens, the context of the model {self.engine.model.context_length:,}: "
                "begin a new one"
            )
        return ids

    def reply(self, text: str, params: SamplingParams) -> Iterator[str]:
        """Say `text`, and yield the pieces of the answer as they come. Both join the conversation once it is complete.

        A reply that is broken off (the generator is closed, or Ctrl-C) keeps what was written so far.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            pieces = self.engine.stream(self.prompt(), params, index=len(self.messages))
        except ValueError:
            del self.messages[-1]
            raise
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer})
