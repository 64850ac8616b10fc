"""Decides which requests run next, and with which strategy. Pure logic: its owner has the clock and the workers.

Batches are not preempted. So the scheduler decides whenever a worker becomes free, and only which requests start on
that worker now and with which strategy. The rest of the queue is planned as well, to see whether it will be in time,
but is decided again when the next worker is free: by then more jobs have arrived and more times are known. A free
worker never waits for more requests.

Jobs run earliest deadline first. A deadline counts from arrival to completion, without tolerance. A job that cannot
meet its deadline even at its cheapest split, or only at the cost of others, runs after all jobs that can. While such a
job waits, every job with a deadline gets its cheapest split only, so that the late job is served at all.

Where requests join and leave a running step one by one (iteration-level scheduling: Orca, Yu et al., OSDI 2022), a
worker is one of the slots of such a step and a batch is one request. All of the above holds, and two things are added:
a running request whose deadline comes into danger may take a cheaper strategy on the way (``review``), and of every
``FAIR_STARTS`` requests that start one is of the job that has waited longest, so that none waits for ever.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

from skipkernels.modality.clock import Clock
from skipkernels.modality.counters import Counters
from skipkernels.modality.errors import AccuracyUnreachable, DeadlineUnreachable, JobError
from skipkernels.modality.forecast import Forecast
from skipkernels.modality.job import Answer, Job, JobAnswer
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.optimiser import EPSILON
from skipkernels.modality.planner import Planner
from skipkernels.modality.policies import SelectionPolicy, get_selection_policy
from skipkernels.modality.profile import Profile
from skipkernels.modality.strategy_options import StrategyOptions
from skipkernels.modality.ticket import Batch, Ticket

FAIR_STARTS = 8
"""Of so many requests that join a running step, one is of the job that has waited longest, whatever its deadline."""
_LEAST_LEFT = 0.02

Admission = Literal["accuracy", "deadline"]
"""What a job is refused for on arrival. ``accuracy``: no strategy promises the required accuracy. ``deadline``: that,
or its deadline cannot be met."""


class Scheduler:
    """One queue in front of workers that all hold the same model.

    Args:
        profile: of that model on these workers' device.
        clock: see ``Clock``.
        selection: ``full``, ``cheapest``, ``random`` or ``maximize``, or a policy of your own.
        workers: how many; they are numbered from 0.
        slots: None: a worker runs one batch after the other. Else workers are slots of one machine, or of several with
            so many each, and whatever runs on a machine shares its steps.
        memory_bytes: the most a batch may take on a worker, on top of the loaded model; None: what was profiled.
        admission: see ``Admission``. With ``accuracy``, jobs whose deadline cannot be met are answered late.

    Raises:
        ProfileError: ``memory_bytes`` is less than one request takes.
        StrategyError: no selection policy has this name.
    """

    def __init__(
        self,
        profile: Profile,
        clock: Clock,
        selection: str | SelectionPolicy = "maximize",
        *,
        workers: int = 1,
        slots: int | None = None,
        memory_bytes: float | None = None,
        admission: Admission = "accuracy",
    ) -> None:
        self.profile = profile
        self.selection = get_selection_policy(selection) if isinstance(selection, str) else selection
        self.latency = LatencyModel(profile, memory_bytes, slots=slots)
        self.counters = Counters()
        self._clock = clock
        self._admission = admission
        self._memory_bytes = memory_bytes
        self._slots = slots
        self._elapsed_ms = clock()
        self._starts = 0
        self._promised = [entry.promised_accuracy for entry in profile.strategies]
        self._forecast = Forecast()
        self._planner = Planner(self.selection, self.latency, self._promised, self._forecast)
        everything = profile.modalities
        # by modalities, skip level, and how many requests share steps; more are added when jobs come with others
        self._options: dict[tuple[frozenset[str], float | None, int | None], StrategyOptions] = {}
        self._options_of(everything, None)
        self._queue: list[tuple[float, int, Ticket]] = []  # by deadline, then arrival
        self._late: list[Ticket] = []  # deadline cannot be met any more, in the order in which that was found
        self._retries: deque[tuple[Ticket, int, int]] = deque()  # ticket, position of the request, strategy
        self._running: dict[int, Batch | None] = dict.fromkeys(range(workers))  # worker -> batch

    @property
    def workers(self) -> int:
        return len(self._running)

    @property
    def running_requests(self) -> int:
        return sum(len(batch.members) for batch in self._running.values() if batch is not None)

    @property
    def waiting_requests(self) -> int:
        waiting = chain((ticket for _, _, ticket in self._queue), self._late)
        return sum(ticket.demand.requests for ticket in waiting) + len(self._retries)

    def submit(self, job: Job) -> Ticket:
        """Accepts a job.

        Raises:
            JobError: unknown modality, or nothing runs on the job's modalities.
            AccuracyUnreachable: ``min_accuracy`` is above what can be promised.
            DeadlineUnreachable: admission is by deadline, and accepting would make this or another job late.
        """
        self._elapse()
        try:
            options = self._options_for(job)
            if job.min_accuracy > options.reachable + EPSILON:
                raise AccuracyUnreachable(job.min_accuracy, options.reachable, self._among(job))
            ticket = Ticket(job, self.counters.accepted, self._clock(), options)
            index = bisect_left(self._queue, (ticket.demand.deadline_ms, ticket.number))
            if self._admission == "deadline":
                self._check_deadline(ticket, index)
        except JobError:
            self.counters.refused += 1
            raise
        self.counters.accepted += 1
        self._queue.insert(index, (ticket.demand.deadline_ms, ticket.number, ticket))
        self._elapse()  # it is one more to share the steps
        least_ms = self.latency.alone_ms(self.selection.least(ticket.demand)) * ticket.demand.work
        self._forecast.note(ticket.arrival_ms, job.deadline_ms, least_ms)
        return ticket

    def next_batch(self, worker: int) -> Batch | None:
        """Starts a batch on a free worker; None: nothing waits."""
        assert self._running[worker] is None, f"worker {worker} still runs a batch"
        self._elapse()
        if self._retries:
            ticket, position, strategy = self._retries.popleft()
            expected_ms = self.latency.batch_ms[strategy][1] * ticket.job.requests[position].work
            return self._start(worker, strategy, ((ticket, position),), expected_ms, retry=True)
        tickets = [ticket for _, _, ticket in self._queue]
        room = max(self.latency.largest_batches)  # requests of late jobs beyond this cannot be in the next batch
        for ticket in self._late:
            if room <= 0:
                break
            tickets.append(ticket)
            room -= ticket.demand.requests
        if not tickets:
            return None
        waiting = len(self._queue)
        if self._slots is not None and self._starts % FAIR_STARTS == FAIR_STARTS - 1:
            oldest = min(tickets, key=lambda ticket: ticket.number)
            waiting = int(tickets.index(oldest) < waiting)
            tickets = [oldest]
        demands = [ticket.demand for ticket in tickets]
        plan, lost = self._planner.decide(demands[:waiting], demands[waiting:], self._free_ms(), self._clock())
        for position in sorted(lost):
            self._leave(tickets[position])
            self._late.append(tickets[position])
        members = tuple(
            (tickets[index], position)
            for index, count in plan.members
            for position in tickets[index].take(count, self._promised[plan.strategy])
        )
        for index, _ in plan.members:
            if not tickets[index].demand.requests:
                self._leave(tickets[index])
        return self._start(worker, plan.strategy, members, plan.expected_ms, retry=False)

    def finish(self, batch: Batch, outputs: Sequence[Any]) -> list[Ticket]:
        """Records a batch's outputs, one per member, in order. Returns the tickets that are now done."""
        now_ms = self._clock()
        self._elapse()
        self._running[batch.worker] = None
        if self._slots is None:
            self.latency.observe(batch.index, len(batch.members), batch.work, now_ms - batch.started_ms)
        elif not batch.moved:
            self.latency.observe_factor(batch.index, batch.spent)
        done = []
        for (ticket, position), output in zip(batch.members, outputs, strict=True):
            if ticket.done:
                continue  # failed while this ran
            ticket.answers[position] = Answer(
                output=output,
                strategy=batch.strategy,
                time_ms=now_ms - ticket.arrival_ms,
                promised_accuracy=self._promised[batch.index],
                retried=batch.retry,
                kl=self.profile.kl_of(batch.profiled),
            )
            self.counters.requests_by_strategy[batch.strategy.name] += 1
            ticket.unanswered -= 1
            if not ticket.unanswered:
                ticket.answer = JobAnswer(
                    answers=tuple(answer for answer in ticket.answers if answer is not None),
                    time_ms=now_ms - ticket.arrival_ms,
                    promised_accuracy=ticket.promised_sum / len(ticket.answers),
                    deadline_met=now_ms <= ticket.demand.deadline_ms,
                )
                self.counters.answered += 1
                self.counters.violations += not ticket.answer.deadline_met
                done.append(ticket)
        return done

    def fail(self, batch: Batch, reason: str) -> list[Ticket]:
        """Records that a batch ended without outputs. Each of its requests is retried once, in a batch of its own, so
        that a request that crashes the model or its worker takes no other down. Returns the tickets that failed because
        this was their retry."""
        self._elapse()
        self._running[batch.worker] = None
        failed = []
        for ticket, position in batch.members:
            if ticket.done:
                continue
            if batch.retry:
                self.cancel(ticket, reason)
                failed.append(ticket)
            else:
                self._retries.append((ticket, position, batch.index))
                self.counters.retried_requests += 1
        return failed

    def refuse(self, batch: Batch, reason: str) -> list[Ticket]:
        """Records that the model cannot serve the only request of a batch, however often it is tried. Returns its
        ticket, unless that is done."""
        self._elapse()
        self._running[batch.worker] = None
        ((ticket, _),) = batch.members
        if ticket.done:
            return []
        self.cancel(ticket, reason)
        return [ticket]

    def review(self) -> list[Batch]:
        """Gives running requests whose deadline is in danger a cheaper strategy of the same modalities, where their
        job's requirement allows it and it brings them home in time; returns those whose strategy has changed. Only
        where requests share steps."""
        if self._slots is None:
            return []
        self._elapse()
        moved = []
        for batch in self._running.values():
            if batch is not None and (index := self._cheaper(batch)) is not None:
                ((ticket, _),) = batch.members
                ticket.promised_sum += self._promised[index] - self._promised[batch.index]
                left = self._left(batch)
                batch.index, batch.profiled = index, self.profile.strategies[index]
                batch.spent, batch.moved = (1.0 - left) * self.latency.factors[index], True
                self.counters.raised_levels += 1
                moved.append(batch)
        return moved

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """Fails a job. The outputs of its requests that are running are dropped."""
        assert not ticket.done, f"job {ticket.number} is done"
        ticket.failure = reason
        self.counters.failed += 1
        if ticket.demand.requests:
            self._leave(ticket)
        self._retries = deque(retry for retry in self._retries if retry[0] is not ticket)

    def waits(self, ticket: Ticket) -> bool:
        """Whether a request of this ticket still has to start, or to be retried."""
        return bool(ticket.demand.requests) or any(retry[0] is ticket for retry in self._retries)

    def batches_of(self, ticket: Ticket) -> list[Batch]:
        """What runs of this ticket's requests now."""
        running = (batch for batch in self._running.values() if batch is not None)
        return [batch for batch in running if any(member is ticket for member, _ in batch.members)]

    def adopt(self, profile: Profile) -> None:
        """Goes on with a profile that knows more: its first strategies are those of the one so far. What waits may take
        the new ones as well."""
        known = [entry.strategy for entry in self.profile.strategies]
        assert [entry.strategy for entry in profile.strategies][: len(known)] == known, "strategies keep their places"
        self._elapse()
        self.profile = profile
        self.latency = LatencyModel(profile, self._memory_bytes, slots=self._slots)
        self._promised = [entry.promised_accuracy for entry in profile.strategies]
        self._planner = Planner(self.selection, self.latency, self._promised, self._forecast)
        self._options = {}
        for ticket in [*(ticket for _, _, ticket in self._queue), *self._late]:
            ticket.demand.offer(self._options_for(ticket.job))
        for batch in self._running.values():
            if batch is not None:
                batch.profiled, batch.moved = profile.strategies[batch.index], True  # its time says nothing new

    def retire(self, worker: int) -> None:
        """Takes a worker out of all further plans."""
        assert self._running[worker] is None, f"worker {worker} still runs a batch"
        self._elapse()
        del self._running[worker]

    def _options_for(self, job: Job) -> StrategyOptions:
        job.check_modalities(self.profile.modalities)
        level = job.skip_level
        if job.max_kl is not None:
            level = self.profile.level_within(
                job.modalities, job.max_kl, level, job.min_accuracy, sharing=self.latency.sharing
            )
        return self._options_of(job.modalities, level)

    def _options_of(self, modalities: frozenset[str], level: float | None) -> StrategyOptions:
        key = modalities, level, self.latency.sharing
        if key not in self._options:
            frontier = self.profile.frontier(modalities, level, sharing=self.latency.sharing)
            # they take 10 ms and more to make, and mostly are the same with any number
            known = (options for (*alike, _), options in self._options.items() if alike == [modalities, level])
            same = next((options for options in known if options.frontier == frontier), None)
            self._options[key] = same or StrategyOptions(self.profile, modalities, self.latency, level)
        return self._options[key]

    def _offer(self) -> None:
        """Another number of requests share the steps now: what saved time may save none any more."""
        for ticket in [*(ticket for _, _, ticket in self._queue), *self._late]:
            options = self._options_of(ticket.job.modalities, ticket.demand.options.skip_level)
            if options is not ticket.demand.options:
                ticket.demand.offer(options)

    def _among(self, job: Job) -> str:
        """Which strategies a job leaves, said to whoever asked."""
        named = [f"with {'+'.join(sorted(job.modalities))}"] if job.modalities != self.profile.modalities else []
        named += [f"at skip_level {job.skip_level:g}"] if job.skip_level is not None else []
        named += [f"within max_kl {job.max_kl:g}"] if job.max_kl is not None else []
        return " ".join(named)

    def _check_deadline(self, ticket: Ticket, index: int) -> None:
        """Raises DeadlineUnreachable when accepting this job would make it, or one that is in time now, late."""
        demands = [waiting.demand for _, _, waiting in self._queue]
        late_before = self._planner.late_ms(demands, self._free_ms())
        demands.insert(index, ticket.demand)
        late_ms = self._planner.late_ms(demands, self._free_ms())
        if len(late_ms) > len(late_before):
            raise DeadlineUnreachable(ticket.job.deadline_ms, max(late_ms.values()))

    def _leave(self, ticket: Ticket) -> None:
        """Removes a ticket from the queue, or from the late ones."""
        index = bisect_left(self._queue, (ticket.demand.deadline_ms, ticket.number))
        if index < len(self._queue) and self._queue[index][2] is ticket:
            del self._queue[index]
        else:
            self._late.remove(ticket)

    def _cheaper(self, batch: Batch) -> int | None:
        """The most accurate strategy with which a request that would be late is in time after all."""
        ((ticket, _),) = batch.members
        now_ms, deadline_ms = self._clock(), batch.deadline_ms
        if ticket.done or not now_ms < deadline_ms < now_ms + self._left_ms(batch, batch.index):
            return None
        if ticket.demand.requests:  # the promise of its fellows is still open
            return None
        spare = ticket.promised_sum - ticket.job.min_accuracy * len(ticket.answers) + EPSILON
        options = self._options_of(ticket.job.modalities, ticket.demand.options.skip_level)
        for index in options.strategies:  # most accurate first
            same = self.profile.strategies[index].strategy.modalities == batch.strategy.modalities
            lost = self._promised[batch.index] - self._promised[index]
            allowed = same and 0.0 <= lost <= spare and index != batch.index
            if allowed and now_ms + self._left_ms(batch, index) <= deadline_ms:
                return index
        return None

    def _left_ms(self, batch: Batch, index: int) -> float:
        """Expected time to the end of a request that shares steps, if it goes on with strategy ``index``."""
        return self._left(batch) * self.latency.batch_ms[index][1] * batch.work

    def _left(self, batch: Batch) -> float:
        """The share that is still to come; one that takes longer than expected is taken to be about to end."""
        return max(_LEAST_LEFT, 1.0 - batch.spent / self.latency.factors[batch.index])

    def _elapse(self) -> None:
        """Time has passed: requests that share steps have come further. Called before their number changes."""
        now_ms, since_ms = self._clock(), self._elapsed_ms
        self._elapsed_ms = now_ms
        if self._slots is None:
            return
        running = [batch for batch in self._running.values() if batch is not None]
        machines = -(-len(self._running) // self._slots)
        beside = -(-len(running) // machines)
        for batch in running:
            batch.spent += (now_ms - since_ms) / (self.latency.profiled_ms(batch.index, beside) * batch.work)
        if self.latency.expect(max(1, min(self._slots, -(-(len(running) + self.waiting_requests) // machines)))):
            self._offer()

    def _free_ms(self) -> list[float]:
        """When each worker is free."""
        now_ms = self._clock()
        if self._slots is not None:
            return [
                now_ms if batch is None else now_ms + self._left_ms(batch, batch.index)
                for batch in self._running.values()
            ]
        return [
            now_ms if batch is None else max(now_ms, batch.started_ms + batch.expected_ms)
            for batch in self._running.values()
        ]

    def _start(
        self, worker: int, strategy: int, members: tuple[tuple[Ticket, int], ...], expected_ms: float, *, retry: bool
    ) -> Batch:
        batch = Batch(
            number=self.counters.batches,
            worker=worker,
            index=strategy,
            profiled=self.profile.strategies[strategy],
            members=members,
            started_ms=self._clock(),
            expected_ms=expected_ms,
            retry=retry,
        )
        self.counters.batches += 1
        self._starts += 1
        self._running[worker] = batch
        return batch
