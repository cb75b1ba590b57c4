"""REINFORCE with and without NSPO2: how much of the gradient's variance is removed, measured on fresh rollouts.

A walker on a line of 21 places starts in the middle and wants to end a walk of 20 steps at a place that it is told;
the reward is noisy, so that few episodes say little. A small network maps its place, the goal and the time to the
chance of a step to the right.
Its policy gradient is filtered by `create_nspo2_optimizer` around Adam while it trains. Then the parameters are held
still, and the variance of the gradient is measured on rollouts that the basis has never seen.

    python examples/reinforce.py [--strategy keep] [--steps 200] [--seed 0]
"""

import argparse

import torch
from torch import nn

from nspo2_trl import create_nspo2_optimizer, get_default_config

PLACES, LENGTH, EPISODES = 21, 20, 16


def rollout(policy: nn.Module, episodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each episode's actions (episodes,) and its reward (episodes,)."""
    place, goal = torch.full((episodes,), PLACES // 2), torch.randint(PLACES, (episodes,))
    code = nn.functional.one_hot
    log_prob = torch.zeros(episodes)
    for time in range(LENGTH):
        state = torch.cat([code(place, PLACES), code(goal, PLACES), torch.full((episodes, 1), time / LENGTH)], 1)
        right = torch.distributions.Bernoulli(logits=policy(state)[:, 0])
        action = right.sample()
        log_prob = log_prob + right.log_prob(action)
        place = (place + 2 * action.long() - 1).clamp(0, PLACES - 1)
    return log_prob, 1 - (place - goal).abs() / (PLACES // 2) + 0.5 * torch.randn(episodes)


def policy_gradient(policy: nn.Module) -> float:
    """Leave the REINFORCE gradient of one batch, with the mean reward of the others as baseline, in `.grad`."""
    policy.zero_grad()
    log_prob, reward = rollout(policy, EPISODES)
    others = (reward.sum() - reward) / (EPISODES - 1)
    loss = -(log_prob * (reward - others)).mean()
    loss.backward()
    return reward.mean().item()


def variance(policy: nn.Module, optimizer, batches: int) -> tuple[float, float, float]:
    """Variance (trace) of the gradient over fresh batches at fixed parameters, raw and filtered; and cos of the means.

    The filter is applied, nothing is learned: the basis has seen none of these rollouts.
    """
    raw, filtered = [], []
    for _ in range(batches):
        policy_gradient(policy)
        for found, project in ((raw, False), (filtered, True)):
            parts = []
            for stack, noise in zip(optimizer.nspo2.stacks, optimizer.nspo2.filters, strict=True):
                stack.read_grads()
                parts.append(noise.head().apply(stack.grad) if project else stack.grad.clone())
            found.append(torch.cat([part.flatten() for part in parts]))
    raw, filtered = torch.stack(raw), torch.stack(filtered)
    cosine = nn.functional.cosine_similarity(raw.mean(0), filtered.mean(0), 0)
    return raw.var(0).sum().item(), filtered.var(0).sum().item(), cosine.item()


def train(seed: int, steps: int, strategy: str, enabled: bool):
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(2 * PLACES + 1, 32), nn.Tanh(), nn.Linear(32, 1))
    config = get_default_config(strategy=strategy)
    optimizer = create_nspo2_optimizer(policy, torch.optim.Adam, {"lr": 0.01}, config)
    optimizer.set_enabled(enabled)
    rewards = []
    for _ in range(steps):
        rewards.append(policy_gradient(policy))
        optimizer.step()
    return policy, optimizer, sum(rewards[-20:]) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="keep", choices=["noise", "keep", "hybrid"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batches", type=int, default=300, help="fresh batches for the variance")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy, optimizer, reward = train(args.seed, args.steps, args.strategy, enabled=True)
    before, after, cosine = variance(policy, optimizer, args.batches)
    plain_reward = train(args.seed, args.steps, args.strategy, enabled=False)[2]
    print(f"after {args.steps} steps of {EPISODES} episodes, strategy {args.strategy}, seed {args.seed}:")
    print(f"variance of the gradient, {args.batches} fresh batches   raw {before:.4f}   filtered {after:.4f}")
    print(f"variance removed                              {1 - after / before:.1%}")
    print(f"cosine of the mean gradients                  {cosine:.3f}")
    print(f"reward of the last 20 steps                   with {reward:.3f}   without {plain_reward:.3f}")


if __name__ == "__main__":
    main()
