"""A slow, obviously right NSPO2 for one block, in float64: the covariance and the projection are explicit matrices."""

import torch


class Reference:
    """Keeps every noise row with its weight, forms C (d x d) and P (d x d), and filters with them."""

    def __init__(self, dim, strategy="noise", rank=4, update_freq=2, decay=0.9, radius=0.1, target_bias=1.0):
        self.strategy, self.rank, self.update_freq, self.decay = strategy, rank, update_freq, decay
        self.radius, self.target_bias = radius, target_bias
        self.rows, self.steps, self.reference = [], 0, torch.zeros(dim, dtype=torch.float64)
        self.previous = self.vectors = self.covariance = None
        self.energy = self.removed = 0.0

    def filter_matrix(self):
        """F (d x d) and what it was made of."""
        dim = len(self.reference)
        if self.vectors is None:
            return torch.eye(dim, dtype=torch.float64)
        m, k = self.reference, self.rank
        plain = {"noise": k, "keep": 0, "hybrid": (k + 1) // 2}[self.strategy]
        first = self.vectors[:, :plain]
        second = self.vectors[:, plain : k + (plain < k)]
        removed = first @ first.T
        if plain < k:
            projector = second @ second.T
            inside = projector @ m
            if inside.norm() > 0:
                projector = projector - torch.outer(inside, inside) / (inside @ inside)
            removed = removed + projector
        moved = (removed @ m).norm()
        alpha = min(1.0, float(self.radius * m.norm() / moved)) if moved > 0 else 1.0
        return torch.eye(dim, dtype=torch.float64) - alpha * removed

    def step(self, samples):
        """`samples` (n, d) → filtered mean (d,)."""
        samples = samples.double()
        n, mean = len(samples), samples.mean(0)
        if n > 1:
            rows = (samples - mean) / (n * (n - 1)) ** 0.5
        else:
            rows = (mean - self.previous)[None] / 2**0.5 if self.previous is not None else None
        matrix = self.filter_matrix()
        if rows is not None:
            if self.vectors is not None:
                self.energy += float(rows.square().sum())
                self.removed += float(rows.square().sum() - (rows @ matrix).square().sum())
            self.rows.append(rows)
            if len(self.rows) % self.update_freq == 0:
                used = self.rows[:-1] if n == 1 else self.rows
                weights = [self.decay ** (len(used) - 1 - i) for i in range(len(used))]
                self.covariance = sum(w * r.T @ r for w, r in zip(weights, used))
                values, vectors = torch.linalg.eigh(self.covariance)
                self.vectors = (vectors * (values > 1e-6 * values.max())).flip(1)  # no directions without noise
        self.reference = self.decay * self.reference + (1 - self.decay) * mean
        self.previous = mean
        return matrix @ mean
