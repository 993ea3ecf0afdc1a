"""What is provisioned, what a call reports about it, and where each file lies under a root."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedtune.provision.files import exists, listed


@dataclass(frozen=True)
class Item:
    """Something provisioned.

    `kind` is ca, server or device; device keys do not expire. `has_key`: its private key lies here too.
    """

    name: str
    path: Path
    kind: str
    not_after: datetime | None = None
    hosts: tuple[str, ...] = ()
    has_key: bool = True


@dataclass(frozen=True)
class Report:
    """What a call did: items made new, items left as they were, devices removed, and what a person has to
    do now, a sentence each.
    """

    root: Path
    hosts: tuple[str, ...]
    made: tuple[Item, ...]
    kept: tuple[Item, ...]
    removed: tuple[str, ...]
    todo: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where everything lies under `root`."""

    root: Path

    @property
    def ca_key(self) -> Path:
        return self.root / "ca" / "ca.key"

    @property
    def ca_crt(self) -> Path:
        return self.root / "ca" / "ca.crt"

    @property
    def server(self) -> Path:
        return self.root / "server"

    @property
    def server_ca(self) -> Path:
        return self.server / "ca.crt"

    @property
    def server_key(self) -> Path:
        return self.server / "server.key"

    @property
    def server_crt(self) -> Path:
        return self.server / "server.crt"

    @property
    def devices(self) -> Path:
        return self.root / "devices"

    @property
    def pubs(self) -> Path:
        return self.server / "devices"

    def pub(self, name: str) -> Path:
        return self.pubs / f"{name}.pub"

    def device_key(self, name: str) -> Path:
        return self.devices / name / "device.key"

    def device_ca(self, name: str) -> Path:
        return self.devices / name / "ca.crt"

    def files(self, names: Iterable[str]) -> list[Path]:
        """Every file of the CA, the server and these devices."""
        fixed = [self.ca_key, self.ca_crt, self.server_ca, self.server_key, self.server_crt]
        return fixed + [
            path for name in names for path in (self.device_key(name), self.device_ca(name), self.pub(name))
        ]

    def known(self) -> tuple[str, ...]:
        """Names of all devices that have a public key for the coordinator, or a private one here."""
        enrolled = {path.stem for path in listed(self.pubs) if path.suffix == ".pub"}
        return tuple(
            sorted(enrolled | {path.name for path in listed(self.devices) if exists(path / "device.key")})
        )
