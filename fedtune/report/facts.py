"""What a summary says, in words and figures, once: the page and the terminal both show these."""

import math
import operator
from dataclasses import dataclass
from typing import Any

from fedtune.common.metrics import tenth, worst_tenth
from fedtune.report import privacy as words
from fedtune.report.format import ABSENT, clean, count, duration, number, percent, plural, size
from fedtune.report.summary import Against, Round, Summary
from fedtune.tasks import task_named


@dataclass(frozen=True)
class Fact:
    """A named figure and, in a few words, what it is."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Rival:
    """Something the federated model is measured against, on the same held-out examples."""

    key: str
    name: str
    accuracy: float
    federated: float | None
    note: str

    @property
    def gain(self) -> float | None:
        return None if self.federated is None else self.federated - self.accuracy


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def metric(s: Summary) -> str:
    """The measure in words."""
    return task_named(s["task"]).metric.format(clean(s["metric"]))


def last_evaluated(s: Summary) -> Round | None:
    return next((r for r in reversed(s["rounds"]) if r["accuracy"] is not None), None)


def accuracy(s: Summary) -> float | None:
    """The final held-out accuracy; of an unfinished run, the last one measured."""
    last = last_evaluated(s)
    return s["final"]["accuracy"] if "final" in s else None if last is None else last["accuracy"]


def loss(s: Summary) -> float | None:
    last = last_evaluated(s)
    return s["final"]["loss"] if "final" in s else None if last is None else last["loss"]


def leading(s: Summary, personally: bool = False) -> tuple[float | None, float | None, float | None]:
    """(accuracy, worst tenth, loss) that stand for the run: of the global model; `personally`, and where
    heads stay with the clients, of what each client predicts with, over those that have something of their
    own. With heads of their own the global model has one that nobody trained.
    """
    if not (keeps_head(s) or (personally and is_personal(s))):
        return accuracy(s), s["final"]["worst_tenth"] if "final" in s else None, loss(s)
    own, last = (
        s.get("personal"),
        next((r for r in reversed(s["rounds"]) if r.get("personal_accuracy") is not None), None),
    )
    measured = None if last is None else last.get("personal_accuracy")
    return (
        own["accuracy"] if own else measured,
        own["worst_tenth"] if own else None,
        None if last is None else last.get("personal_loss"),
    )


def rounds_done(s: Summary) -> int:
    return max((r["round"] for r in s["rounds"]), default=0)


def rounds_planned(s: Summary) -> int:
    planned = s["job"].get("federation", {}).get("rounds", 0)
    return max(rounds_done(s), planned if isinstance(planned, int) else 0)


def headline(s: Summary) -> str:
    """The result in one sentence."""
    done = plural(rounds_done(s), "round")
    if not s["complete"]:
        done = f"{count(rounds_done(s))} of {plural(rounds_planned(s), 'round')}, unfinished"
    cost = f"{'up to ' if _unequal(s) else ''}{size(s['communication']['update_bytes'])} per client and round"
    ours = leading(s)[0]
    if ours is None:
        return f"{'Not evaluated' if s['complete'] else 'Nothing evaluated yet'} after {done}; {cost}."
    if keeps_head(s):
        return (
            f"{number(ours)} personal {metric(s)}, of each client with the head that it keeps, "
            f"on held-out data after {done}; {cost}."
        )
    return f"{number(ours)} {metric(s)} on held-out data after {done}; {cost}."


def rivals(s: Summary) -> list[Rival]:
    """The baselines there are, weakest idea first."""
    given, ours, found = s.get("baselines", {}), accuracy(s), []
    if "majority" in given:
        found.append(
            Rival(
                "majority",
                f"most common {task_named(s['task']).answer}",
                given["majority"]["accuracy"],
                ours,
                "always the same answer",
            )
        )
    if "head" in given:
        found.append(
            Rival(
                "head", "base + head", given["head"]["accuracy"], ours, "frozen base, everybody's data pooled"
            )
        )
    if "local" in given:
        local = given["local"]
        who = f"{count(local.get('trained', len(local['clients'])))} of {plural(local['of'], 'client')}"
        found.append(Rival("local", "alone", local["accuracy"], local["federated"], f"{who}, own data only"))
    return found


_PLAIN = {"majority": "always answering the {} gives", "head": "the frozen base with a trained head reaches"}


def verdict(s: Summary) -> str:
    """The baselines in one sentence; empty without any."""
    parts = []
    for r in rivals(s):
        if r.key == "local":
            parts.append(
                f"clients that train alone reach {number(r.accuracy)} where the federated model "
                f"has {number(r.federated)}"
            )
        else:
            parts.append(f"{_PLAIN[r.key].format(r.name)} {number(r.accuracy)}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def notices(s: Summary) -> list[str]:
    """What a reader must not miss: an unfinished run, numbers that broke, a baseline not beaten, refusals."""
    found = []
    if not s["complete"]:
        found.append(
            f"This run is unfinished: {count(rounds_done(s))} of {plural(rounds_planned(s), 'round')} done."
        )
    if s["privacy"]["unit"] != "none" and words.lost(s["privacy"]):
        found.append(f"NOT PRIVATE, though the job asks for it. {clean(s['privacy']['note'])}".strip())
    if keeps_head(s):
        found.append(
            "Heads stay with the clients: what is said of the global model, and what is exported, "
            "is with the initial head, which nobody trained."
        )
    if _unscored(s):
        found.append(words.UNSCORED)
    # under privacy training metrics may stay with the clients
    told = s["privacy"]["unit"] == "none" or any(is_number(r["train_loss"]) for r in s["rounds"])
    broken = next((r["round"] for r in s["rounds"] if _diverged(r, told)), None)
    if broken is not None:
        found.append(
            f"The loss is not a number from round {broken} on: training diverged. "
            "A lower federation.lr may help."
        )
    found += [
        f"Not better than “{r.name}” ({number(r.federated)} against {number(r.accuracy)})."
        for r in rivals(s)
        if is_number(r.gain) and r.gain is not None and r.gain <= 0 and not keeps_head(s)
    ]
    refused = len(refusals(s))
    if refused:
        found.append(
            f"{plural(refused, 'update')} refused; the rounds went on without "
            f"{'it' if refused == 1 else 'them'}."
        )
    return found


def _unscored(s: Summary) -> bool:
    """A live run whose devices may not say how well the model does."""
    private = s["job"].get("privacy", {})
    return (
        s["engine"] == "live"
        and accuracy(s) is None
        and (s["privacy"]["unit"] != "none" or private.get("secure-aggregation") is True)
    )


def _diverged(r: Round, told: bool) -> bool:
    """A loss was measured and is not a number: null (or NaN) although examples were evaluated, or clients
    trained and `told` theirs.
    """
    return bool(
        (r["evaluated"] and not is_number(r["loss"]))
        or (told and r["clients"] and not is_number(r["train_loss"]))
    )


def key_figures(s: Summary) -> list[Fact]:
    """The handful of numbers that stand large on the page."""
    c, total, simulated = s["communication"], s["communication"]["up"] + s["communication"]["down"], clock(s)
    drawn = sorted({len(r["clients"]) for r in s["rounds"] if r["round"] > 0})
    cohort = (
        ""
        if not drawn
        else f"{drawn[0]} in each round"
        if len(drawn) == 1
        else f"{drawn[0]} to {drawn[-1]} in a round"
    )
    figures = [Fact(f"held-out {metric(s)}", number(accuracy(s)), _measured(s))]
    if keeps_head(s):
        figures = [
            *_own_figures(s),
            Fact(
                f"shared model, held-out {metric(s)}",
                number(accuracy(s)),
                "with the initial head, which nobody trained",
            ),
        ]
    elif "final" in s:
        figures.append(
            Fact(
                "worst tenth",
                number(s["final"]["worst_tenth"]),
                f"mean over clients {number(s['final']['mean'])}",
            )
        )
        figures.append(Fact("held-out loss", number(s["final"]["loss"]), "cross-entropy"))
    return [
        *figures,
        Fact("rounds", count(rounds_done(s)), f"in {duration(s['wall_seconds'])}"),
        *(
            []
            if simulated is None
            else [
                Fact(
                    "simulated time",
                    duration(simulated),
                    f"on {plural(len(s.get('devices', [])), 'class', 'classes')} of devices",
                )
            ]
        ),
        Fact("clients", count(clients(s)), cohort),
        Fact(
            "numbers trained",
            count(c["trainable_numbers"]),
            f"{percent(c['trainable_numbers'], s['base']['parameters'])} of the base",
        ),
        Fact(
            "one update",
            size(c["update_bytes"]),
            "at most, up; what the client's rank has comes down"
            if s.get("ranks")
            else "at most, up; all that anybody trains comes down"
            if s.get("units")
            else "each way, per client and round",
        ),
        Fact("sent in all", size(total), f"in {plural(c['messages'], 'message')}"),
        Fact("epsilon", words.shown(s["privacy"]["epsilon"]), words.short(s["privacy"])),
    ]


def _own_figures(s: Summary) -> list[Fact]:
    """Where heads stay with the clients: how well they predict with these."""
    found, own = leading(s), s.get("personal")
    where = (
        (
            f"own heads of {count(own['clients'])} of {plural(own['of'], 'client')}, "
            f"{plural(own['examples'], 'example')}"
        )
        if own
        else "own heads, last measured"
    )
    worst = [Fact("personal worst tenth", number(found[1]), "of those clients")] if own else []
    return [Fact(f"personal {metric(s)}", number(found[0]), where), *worst]


def clients(s: Summary) -> int:
    """All of them, listed or not."""
    return s["population"]["clients"] if "population" in s else len(s["split"])


def _measured(s: Summary) -> str:
    if "final" in s and accuracy(s) is None:
        return "not measured"
    if "final" in s:
        listed = sum(c["examples"] for c in s["final"]["clients"])
        return f"on {plural(s['final']['whole']['examples'] if 'whole' in s['final'] else listed, 'example')}"
    last = last_evaluated(s)
    return f"last measured, after round {last['round']}" if last else "not measured yet"


def model(s: Summary) -> list[Fact]:
    """Base and adapter."""
    a, base = s["adapter"], s["base"]
    head = f", {count(a['head'])} of them in the task head" if a["head"] else ""
    return [
        Fact("base", clean(base["source"]), f"{count(base['parameters'])} numbers, frozen"),
        Fact("base sha256", clean(base["sha256"]) or ABSENT),
        Fact("base licence", clean(base["licence"]) or "not stated"),
        Fact("task", s["task"]),
        Fact(
            "adapter",
            f"{clean(a['method'])}, rank {a['rank']}" if a["modules"] else clean(a["method"]),
            _where(s),
        ),
        Fact("trained", plural(a["trainable"], "number") + head),
        Fact("engine", clean(s["engine"])),
    ]


def _where(s: Summary) -> str:
    """Where the adapter sits, for methods that sit somewhere."""
    a = s["adapter"]
    if not a["modules"]:
        return ""
    return plural(a["modules"], "module") + (
        f", frame from {clean(a['init'])}" if s["communication"]["frame_bytes"] else ""
    )


def communication(s: Summary) -> list[Fact]:
    """Totals of what was sent."""
    c = s["communication"]
    numbers = c.get("sent_numbers", c["trainable_numbers"])
    holders = c.get("took_part", sum(1 for client in c["clients"] if client["rounds"] > 0))
    beside = c.get("evaluation", 0) + c.get("offers", 0)
    return [
        Fact(
            "one update",
            size(c["update_bytes"]),
            f"at most, of {plural(numbers, 'number')}"
            if _unequal(s)
            else f"{plural(numbers, 'number')} and their names",
        ),
        *(
            [
                Fact(
                    "frame",
                    size(c["frame_bytes"]),
                    f"frozen, sent once to each of {plural(holders, 'client')}",
                )
            ]
            if c["frame_bytes"]
            else []
        ),
        Fact("sent by clients", size(c["up"]), f"{percent(c['up'], c['up'] + c['down'])} of all bytes"),
        Fact("received by clients", size(c["down"]), "frame included" if c["frame_bytes"] else ""),
        *(
            [Fact("for probes", size(c["probes"]), "of these, to ask which blocks matter")]
            if c.get("probes")
            else []
        ),
        *(
            [Fact("beside the rounds", size(beside), "evaluation on the devices, job offers and bundles")]
            if beside
            else []
        ),
        Fact(
            "in all",
            size(c["up"] + c["down"] + beside),
            f"{plural(c['messages'], 'message')} in the rounds"
            if beside
            else plural(c["messages"], "message"),
        ),
    ]


def clock(s: Summary) -> float | None:
    """Simulated seconds of the whole run; None without device classes."""
    return s["rounds"][-1].get("simulated_clock") if s["rounds"] else None


def fleet(s: Summary) -> str:
    """What the devices did to the run, in one sentence; empty without device classes."""
    simulated, classes = clock(s), s.get("devices", [])
    if simulated is None or not classes:
        return ""
    asked, dropped, late = (sum(c[key] for c in classes) for key in ("asked", "dropped", "stragglers"))  # type: ignore[literal-required]
    deadline = s["job"].get("federation", {}).get("deadline")
    limit = f" of {duration(deadline)}" if isinstance(deadline, (int, float)) else ""
    text = (
        f"{duration(simulated)} of simulated time; of {plural(asked, 'answer')} asked for, "
        f"{count(dropped)} never came and {count(late)} would have missed the deadline{limit}."
    )
    unable = sum(c["clients"] - c["able"] for c in classes)
    return text + (f" {plural(unable, 'client')} had too little memory to take part." if unable else "")


def _unequal(s: Summary) -> bool:
    """Whether clients train, or send, unlike numbers."""
    return bool(s.get("units") or s.get("ranks"))


def units(s: Summary) -> str:
    """Which units clients train, in one sentence; empty where they all train all."""
    if not s.get("units"):
        return ""
    section, classes = s["job"].get("units", {}), s["job"].get("simulation", {}).get("devices", [])
    own = sorted({d.get("units", 0) for d in classes if isinstance(d, dict)} - {0})
    beside = f", of some classes of devices {', '.join(map(count, own))}" if own else ""
    return (
        f"Strategy {clean(section.get('strategy', ''))}: "
        f"a client trains {plural(section.get('budget', 0), 'block')} in a round{beside}, "
        "and what is trained outside the blocks."
    )


_KEPT = {
    "ditto": "Each client keeps a model of its own, pulled to the global one",
    "head": "Each client keeps the head that it trained",
    "select": "Each client keeps those entries of the weights that moved most with it, and shares the others",
    "loge": "Each client keeps a head of its own beside the shared one",
}


def ranks(s: Summary) -> str:
    """What clients of unequal ranks share, in one sentence; empty where all have the same."""
    found = [r["rank"] for r in s.get("ranks", [])]
    return (
        (
            f"Clients have the ranks {', '.join(map(count, found))}: each trains the leading block of that "
            "size of every core, and a number is averaged over those that have it."
        )
        if found
        else ""
    )


def personal(s: Summary) -> str:
    """What clients keep for themselves and how well they predict with it, in one sentence; empty where
    they keep nothing to predict with.
    """
    found = s.get("personal")
    if found is None:
        return ""
    what = _KEPT.get(
        str(s["job"].get("personal", {}).get("method")), "Each client keeps something of its own"
    )
    if not found["clients"] or found["accuracy"] is None:
        return f"{what}; none has been measured."
    text = (
        f"{what}: {number(found['accuracy'])} {metric(s)} on {plural(found['examples'], 'held-out example')} "
        f"of the {count(found['clients'])} of {plural(found['of'], 'client')} that took part"
    )
    return (
        f"{text}, worst tenth {number(found['worst_tenth'])}; "
        f"the global model has {number(found['federated'])} on the same examples."
    )


def labels(s: Summary) -> str:
    """What the figures of labels are shares of."""
    if not s.get("by_label"):
        return ""
    text = (
        "Share of the held-out examples of each label that is given it, from the most "
        "training examples to the fewest"
    )
    own = s.get("personal")
    return (
        (
            f"{text}; personal: by what clients predict with, "
            f"of {plural(own['examples'], 'held-out example')} of the {count(own['clients'])} "
            f"of {plural(own['of'], 'client')} that took part."
        )
        if own
        else f"{text}."
    )


def is_personal(s: Summary) -> bool:
    """Whether clients predict with something of their own."""
    return s["job"].get("personal", {}).get("method", "none") != "none"


def keeps_head(s: Summary) -> bool:
    return s["job"].get("personal", {}).get("method") == "head"


def refusals(s: Summary) -> list[tuple[int, str, str]]:
    """(round, client, reason) of every update that was not taken."""
    return [(r["round"], clean(name), clean(why)) for r in s["rounds"] for name, why in r["refused"].items()]


def privacy(s: Summary) -> str:
    """The privacy line, as plain as it is."""
    return words.sentence(s["privacy"])


def scores(s: Summary) -> list[tuple[str, float, float | None, int]]:
    """(client, accuracy, accuracy of base + head or None, examples) of those listed, worst first; clients
    without a figure are left out.
    """
    if "final" not in s:
        return []
    head = {c["name"]: c["accuracy"] for c in s.get("baselines", {}).get("head", {}).get("clients", [])}
    rows = [
        (c["name"], c["accuracy"], head.get(c["name"]), c["examples"])
        for c in s["final"]["clients"]
        if c["accuracy"] is not None and is_number(c["accuracy"])
    ]
    return sorted(rows, key=lambda row: (row[1], row[0]))


def spread(s: Summary) -> str:
    """How evenly the model serves the clients, in one sentence."""
    rows = scores(s)
    if not rows:
        return "No client has been evaluated."
    listed = sum(n for *_, n in rows[: tenth(len(rows))])
    measured, few = (
        (s["final"]["whole"]["clients"], s["final"]["whole"]["worst_examples"])
        if "whole" in s["final"]
        else (len(rows), listed)
    )
    text = f"From {number(rows[0][1])} to {number(rows[-1][1])} over {plural(measured, 'client')}"
    text += f"; mean {number(s['final']['mean'])}, worst tenth {number(s['final']['worst_tenth'])} "
    text += f"({plural(tenth(measured), 'client')} with {plural(few, 'held-out example')} in all)."
    found = against(s)
    if found["clients"]:
        text += (
            f" Better than base + head on {count(found['better'])} of {plural(found['clients'], 'client')}"
        )
        text += f", equal on {count(found['equal'])}" if found["equal"] else ""
        text += f"; the worst tenth of base + head is {number(found['worst_tenth'])}."
    return text


def against(s: Summary) -> Against:
    """The clients beside base + head."""
    head = s.get("baselines", {}).get("head")
    if head is not None and "whole" in head:
        return head["whole"]
    pairs = [(ours, theirs) for _, ours, theirs, _ in scores(s) if theirs is not None]
    better, equal = (sum(test(ours, theirs) for ours, theirs in pairs) for test in (operator.gt, operator.eq))
    return {
        "clients": len(pairs),
        "better": better,
        "equal": equal,
        "worst_tenth": worst_tenth(theirs for _, theirs in pairs),
    }


def listed(s: Summary) -> str:
    """What the lists of clients leave out, in a sentence; empty where they have everybody."""
    shown = []
    if "whole" in s.get("final", {}):
        shown.append(
            f"{count(len(s['final']['clients']))} of {plural(s['final']['whole']['clients'], 'client')} "
            "by their accuracy, spread evenly from worst to best"
        )
    if "population" in s:
        shown.append(
            f"{count(len(s['split']))} of {plural(clients(s), 'client')} by what they hold, evenly spaced"
        )
    return f"Listed and drawn: {'; '.join(shown)}. Figures in sentences are of all." if shown else ""
