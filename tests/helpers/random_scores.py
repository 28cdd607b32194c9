"""Scores of several distributions, with ties, infinities and awkward orders."""

import math

import numpy as np


def random_scores(random, kind, size):
    normal = random.standard_normal(size)
    scores = {
        "normal": lambda: normal,
        "ties": lambda: random.integers(0, 4, size),
        "constant": lambda: np.zeros(size),
        "zeros": lambda: np.where(normal > 0, normal, random.choice([0.0, -0.0], size)),
        "pruned and protected": lambda: np.where(abs(normal) > 1, normal * math.inf, normal),
        "tiny": lambda: normal * 1e-42,
        "sorted": lambda: np.sort(normal),
        "falling": lambda: -np.sort(normal),
        "periodic": lambda: np.where(np.arange(size) % 7 < 4, 100.0, normal),
    }
    return scores[kind]().astype(np.float32)


KINDS = ["normal", "ties", "constant", "zeros", "pruned and protected", "tiny", "sorted", "falling", "periodic"]
