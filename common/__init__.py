"""The spine: one package that carries a language model and a reasoning system through twelve months.

Rooms, in the order in which they may import each other (each may use only those before it):
foundation, tokenization, data, model, training, pretrained, generation, finetuning, evaluation, reasoning,
reinforcement, diagnostics.
"""
