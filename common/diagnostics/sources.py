"""Texts whose entropy is known, so that "the loss is too good" becomes a test."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MarkovSource:
    """A first-order Markov chain over single-byte symbols, with a known entropy rate.

    No model can code its output in fewer bits per symbol than `entropy_rate`, on average; a good one comes close.
    """

    symbols: str = "abcdefghijklmnop"
    seed: int = 0
    concentration: float = 0.3  # of the Dirichlet distribution of each row: small is predictable

    @property
    def transitions(self) -> np.ndarray:
        """P(next | current), one row for each symbol."""
        size = len(self.symbols)
        return np.random.default_rng(self.seed).dirichlet(np.full(size, self.concentration), size=size)

    @property
    def stationary(self) -> np.ndarray:
        """How often each symbol appears in the long run."""
        values, vectors = np.linalg.eig(self.transitions.T)
        vector = np.real(vectors[:, np.argmin(np.abs(values - 1))])
        return vector / vector.sum()

    @property
    def entropy_rate(self) -> float:
        """Bits per symbol: the entropy of each row, weighted by how often its symbol appears."""
        p = self.transitions
        rows = -(p * np.log2(np.where(p > 0, p, 1))).sum(axis=1)
        return float(self.stationary @ rows)

    def texts(self, count: int, length: int, seed: int) -> list[str]:
        """`count` independent texts of `length` symbols."""
        cumulative = self.transitions.cumsum(axis=1)
        rng = np.random.default_rng((self.seed, seed))
        state = rng.choice(len(self.symbols), size=count, p=self.stationary)
        columns = [state]
        for draws in rng.random((length - 1, count)):
            state = np.minimum((cumulative[state] < draws[:, None]).sum(axis=1), len(self.symbols) - 1)
            columns.append(state)
        table = np.array(list(self.symbols))[np.stack(columns, axis=1)]  # (count, length)
        return ["".join(row) for row in table]
