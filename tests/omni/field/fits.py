"""Fits that are changed, interrupted and compared."""

from dataclasses import replace

import torch

from omni.run import make_trainer

CPU = torch.device("cpu")


def trainer(store, config, path, **optim):
    """A trainer whose settings in `optim` are changed."""
    return make_trainer(store, replace(config, optim=replace(config.optim, **optim)), path, CPU)


def at_step(step, action):
    """A scalar callback that acts once, when `step` is first reached."""
    pending = [action]

    def callback(now, values):
        if now == step and pending:
            pending.pop()()

    return callback


def differences(a, b):
    """Names of the entries in which two nested states differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [""]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [f"{key}.{name}" for key in a for name in differences(a[key], b[key])]
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return [f"{i}.{name}" for i in range(len(a)) for name in differences(a[i], b[i])]
    return [] if a == b else [""]
