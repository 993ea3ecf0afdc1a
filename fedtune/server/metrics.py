"""What the service does, for Prometheus to scrape.

No names of devices: a label per device would never stop growing.
"""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server

from fedtune.errors import EnvironmentProblem
from fedtune.round.replies import Reply

STATES = ("starting", "idle", "waiting", "training", "evaluating")


class Exporter:
    """Serves /metrics on HOST:PORT until the process ends.

    Raises EnvironmentProblem when the port cannot be had.
    """

    def __init__(self, host: str, port: int) -> None:
        self.registry = CollectorRegistry()
        self._state = Gauge(
            "fedtune_state", "1 for what the service does now", ["state"], registry=self.registry
        )
        self._job = Info("fedtune_job", "the job being run", registry=self.registry)
        self._round = Gauge("fedtune_round", "finished rounds of the job", registry=self.registry)
        self._rounds = Gauge("fedtune_rounds", "rounds of the job in all", registry=self.registry)
        self._queue = Gauge("fedtune_queued_jobs", "jobs behind the one being run", registry=self.registry)
        self._devices = Gauge(
            "fedtune_devices", "devices seen in this job, by state", ["state"], registry=self.registry
        )
        self._replies = Counter("fedtune_updates", "updates by result", ["result"], registry=self.registry)
        self._bytes = Gauge(
            "fedtune_bytes", "bytes of this run's messages", ["direction"], registry=self.registry
        )
        self._seconds = Gauge("fedtune_round_seconds", "seconds of the last round", registry=self.registry)
        self._scores = Gauge(
            "fedtune_score",
            "held-out loss and accuracy of the last evaluation",
            ["metric"],
            registry=self.registry,
        )
        self._epsilon = Gauge(
            "fedtune_epsilon",
            "privacy spent so far by the client that lost most; +Inf once anything left unprotected",
            registry=self.registry,
        )
        self._line: Mapping[str, Any] | None = None
        try:
            start_http_server(port, host, self.registry)
        except OSError as e:
            raise EnvironmentProblem(
                f"cannot serve metrics on {host}:{port} ({e.strerror or e}); give another --metrics"
            ) from None

    def update(self, facts: Mapping[str, Any]) -> None:
        """`facts` as service.json has them."""
        for state in STATES:
            self._state.labels(state).set(facts["state"] == state)
        self._job.info({"name": facts["job"] or ""})
        self._round.set(facts.get("round") or 0)
        self._rounds.set(facts.get("rounds") or 0)
        self._queue.set(len(facts["queue"]))
        for state in ("ready", "asked", "refused", "offline"):
            self._devices.labels(state).set(
                sum((d["state"] if d["online"] else "offline") == state for d in facts["devices"])
            )
        line = facts.get("line")
        if facts.get("epsilon") is not None:
            self._epsilon.set(float(facts["epsilon"]))
        if line is not None and line is not self._line:
            self._finished(line)
        self._line = line

    def reply(self, reply: Reply) -> None:
        if reply.late:
            self._replies.labels("late").inc()

    def _finished(self, line: Mapping[str, Any]) -> None:
        self._replies.labels("accepted").inc(len(line["clients"]))
        self._replies.labels("refused").inc(len(line["refused"]))
        self._seconds.set(line["seconds"])
        for direction in ("up", "down"):
            self._bytes.labels(direction).set(line[direction])
        for metric in ("loss", "accuracy"):
            if line[metric] is not None:
                self._scores.labels(metric).set(line[metric])
