"""Conversations as text and as ids: the one place where a chat template is rendered.

A template is a small program in Jinja that comes with a model. It runs in a sandbox: it reaches nothing outside, but one
that means harm can still use up time and memory. What people write stays text: a special token that stands in a message is
never a special token of the prompt.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.tokenization.protocol import Tokenizer

Message = Mapping[str, Any]  # role and content; what else there is, is the template's affair
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Generation(Extension):
    """`{% generation %}` encloses what the assistant says, for masks of losses. The text is the same without it."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    """As transformers sets Jinja up, so that the same template gives the same text."""

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made.from_string(template)


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
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    values = {"tools": None, "documents": None, **values}
    try:
        return _compiled(template).render(messages=given, add_generation_prompt=add_generation_prompt, **values)
    except Exception as error:  # it is somebody's program, and raises what it likes
        said = str(error) or type(error).__name__
        raise ValueError(f"the chat template cannot render this conversation: {said}") from error


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

    Two exceptions. A value such as `bos_token="<|begin_of_text|>"` is the tokenizer's own, not somebody's text. And what the
    assistant itself has said keeps its visible tokens (Rules.visible): <think> is one token when the model writes it.

    Raises:
        ValueError: as `render_chat`; or the template decides by text that looks like a special token.
    """
    plain = render_chat(messages, template, add_generation_prompt=add_generation_prompt, **values)
    if not tokenizer.specials:
        return tokenizer.encode(plain)
    names = set(tokenizer.specials)
    spoken = names - set(tokenizer.rules.visible if hasattr(tokenizer, "rules") else ())
    taken = plain + "".join(names)
    # A rare character that is not in the text. No template can cut it in two, nor JSON or Python write it otherwise.
    mark = next(chr(point) for point in range(0x20000, 0x2A6D0) if chr(point) not in taken)
    by_others, by_assistant = _disarming(names, mark), _disarming(spoken, mark)
    own = {k: v for k, v in values.items() if k.endswith("_token") and isinstance(v, str) and v in names}
    text = render_chat(
        [by_assistant(message) if message["role"] == "assistant" else by_others(message) for message in messages],
        template,
        add_generation_prompt=add_generation_prompt,
        **{**by_others(values), **own},
    )
    if text.replace(mark, "") != plain:
        raise ValueError("the chat template decides by text in a message that looks like a special token: take it out")
    ids: list[int] = []
    for part in re.split(f"({_any_of(names)})", text):
        ids.extend(
            [tokenizer.specials[part]] if part in tokenizer.specials else tokenizer.encode(part.replace(mark, ""))
        )
    return ids


def _any_of(texts: Collection[str]) -> str:
    """A pattern for the longest of them that stands at a place."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _disarming(names: Collection[str], mark: str) -> Callable[[Any], Any]:
    """Puts the mark into what is the name of a special token, or could become one beside other text of the template."""
    whole = re.compile(_any_of(names))
    beginnings = tuple({name[:i] for name in names for i in range(1, len(name))})
    ends = tuple({name[i:] for name in names for i in range(1, len(name))})

    def cut(found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise ValueError(f"{found[0]!r} in a message cannot be told from the special token")
        return found[0][0] + mark + found[0][1:]

    def disarm(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {disarm(key): disarm(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return (list if isinstance(value, list) else tuple)(disarm(one) for one in value)
        if not isinstance(value, str):
            return value
        while whole.search(value):  # names may overlap
            value = whole.sub(cut, value)
        start, end = len(value) - len(value.lstrip()), len(value.rstrip())  # templates strip
        if value.endswith(beginnings, start, end):
            value = value[:end] + mark + value[end:]
        return value[:start] + mark + value[start:] if value.startswith(ends, start) else value

    return disarm
