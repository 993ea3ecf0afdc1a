"""What coordinator and device say to each other before the first round: the offer of a job,
and the device's answer.

Both travel as named values (text, bytes, whole numbers) in whatever record the transport has. Values
from outside are checked when read; an answer is shown to the operator, so it is one printable line and
never holds a data value.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from fedtune.bundles.bundle import SHIPPED
from fedtune.errors import Refused
from fedtune.job import DeviceClass, Job, toml_value

Value = str | bytes | int
State = Literal["ready", "need", "refused"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""How devices may be called."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = "file:"
_MAX_REASON = 300


@dataclass(frozen=True)
class Offer:
    """A job by the name of its bundle (sha256); with the bundle's files once the device has
    said that it needs them.
    """

    job: str
    files: Mapping[str, bytes] = field(default_factory=dict)

    def dump(self) -> dict[str, Value]:
        return {"job": self.job, **{_FILE + name: data for name, data in self.files.items()}}

    @classmethod
    def load(cls, values: Mapping[str, object]) -> "Offer":
        """Raises Refused for anything that is not an offer."""
        files = {name: values.get(_FILE + name) for name in SHIPPED}
        return cls(
            job_name(values.get("job")),
            {name: data for name, data in files.items() if isinstance(data, bytes)},
        )


@dataclass(frozen=True)
class OfferAnswer:
    """ready: the device can train this job now. need: it wants the bundle first. refused: it will not, and
    why. `kind`: its class of the job's devices, "" for none.
    """

    state: State
    reason: str = ""
    name: str = ""
    examples: int = 0
    held_out: int = 0
    kind: str = ""

    def dump(self) -> dict[str, Value]:
        return {
            "state": str(self.state),
            "reason": one_line(self.reason),
            "name": self.name,
            "examples": self.examples,
            "held-out": self.held_out,
            "kind": self.kind,
        }

    @classmethod
    def load(cls, values: Mapping[str, object]) -> "OfferAnswer":
        """Raises Refused for anything that is not an answer."""
        try:
            found = _ANSWER.validate_python({key.replace("-", "_"): value for key, value in values.items()})
        except ValidationError as e:
            raise Refused(
                "answer", f"not an answer to an offer ({e.errors(include_input=False)[0]['loc']})"
            ) from None
        if (found.name and not NAME.fullmatch(found.name)) or not all(
            0 <= n < 2**53 for n in (found.examples, found.held_out)
        ):
            raise Refused("answer", "names or counts out of bounds")
        return replace(found, reason=one_line(found.reason), kind=one_line(found.kind))


def class_of(job: Job, kind: str) -> DeviceClass | None:
    """The class of the job's devices that a device says it is of; None where it says none.

    Raises Refused for one that the job does not have.
    """
    known = {device.name: device for device in job.simulation.devices}
    if kind and kind not in known:
        these = (
            f"those of simulation.devices are {', '.join(map(toml_value, known))}; name one of them, or none"
            if known
            else "it has none in simulation.devices; name none"
        )
        raise Refused("class", f"the job knows no class {toml_value(kind[:40])}: {these}")
    return known.get(kind)


_ANSWER = TypeAdapter(OfferAnswer)


def job_name(value: object) -> str:
    """A bundle's name. Raises Refused for anything else: it becomes a folder's name."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise Refused("job", "is not named by 64 hexadecimal digits")
    return value


def one_line(text: str) -> str:
    """Printable characters only, and not many: what came from outside and is shown."""
    return "".join(c if c.isprintable() else " " for c in text)[:_MAX_REASON]
