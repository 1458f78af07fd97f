"""Reward functions, called by TRL's own trainer.

make test-hosts runs it, in an environment with trl.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from types import SimpleNamespace

import torch
from fake_gen import AsyncFakeGen, FakeGen
from training import COMPLETIONS, Trainer
from trl import GRPOTrainer

from guardengine.integrations import trl


def test_trl_itself() -> None:
    """The trainer's own method, without a trainer."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    functions = [
        trl.guard_reward(FakeGen()),
        trl.async_guard_reward(AsyncFakeGen(), "hybrid", preference_column="pm"),
    ]
    logged = Trainer()
    fake = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda values: values, is_main_process=True
        ),
        reward_funcs=functions,
        reward_func_names=[function.__name__ for function in functions],
        reward_processing_classes=[None, None],
        state=SimpleNamespace(global_step=1),
        environments=None,
        async_loop=loop,
        args=SimpleNamespace(report_to=[]),
        _log_completion_extra=lambda column, values: logged.extra.setdefault(column, []).extend(values),
        _log_metric=lambda name, value: logged.metrics.setdefault(name, []).append(value),
    )
    calculate = inspect.unwrap(GRPOTrainer._calculate_rewards)
    inputs = [{"prompt": "x", "pm": 2.0} for _ in COMPLETIONS]
    rewards = calculate(fake, inputs, ["x"] * 3, COMPLETIONS, [[1]] * 3)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    assert rewards.tolist() == [[1.0, 2.0], [0.0, -10.0], [1.0, -5.0]]
    assert set(logged.metrics) == {
        f"{f.__name__}/{what}" for f in functions for what in ("unsafe", "refusal")
    }
