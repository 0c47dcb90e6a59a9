"""Training the heads of several folds on stored features: one after another on all threads or on one, stacked
by torch.func, or in two processes.

    python tests/benchmarks/heads_together.py
    python tests/benchmarks/heads_together.py --neighbours 2

The four forms do the same steps on the same batches; their weights are compared at the end. The time of a
process's start is left out (each waits until it is told to begin), since it is paid once for all members.
"""
import copy
import multiprocessing as mp
import platform
import time
from dataclasses import dataclass
from datetime import date
from statistics import median

import torch
import tyro
from torch.func import functional_call, stack_module_state, vmap

from biomass_kit.model.model import BiomassModel
from biomass_kit.training.batches import one_thread


@dataclass(frozen=True)
class Args:
    "Milliseconds a step of all members together, in four forms."

    members: int = 10
    dim: int = 768
    tiles: int = 4
    batch_size: int = 16
    steps: int = 60
    rounds: int = 3
    neighbours: int = 0  # processes that only keep the cores busy meanwhile


def draw(a: Args) -> tuple:
    "Members, and one batch for each."
    torch.manual_seed(0)
    models = [BiomassModel(a.dim, dropout=0.0) for _ in range(a.members)]
    return models, torch.randn(a.members, a.batch_size, 2, a.tiles, a.dim), torch.rand(
        a.members, a.batch_size, 5)


def loss_of(predicted, wanted): return torch.nn.functional.smooth_l1_loss(predicted, wanted)


def optimizer(parameters): return torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05)


def one_after_another(models, x, y, steps) -> float:
    "Seconds of a plain loop for each member."
    start = time.perf_counter()
    for model, xi, yi in zip(models, x, y):
        o = optimizer(model.parameters())
        for _ in range(steps):
            o.zero_grad()
            loss_of(model(xi), yi).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            o.step()
    return time.perf_counter() - start


def on_one_thread(*given) -> float:
    "The same on one thread."
    with one_thread(): return one_after_another(*given)


def idle_turns():
    "What a busy neighbour does."
    while True: pass


def stacked(models, x, y, steps) -> tuple:
    "Seconds of one loop for all members at once, and their weights."
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    leaves = [p.requires_grad_() for p in parameters.values()]
    o, start = optimizer(leaves), time.perf_counter()

    def member_loss(p, b, xi, yi): return loss_of(functional_call(base, (p, b), (xi,)), yi)

    for _ in range(steps):
        o.zero_grad()
        vmap(member_loss)(parameters, buffers, x, y).sum().backward()
        norms = sum(p.grad.flatten(1).square().sum(1) for p in leaves).sqrt()
        for p in leaves: p.grad.mul_((1 / (norms + 1e-6)).clamp(max=1).view(-1, *[1] * (p.ndim - 1)))
        o.step()
    return time.perf_counter() - start, parameters


def worker(a: Args, index: int, count: int, begin, done):
    "One process's share of the members, on one thread."
    torch.set_num_threads(1)
    models, x, y = draw(a)
    one_after_another(copy.deepcopy(models[:1]), x[:1], y[:1], 3)
    begin.wait()
    for _ in range(a.rounds):
        mine = copy.deepcopy(models[index::count])
        begin.wait()
        one_after_another(mine, x[index::count], y[index::count], a.steps)
        done.wait()


def apart(weights, others) -> float:
    "The largest difference between weights, each a list of (name -> tensor) by member."
    return max((a[n] - p).abs().max().item() for a, b in zip(weights, others) for n, p in b.items())


def in_one_process(a: Args, models, x, y) -> tuple:  # (form -> seconds of each round, gaps of weights)
    "The three forms in turn; how far stacked weights, and those of one thread, are from the first form's."
    times = {"one after another": [], "on one thread": [], "stacked": []}
    one_after_another(copy.deepcopy(models[:1]), x[:1], y[:1], 3)
    for _ in range(a.rounds):
        plain, alone = copy.deepcopy(models), copy.deepcopy(models)
        times["one after another"].append(one_after_another(plain, x, y, a.steps))
        times["on one thread"].append(on_one_thread(alone, x, y, a.steps))
        seconds, together = stacked(copy.deepcopy(models), x, y, a.steps)
        times["stacked"].append(seconds)
        due, lone = ([dict(m.named_parameters()) for m in each] for each in (plain, alone))
        gap = apart([{n: t[i] for n, t in together.items()} for i in range(len(models))], due)
        threads = apart(lone, due)
        assert max(gap, threads) < 1e-3, f"training ends elsewhere: {gap} stacked, {threads} on one thread"
    return times, (gap, threads)


def in_two_processes(a: Args, context) -> list:
    "Seconds of each round of two processes, each with its share of the members."
    begin, done = context.Barrier(3), context.Barrier(3)
    processes = [context.Process(target=worker, args=(a, i, 2, begin, done)) for i in range(2)]
    for p in processes: p.start()
    begin.wait()
    seconds = []
    for _ in range(a.rounds):
        begin.wait()
        start = time.perf_counter()
        done.wait()
        seconds.append(time.perf_counter() - start)
    for p in processes: p.join()
    return seconds


def main():
    a = tyro.cli(Args)
    print(f"{a.members} members, {a.dim} channels, {a.tiles} tiles, batch {a.batch_size}, "
          f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, "
          f"{date.today()}")
    context = mp.get_context("spawn")
    busy = [context.Process(target=idle_turns, daemon=True) for _ in range(a.neighbours)]
    for p in busy: p.start()
    times, (gap, threads) = in_one_process(a, *draw(a))
    times["two processes"] = in_two_processes(a, context)
    for name, seconds in times.items():
        print(f"  {name:18s} {median(seconds) / a.steps * 1e3:6.1f} ms a step of all members, "
              f"{median(times['one after another']) / median(seconds):.2f} times as fast")
    print(f"  largest difference of a weight, stacked against one after another: {gap:.1e}; "
          f"one thread against all: {threads:.1e}")


if __name__ == "__main__": main()
