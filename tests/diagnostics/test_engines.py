"""The probes of an engine, on one that is not ours: transformers' `generate` around a GPT-2 with dropout."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.diagnostics.doctor import doctor
from common.diagnostics.probes import by_name

IDS = set(range(50))  # the head has 61 rows


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.4,
                        initializer_range=0.3, bos_token_id=None, eos_token_id=None)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def greedy_of(model):
    """As transformers does it: in whatever mode the model is."""

    def greedy(prompt, count):
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                              pad_token_id=0)  # fmt: skip
        return made[0, len(prompt) :].tolist()

    return greedy


def in_evaluation_mode(model, greedy, *, back=True):
    def careful(prompt, count):
        mode = model.training
        model.eval()
        made = greedy(prompt, count)
        model.train(mode and back)
        return made

    return careful


def test_a_generator_that_does_not_set_the_mode_is_seen(gpt2):
    probe, greedy = by_name("mode-independence"), greedy_of(gpt2)
    reading = probe(greedy=greedy, module=gpt2, makeable_ids=IDS)
    assert reading.value == 4
    assert not gpt2.training, "the probe leaves the module as it was"
    assert not probe(greedy=in_evaluation_mode(gpt2, greedy), module=gpt2, makeable_ids=IDS).caught
    forgetful = in_evaluation_mode(gpt2, greedy, back=False)
    assert probe(greedy=forgetful, module=gpt2, makeable_ids=IDS).value == 4, "a mode that is not put back is as bad"


def logprobs_of(model, rows):
    def score(prompts, continuations):
        found = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *continuation]])).logits[0, len(prompt) - 1 : -1, :rows]
            scored = logits.double().log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
            found.append(scored.squeeze(1).tolist())
        return found

    return score


def generated(model, prompts, seed):
    made = [[(i * 7 + seed) % 50 for i in range(4)] for _ in prompts]
    return list(zip(made, logprobs_of(model, 50)(prompts, made), strict=True))


def test_scores_over_more_rows_than_can_be_drawn_are_seen(gpt2):
    handles = {"generated_logprobs": lambda *asked: generated(gpt2, *asked), "makeable_ids": IDS}
    probe = by_name("generate-equals-score")
    assert not probe(score_tokens=logprobs_of(gpt2, 50), **handles).caught
    assert probe(score_tokens=logprobs_of(gpt2, 61), **handles).value > 0.01
    assert probe(score_tokens=lambda p, c: [[float("nan")] * 4] * 4, **handles).caught
    assert not doctor(score_tokens=logprobs_of(gpt2, 61), **handles).healthy


def remembering_of(model, *, forgets):
    def remembering():
        held = {"ids": [], "past": None, "weights": None}

        @torch.no_grad()
        def answer(prompt, count):
            state = [p.sum().item() for p in model.parameters()]
            same = held["ids"] == prompt[: len(held["ids"])] and held["past"] is not None
            if not same or (forgets and held["weights"] != state):
                held.update(ids=[], past=None)
            ids, past = list(prompt), held["past"]
            new = ids[len(held["ids"]) :]
            for _ in range(count):
                out = model(torch.tensor([new]), past_key_values=past, use_cache=True)
                past, new = out.past_key_values, [int(out.logits[0, -1].argmax())]
                ids += new
            held.update(ids=ids[:-1], past=past, weights=state)
            return ids[len(prompt) :]

        return answer

    return remembering


def test_keys_and_values_of_old_weights_are_seen(gpt2):
    probe, before = by_name("no-stale-cache"), {k: v.clone() for k, v in gpt2.state_dict().items()}
    for forgets in (True, False):
        reading = probe(remembering=remembering_of(gpt2, forgets=forgets), module=gpt2, makeable_ids=IDS)
        assert reading.caught is not forgets, str(reading)
    assert all(torch.equal(before[k], v) for k, v in gpt2.state_dict().items()), "the weights are put back"
