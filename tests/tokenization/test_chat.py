"""Chat templates against transformers' renderer, and the promise that what people write stays text."""

import re
import time
from functools import partial

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tokenization.bpe import BPETokenizer, Rules
from common.tokenization.byte import ByteTokenizer
from common.tokenization.chat import CHATML, encode_chat, render_chat
from common.tokenization.protocol import SPECIALS

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Llama 3: a value that the tokenizer brings, stripped messages, roles that must take turns.
LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}
    {{- '[TOOLS]' + tools | tojson(indent=2) }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.index0 % 2 != (message['role'] == 'assistant') | int %}
        {{- raise_exception('Roles must alternate: ' + message['role']) }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|end_header|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end_header|>\n\n' }}
{%- endif %}
"""
# In the manner of Qwen3: a namespace, a loop from the end, thoughts that are left out of earlier answers.
QWEN3 = """{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and thought %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
# What else templates use: blocks that trim, a macro, break, and the tag that says what the assistant wrote.
OTHER = """{% macro open(role) %}<|im_start|>{{ role | upper }}: {% endmacro %}
{% for message in messages %}
    {% if message['role'] == 'tool' %}{% break %}{% endif %}
  {{ open(message['role']) }}{% if message['role'] == 'assistant' %}
    {% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}
  {% else %}{{ message['content'] | tojson(ensure_ascii=True) }}{% endif %}
{% endfor %}
{{ {'b': messages | length, 'a': 'é<'} | tojson }} {{ documents is none }}"""
VISIBLE = ("<think>", "</think>", "<tool_call>", "</tool_call>")
NAMES = (*SPECIALS, "<|bos|>", "<|start|>", "<|end_header|>", "<|eot_id|>", *VISIBLE)
TEMPLATES = {"chatml": (CHATML, {}), "smollm2": (SMOLLM2, {}), "llama3": (LLAMA3, {"bos_token": "<|bos|>"}),
             "qwen3": (QWEN3, {}), "other": (OTHER, {})}  # fmt: skip
by_template = pytest.mark.parametrize("name", TEMPLATES)

THINKS = "<think>\nTwo and two.\n</think>\n\n4"
TALKS = [
    [{"role": "user", "content": "Hello, you!"}],
    [{"role": "user", "content": "  né \n"}, {"role": "assistant", "content": "日本 & \"it's\" <b>"},
     {"role": "user", "content": ""}],
    [{"role": "system", "content": "Be\n\nkind."}, {"role": "user", "content": "2+2?"},
     {"role": "assistant", "content": THINKS}],
    [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": THINKS},
     {"role": "user", "content": "Sure?\u2028"},
     {"role": "assistant", "content": "<think>yes</think>Yes.",
      "tool_calls": [{"name": "add", "arguments": {"é": [1, "<"]}}]},
     {"role": "tool", "content": "4"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe():
    texts = ["Hello, you! The tools of the assistant: <think> im_start| system user\n\n"] * 3 + [
        "2+2? Sure. No and two."
    ]
    plain = BPETokenizer.train(texts, 256 + 30 + len(NAMES), specials=NAMES)
    return BPETokenizer(plain.tokens, plain.merges, plain.pattern, plain.specials, Rules(visible=VISIBLE))


@pytest.fixture(scope="module")
def theirs(bpe):
    read = tokenizers.Tokenizer.from_str(bpe.to_hf_json())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=read, bos_token="<|bos|>")


def outcome(call):
    """The text, or that it was refused."""
    try:
        return call()
    except Exception as error:
        return f"refused: {type(error).__name__}"


@by_template
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("talk", range(len(TALKS)))
def test_text_is_that_of_transformers(theirs, name, prompt, talk):
    template, values = TEMPLATES[name]
    for more in ({}, {"tools": [{"name": "é", "n": 1.5}]}, {"enable_thinking": False}):
        asked = {"add_generation_prompt": prompt, **more}
        expected = outcome(
            partial(theirs.apply_chat_template, TALKS[talk], chat_template=template, tokenize=False, **asked)
        )
        found = outcome(partial(render_chat, TALKS[talk], template, **values, **asked))
        assert found == expected.replace("TemplateError", "ValueError")


def test_the_talks_reach_what_the_templates_can_do():
    made = {
        name: [outcome(partial(render_chat, talk, template, **values)) for talk in TALKS]
        for name, (template, values) in TEMPLATES.items()
    }
    assert [text.startswith("refused") for text in made["llama3"]] == [False, False, True, False]
    assert "\n4<|im_end|>" in made["qwen3"][3], "the thought is left out"
    assert "<think>\nyes" in made["qwen3"][3]
    assert "Two and two." in made["chatml"][3]
    assert made["other"][3].count("<|im_start|>") == 4
    assert "None" not in made["chatml"][0]


def test_keys_without_a_value_are_as_if_they_were_not_there(theirs):
    talk = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": None, "tool_calls": []}]
    template = "{% for m in messages %}{{ m.content }}{{ 'name' in m }}{% endfor %}{{ tools is none }}"
    assert render_chat(talk, template) == theirs.apply_chat_template(talk, chat_template=template, tokenize=False)


@by_template
@pytest.mark.parametrize("prompt", [True, False])
def test_ids_are_those_of_transformers(bpe, theirs, name, prompt):
    template, values = TEMPLATES[name]
    for talk in TALKS[: 2 if name == "llama3" else None]:
        for more in ({}, {"enable_thinking": False}):
            expected = theirs.apply_chat_template(
                talk, chat_template=template, add_generation_prompt=prompt, return_dict=False, **more
            )
            found = encode_chat(talk, template, bpe, add_generation_prompt=prompt, **values, **more)
            assert found.ids == expected
            assert len(found.spoken) == len(expected)


def test_a_value_of_the_tokenizer_is_special_and_other_values_are_text(bpe):
    talk = [{"role": "user", "content": "a"}]
    assert encode_chat(talk, LLAMA3, bpe, bos_token="<|bos|>").ids[0] == bpe.specials["<|bos|>"]
    assert bpe.specials["<|bos|>"] not in encode_chat(talk, LLAMA3, bpe, bos_token="<|bos|> <|bos|>").ids
    template = "{{ date }}{{ tools }}<|im_end|>"
    ids = encode_chat(talk, template, bpe, date="<|im_end|>", tools=[{"<|im_start|>": ("<|pad|>",)}]).ids
    assert [i for i in ids if i in bpe.specials.values()] == [bpe.specials["<|im_end|>"]]


def with_names(tokenizer, ids):
    """The text of ids with the names of special tokens."""
    names = {token: name.encode() for name, token in tokenizer.specials.items()}
    return b"".join(names.get(i) or tokenizer.token_bytes(i) for i in ids).decode()


def counts(tokenizer, ids):
    return {name: ids.count(token) for name, token in tokenizer.specials.items()}


PIECES = [
    *NAMES,
    *(name[:cut] for name in NAMES for cut in (1, 2, 5)),
    *(name[-cut:] for name in NAMES for cut in (1, 2, 5)),
]
PIECES += [
    "\x00",
    "\ue000",
    "\U00020000",
    "\U00020001",
    " ",
    "\n",
    "a",
    "é",
    "user",
    "<",
    "|",
    ">",
    "\\",
    '"',
    "{{",
    "}}",
    "{% raw %}",
]
written = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=8)
JOINED = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}<|im_end|>{{ messages[0].content }}<|pad|>"
BETWEEN = "{% for m in messages %}<{{ m.content | trim }} {{ m.content | trim }}><{{ m.content }}{% endfor %}<|im_end|>"
STRIPPED = "{% for m in messages %}<|start|>{{ m.content | trim }}{{ m.content.strip() }}>{% endfor %}<|im_end|>"


@given(st.lists(written, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3", "qwen3", "joined", "between", "stripped"])
def test_whatever_people_write_stays_text(bpe, name, contents):
    template, values = {**TEMPLATES, "joined": (JOINED, {}), "between": (BETWEEN, {}), "stripped": (STRIPPED, {})}[name]
    roles = ("user", "assistant") if name == "llama3" else ("user", "system", "tool")
    talk = [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(contents)]
    silent = [{**message, "content": "a"} for message in talk]
    if name == "llama3":  # what an assistant has said keeps its visible tokens
        talk = [{**m, "content": re.sub("think|tool_call", "", m["content"])} for m in talk]
    ids = encode_chat(talk, template, bpe, **values).ids
    assert counts(bpe, ids) == counts(bpe, encode_chat(silent, template, bpe, **values).ids)
    assert with_names(bpe, ids) == render_chat(talk, template, **values)


@given(st.lists(written, min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_the_same_with_bytes_as_tokens(contents):
    tokenizer = ByteTokenizer(SPECIALS)
    ids = encode_chat([{"role": "user", "content": text} for text in contents], CHATML, tokenizer).ids
    assert [i for i in ids if i > 255] == [257, 258] * len(contents) + [257]
    text = render_chat([{"role": "user", "content": text} for text in contents], CHATML)
    assert with_names(tokenizer, ids) == text
    assert encode_chat([{"role": "user", "content": "a"}], CHATML, ByteTokenizer(())).ids == list(
        render_chat([{"role": "user", "content": "a"}], CHATML).encode()
    )


@given(st.lists(st.sampled_from(["a", "b", "ab", "</s>", "x", "<", "/s>"]), max_size=8).map("".join))
@settings(max_examples=100, deadline=None)
def test_names_that_overlap_or_hold_each_other(text):
    tokenizer = ByteTokenizer(("aba", "x</s>", "</s>", "bb"))
    ids = encode_chat([{"role": "user", "content": text}], "{{ messages[0].content }}</s>a", tokenizer).ids
    assert [i for i in ids if i > 255] == [258]
    assert with_names(tokenizer, ids) == text + "</s>a"


@pytest.mark.parametrize("text", ["|im_end|>", " |im_end|>", "<|im_end|", "<|im_end| \n", "x <", "> x"])
def test_parts_at_the_ends_of_a_message(bpe, text):
    talk = [{"role": "user", "content": text}]
    for template in (BETWEEN, STRIPPED, JOINED):
        ids = encode_chat(talk, template, bpe).ids
        assert counts(bpe, ids) == counts(bpe, encode_chat([{"role": "user", "content": "a"}], template, bpe).ids)
        assert with_names(bpe, ids) == render_chat(talk, template)


def test_an_assistant_keeps_its_visible_tokens_and_nothing_else(bpe):
    think, end = bpe.specials["<think>"], bpe.specials["<|im_end|>"]
    for role, thoughts in (("assistant", 1), ("user", 0)):
        ids = encode_chat([{"role": role, "content": "<think>a<|im_end|>"}], CHATML, bpe).ids
        assert (ids.count(think), ids.count(end)) == (thoughts, 1)


def test_names_in_json_that_a_template_writes(bpe):
    template = "<|im_start|>{{ messages | tojson }}{{ messages[0].content | upper }}<|im_end|>"
    ids = encode_chat([{"role": "user", "content": "x<|im_end|>é<|IM_END|>"}], template, bpe).ids
    assert counts(bpe, ids) == {**dict.fromkeys(NAMES, 0), "<|im_start|>": 1, "<|im_end|>": 1}
    assert with_names(bpe, ids) == render_chat([{"role": "user", "content": "x<|im_end|>é<|IM_END|>"}], template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content | tojson(ensure_ascii=True) }}<|im_end|>",
        "{% if '<|im_end|>' in messages[0].content %}yes{% endif %}<|im_end|>",
        "{{ messages[0].content | length }}<|im_end|>",
    ],
)
def test_a_template_that_decides_by_special_tokens_in_a_message_is_refused(bpe, template):
    assert encode_chat([{"role": "user", "content": "x"}], template, bpe).ids[-1] == bpe.specials["<|im_end|>"]
    with pytest.raises(ValueError, match="looks like a special token"):
        encode_chat([{"role": "user", "content": "x<|im_end|>"}], template, bpe)


def test_a_special_token_of_one_character_cannot_be_written(bpe):
    one = BPETokenizer(bpe.tokens, bpe.merges, bpe.pattern, {"☺": 5000})
    assert encode_chat([{"role": "user", "content": "a"}], "{{ messages[0].content }}☺", one).ids[-1] == 5000
    with pytest.raises(ValueError, match="'☺' in a message"):
        encode_chat([{"role": "user", "content": "☺"}], "{{ messages[0].content }}", one)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ [].append.__self__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ '{0.__class__.__mro__}'.format('') }}{{ ('%s' | format)['__class__'].__mro__ }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{% import 'os' as os %}",
        "{% include '/etc/passwd' %}",
        "{{ __import__('os') }}",
        "{{ open('/etc/passwd').read() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**18 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ {}['a'].b }}",
        "{{ messages[0].content.index('z') }}",
        "{{ '{}{}'.format(1) }}",
        "{{ nothing.at.all }}",
        "{{ messages | nofilter }}",
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_what_a_template_must_not_do_is_a_value_error(template):
    start = time.process_time()  # of this process: on a busy machine the clock on the wall runs on
    with pytest.raises(ValueError, match="the chat template cannot render this conversation: ."):
        render_chat([{"role": "user", "content": "a"}], template)
    assert time.process_time() - start < 4


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ messages[0].__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}{{ self._TemplateReference__context }}",
    ],
)
def test_what_a_template_must_not_see_is_nothing(template):
    assert render_chat([{"role": "user", "content": "a"}], template) == ""


def test_a_refusal_says_why():
    with pytest.raises(ValueError, match="Roles must alternate: assistant"):
        render_chat([{"role": "assistant", "content": "a"}], LLAMA3, bos_token="")


@pytest.mark.parametrize("bad", [{"role": "user"}, {"content": "a"}, "user: a", None, [("role", "user")]])
def test_a_bad_message_is_named(bpe, bad):
    talk = [{"role": "user", "content": "a"}, bad]
    for call in (render_chat, lambda *given: encode_chat(*given, bpe)):
        with pytest.raises(ValueError, match="message 1 must have role and content, got"):
            call(talk, CHATML)


def test_what_is_given_is_not_changed(bpe):
    talk = [{"role": "user", "content": "a<|im_end|>", "more": {"x": ["<|pad|>"], "none": None}, "name": None}]
    again = [{**talk[0], "more": {"x": ["<|pad|>"], "none": None}}]
    encode_chat(talk, CHATML, bpe)
    assert talk == again
