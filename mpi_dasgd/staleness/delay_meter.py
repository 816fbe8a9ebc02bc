"""Delays of gradients as Koloskova, Stich and Jaggi (2022; arXiv 2206.08307) define them.

A server applies one gradient per iteration: gradient t = 0, 1, ... makes x_{t+1} of x_t. A *job* is
a point that a client was given: it starts at the iteration s whose point x_s it is, and ends when
its gradient is applied, at iteration t. C_t is the multiset of the jobs in flight when gradient t
arrives.

- delay of an applied gradient: tau_t = t - s;
- concurrency: |C_t|;
- delay of a job that is in flight at the end, T gradients applied: T - s;
- tau_avg = [sum_{t<T} tau_t + sum_{in flight} (T - s)] / (T + |C_T| - 1). The paper leaves j_T out
  of the second sum: its next job starts at T and counts 0, which is the -1;
- tau_max: the largest of both kinds.

Each job but the one applied ages by one per iteration. Hence, for any schedule,

    sum_{t<T} tau_t + sum_{in flight} (T - s) = sum_{t<T} (|C_t| - 1),

exactly; with n jobs always in flight it is T (n - 1): the average delay *is* the concurrency.
"""

from __future__ import annotations

from collections import Counter

__all__ = ["DelayMeter"]


class DelayMeter:
    """Meter of the delays and the concurrency of a server's jobs. Delays are in gradients.

    Args:
        first: iteration of the first gradient; that of the checkpoint when a run is resumed.

    Attributes:
        t: iteration: gradients applied, those before `first` included.
        in_flight: |C_t|, number of jobs now in flight.
        applied_sum: sum of the delays of applied gradients.
        given_up_sum: sum of the ages of jobs that were given up, at that moment.
        concurrency_sum: sum of |C_t| over all iterations.
        concurrency_max: the largest |C_t|: tau_C.
        histogram: number of applied gradients by delay.
    """

    def __init__(self, first: int = 0) -> None:
        self.t = first
        self.in_flight = 0
        self.applied_sum = 0
        self.given_up_sum = 0
        self.concurrency_sum = 0
        self.concurrency_max = 0
        self.histogram: Counter[int] = Counter()
        self._first = first
        self._starts: dict[
            int, list[int]
        ] = {}  # iterations at which jobs in flight began, by client
        self._starts_sum = 0

    def start(self, client: int) -> None:
        """Begin a job: `client` was given the point x_t."""
        self._starts.setdefault(client, []).append(self.t)
        self._starts_sum += self.t
        self.in_flight += 1

    def holds(self, client: int, start: int) -> bool:
        """Return whether a job of `client` that began at iteration `start` is in flight."""
        return start in self._starts.get(client, ())

    def apply(self, client: int, start: int) -> int:
        """End iteration t with the gradient of a job in flight; return its delay."""
        self.concurrency_sum += self.in_flight
        self.concurrency_max = max(self.concurrency_max, self.in_flight)
        self._end(client, start)
        delay = self.t - start
        self.applied_sum += delay
        self.histogram[delay] += 1
        self.t += 1
        return delay

    def give_up(self, client: int) -> int:
        """End the jobs of `client` without their gradients; return how many were in flight."""
        starts = list(self._starts.get(client, ()))
        for start in starts:
            self.given_up_sum += self.t - start
            self._end(client, start)
        return len(starts)

    def _end(self, client: int, start: int) -> None:
        self._starts[client].remove(start)
        self._starts_sum -= start
        self.in_flight -= 1

    @property
    def applied(self) -> int:
        """T, number of gradients applied since `first`."""
        return self.t - self._first

    @property
    def in_flight_sum(self) -> int:
        """Sum of the present delays of the jobs in flight."""
        return self.in_flight * self.t - self._starts_sum

    @property
    def average(self) -> float:
        """tau_avg, jobs in flight included; 0 before the first gradient."""
        count = self.applied + max(1, self.in_flight) - 1
        return (self.applied_sum + self.in_flight_sum) / max(1, count)

    @property
    def applied_average(self) -> float:
        """Mean delay of applied gradients alone; 0 before the first."""
        return self.applied_sum / max(1, self.applied)

    @property
    def maximum(self) -> int:
        """tau_max, jobs in flight included."""
        waiting = (self.t - starts[0] for starts in self._starts.values() if starts)
        return max(max(waiting, default=0), max(self.histogram, default=0))

    @property
    def concurrency(self) -> float:
        """Mean of |C_t| over all iterations; 0 before the first."""
        return self.concurrency_sum / max(1, self.applied)

    def fraction_above(self, threshold: float) -> float:
        """Return the share of applied gradients whose delay is above `threshold`."""
        above = sum(count for delay, count in self.histogram.items() if delay > threshold)
        return above / max(1, self.applied)
