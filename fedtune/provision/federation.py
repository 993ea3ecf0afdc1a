"""What can be done with the keys of a federation: make them, renew them, look at them, and read the
devices a coordinator lets in.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedtune.common.storage import failing_clearly
from fedtune.errors import UserError
from fedtune.provision.certificates import parse_pub, public_pem
from fedtune.provision.files import (
    exists,
    held,
    is_folder,
    listed,
    make_folder,
    read,
    require_no_file,
    require_plain,
    require_unused,
    write,
)
from fedtune.provision.found import ca_item, device_item, read_ca, server_items
from fedtune.provision.layout import Item, Layout, Report
from fedtune.provision.names import NAME, NO_HOST, check_names, refuse_twins, require_known, sans
from fedtune.provision.plan import (
    ProvisionPlan,
    plan_ca,
    plan_device,
    plan_new_ca,
    plan_renewed_ca,
    plan_renewed_server,
    plan_server,
)
from fedtune.provision.todo import to_do, to_do_renewed

DAYS, CA_DAYS, WITHIN = 365, 1825, 30
MAX_DAYS, MAX_CA_DAYS = 3650, 7300


def make(
    root: Path,
    hosts: Sequence[str],
    names: Sequence[str],
    days: int = DAYS,
    ca_days: int = CA_DAYS,
    force: bool = False,
    now: datetime | None = None,
) -> Report:
    """Makes what is missing of a CA, a server certificate for `hosts`, and key pairs for the devices `names`.

    What is there stays as it is, so calling again with more names enrols more devices; that needs no CA key.
    `hosts` may be empty when there is a server certificate. `force` makes everything new, and devices not in
    `names` are removed with the old CA.

    Raises:
        UserError: `force` while a coordinator or device runs with these keys; a host, name or number of days
            that cannot be; a file in the way that is damaged, a link, of another CA, or for other hosts; the
            CA's key is not here and something is to be signed. Nothing is written then.
        EnvironmentProblem: the folder cannot be written or read.
            What was written is finished by calling again.
    """
    now = _moment(now)
    wanted = sans(hosts) if hosts else ()
    names = check_names(names)
    _check_days(days, ca_days)
    layout = Layout(root)
    if not wanted and (force or not exists(layout.server_crt)):
        raise UserError(NO_HOST)
    make_folder(root)
    with held(root):
        known = layout.known()
        removed = tuple(name for name in known if force and name not in names)
        require_plain(root, layout.files([*names, *removed]))
        plan = ProvisionPlan()
        if force:
            require_unused([layout.server_crt.parent, *(layout.devices / name for name in known)])
            ca = plan_new_ca(plan, layout, ca_days, now)
        else:
            refuse_twins(names, known)
            ca = plan_ca(plan, layout, ca_days, now)
        found = plan_server(plan, layout, ca, wanted, days, force, now)
        for name in names:
            plan_device(plan, layout, ca, name, force)
        _remove(layout, removed)
        _carry_out(plan)
    return Report(
        root, found, tuple(plan.made), tuple(plan.kept), removed, tuple(to_do(layout, plan, removed))
    )


def renew(
    root: Path,
    within: int = WITHIN,
    hosts: Sequence[str] = (),
    days: int = DAYS,
    names: Sequence[str] = (),
    now: datetime | None = None,
) -> Report:
    """Replaces what expires within so many days, and the key pairs of the devices `names`.

    The server gets a new key and a certificate for the same hosts, or for `hosts`, which are a reason to
    renew if they are others. The CA gets a new certificate for its old key, as long-lived as the last, and
    every copy of ca.crt here is brought up to date. With `names` and no `hosts` only these devices are
    touched: a stolen one is shut out without the CA's key at hand.

    Raises:
        UserError: nothing provisioned at `root`; a device that is not known; the CA's key is needed and not
            here; arguments or files as for `make`. Nothing is written then.
        EnvironmentProblem: the folder cannot be written or read.
            What was written is finished by calling again.
    """
    now = _moment(now)
    wanted = sans(hosts) if hosts else ()
    names = check_names(names)
    _check_days(days, MAX_CA_DAYS)
    if not 0 <= within <= MAX_DAYS:
        raise UserError(f"--within {within}: give 0 to {MAX_DAYS} days")
    layout = Layout(root)
    require_no_file(root)
    if not is_folder(root):
        raise _nothing_here(root)
    with held(root):
        known = layout.known()
        require_known(names, known)
        require_plain(root, layout.files(known))
        certificates = bool(hosts or not names)
        ca = read_ca(layout, with_key=certificates)
        if ca is None:
            raise _nothing_here(root)
        plan = ProvisionPlan()
        if certificates:
            ca = plan_renewed_ca(plan, layout, ca, known, within, days, now)
            found = plan_renewed_server(plan, layout, ca, wanted, within, days, now)
        else:
            plan.kept += [ca_item(layout, ca), *server_items(layout)]
            found = plan.kept[-1].hosts
        for name in names:
            plan_device(plan, layout, ca, name, anew=True)
        _carry_out(plan)
    return Report(
        root, found, tuple(plan.made), tuple(plan.kept), (), tuple(to_do_renewed(layout, plan, now))
    )


def inspect(root: Path) -> list[Item]:
    """Everything provisioned at `root`: the CA, the server certificate, the devices by name.

    Needs no private key and changes nothing.

    Raises UserError when nothing is provisioned there or a certificate is damaged.
    """
    layout = Layout(root)
    ca = read_ca(layout, with_key=False) if is_folder(root) else None
    if ca is None:
        raise _nothing_here(root)
    return [
        ca_item(layout, ca),
        *server_items(layout),
        *(device_item(layout, name) for name in layout.known()),
    ]


def load_devices(folder: Path) -> dict[str, bytes]:
    """Name -> public key (PEM, SubjectPublicKeyInfo) of every NAME.pub in `folder`, by name.

    Empty when there are none.

    Raises:
        UserError: the folder is missing; a file is not one EC public key in OpenSSH form, or its name is no
            device name; two files hold the same key, so that one device could pass for the other.
        EnvironmentProblem: the folder or a file cannot be read.
    """
    if not is_folder(folder):
        raise UserError(
            f"{folder}: not a folder; give the folder of .pub files that `fedtune "
            "provision` made, server/devices"
        )
    paths = [path for path in listed(folder) if path.suffix == ".pub"]
    found: dict[str, bytes] = {}
    owner: dict[bytes, Path] = {}
    for path in paths:
        if not NAME.fullmatch(path.stem):
            raise UserError(
                f"{path}: {path.stem!r} is not a device name (letters, digits and . "
                "_ -, at most 64); rename or remove it"
            )
        key = public_pem(parse_pub(path, read(path) or b""))
        if key in owner:
            raise UserError(
                f"{path}: holds the same key as {owner[key].name}; each device needs its own: "
                f"`fedtune provision renew --device {path.stem}`"
            )
        owner[key] = path
        found[path.stem] = key
    return found


def _check_days(days: int, ca_days: int) -> None:
    if not 1 <= days <= MAX_DAYS:
        raise UserError(f"--days {days}: give 1 to {MAX_DAYS}")
    if not days <= ca_days <= MAX_CA_DAYS:
        raise UserError(
            f"--ca-days {ca_days}: give --days ({days}) to {MAX_CA_DAYS}; "
            "the server certificate cannot outlive its CA"
        )


def _moment(now: datetime | None) -> datetime:
    # certificates know whole seconds
    return (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)


def _nothing_here(root: Path) -> UserError:
    return UserError(
        f"{root}: nothing is provisioned here; `fedtune provision --host NAME --devices N -o {root}` does it"
    )


def _carry_out(plan: ProvisionPlan) -> None:
    for file in plan.files:
        make_folder(file.path.parent)
        if file.secret:
            with failing_clearly(file.path.parent):
                os.chmod(file.path.parent, 0o700)
        write(file)


def _remove(layout: Layout, names: Iterable[str]) -> None:
    """First the public key, which is what lets a device in; then the device's folder,
    if nothing else is in it.
    """
    for name in names:
        for path in (layout.pub(name), layout.device_key(name), layout.device_ca(name)):
            with failing_clearly(path):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (layout.devices / name).rmdir()
