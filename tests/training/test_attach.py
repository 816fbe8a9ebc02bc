"""`mpi_dasgd.attach` on ranks: `optimizer.step()` in a loop that is otherwise plain torch."""

from __future__ import annotations

import pytest

from tests.support.rank_pool import run_pooled

pytestmark = pytest.mark.mpi

HEAD = """
    import sys
    import torch, mpi_dasgd
    from mpi_dasgd.errors import Diverged, UserError

    def make(kind=torch.optim.SGD, lr=0.1, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        return model, kind(model.parameters(), lr=lr, **options)

    def gradient(model, optimizer, scale=1.0):
        optimizer.zero_grad()
        loss = scale * model(torch.randn(8, 4)).square().mean()
        loss.backward()
        return loss

    def run(training, steps, step):
        for _ in range(steps):
            if training.computes_gradients:
                step()
            else:
                while not training.endpoint.inbox.has_messages and training.total_samples < 8:
                    training.serve()
                training.serve()
"""

RATES = """
    algorithm, server = sys.argv[1], sys.argv[2] == "True"
    settings = {"algorithm.name": algorithm, "algorithm": {"server_trains": server}}
    model, optimizer = make(momentum=0.9)
    training = mpi_dasgd.attach(model, optimizer, samples_per_step=8, config=settings)
    used = []
    optimizer.register_step_pre_hook(
        lambda o, *_: used.append((o.param_groups[0]["lr"], o.param_groups[0]["momentum"]))
    )

    def step():
        gradient(model, optimizer)
        optimizer.step()

    def rates():  # of the user's steps: a server makes others in between
        lrs = [lr for lr, _ in used]
        used.clear()
        return lrs

    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.1)
    for _ in range(15):
        step()
        schedule.step()
    first = rates()
    assert sorted(set(first), reverse=True) == [0.1, 0.1 * 0.1, 0.1 * 0.1 * 0.1], first
    optimizer.param_groups[0]["lr"] = 1e-5
    step()
    assert set(rates()) == {1e-5}
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 1e-4
    optimizer.load_state_dict(state)
    step()
    assert set(rates()) == {1e-4}
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    plateau.step(1.0), plateau.step(2.0)
    step()
    assert set(rates()) == {1e-5}
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    seen = []
    for _ in range(10):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        step()
        if len(seen) < 10:
            cycle.step()
    assert set(used) <= {*seen, (seen[-1])} and set(seen) <= set(used), (used, seen)
    assert training.local.local_step == 28 and training.samples == 28 * 8
    optimizer.param_groups[0]["lr"] = 1e-4  # a server goes on until the others have left
    training.close()
    try:
        optimizer.step()
    except UserError as error:
        assert "training is closed" in str(error)
    else:
        raise AssertionError("a step after close() trains alone")
    training.average()
    training.detach()
    optimizer.step()
"""


@pytest.mark.parametrize(
    ("algorithm", "server_trains"),
    [("adpsgd", False), ("allreduce", False), ("dasgd", False), ("swarm", False), ("asgd", True)],
)
def test_the_learning_rate_is_the_users(algorithm: str, server_trains: bool) -> None:
    run_pooled(2, HEAD + RATES, algorithm, str(server_trains))


FACTORS = """
    settings = {
        "schedule.name": "cosine", "budget.samples": 10 * 8 * 2, "algorithm.name": "allreduce",
    }
    model, optimizer = make()
    if sys.argv[1] == "tensor":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    base = optimizer.param_groups[0]["lr"]
    training = mpi_dasgd.attach(model, optimizer, samples_per_step=8, config=settings)
    used = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append(float(o.param_groups[0]["lr"])))
    while not training.finished:
        gradient(model, optimizer)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] is base
        assert abs(training.local.lr - used[-1]) < 1e-9
    assert len(used) == 10 and abs(used[0] - 0.0976) < 1e-3 and used[-1] < 0.01, used
    assert used == sorted(used, reverse=True)
    training.close()
"""


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_our_schedule_multiplies_for_the_step_only(kind: str) -> None:
    run_pooled(2, HEAD + FACTORS, kind)


REFUSED = """
    algorithm = sys.argv[1]
    from mpi4py import MPI
    rank = MPI.COMM_WORLD.rank

    # GradScaler: one rank's gradient is inf; its step is none, and nobody else is the worse for it
    for fused in (False, True):
        model, optimizer = make(torch.optim.AdamW, fused=fused)
        training = mpi_dasgd.attach(model, optimizer, algorithm, codec="none")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        done = step = 0
        while done < 12:  # as many steps on each rank: allreduce needs them
            optimizer.zero_grad()
            factor = float("inf") if rank == 1 and step == 5 else 1.0
            scaler.scale(factor * model(torch.randn(8, 4)).square().mean()).backward()
            before = training.local.local_step
            scaler.step(optimizer)
            scaler.update()
            assert training.local.local_step == before + (factor == 1.0)
            done, step = training.local.local_step, step + 1
        assert step == 12 + (rank == 1)
        if fused:
            assert not hasattr(optimizer, "grad_scale")
        training.close()
        training.average()
        assert all(torch.isfinite(p).all() for p in model.parameters())

    # without it the step is refused, by rank, step and parameter, before anybody receives it
    model, optimizer = make()
    training = mpi_dasgd.attach(model, optimizer, algorithm, codec="none")
    refused = None
    for step in range(1, 8):
        gradient(model, optimizer)
        if rank == 1 and step == 5:
            model[2].weight.grad[0, 3] = float("nan")
            kept = [p.detach().clone() for p in model.parameters()]
            try:
                optimizer.step()
            except Diverged as error:
                refused = str(error)
                for p, old in zip(model.parameters(), kept):  # the user repairs, and goes on
                    p.data.copy_(old)
                gradient(model, optimizer)
        optimizer.step()
    if rank == 1:
        assert refused and "rank 1, step 5" in refused and "2.weight" in refused, refused
    training.close()
    training.average()
    assert all(torch.isfinite(p).all() for p in model.parameters())
"""


@pytest.mark.parametrize("algorithm", ["adpsgd", "dasgd", "osgp", "allreduce"])
def test_what_is_not_finite_stays_where_it_is(algorithm: str) -> None:
    run_pooled(2, HEAD + REFUSED, algorithm)


NAN_MODEL = """
    model, optimizer = make()
    with mpi_dasgd.attach(model, optimizer) as training:
        gradient(model, optimizer)
        optimizer.step()
    if training.rank == 1:
        model[2].bias.data.fill_(float("nan"))
    own = [p.detach().clone() for p in model.parameters()]
    for call in (training.average, lambda: training.mean_model().__enter__()):
        try:
            call()
        except Diverged as error:
            assert "parameter 2.bias of rank 1 is not finite" in str(error), error
        else:
            raise AssertionError("a mean that is not finite")
        for p, q in zip(model.parameters(), own):
            assert torch.equal(p.nan_to_num(), q.nan_to_num())
"""


def test_a_mean_that_is_not_finite_is_refused_on_all_ranks() -> None:
    run_pooled(2, HEAD + NAN_MODEL)


GUARDS = """
    model, optimizer = make()
    training = mpi_dasgd.Decentralized(model, optimizer, total_samples=16)
    gradient(model, optimizer)
    for wrong, words in (
        (optimizer.step, "would train alone"),
        (lambda: training.step(32.0), "expected the number of samples of a batch"),
        (lambda: training.step(torch.tensor(0.5)), "expected the number of samples"),
        (lambda: training.step(-1), "0 or more, got -1"),
        (lambda: mpi_dasgd.attach(model, optimizer), "another Decentralized"),
        (lambda: mpi_dasgd.attach(model, "SGD"), "expected a torch.optim.Optimizer, got str"),
        (lambda: mpi_dasgd.attach(model, optimizer, config=3), "got int"),
        (lambda: mpi_dasgd.attach(model, optimizer, config={"codec.nam": "none"}), "unknown key"),
        (lambda: mpi_dasgd.attach(model, optimizer, config="none.toml"), "none.toml"),
    ):
        try:
            wrong()
        except UserError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
    while not training.finished:
        gradient(model, optimizer)
        training.step(8)
    training.close()
    optimizer.step()  # free again

    class Wrapper(torch.optim.Optimizer):  # as accelerate's
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.bound = optimizer.step

        def step(self, closure=None):
            return self.bound(*(() if closure is None else (closure,)))

    wrapper = Wrapper(optimizer)
    training = mpi_dasgd.attach(model, wrapper, "local_sgd")  # the same model again
    for _ in range(4):
        loss = wrapper.step(lambda: gradient(model, optimizer))
        assert torch.is_tensor(loss)
        loss = training.step(8, lambda: gradient(model, optimizer))
        assert torch.is_tensor(loss)
    assert training.local.local_step == 8 and training.samples == 4 * 1 + 4 * 8 + 3 * 7
    training.close()
    model, optimizer = make(torch.optim.LBFGS)
    with mpi_dasgd.Decentralized(model, optimizer) as training:
        try:
            training.step(8)
        except UserError as error:
            assert "LBFGS needs a closure" in str(error), error
        else:
            raise AssertionError("LBFGS without a closure")
        training.step(torch.tensor(8), lambda: gradient(model, optimizer))
        assert training.local.local_step == 1 and training.samples == 8
"""


def test_calls_that_would_train_alone_are_refused() -> None:
    run_pooled(2, HEAD + GUARDS)
