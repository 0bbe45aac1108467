"""Conversations as text and as ids: the one place where a chat template is rendered.

A template is a small program in Jinja that comes with a model. It runs in a sandbox. What people write stays text: a special
token that stands in a message is never a special token of the prompt.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.tokenization.protocol import Tokenizer

Message = Mapping[str, Any]  # role and content; what else there is, is the template's affair
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers sets it up, so that the same template gives the same text."""

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def render_chat(
    messages: Sequence[Message], template: str, *, add_generation_prompt: bool = True, **values: Any
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source, see CHATML for the smallest one.
        add_generation_prompt: end with the opening of the assistant's next message.
        values: what else the template may ask for (tools, enable_thinking, ...).
    Raises:
        ValueError: the template refuses the conversation or cannot be rendered; says why.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {i} must have role and content, got {message!r}")
    try:
        return (
            _environment()
            .from_string(template)
            .render(messages=list(messages), add_generation_prompt=add_generation_prompt, **values)
        )
    except (jinja2.exceptions.TemplateError, TypeError, ArithmeticError, OverflowError) as error:
        raise ValueError(f"the chat template cannot render this conversation: {error}") from error


def encode_chat(
    messages: Sequence[Message],
    template: str,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
    **values: Any,
) -> list[int]:
    """The ids of a conversation. Only the template can make special tokens; the same text in a message is plain text.

    Nothing is put in front: what a model expects to begin with is the template's to say (gallery: baselines/double-bos).
    """
    names = sorted(tokenizer.specials, key=len, reverse=True)
    if not names:
        return tokenizer.encode(render_chat(messages, template, add_generation_prompt=add_generation_prompt, **values))
    special = re.compile("|".join(map(re.escape, names)))
    mark = f"\x00{secrets.token_hex(8)}\x00"  # put into what looks special in a message, taken out after the cut

    def disarm(value: Any) -> Any:
        if isinstance(value, str):
            return special.sub(lambda found: found[0][:1] + mark + found[0][1:], value)
        if isinstance(value, Mapping):
            return {disarm(key): disarm(one) for key, one in value.items()}
        return [disarm(one) for one in value] if isinstance(value, list | tuple) else value

    text = render_chat(
        [disarm(message) for message in messages],
        template,
        add_generation_prompt=add_generation_prompt,
        **{name: disarm(value) for name, value in values.items()},
    )
    ids: list[int] = []
    for part in re.split(f"({special.pattern})", text):
        ids.extend(
            [tokenizer.specials[part]] if part in tokenizer.specials else tokenizer.encode(part.replace(mark, ""))
        )
    return ids
