"""Probes of a question-and-answer harness: hand it answers whose worth is known."""

from collections.abc import Callable

from common.diagnostics.core import Reading, probe


@probe("oracle-solver", "does a perfect answerer score 100 %?")
def oracle_solver(accuracy: Callable, solver: Callable) -> Reading:
    """Wrong pairs of question and answer, and a parser that loses right answers, both show here."""
    return Reading(1 - accuracy(solver), 0.0, "share of right answers graded wrong")


@probe("answer-attacks", "does an answer that is surely wrong score anything?")
def answer_attacks(accuracy: Callable, solver: Callable) -> Reading:
    """The best accuracy of: no answer, the question itself, every digit, and the right answer with one digit more."""
    attacks = {
        "empty": lambda question: "",
        "question": lambda question: question,
        "digits": lambda question: "0123456789",
        "prefixed": lambda question: "9" + solver(question),
        "appended": lambda question: solver(question) + "1",
    }
    scores = {name: accuracy(attack) for name, attack in attacks.items()}
    worst = max(scores, key=scores.get)
    return Reading(scores[worst], 0.0, f"best attack: {worst}" if scores[worst] else "no attack scored")
