"""What a person does next, a sentence each: which folder goes to whom."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from fedtune.provision.layout import Layout
from fedtune.provision.names import names_in_short
from fedtune.provision.plan import ProvisionPlan


def to_do(layout: Layout, plan: ProvisionPlan, removed: Sequence[str]) -> Iterator[str]:
    kinds = {item.kind for item in plan.made}
    if "ca" in kinds:
        yield (
            f"keep {layout.root / 'ca'} offline: whoever holds ca.key can pose as "
            "the coordinator; only renewing needs it"
        )
    if "server" in kinds or removed:
        yield f"copy {layout.server} to the coordinator{' in place of the old one' if removed else ''}"
    elif "device" in kinds:
        yield f"copy {layout.pubs} to the coordinator: it lets in the devices listed there"
    yield from _deliver(layout, plan)


def to_do_renewed(layout: Layout, plan: ProvisionPlan, now: datetime) -> Iterator[str]:
    kinds = {item.kind for item in plan.made}
    if "ca" in kinds and plan.replaced_until:
        until = plan.replaced_until
        yield f"every device needs the new ca.crt: copy {layout.server_ca} to each, " + (
            f"before {until:%Y-%m-%d}; until then the old and the new one both work"
            if until > now
            else f"now: the old one expired on {until:%Y-%m-%d}, and a device that has it cannot connect"
        )
    if kinds & {"ca", "server"}:
        yield f"copy {layout.server} to the coordinator and restart it"
    elif "device" in kinds:
        yield (
            f"copy {layout.pubs} to the coordinator, so that it refuses the old key "
            f"of {names_in_short(_devices(plan))}"
        )
    yield from _deliver(layout, plan)


def _deliver(layout: Layout, plan: ProvisionPlan) -> Iterator[str]:
    names = _devices(plan)
    if len(names) == 1:
        yield f"copy {layout.devices / names[0]} to {names[0]}, and to no other device"
    elif names:
        yield (
            f"copy each folder in {layout.devices} to the device of its name, "
            f"and to no other: {names_in_short(names)}"
        )


def _devices(plan: ProvisionPlan) -> list[str]:
    return [item.name for item in plan.made if item.kind == "device"]
