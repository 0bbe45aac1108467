"""What is written is what transformers reads: logits, ids, text; and it comes back into our model unchanged."""

import warnings

import pytest
import safetensors
import torch
import transformers

from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.pretrained.export import export_hf
from common.pretrained.load import Pretrained, load_pretrained
from common.tokenization.bpe import BPETokenizer, Rules
from common.tokenization.byte import ByteTokenizer
from common.tokenization.chat import CHATML, render_chat
from common.tokenization.protocol import END_OF_TEXT, PADDING, SPECIALS
from common.training.checkpoint import save_checkpoint
from tests.pretrained.small import BIASES, CONTEXT, GPT2, ids_of, made, small_tokenizer
from tests.tokenization.strange import strange_texts

TURNED = {"rope_layout": "interleaved"}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 16, "yarn_fast": 20.0, "yarn_slow": 2.0}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 16, "rope_low_frequency": 1.5,
          "rope_high_frequency": 5.0}  # fmt: skip
SHAPES = {  # family of theirs, what is changed in a tied Llama
    "plain": ("llama", {}),
    "untied": ("llama", {"tied": False}),
    "grouped": ("llama", {"key_value_heads": 2, "rope_base": 500.0, "norm_epsilon": 1e-3}),
    "one key head": ("llama", {"key_value_heads": 1, "tied": False}),
    "biases": ("llama", BIASES),
    "attention biases": ("llama", {"attention_bias": True, "tied": False}),
    "MLP biases": ("llama", {"mlp_bias": True}),
    "wide heads": ("llama", {"head_width": 10, "hidden_width": 44}),
    "linear": ("llama", {"rope_scaling": "linear", "rope_factor": 4.0}),
    "llama3": ("llama", LLAMA3),
    "llama3 of the context": ("llama", {"rope_scaling": "llama3", "rope_factor": 8.0}),
    "yarn": ("llama", YARN),
    "yarn of the context": ("llama", {"rope_scaling": "yarn", "rope_factor": 2.0}),
    "qwen3": ("qwen3", {"qk_norm": True, "key_value_heads": 2}),
    "qwen3 with biases": ("qwen3", {"qk_norm": True, "attention_bias": True, "head_width": 10, "tied": False}),
    "qwen3 with yarn": ("qwen3", {"qk_norm": True, **YARN}),
    "mistral": ("mistral", {"window": 5, "key_value_heads": 2, "tied": False}),
    "mixtral": ("mixtral", {"experts": 4, "tied": False}),
    "mixtral with a window": ("mixtral", {"experts": 3, "experts_per_token": 1, "window": 5, "key_value_heads": 2}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied": ("gpt2", {**GPT2, "tied": False, "mlp": "gelu", "norm_epsilon": 1e-3}),
    "gpt2 with relu": ("gpt2", {**GPT2, "mlp": "relu"}),
    "gpt2 that says nothing of rope": ("gpt2", {**GPT2, **TURNED}),
    "interleaved": ("llama", {**TURNED, "key_value_heads": 2}),
    "interleaved with biases": ("llama", {**TURNED, **BIASES, "tied": False}),
    "interleaved with norms": ("qwen3", {**TURNED, "qk_norm": True, "key_value_heads": 2, "attention_bias": True}),
    "interleaved with a window": ("mistral", {**TURNED, "window": 5}),
    "interleaved with experts": ("mixtral", {**TURNED, "experts": 4}),
    "interleaved with yarn": ("llama", {**TURNED, **YARN}),
}  # fmt: skip
by_shape = pytest.mark.parametrize("shape", SHAPES)
TEXTS = strange_texts(300, seed=4)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def bpe():
    return small_tokenizer()


def theirs_of(folder):
    """transformers' model; nothing may be missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def entries(folder):
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


@by_shape
@torch.no_grad()
def test_logits_in_transformers_and_the_way_back(shape, bpe, tmp_path):
    kind, changes = SHAPES[shape]
    model, ids = made(changes), ids_of()
    folder = export_hf(Pretrained(model, bpe, None), tmp_path / "out")
    theirs = theirs_of(folder)
    assert theirs.config.model_type == kind
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    again = load_pretrained(folder)
    assert (again.tokenizer.fingerprint, again.chat_template) == (bpe.fingerprint, None)
    torch.testing.assert_close(again.model(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    if changes.get("rope_layout") is None:
        before, after = dict(model.named_parameters()), dict(again.model.named_parameters())
        assert set(before) == set(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(again.model(ids).logits, model(ids).logits)
    elif kind != "gpt2":
        assert again.model.config.rope_layout == "half"
        assert not torch.equal(again.model.blocks[0].attention.query.weight, model.blocks[0].attention.query.weight)
    twice = load_pretrained(export_hf(again, tmp_path / "twice"))
    assert torch.equal(twice.model(ids).logits, again.model(ids).logits)
    assert entries(tmp_path / "twice") == entries(folder)


@pytest.mark.parametrize("shape", ["plain", "untied", "gpt2", "gpt2 untied", "qwen3", "mixtral with a window"])
def test_a_tied_head_is_stored_once_and_stays_tied(shape, tmp_path):
    _, changes = SHAPES[shape]
    tied = changes.get("tied", True)
    folder = export_hf(Pretrained(made(changes), None, None), tmp_path / "out")
    assert [shape for shape in entries(folder).values() if shape[0] == 300] == [(300, 32)] * (1 if tied else 2)
    theirs, ours = theirs_of(folder), load_pretrained(folder).model
    assert (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight) is tied
    assert (ours.embedding.weight is ours.head.weight) is tied


def test_experts_are_written_as_mixtral_was_published(tmp_path):
    model = made({"experts": 3, "hidden_width": 20})
    names = entries(export_hf(Pretrained(model, None, None), tmp_path / "out"))
    assert not [name for name in names if ".mlp." in name]
    for i, e in ((0, 0), (1, 2)):
        start = f"model.layers.{i}.block_sparse_moe"
        assert names[f"{start}.gate.weight"] == (3, 32)
        assert {w: names[f"{start}.experts.{e}.{w}.weight"] for w in ("w1", "w2", "w3")} == {
            "w1": (20, 32), "w2": (32, 20), "w3": (20, 32)}  # fmt: skip


@torch.no_grad()
def test_bfloat16_stays_bfloat16(tmp_path):
    model = made({}).bfloat16()
    folder = export_hf(Pretrained(model, None, None), tmp_path / "out")
    theirs, ours = theirs_of(folder), load_pretrained(folder).model
    assert theirs.dtype == ours.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(ours(ids_of()).logits, model(ids_of()).logits)


# --- tokenizers and text ----------------------------------------------------------------------------------------------


def tokenizers_of(bpe):
    thinks = BPETokenizer(
        bpe.tokens, bpe.merges, bpe.pattern, {**bpe.specials, "<think>": 300}, Rules(visible=("<think>",))
    )
    return {"bpe": bpe, "bytes": ByteTokenizer(SPECIALS), "bytes, one special": ByteTokenizer(), "visible": thinks}


@pytest.mark.parametrize("name", ["bpe", "bytes", "bytes, one special", "visible"])
def test_ids_are_the_same(name, bpe, tmp_path):
    tokenizer = tokenizers_of(bpe)[name]
    folder = export_hf(Pretrained(made({}, vocab_size=310), tokenizer, None), tmp_path / "out")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_pretrained(folder).tokenizer
    found = theirs(TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [t for t, ids in zip(TEXTS, found, strict=True) if not ids == tokenizer.encode(t) == ours.encode(t)] == []
    recognised = theirs([text + END_OF_TEXT for text in TEXTS])["input_ids"]
    assert recognised == [tokenizer.encode(text + END_OF_TEXT, allow_special=True) for text in TEXTS]
    assert theirs.decode(theirs("né  日本 , a")["input_ids"]) == "né  日本 , a"
    assert (theirs.bos_token, theirs.eos_token) == (END_OF_TEXT, END_OF_TEXT)
    assert theirs.pad_token == (PADDING if PADDING in tokenizer.specials else None)
    assert theirs.model_max_length == CONTEXT
    assert {theirs.convert_tokens_to_ids(text): text for text in tokenizer.specials} == {
        token: text for text, token in tokenizer.specials.items()
    }
    text = theirs.decode([*tokenizer.encode("a"), *tokenizer.specials.values()], skip_special_tokens=True)
    assert text == ("a<think>" if name == "visible" else "a")


@pytest.mark.parametrize("shape", ["grouped", "gpt2", "interleaved with norms", "mixtral", "mistral"])
def test_generate_writes_the_same_text(shape, bpe, tmp_path):
    model = made(SHAPES[shape][1], vocab_size=310)  # rows that are no token, as in published models
    with torch.no_grad():
        model.head.weight[bpe.vocab_size :] = 0.0
    folder = export_hf(Pretrained(model, bpe, None), tmp_path / "out")
    engine, theirs = Engine(model, bpe), theirs_of(folder)
    greedy = SamplingParams(temperature=0, max_tokens=30)
    for text in ("To be", "né", ""):
        prompt = engine.encode(text)
        ((mine,),) = engine.generate([prompt], greedy)
        ids = torch.tensor([prompt])
        other = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False,
                                pad_token_id=bpe.specials[PADDING])  # fmt: skip
        assert other[0, len(prompt) :].tolist() == mine.ids
        words = transformers.AutoTokenizer.from_pretrained(folder)
        assert words.decode(other[0, len(prompt) :], skip_special_tokens=True) == mine.text


def test_where_generation_ends(bpe, tmp_path):
    model, end, turn = made({}), bpe.specials[END_OF_TEXT], bpe.specials["<|im_end|>"]
    for template, ends in ((None, end), (CHATML, [turn, end])):
        folder = export_hf(Pretrained(model, bpe, template), tmp_path / str(template is None))
        theirs = theirs_of(folder)
        assert theirs.generation_config.eos_token_id == ends
        assert (theirs.config.eos_token_id, theirs.config.bos_token_id) == (end, end)


def test_a_chat_template_is_written_and_read(bpe, tmp_path):
    template = CHATML + "{# é\n\n #}"
    folder = export_hf(Pretrained(made({}), bpe, template), tmp_path / "out")
    assert load_pretrained(folder).chat_template == template
    talk = [{"role": "user", "content": "né"}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    made_text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert made_text == render_chat(talk, template)


def test_a_run_of_ours(bpe, tmp_path):
    model = made(SHAPES["interleaved"][1])
    save_checkpoint(tmp_path / "run" / "model", model, bpe)
    bpe.save(tmp_path / "run" / "model" / "tokenizer.json")
    folder = export_hf(tmp_path / "run", tmp_path / "deep" / "er" / "out")
    assert folder == tmp_path / "deep" / "er" / "out"
    with torch.no_grad():
        torch.testing.assert_close(theirs_of(folder)(ids_of()).logits, model(ids_of()).logits, atol=1e-4, rtol=0)
    assert load_pretrained(folder).tokenizer.fingerprint == bpe.fingerprint


# --- their folders ----------------------------------------------------------------------------------------------------

SIZE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.2, "bos_token_id": None,
        "eos_token_id": None}  # fmt: skip
FOREIGN = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT,
                                            initializer_range=0.2, bos_token_id=None, eos_token_id=None),
    "llama": lambda: transformers.LlamaConfig(**SIZE, **BIASES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZE, head_dim=10, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZE, sliding_window=5),
    "mixtral": lambda: transformers.MixtralConfig(**SIZE, num_local_experts=3),
}  # fmt: skip


@pytest.mark.parametrize("family", FOREIGN)
@torch.no_grad()
def test_theirs_in_and_out_again(family, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(FOREIGN[family]()).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    again = theirs_of(export_hf(tmp_path / "in", tmp_path / "out"))
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(ids_of()).logits, theirs(ids_of()).logits, atol=1e-6, rtol=0)
    assert entries(tmp_path / "in") == entries(tmp_path / "out")
    before, after = theirs.state_dict(), again.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
