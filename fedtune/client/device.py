"""A device in a live federation: joins, takes jobs that its owner's policy allows,
and lets the trainer do the work.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.algorithms.units import Limits, limits_of
from fedtune.bundles.bundle import Bundle, open_bundle, receive_bundle
from fedtune.bundles.offer import Offer, OfferAnswer, class_of
from fedtune.client.app import make_device_app
from fedtune.client.budget import Budget
from fedtune.client.connection import Unreachable, look
from fedtune.client.policy import FILE as POLICY
from fedtune.client.policy import Policy, load_policy
from fedtune.client.secure import SecureWork, is_question
from fedtune.client.supernode import NodeSettings, SuperNode, execute
from fedtune.client.trainer import Trainer, TrainerSettings
from fedtune.common.storage import lock, private_folder
from fedtune.errors import DataError, FedtuneError, ModelError, Refused, RunError, UserError
from fedtune.process.waits import GOODBYE_SECONDS, OFFER_SECONDS, STEADY_SECONDS, WATCH_POLL, backoff
from fedtune.round.asked import require_borne
from fedtune.stateful.methods import method_of
from fedtune.wire import kind_of

log = logging.getLogger(__name__)
KEEP_BUNDLES = 3
KEEP_OWN = 16
OWN = "personal"
"""Folder of what this device keeps for itself, by job; not removed with the bundles,
as nobody could make it again.
"""


@dataclass(frozen=True)
class DeviceSettings:
    """What `fedtune client` or `fedtune edge train` was told.

    Attributes:
        server: HOST:PORT of the coordinator.
        folder: this device's own, with ca.crt and device.key from `fedtune provision`;
            holds bundles and logs too.
        data: file of texts or folder of images; never leaves.
        base: folder of the base model, when the one the job names is not to be looked for.
        policy: the owner's limits; None takes policy.toml of the folder, if there is one.
        name: what to be called where devices have no keys.
        kind: the class of the job's devices whose `units`, `depth` and `rank` this one trains; "" for none.
        insecure: no TLS and no key; the caller allows it for loopback only.
        graphs: folder of training graphs, for a device without torch; memory_mb:
            MB that its trainer keeps to, 0 for no limit.
    """

    server: str
    folder: Path
    data: Path
    base: Path | None = None
    policy: Path | None = None
    name: str = ""
    insecure: bool = False
    threads: int = 0
    idle_seconds: float = 600.0
    graphs: Path | None = None
    memory_mb: int = 0
    kind: str = ""


Say = Callable[[str], None]


@dataclass
class Work:
    """Answers what the coordinator asks.

    Keeps at most one job open; `fatal` is an error that the owner has to mend.
    """

    settings: DeviceSettings
    policy: Policy
    say: Say
    fatal: UserError | None = None
    _bundle: Bundle | None = None
    _trainer: Trainer | None = None
    _secure: SecureWork | None = None
    _facts: dict = field(default_factory=dict)

    def accept(self, offer: Offer) -> OfferAnswer:
        """Opens the job, after the policy and the data have been checked;
        "need" when its bundle is not here yet.
        """
        folder = self._folder(offer.job)
        try:
            if offer.files:
                receive_bundle(folder, offer.job, offer.files)
                self.say(f"received job {offer.job[:12]} ({sum(map(len, offer.files.values())):,} bytes)")
            if not self._here(offer.job):
                return OfferAnswer("need")
            self._open(offer.job)
        except Refused as e:
            self.say(f"refused job {offer.job[:12]}: {e}")
            return OfferAnswer("refused", str(e), self.settings.name)
        # its text may hold what the data holds: the owner sees it, the coordinator does not
        except FedtuneError as e:
            if isinstance(e, UserError):
                self.fatal = e
            else:
                self.say(f"cannot take job {offer.job[:12]} now: {e}")
            return OfferAnswer("refused", _outward(e), self.settings.name)
        self.say(
            f"ready for job {offer.job[:12]}: {self._facts['examples']} examples to train on, "
            f"{self._facts['held_out']} held out"
        )
        # how many there are is not protected by any noise
        if self._bundle is not None and self._bundle.job.privacy.hides_clients:
            return OfferAnswer("ready", "", self.settings.name, kind=self.settings.kind)
        return OfferAnswer(
            "ready",
            "",
            self.settings.name,
            self._facts["examples"],
            self._facts["held_out"],
            self.settings.kind,
        )

    def train(self, job: str, packet: bytes, client: str) -> bytes:
        with _inward(self):
            bundle, trainer = self._opened(job)
            if not is_question(packet):
                require_borne(bundle, packet, self._limits(bundle))
            if bundle.job.privacy.secure_aggregation:
                assert self._secure is not None
                return self._secured(self._secure, trainer, packet, client)
            budget = self._budget(bundle)
            if (sent := budget.charge(packet)) is not None:
                self.say("sending the answer of this round again")
                return sent
            self.say("saying which blocks matter" if kind_of(packet) == "probe" else "training")
            answer = trainer.handle(packet, client, bundle.job.federation.deadline)
            budget.keep(packet, answer)
            return answer

    def _secured(self, secure: SecureWork, trainer: Trainer, packet: bytes, client: str) -> bytes:
        """A question of a round whose updates are summed: the update stays here,
        what leaves is a message of the protocol.
        """
        if is_question(packet):
            return secure.answer(packet)
        secure.begin(packet)
        self._budget(secure.bundle).charge(packet)
        self.say("training")
        return secure.first(
            packet, trainer.handle(packet, client, secure.bundle.job.federation.deadline), client
        )

    def evaluate(self, job: str, packet: bytes) -> bytes:
        with _inward(self):
            bundle, trainer = self._opened(job)
            if bundle.job.privacy.hides_clients:
                raise Refused("privacy", "scores of held-out examples would leave as they are")
            self.say("evaluating")
            return trainer.evaluate(packet, bundle.job.federation.deadline)

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.stop()
        self._trainer = self._bundle = self._secure = None

    def _budget(self, bundle: Bundle) -> Budget:
        return Budget(self.settings.folder / "privacy", bundle.manifest.job_sha256, bundle.job)

    def _opened(self, job: str) -> tuple[Bundle, Trainer]:
        """A round may come to a device that was restarted since it was ready:
        then the job is opened from the cache.
        """
        if self._bundle is None or self._trainer is None or self._bundle.digest != job:
            if not self._here(job):
                raise Refused("job", "this device does not have that bundle")
            self._open(job)
        assert self._bundle is not None and self._trainer is not None
        return self._bundle, self._trainer

    def _open(self, job: str) -> None:
        if self._bundle is not None and self._bundle.digest == job:
            return
        self.close()
        bundle = open_bundle(self._folder(job))
        _ = bundle.frame
        self.policy.check(bundle.manifest, bundle.job)
        limits = self._limits(bundle)
        _ = self._budget(bundle).plan
        secure = (
            SecureWork(self.settings.folder / "secagg", bundle, self.policy.min_cohort, limits.blocks)
            if bundle.job.privacy.secure_aggregation
            else None
        )
        trainer = Trainer(
            TrainerSettings(
                bundle.folder,
                self.settings.data,
                self.settings.base,
                self.settings.threads,
                self.settings.idle_seconds,
                self.settings.folder / "trainer.log",
                self.settings.folder,
                self.settings.graphs,
                self.settings.memory_mb,
                self._own(bundle),
            )
        )
        try:
            self._facts = trainer.open(OFFER_SECONDS)
        except BaseException:
            trainer.stop()
            raise
        self._bundle, self._trainer, self._secure = bundle, trainer, secure
        self._tidy()

    def _limits(self, bundle: Bundle) -> Limits:
        """What this device bears of a job.

        Raises Refused where it names a class that the job does not have.
        """
        return limits_of(class_of(bundle.job, self.settings.kind))

    def _own(self, bundle: Bundle) -> Path:
        """Folder of what this device keeps of a job. Raises Refused where it would be one too many: a
        coordinator could fill the disk, and only the owner can say what may go.
        """
        folder = self.settings.folder / OWN / bundle.digest[:16]
        if (
            method_of(bundle.job).keeps
            and not folder.exists()
            and len(list(folder.parent.glob("*"))) >= KEEP_OWN
        ):
            raise Refused(
                "personal",
                f"this device keeps something of {KEEP_OWN} jobs already; "
                f"its owner can remove folders from {OWN}/",
            )
        return folder

    def _here(self, job: str) -> bool:
        try:
            return open_bundle(self._folder(job)).digest == job
        except RunError:
            return False

    def _folder(self, job: str) -> Path:
        return self.settings.folder / "bundles" / job

    def _tidy(self) -> None:
        """Keeps the newest few bundles."""
        found = sorted((self.settings.folder / "bundles").iterdir(), key=lambda p: p.stat().st_mtime)
        for old in [p for p in found[:-KEEP_BUNDLES] if self._bundle is None or p != self._bundle.folder]:
            for part in old.iterdir():
                part.unlink()
            old.rmdir()


def run_device(settings: DeviceSettings, say: Say, stop: threading.Event) -> None:
    """Joins and works until `stop` is set; connects again, for ever, whenever the coordinator is gone.

    Raises UserError for what only the device's owner can mend: the data, the base, the key, the certificate.
    """
    _require_files(settings)
    policy = (
        load_policy(settings.policy or settings.folder / POLICY)
        if settings.policy or (settings.folder / POLICY).exists()
        else Policy()
    )
    with _alone(settings.folder), contextlib.closing(Work(settings, policy, say)) as work:
        waits = backoff()
        while not stop.is_set():
            try:
                look(settings.server, None if settings.insecure else settings.folder / "ca.crt")
            except Unreachable as e:
                wait = next(waits)
                say(f"cannot join {e}; trying again in {wait:.0f} s")
                stop.wait(wait)
                continue
            if _serve(settings, work, stop) > STEADY_SECONDS:
                waits = backoff()
            if not stop.is_set():
                stop.wait(next(waits))


def _serve(settings: DeviceSettings, work: Work, stop: threading.Event) -> float:
    """One life of a SuperNode; how long it was. Raises UserError as `run_device`."""
    secure = not settings.insecure
    node = SuperNode(
        NodeSettings(
            settings.server,
            settings.folder / "ca.crt" if secure else None,
            settings.folder / "device.key" if secure else None,
            settings.folder / "node",
        )
    )
    over = threading.Event()
    app = make_device_app(work.accept, work.train, work.evaluate)
    executor = threading.Thread(target=_executing, args=(node, app, over), name="executor", daemon=True)
    executor.start()
    work.say(f"connecting to {settings.server}")
    lived = 0.0
    try:
        while not stop.is_set() and not node.exited and executor.is_alive():
            if work.fatal is not None:
                stop.wait(GOODBYE_SECONDS)  # the refusal is on its way to the coordinator
                raise work.fatal
            stop.wait(WATCH_POLL)
            lived += WATCH_POLL
        if node.exited:
            _explain(node.said(), settings)
            last = [line for line in node.said().splitlines() if "ERROR" in line or "WARNING" in line]
            work.say(f"the connection ended{': ' + last[-1].split(':', 1)[-1].strip() if last else ''}")
    finally:
        over.set()
        node.stop()
        executor.join(GOODBYE_SECONDS)
    return lived


def _executing(node: SuperNode, app: object, over: threading.Event) -> None:
    try:
        execute(node, app, over)  # type: ignore[arg-type]
    except Exception:  # the thread's end is seen by _serve, which starts anew
        log.exception("the executor failed")


def _explain(said: str, settings: DeviceSettings) -> None:
    """Raises UserError when the SuperNode's last words name something that trying again will not mend."""
    if "Failed to activate" in said:
        raise UserError(
            f"{settings.server}: the coordinator does not know this device's key "
            f"{settings.folder / 'device.key'}; put the device's .pub file into the coordinator's devices "
            "folder, or use the key that was provisioned"
        )
    if "Unable to parse the private key" in said:
        raise UserError(
            f"{settings.folder / 'device.key'}: is not a device key; "
            "copy the one that `fedtune provision` made"
        )


def _require_files(settings: DeviceSettings) -> None:
    if not settings.data.exists():
        raise DataError(f"--data {settings.data}: does not exist; give a file of texts or a folder of images")
    for name in () if settings.insecure else ("ca.crt", "device.key"):
        if not (settings.folder / name).is_file():
            raise UserError(
                f"{settings.folder / name}: is missing; give --dir a device folder "
                "that `fedtune provision` made"
            )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two clients with one key would take each other's messages."""
    private_folder(folder)
    with lock(folder / ".lock") as mine:
        if not mine:
            raise RunError(
                f"{folder}: another client runs with this folder; stop it, or give this one "
                "a folder and key of its own"
            )
        yield


@contextlib.contextmanager
def _inward(work: Work) -> Iterator[None]:
    """Errors as the coordinator may see them; the owner sees them whole."""
    try:
        yield
    except Refused:
        raise
    except FedtuneError as e:
        log.error("%s", e)
        if isinstance(e, UserError):
            work.fatal = e
        raise Refused("device", _outward(e)) from None


def _outward(error: FedtuneError) -> str:
    if isinstance(error, DataError):
        return "data: what this device reads does not fit the job; its owner sees why"
    if isinstance(error, ModelError):
        return "base: this device does not have the base of the job; its owner sees why"
    return f"the device failed with {type(error).__name__}; its owner sees why"
