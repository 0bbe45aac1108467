"""Conversations as text and as ids: the one place where a chat template is rendered.

A template is a small program in Jinja that comes with a model. It runs in a sandbox: it can reach nothing outside, but a
malicious one can still use up time and memory. What people write stays text: a special token whose name stands in a message
never becomes a special token of the prompt. Read `encode_chat` first.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.tokenization.protocol import Tokenizer

Message = Mapping[str, Any]  # role and content; other keys (tool_calls, name) are for the template to use
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SPAN_MARKS = (
    "_generation_marks"  # a value of the template, by which encode_chat asks for the limits of what is enclosed
)


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}` encloses what the assistant says. The text is the same with and without it.

    If the template is rendered with the value SPAN_MARKS, a pair of characters, they are written around each such block.
    """

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = jinja2.nodes.Name(SPAN_MARKS, "load")
        return jinja2.nodes.CallBlock(self.call_method("_enclosed", [marks]), [], [], body, lineno=line)

    def _enclosed(self, marks: Any, caller: Callable[[], str]) -> str:
        text = caller()
        return text if isinstance(marks, jinja2.Undefined) else marks[0] + text + marks[1]


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    """The template with Jinja set up as transformers does it, so that the same template gives the same text."""

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
        values: other variables that the template uses (tools, enable_thinking, ...).
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
    except Exception as error:  # a template is somebody else's program and may raise anything
        said = str(error) or type(error).__name__
        raise ValueError(f"the chat template cannot render this conversation: {said}") from error


class ChatIds(NamedTuple):
    """A conversation as ids. `spoken[i]` is True if the assistant wrote token i: the tokens that a fine-tuning learns from.

    Spoken are the texts of the assistant and the token that ends each of its turns, because a model has to learn to stop.
    """

    ids: list[int]
    spoken: list[bool]


def encode_chat(
    messages: Sequence[Message],
    template: str,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
    **values: Any,
) -> ChatIds:
    """The ids of a conversation, and which of them the assistant has spoken.

    Two things make this harder than "render the template, encode the text", and both are solved with *marks*: characters
    that occur nowhere in the conversation, which are put into the text, looked at, and taken out before anything is
    encoded.

    **What people write must stay text.** The template writes `<|im_end|>` as text and means the special token of that name.
    A user may write the same ten characters and must not get the token: it would end their turn, and what follows could
    open a turn of the system. Once a text is rendered nobody can tell the two apart. So the name is broken before
    rendering: each message is *disarmed*, which puts a mark inside everything in it that is the name of a special token,
    and beside everything at its ends that could become one together with the text that the template puts next to it.

        message   "hi<|im_end|>"                    disarmed   "hi<·|im_end|>"                  (· is the mark)
        rendered  "<|im_start|>user\\nhi<·|im_end|><|im_end|>\\n"

    Every special name that is still whole was written by the template. The text is cut at these, the marks are removed from
    the pieces between, and each piece is encoded as ordinary text. As a check, the marked text without its marks must be
    exactly what the template makes of the original messages. A template that looks at its messages (their length, or whether
    they contain a name) may fail that, and is refused.

    **Which tokens did the assistant write?** Some templates say it themselves: they enclose it in `{% generation %}` tags.
    Then two more marks are written around each such block, and what lies between them is spoken. Most templates have no such
    tags. For them the question is turned around: what would the model be given, and what would it have to write?
    If it is asked to `add_generation_prompt`, a template ends the prompt with an *opening*, such as
    `<|im_start|>assistant\\n`. The model writes what comes after an opening, until it writes a special token that ends the
    turn. So a spoken span begins after each opening in the text and includes the next special token. Nobody can forge
    either limit, because special names in messages are disarmed. A template without an opening (`[INST] … [/INST]
    answer</s>`) is rendered up to each message of the assistant instead, which shows where it begins. A token that lies
    across the beginning or end of a span counts as spoken, as in transformers.

    Nothing is put in front: what a model expects to begin with is the template's to say (gallery: baselines/double-bos).

    Two exceptions to "what people write stays text". A value such as `bos_token="<|begin_of_text|>"` is the tokenizer's
    own, not somebody's text. And what the assistant itself has said keeps its visible tokens (Rules.visible): <think> is
    one token when the model writes it, and it does not end a turn.

    Args:
        messages, template, values: as for `render_chat`.
        add_generation_prompt: True to let the model answer, False to learn from the conversation.
    Raises:
        ValueError: as `render_chat`; the template decides by text that looks like a special token; or, without generation
            prompt, nothing shows what the assistant has spoken (then put `{% generation %}` tags into the template).
    """
    plain = render_chat(messages, template, add_generation_prompt=add_generation_prompt, **values)
    names = set(tokenizer.specials)
    visible = set(tokenizer.rules.visible if hasattr(tokenizer, "rules") else ())
    taken = plain + "".join(names)
    # Ideographs of Unicode's plane 2: one code point each, which no string operation of a template can cut in two, and which
    # neither `tojson` nor `repr` writes in an escaped form.
    rare = (chr(point) for point in range(0x20000, 0x2A6D0) if chr(point) not in taken)
    mark, begin, end = next(rare), next(rare), next(rare)
    by_others, by_assistant = _disarming(names, mark), _disarming(names - visible, mark)
    own = {k: v for k, v in values.items() if k.endswith("_token") and isinstance(v, str) and v in names}
    safe = [by_assistant(message) if message["role"] == "assistant" else by_others(message) for message in messages]
    given = {**by_others(values), **own}
    render = functools.partial(render_chat, template=template, **given)
    marked = render(safe, add_generation_prompt=add_generation_prompt, **{SPAN_MARKS: begin + end})
    text = marked.replace(begin, "").replace(end, "")
    if text.replace(mark, "") != plain:
        raise ValueError("the chat template decides by text in a message that looks like a special token: take it out")
    pieces = [piece for piece in re.split(f"({_any_of(names)})", text) if piece]
    if begin in marked:
        spans = _enclosed_spans(marked, begin, end)
    else:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = _answered_spans(answers, safe, text, pieces, names - visible, render, add_generation_prompt)
    ids: list[int] = []
    spoken: list[bool] = []
    start = 0
    for piece in pieces:
        inside = [(a - start, b - start) for a, b in spans if a < start + len(piece) and start < b]
        new = [tokenizer.specials[piece]] if piece in names else tokenizer.encode(piece.replace(mark, ""))
        ids += new
        spoken += _spoken_tokens(new, piece, inside, mark, tokenizer)
        start += len(piece)
    return ChatIds(ids, spoken)


Span = tuple[int, int]  # from one character up to another, in the marked text


def _enclosed_spans(marked: str, begin: str, end: str) -> list[Span]:
    """The blocks between `begin` and `end`, as they lie in the text without these two."""
    spans, place, opened = [], 0, 0
    for part in re.split(f"([{begin}{end}])", marked):
        if part == begin:
            opened = place
        elif part == end:
            spans.append((opened, place))
        else:
            place += len(part)
    return spans


def _answered_spans(
    answers: Sequence[int],
    safe: Sequence[Message],
    text: str,
    pieces: Sequence[str],
    ending: Collection[str],
    render: Callable[..., str],
    with_prompt: bool,
) -> list[Span]:
    """What the assistant says in the messages with these numbers, for a template without generation tags."""
    if not answers:
        return []
    turns = _after_openings(safe, text, ending, render, with_prompt)
    if len(turns) != len(answers):
        turns = _after_prompts(answers, safe, text, render)
    if len(turns) != len(answers):
        if with_prompt:
            return []  # somebody wants an answer, and need not be refused because nothing could be learned
        raise ValueError(
            f"the conversation has {len(answers)} messages of the assistant, and the chat template does not show where they "
            "begin: enclose what the assistant says in {% generation %} … {% endgeneration %} in the template"
        )
    ends, place = [], 0  # where each token that can end a turn ends
    for piece in pieces:
        place += len(piece)
        if piece in ending:
            ends.append(place)
    return [(start, next((place for place in ends if start < place <= limit), limit)) for start, limit in turns]


def _after_openings(
    safe: Sequence[Message], text: str, ending: Collection[str], render: Callable[..., str], with_prompt: bool
) -> list[Span]:
    """From each opening to the end of the text. None if the template has no opening that only the template can write."""
    with_opening, without = (render(safe, add_generation_prompt=asked) for asked in (True, False))
    found = re.search(_any_of(ending), with_opening[len(without) :]) if with_opening.startswith(without) else None
    if found is None:
        return []
    opening = with_opening[len(without) + found.start() :]
    # Some openings go on with (empty) thoughts. A prompt gives these to the model, and earlier turns do not have them.
    opening = opening.partition("<think>")[0]
    places = [found.end() for found in re.finditer(re.escape(opening), text)]
    return [
        (place, len(text)) for place in (places[:-1] if with_prompt else places)
    ]  # the last one is the prompt itself


def _after_prompts(
    answers: Sequence[int], safe: Sequence[Message], text: str, render: Callable[..., str]
) -> list[Span]:
    """From the end of the prompt that leads to each answer, to the end of the text that has the answer as well."""
    turns = []
    for i in answers:
        prompt, turn = render(safe[:i], add_generation_prompt=True), render(safe[: i + 1], add_generation_prompt=False)
        if text.startswith(turn) and turn.startswith(prompt):
            turns.append((len(prompt), len(turn)))
    return turns


def _spoken_tokens(
    ids: Sequence[int], piece: str, spans: Sequence[Span], mark: str, tokenizer: Tokenizer
) -> list[bool]:
    """For each token of a piece of text, whether a byte of it lies in one of the spans (of characters of the piece)."""
    if not spans:
        return [False] * len(ids)
    if spans[0][0] <= 0 and spans[0][1] >= len(piece):  # the usual case: all of it
        return [True] * len(ids)
    # Where each character ends, in bytes. Marks have none. (A tokenizer that changes text before it encodes it, to the
    # composed form of Unicode or by dropping bytes, may be off by those bytes at the limits of a span.)
    ends = list(itertools.accumulate(0 if letter == mark else len(letter.encode()) for letter in piece))
    limits = [(ends[a - 1] if a > 0 else 0, ends[min(b, len(piece)) - 1]) for a, b in spans if b > 0]
    spoken, place = [], 0
    for token in ids:
        after = place + len(tokenizer.token_bytes(token))
        spoken.append(any(place < b and a < after for a, b in limits))
        place = after
    return spoken


def _any_of(texts: Collection[str]) -> str:
    """A pattern that matches the longest of these texts at a place; nothing if there are none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _disarming(names: Collection[str], mark: str) -> Callable[[Any], Any]:
    """A function that puts the mark into every special name in a message, and beside every part of one at its ends.

    It goes through lists and dictionaries, keys included, and leaves everything that is not text as it is. "At its ends" is
    meant without white space, because templates strip messages before they write their own text beside them.
    """
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
        while whole.search(value):  # again, because names may overlap
            value = whole.sub(cut, value)
        start, end = len(value) - len(value.lstrip()), len(value.rstrip())
        if value.endswith(beginnings, start, end):
            value = value[:end] + mark + value[end:]
        return value[:start] + mark + value[start:] if value.startswith(ends, start) else value

    return disarm
